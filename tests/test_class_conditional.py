"""`train --network unet` and `sample --condition class=K` on a run that knows classes."""

import io
import sys

import children
import numpy as np
import pytest
import torch
from PIL import Image

from fastscore import datasets, guidance, losses, models, random, sampling
from fastscore.cli import conditions, draw, networks, run_folder
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit, objective

TINY = {"network": "unet", "width": 8, "levels": 4, "batch_size": 8, "held_out": 300}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def trained(out, **options):
    for _ in fit(TrainConfig(**{**TINY, "steps": 4, "out": out, **options})):
        pass
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A UNet of the 8x8 digits, moved away from its start, where it knows no classes."""
    out = trained(tmp_path_factory.mktemp("runs") / "run")
    return out


@pytest.fixture(scope="module")
def opened(folder):
    run = run_folder.open_run(folder)
    generator = torch.Generator().manual_seed(0)
    for p in run.net.parameters():
        p += 0.1 * torch.randn(p.shape, generator=generator)
    return run


def images(path):
    return np.load(path)["images"]


def own_images(path, labels=None, shape=(40, 8, 8)):
    x = np.random.default_rng(0).random(shape, np.float32)
    named = {} if labels is None else {"labels": np.asarray(labels)}
    np.savez(path, images=x, **named)
    return str(path)


# Training


def test_a_unet_takes_its_scale_and_its_classes_from_the_training_images(folder):
    net, sigmas, shape, config = run_folder.open_run(folder)
    x, labels = datasets.load("digits")
    x = x[datasets.split(len(x), 300, seed=0)[0]].double()
    assert isinstance(net, models.UNet) and shape == (1, 8, 8)
    assert (net.num_classes, config.classes) == (10, 10)
    assert net.data_mean == pytest.approx(float(x.mean()), rel=1e-5)
    assert net.data_std == pytest.approx(float(x.std(correction=0)), rel=1e-5)
    assert sigmas[0].item() == pytest.approx(8 * net.data_std, rel=1e-3)
    assert sigmas[-1].item() == pytest.approx(0.04 * net.data_std, rel=1e-3)
    assert run_folder.read_config(folder)[0] == config


def test_the_options_of_a_unet_are_those_of_the_run(tmp_path):
    options = {"multipliers": (1, 2, 2), "blocks": 2, "attention": (1,), "patch": 1}
    out = trained(tmp_path / "run", **options, sigma_max=3.0, data_std=0.25, classes=12, steps=1)
    net, sigmas, _, config = run_folder.open_run(out)
    assert {name: getattr(config, name) for name in options} == options
    assert (net.num_classes, net.data_std, sigmas[0].item()) == (12, 0.25, 3.0)
    assert net.multiple == 4 and len(net.down) == 3 * 2 + 2


def test_images_without_labels_make_an_unconditional_unet(tmp_path):
    data = own_images(tmp_path / "x.npz")
    out = trained(tmp_path / "run", data=data, held_out=0, steps=1)
    assert run_folder.open_run(out).net.num_classes is None
    out = trained(tmp_path / "digits", classes=0, steps=1)
    assert run_folder.open_run(out).net.num_classes is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"network": "mlp", "classes": 10}, "classes belongs to network unet; the network is mlp"),
        ({"network": "ncsn", "patch": 2}, "patch belongs to network unet; the network is ncsn"),
        ({"network": "mlp", "label_drop": 0.2}, "label_drop belongs to network unet"),
        ({"depth": 4}, "depth belongs to network mlp; the network is unet"),
        ({"classes": -1}, "classes must be at least 0; got -1"),
        ({"classes": 9}, "classes must be at least 10, for the labels of digits; got 9"),
        ({"label_drop": 1.5}, r"label_drop must be in \[0, 1\]; got 1.5"),
        ({"classes": 0, "label_drop": 0.5}, "label_drop belongs to network unet on images with"),
        ({"data": "UNLABELLED", "classes": 3, "held_out": 0}, "classes needs labels"),
        (
            {"data": "UNLABELLED", "label_drop": 0.3, "held_out": 0},
            "label_drop belongs to network unet on images with labels",
        ),
        ({"data": "GREY", "held_out": 0}, "all their values are the same"),
        ({"width": 10}, "width must be a multiple of 4; got 10"),
    ],
)
def test_a_wrong_option_is_one_sentence(tmp_path, options, message):
    np.savez(tmp_path / "grey.npz", images=np.full((9, 8, 8), 255, np.uint8))
    files = {"UNLABELLED": own_images(tmp_path / "x.npz"), "GREY": str(tmp_path / "grey.npz")}
    options = {k: files.get(v, v) if k == "data" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        fit(TrainConfig(**{**TINY, "steps": 4, "out": tmp_path / "run", **options}))
    assert not (tmp_path / "run").exists()


class Told:
    """A score that keeps what it is told."""

    def __call__(self, x, sigma, label, *, dropped):
        self.label, self.dropped = label, dropped
        return -x


def told(config, labels, step, **part):
    net = Told()
    networks.with_labels(config, net, labels, step, **part)(torch.zeros(len(labels), 1), 1.0)
    return net


def test_labels_are_dropped_by_the_noise_contract_for_every_split():
    """Those whose uniform of stream 10 is at most the share; parts of a batch agree with it."""
    config = TrainConfig(network="unet", classes=10, label_drop=0.3, seed=5)
    labels = torch.arange(1000) % 10
    whole = told(config, labels, 7)
    u = random.uniform((1000,), seed=5, step=7, stream=10)
    assert torch.equal(whole.dropped, u <= 0.3) and torch.equal(whole.label, labels)
    parts = [told(config, labels[a:b], 7, first_sample=a) for a, b in ((0, 333), (333, 1000))]
    assert torch.equal(torch.cat([part.dropped for part in parts]), whole.dropped)
    assert not torch.equal(told(config, labels, 8).dropped, whole.dropped)

    # 5 standard deviations of 10⁵ draws: false-alarm rate 6e-7.
    many = told(config, torch.zeros(100_000, dtype=torch.int64), 0).dropped.double().mean()
    assert abs(float(many) - 0.3) < 5 * (0.3 * 0.7 / 1e5) ** 0.5
    for share in (0.0, 1.0):
        one = TrainConfig(network="unet", classes=10, label_drop=share)
        assert bool((told(one, labels, 0).dropped == (share == 1)).all())


@pytest.mark.parametrize("loss", ["denoising", "sliced", "sliced-vr", "exact"])
def test_every_loss_is_that_of_the_network_told_the_labels(opened, loss):
    """Sample by sample, by a network of which nothing is conditional: label or -1 baked in."""
    options = {"projections": 2} if "sliced" in loss else {}
    told = {"classes": 10, "label_drop": 0.5, "weighting": "even"}
    config = TrainConfig(network="unet", loss=loss, seed=3, **told, **options)
    x, labels = (t[:6] for t in datasets.load("digits"))
    x = x[..., :4, :4] if loss == "exact" else x
    level = torch.tensor([0, 1, 2, 3, 0, 1])
    found = objective(config, opened.net, opened.sigmas, x, labels, level, 2)

    dropped = random.uniform((6,), seed=3, step=2, stream=10) <= 0.5
    assert 0 < int(dropped.sum()) < 6
    fixed = torch.where(dropped, -1, labels)
    for i in range(6):
        one = losses.noise_conditional(
            lambda x, sigma, i=i: opened.net(x, sigma, int(fixed[i])),
            x[i : i + 1],
            opened.sigmas,
            method=loss,
            labels=level[i : i + 1],
            seed=3,
            step=2,
            first_sample=i,
            **options,
        )
        torch.testing.assert_close(found[i : i + 1], one, rtol=1e-4, atol=1e-3)


def test_a_resumed_class_conditional_run_ends_where_the_whole_one_ends(tmp_path):
    trained(tmp_path / "whole", steps=9)
    interrupted = fit(TrainConfig(**TINY, steps=9, out=tmp_path / "parts"))
    for _ in range(4):
        next(interrupted)
    interrupted.close()
    list(fit(TrainConfig(out=tmp_path / "parts", resume=True)))
    whole, parts = (run_folder.read_weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(ValueError, match=r"has label_drop 0\.1, which --resume cannot change"):
        fit(TrainConfig(out=tmp_path / "parts", resume=True, label_drop=0.2))


# Sampling


@pytest.mark.parametrize(
    "sampler",
    [
        {"steps_per_level": 3},
        {"sampler": "consistent_annealed"},
        {"sampler": "predictor_corrector"},
        {"sampler": "probability_flow", "method": "euler"},
    ],
    ids=lambda options: options.get("sampler", "annealed_langevin"),
)
def test_samples_are_those_of_the_guided_score(opened, sampler):
    """Each with its own label, in batches of any size."""
    labels = torch.tensor([3, -1, 0, 9, 3])
    options = {"seed": 4, "labels": labels, "weight": 2.0, "initial_law": "gaussian", **sampler}
    job = draw.prepare(*opened[:3], 5, batch_size=2, **options)
    guided = guidance.classifier_free(opened.net, labels, weight=2.0)
    whole = sampling.sample(guided, shape=(5, 1, 8, 8), seed=4, **job.sampler)
    torch.testing.assert_close(draw.draw(job).samples, whole, rtol=1e-3, atol=1e-3)
    other = draw.draw(draw.prepare(*opened[:3], 5, batch_size=2, **{**options, "weight": 0.0}))
    assert not torch.allclose(other.samples[0], whole[0], atol=1e-2)
    # Without a label guidance changes nothing.
    torch.testing.assert_close(other.samples[1], whole[1], rtol=1e-3, atol=1e-3)


def test_classes_are_spread_evenly_and_in_order():
    assert conditions.spread([0, 1, 2], 7).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert conditions.spread([4], 3).tolist() == [4, 4, 4]
    assert conditions.spread(range(10), 3).tolist() == [0, 3, 6]


def test_the_command_draws_the_classes_that_are_asked_for(tmp_path, folder, fastscore):
    opened = run_folder.open_run(folder)
    job = ("sample", folder, "-n", 4, "--seed", 2, "--steps-per-level", 2)
    asked = {
        "default": ((), [0, 2, 5, 7]),
        "some": (("--condition", "class=7,1"), [7, 7, 1, 1]),
        "all": (("--condition", "class=all", "--weight", 3), [0, 2, 5, 7]),
        "none": (("--condition", "class=none"), None),
    }
    for name, (words, labels) in asked.items():
        code, out, _ = fastscore(*job, *words, "--out", tmp_path / f"{name}.npz")
        assert code == 0 and ("all classes in order" in out) == (name == "default")
        weight = 3.0 if name == "all" else 1.0
        options = {"labels": labels, "weight": weight, "seed": 2, "steps_per_level": 2}
        drawn = draw.draw(draw.prepare(*opened[:3], 4, **options)).samples
        assert np.array_equal(images(tmp_path / f"{name}.npz"), drawn.clamp(0, 1).numpy())


def test_a_class_and_an_image_can_be_asked_for_at_once(opened):
    asked = conditions.ConditionOptions(("class=3", "deblur=held-out:3,0.8"), guidance="flat")
    under = conditions.open_conditions(asked, opened.config.out)
    x = torch.rand(2, 1, 8, 8)
    condition = conditions.conditioned(opened.net, opened.shape, n=4, **under)
    observed = conditions.observe(under["requests"][1], opened.shape, opened.config)
    net = guidance.classifier_free(opened.net, 3, weight=1.0)
    led = guidance.linear_inverse(net, observed.operator, observed.y, 0.0, method="flat")
    sigma = torch.tensor([0.5, 0.2])
    torch.testing.assert_close(condition.score(1, 3)(x, sigma), led(x, sigma))


@pytest.mark.parametrize(
    "words, message",
    [
        (("--condition", "class=10"), "condition class must be in 0..9; got 10"),
        (("--condition", "class=1,two"), "got '1,two'"),
        (("--condition", "class=1,"), "got '1,'"),
        (("--weight", "nan"), "weight must be finite"),
        (("--condition", "deblur=held-out:3,1", "--weight", 2), "weight belongs to a class"),
        (("--scale", 2), "belong to a condition"),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path, folder, fastscore, words, message):
    code, _, error = fastscore("sample", folder, *words, "--out", tmp_path / "x.png")
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_classes_of_a_run_that_knows_none_are_refused(tmp_path, fastscore):
    out = trained(tmp_path / "run", classes=0, steps=1)
    for words, message in (
        (("--condition", "class=1"), "or a run that knows classes"),
        (("--weight", 2), "weight is of a run that knows classes"),
    ):
        code, _, error = fastscore("sample", out, *words, "--out", tmp_path / "x.png")
        assert code == 2 and message in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="needs --classifier RUN"):
        draw.prepare(*run_folder.open_run(out)[:3], 2, labels=1)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([1, 2], r"labels must be a class number, or int64 \(3,\); got torch.int64 \(2,\)"),
        (10, r"labels must be in -1..9; got 10"),
        ([0, -2, 1], r"labels must be in -1..9; got -2"),
        (0.5, "got torch.float32"),
    ],
)
def test_labels_that_do_not_fit_are_refused(opened, labels, message):
    with pytest.raises(ValueError, match=message):
        draw.prepare(*opened[:3], 3, labels=labels)


def test_an_interrupted_job_goes_on_and_another_is_refused(
    tmp_path, folder, fastscore, monkeypatch
):
    job = ("sample", folder, "-n", 9, "--batch-size", 2, "--steps-per-level", 2)
    assert fastscore(*job, "--out", tmp_path / "whole.npz")[0] == 0
    begun, states = [], sampling.states

    def interrupted(*arguments, **options):
        if len(options["x"]):
            begun.append(options["first_sample"])
            if len(begun) == 3:
                raise KeyboardInterrupt
        return states(*arguments, **options)

    monkeypatch.setattr(sampling, "states", interrupted)
    code, _, said = fastscore(*job, "--out", tmp_path / "parts.npz")
    assert code == 130 and "the same command goes on" in said
    for words, name in ((("--weight", 0), "weight"), (("--condition", "class=3"), "labels")):
        code, _, said = fastscore(*job, *words, "--out", tmp_path / "parts.npz")
        assert code == 2 and "holds batches of another job" in said and name in said
    begun.clear()
    begun.extend([-1] * 3)
    assert fastscore(*job, "--out", tmp_path / "parts.npz")[0] == 0
    assert begun[3:] == [4, 6, 8]
    assert np.array_equal(images(tmp_path / "whole.npz"), images(tmp_path / "parts.npz"))


@pytest.mark.processes
def test_two_ranks_write_what_one_writes(tmp_path, folder, fastscore):
    job = ("sample", folder, "-n", 9, "--batch-size", 2, "--steps-per-level", 2)
    assert fastscore(*job, "--out", tmp_path / "one.npz")[0] == 0
    words = [*map(str, job), "--out", str(tmp_path / "two.npz")]
    found = children.run([*TORCHRUN, "-m", "fastscore", *words])
    assert found.returncode == 0, found.stderr
    assert np.array_equal(images(tmp_path / "one.npz"), images(tmp_path / "two.npz"))


def test_training_ends_with_pictures_of_each_class_in_turn(tmp_path, fastscore, monkeypatch):
    seen, prepare = [], draw.prepare

    def kept(*arguments, **options):
        seen.append(options.get("labels"))
        return prepare(*arguments, **{**options, "steps_per_level": 1})

    monkeypatch.setattr(draw, "prepare", kept)
    words = "--network unet --width 8 --levels 2 --batch-size 4 --steps 2 --out".split()
    assert fastscore("train", *words, tmp_path / "run")[0] == 0
    assert seen[0].tolist() == [i % 10 for i in range(64)]
    with Image.open(io.BytesIO((tmp_path / "run" / "samples.png").read_bytes())) as grid:
        assert min(grid.size) > 8 * 8


@pytest.mark.parametrize("options", [{"task": "classifier", "depth": 1}, {"network": "unet"}])
def test_a_class_may_be_held_out_alone(tmp_path, options):
    """The first look at the held-out loss was an error."""
    held_out = datasets.split(20, 5, seed=0)[1]
    labels = np.zeros(20, np.int64)
    labels[held_out[0]] = 2
    images = np.random.default_rng(0).random((20, 1, 16, 16), np.float32)
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    options = {**options, "width": 8, "levels": 3, "batch_size": 4, "steps": 2}
    config = TrainConfig(
        data=f"{tmp_path / 'x.npz'}:channels-first", out=tmp_path / "run", held_out=5,
        held_out_every=1, **options,
    )
    assert len(list(fit(config))) == 2
