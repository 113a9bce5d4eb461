"""`train` on an .npz with contexts, and `sample --context`."""


import numpy as np
import pytest
import torch

from fastscore import guidance, models, random, sampling
from fastscore.cli import conditions, contexts, draw, networks, run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit

SMALL = {"width": 32, "depth": 1, "levels": 6, "batch_size": 64}
JOB = ("-n", 5, "--batch-size", 2, "--steps-per-level", 2)


def moved(path, n=2000, side=2, **more):
    """Images N(1/2 + 0.3 c, 0.05²), all pixels alike in law, with c uniform in [-1, 1]."""
    generator = np.random.default_rng(0)
    c = generator.uniform(-1, 1, (n, 1)).astype(np.float32)
    x = 0.5 + 0.3 * c[..., None] + 0.05 * generator.normal(size=(n, side, side))
    np.savez(path, images=x.clip(0, 1).astype(np.float32), context=c, **more)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("runs")
    data = moved(tmp / "x.npz")
    list(fit(TrainConfig(**SMALL, data=data, out=tmp / "run", steps=1000, held_out=100)))
    return tmp / "run"


def images(path):
    return np.load(path)["images"]


def test_samples_have_the_mean_that_their_context_says(folder):
    """500 of each: the standard error is 0.003; the small network is within 0.05."""
    net, sigmas, shape, config = run_folder.open_run(folder)
    assert (config.context, config.classes, net.context_size) == (1, 0, 1)
    context = torch.tensor([-0.8, 0.0, 0.8]).repeat_interleave(500)[:, None]
    drawn = draw.draw(draw.prepare(net, sigmas, shape, 1500, context=context)).samples
    for c, part in zip((-0.8, 0.0, 0.8), drawn.split(500)):
        assert float(part.mean()) == pytest.approx(0.5 + 0.3 * c, abs=0.05)
        assert float(part.std()) < 0.15   # of all contexts 0.18


def test_every_sample_has_its_own_context_in_batches_of_any_size(folder):
    net, sigmas, shape, _ = run_folder.open_run(folder)
    context = torch.tensor([-0.9, -0.3, 0.1, 0.5, 0.9])[:, None]
    options = {"steps_per_level": 3, "seed": 2, "context": context, "weight": 0.5}
    job = draw.prepare(net, sigmas, shape, 5, batch_size=2, **options)
    guided = guidance.classifier_free(net, context=context, weight=0.5)
    whole = sampling.sample(guided, shape=(5, *shape), seed=2, **job.sampler)
    torch.testing.assert_close(draw.draw(job).samples, whole, rtol=1e-4, atol=1e-4)


def test_the_command_takes_numbers_or_a_file(tmp_path, folder, fastscore):
    np.save(tmp_path / "c.npy", np.array([[0.1], [0.2], [0.3], [0.4], [0.5]]))
    opened = run_folder.open_run(folder)[:3]
    asked = {
        "numbers": (("--context", "0.25"), [[0.25]] * 5, 0.0),
        "negative": (("--context=-0.5", "--weight", 1), [[-0.5]] * 5, 1.0),
        "file": (("--context", tmp_path / "c.npy"), [[0.1], [0.2], [0.3], [0.4], [0.5]], 0.0),
        "none": ((), None, None),
    }
    for name, (words, context, weight) in asked.items():
        code, _, error = fastscore("sample", folder, *JOB, *words, "--out", tmp_path / "x.npz")
        assert code == 0, error
        told = {} if context is None else {"context": torch.tensor(context), "weight": weight}
        job = draw.prepare(*opened, 5, batch_size=2, steps_per_level=2, **told)
        drawn = draw.draw(job).samples.clamp(0, 1).numpy()
        assert np.array_equal(images(tmp_path / "x.npz"), drawn), name


def test_contexts_reach_the_loss_and_some_are_dropped():
    class Told:
        def __call__(self, x, sigma, context, *, dropped):
            self.context, self.dropped = context, dropped
            return -x

    config = TrainConfig(network="mlp", context=3, label_drop=0.4, seed=5)
    net, c = Told(), torch.rand(200, 3)
    networks.with_labels(config, net, c, 7, first_sample=50)(torch.zeros(200, 1), 1.0)
    u = random.uniform((200,), seed=5, step=7, stream=10, offset=50)
    assert torch.equal(net.context, c) and torch.equal(net.dropped, u <= 0.4)


def test_a_resumed_run_sees_the_same_contexts(tmp_path):
    data = moved(tmp_path / "x.npz", n=60)
    options = {**SMALL, "data": data, "held_out": 10, "steps": 9}
    list(fit(TrainConfig(**options, out=tmp_path / "whole")))
    interrupted = fit(TrainConfig(**options, out=tmp_path / "parts"))
    for _ in range(4):
        next(interrupted)
    interrupted.close()
    list(fit(TrainConfig(out=tmp_path / "parts", resume=True)))
    whole, parts = (run_folder.read_weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    # Another context under the same image is other data.
    with np.load(data) as archive:
        arrays = dict(archive)
    np.savez(data, images=arrays["images"], context=arrays["context"] + 1)
    with pytest.raises(ValueError, match="gone or changed"):
        list(fit(TrainConfig(out=tmp_path / "parts", resume=True, steps=12)))


def test_a_unet_is_told_contexts_and_labels_beside_them_are_not_used(tmp_path):
    data = moved(tmp_path / "x.npz", n=30, side=16, labels=np.arange(30) % 3)
    options = {"data": data, "width": 8, "levels": 3, "batch_size": 4, "steps": 1}
    list(fit(TrainConfig(**options, out=tmp_path / "run")))
    net, _, _, config = run_folder.open_run(tmp_path / "run")
    assert isinstance(net, models.UNet) and (net.context_size, net.num_classes) == (1, None)
    # Told not to look at the contexts, it has the labels.
    list(fit(TrainConfig(**options, out=tmp_path / "classes", context=0)))
    config = run_folder.open_run(tmp_path / "classes").config
    assert (config.context, config.classes) == (0, 3)
    assert splits.source(config).labels.dtype == torch.int64


@pytest.mark.parametrize(
    "options, message",
    [
        ({"context": 2}, "context must be 1, the length of those of"),
        ({"data": "digits", "context": 2}, "context needs an .npz with an array named context"),
        ({"data": "NAN"}, "context must be finite"),
        ({"data": "SHORT"}, r"context must be numbers, \(60, C\); got float32 \(59, 1\)"),
        ({"data": "WORDS"}, r"context must be numbers, \(60, C\); got <U1"),
        ({"context": -1}, "context must be at least 0; got -1"),
        ({"network": "ncsn", "context": 1}, "context needs an .npz|belongs to network"),
        ({"task": "classifier", "context": 1}, "context belongs to task score"),
        ({"context": 0, "label_drop": 0.5}, "label_drop belongs to .* or to contexts"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(tmp_path, options, message):
    data = moved(tmp_path / "x.npz", n=60)
    with np.load(data) as archive:
        x, c = archive["images"], archive["context"]
    wrong = {"NAN": c * np.nan, "SHORT": c[1:], "WORDS": np.array([["a"]] * 60)}
    named = options.get("data", data)
    if named in wrong:
        np.savez(tmp_path / "wrong.npz", images=x, context=wrong[named])
        named = str(tmp_path / "wrong.npz")
    small = {k: v for k, v in SMALL.items() if k != "depth"}
    with pytest.raises(ValueError, match=message):
        fit(TrainConfig(**{**small, "out": tmp_path / "run", **options, "data": named}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--context", "1,2"), "context must be (1,) or (5, 1); got (2,)"),
        (("--context", "a"), "must be numbers with commas between, or an .npy file; got 'a'"),
        (("--context", "nan"), "context must be finite"),
        (("--context", "none.npy"), "none.npy"),
        (("--context", "1", "--weight", "inf"), "weight must be finite"),
        (("--weight", "1"), "weight is of a run that knows classes"),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path, folder, fastscore, words, message):
    code, _, error = fastscore("sample", folder, *JOB, *words, "--out", tmp_path / "x.png")
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_a_run_without_contexts_takes_none(tmp_path, fastscore):
    list(fit(TrainConfig(**SMALL, out=tmp_path / "run", steps=1)))
    words = ("sample", tmp_path / "run", *JOB, "--context", "1", "--out", tmp_path / "x.png")
    code, _, error = fastscore(*words)
    assert code == 2 and "context needs a run that knows contexts" in error


def test_a_context_and_an_image_can_be_asked_for_at_once(folder):
    opened = run_folder.open_run(folder)
    asked = conditions.ConditionOptions(("inpaint=held-out:3,left-half",), context="0.5")
    under = conditions.open_conditions(asked, folder)
    job = draw.prepare(*opened[:3], 3, condition=under, steps_per_level=2)
    assert draw.draw(job).samples.shape == (3, 1, 2, 2)
    assert {"context", "weight", "observation"} <= job.depends_on.keys()


def test_numbers_and_files_are_read(tmp_path):
    assert contexts.parse("1,-2.5").tolist() == [1.0, -2.5]
    np.save(tmp_path / "c.npy", np.arange(6).reshape(3, 2))
    assert contexts.parse(str(tmp_path / "c.npy")).tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
