"""`sample --condition` and `train --task classifier`: what is observed, drawn and refused."""

import json

import numpy as np
import pytest
import torch
from commands import command

from fastscore import datasets, random
from fastscore.cli import conditions, draw, evaluate, observations, run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit

TINY = {"width": 32, "depth": 1, "levels": 4, "batch_size": 64, "held_out": 300}


@pytest.fixture
def run():
    return command


def trained(**options):
    for _ in fit(TrainConfig(**{**TINY, **options})):
        pass
    return options["out"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A score network and a classifier of the 8x8 digits, hardly trained."""
    tmp = tmp_path_factory.mktemp("runs")
    trained(out=tmp / "score", steps=150)
    trained(out=tmp / "classes", steps=150, task="classifier", lr=5e-3)
    return tmp


@pytest.fixture
def opened(folders):
    return run_folder.open_run(folders / "score")


def drawn(opened, n, condition, **options):
    """n samples of a run under a condition."""
    condition = {"config": opened.config, **condition}
    job = draw.prepare(*opened[:3], n, condition=condition, **{"steps_per_level": 3, **options})
    return draw.draw(job)


def held_out(k):
    images, labels = datasets.load("digits")
    return images[datasets.split(len(images), 300, seed=0)[1]][k]


# Classifier


def test_classifier_learns_and_says_how_well_at_each_level(folders):
    net, sigmas, shape, config = run_folder.open_run(folders / "classes", "classifier")
    assert net.num_classes == 10 and shape == (1, 8, 8) and config.task == "classifier"
    found = evaluate.accuracy(net, *splits.part(config, "held_out"), sigmas)
    assert found[-1] > 0.85 and found[0] > 0.2 and found[-1] > found[0] + 0.2  # chance is 0.1
    records = [
        json.loads(line)
        for line in (folders / "classes" / "metrics.jsonl").read_text().splitlines()
    ]
    assert records[-1]["step"] == 150 and records[-1]["loss"] < records[0]["loss"] < np.log(10)


def test_a_resumed_classifier_ends_where_the_whole_one_ends(tmp_path):
    def loop(folder, **options):
        return fit(
            TrainConfig(**TINY, out=tmp_path / folder, steps=40, task="classifier", **options)
        )

    list(loop("whole"))
    interrupted = loop("parts")
    for _ in range(15):
        next(interrupted)
    interrupted.close()
    # --resume takes the options of the run, the task among them.
    list(fit(TrainConfig(out=tmp_path / "parts", steps=40, resume=True)))
    whole, parts = (
        run_folder.read_weights(tmp_path / f) for f in ("whole", "parts")
    )
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_the_two_sorts_of_run_are_told_apart(folders):
    with pytest.raises(ValueError, match="holds a classifier, not a score network"):
        run_folder.open_run(folders / "classes")
    with pytest.raises(ValueError, match="holds a score network, not a classifier"):
        run_folder.open_run(folders / "score", "classifier")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "regression"}, "task must be score or classifier"),
        ({"network": "ncsn"}, "network belongs to task score"),
        ({"loss": "exact"}, "loss belongs to task score"),
        ({"data": "UNLABELLED"}, "a classifier needs labels"),
    ],
)
def test_options_of_a_classifier_are_checked_before_anything_is_written(tmp_path, options, message):
    np.savez(tmp_path / "x.npz", images=np.zeros((400, 4, 4), np.uint8))
    options = {k: str(tmp_path / "x.npz") if v == "UNLABELLED" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        fit(TrainConfig(**{"out": tmp_path / "run", "task": "classifier", **options}))
    assert not (tmp_path / "run").exists()


def test_the_reader_sees_the_classes_of_real_images():
    images, labels = datasets.load("digits")
    seen = evaluate.seen(evaluate.reader(images[:300], labels[:300]), images[300:500])
    assert float((seen == labels[300:500]).double().mean()) > 0.85


# Observations


def test_held_out_images_are_degraded_by_the_operator(opened):
    image, shape, config = held_out(3), opened.shape, opened.config
    masked = observations.observe(
        observations.parse("inpaint=held-out:3,right-half"), shape, config
    )
    assert torch.equal(masked.y[..., :4], image[..., :4]) and not masked.y[..., 4:].any()
    assert torch.equal(masked.original, image) and bool((masked.picture[..., 4:] == 0.5).all())
    small = observations.observe(observations.parse("super_resolution=held-out:3,2"), shape, config)
    blocks = image.reshape(1, 4, 2, 4, 2).mean((2, 4))
    torch.testing.assert_close(small.y, blocks)
    torch.testing.assert_close(
        small.picture, blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    )
    noisy = observations.observe(
        observations.parse("super_resolution=held-out:3,2"), shape, config, noise=0.1, seed=7
    )
    torch.testing.assert_close(
        noisy.y - small.y, 0.1 * random.normal((1, 4, 4), seed=7, stream=1026), rtol=1e-5, atol=1e-6
    )
    blurred = observations.observe(observations.parse("deblur=held-out:3,1.0"), shape, config)
    torch.testing.assert_close(blurred.y.mean(), image.mean())
    assert float(blurred.y.var()) < float(image.var())


def test_files_hold_the_observation(tmp_path, opened):
    from PIL import Image

    shape = opened.shape
    array = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    Image.fromarray(array).save(tmp_path / "small.png")
    np.save(tmp_path / "small.npy", array.astype(np.float32) / 255)
    for name in ("small.png", "small.npy"):
        seen = observations.observe(
            observations.parse(f"super_resolution={tmp_path / name},2"), shape
        )
        torch.testing.assert_close(seen.y[0], torch.from_numpy(array.astype(np.float32)) / 255)
        assert seen.original is None
    Image.fromarray(array).resize((8, 8)).save(tmp_path / "whole.png")
    Image.fromarray(np.diag([255] * 8).astype(np.uint8)).save(tmp_path / "mask.png")
    seen = observations.observe(
        observations.parse(f"inpaint={tmp_path / 'whole.png'},{tmp_path / 'mask.png'}"), shape
    )
    assert torch.equal(seen.mask[0], torch.eye(8, dtype=torch.bool))


@pytest.mark.parametrize(
    "name, hidden",
    [("left-half", 32), ("right-half", 32), ("top-half", 32), ("bottom-half", 32), ("centre", 16)],
)
def test_names_of_masks_say_what_is_hidden(name, hidden):
    mask = observations.load_mask(name, (1, 8, 8))
    corner = {
        "left-half": (0, 0),
        "right-half": (0, 7),
        "top-half": (0, 0),
        "bottom-half": (7, 0),
        "centre": (3, 3),
    }[name]
    assert int((~mask).sum()) == hidden and not mask[0][corner]


# Samples


@pytest.mark.parametrize("guide", conditions.GUIDANCE)
def test_known_pixels_are_kept_and_splits_agree(opened, guide):
    condition = {"requests": [observations.parse("inpaint=held-out:3,right-half")], "guide": guide}
    whole = drawn(opened, 4, condition)
    parts = drawn(opened, 3, condition, batch_size=2, first_sample=1)
    torch.testing.assert_close(whole.samples[1:], parts.samples, rtol=1e-3, atol=1e-3)
    original, mask = whole.shown["original"], whole.shown["mask"]
    known = mask.expand(4, 1, 8, 8)
    torch.testing.assert_close(
        whole.samples[known], original.expand(4, 1, 8, 8)[known], rtol=0, atol=1e-6
    )
    assert float((whole.samples[0] - whole.samples[1])[~mask].abs().max()) > 1e-2


def test_grey_of_the_colours_is_the_observation_and_class_joins_in(tmp_path):
    images = np.random.default_rng(0).uniform(0, 1, (40, 4, 4, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(40) % 2)
    options = {
        "data": f"{tmp_path / 'x.npz'}:channels-last",
        "steps": 5,
        "width": 16,
        "held_out": 8,
    }
    score = trained(out=tmp_path / "score", **options)
    classes = trained(out=tmp_path / "classes", task="classifier", **options)
    opened = run_folder.open_run(score)
    asked = conditions.ConditionOptions(("class=1", "colourise=held-out:0"), classes, scale=2.0)
    given = conditions.open_conditions(asked, score)
    result = drawn(opened, 2, given, steps_per_level=2)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    known = (luma * result.shown["original"]).sum(0).expand(2, 4, 4)
    torch.testing.assert_close((luma * result.samples).sum(1), known, rtol=1e-5, atol=1e-5)
    alone = drawn(opened, 2, {"requests": given["requests"][1:]}, steps_per_level=2)
    assert not torch.equal(alone.samples, result.samples)


# The command line


def test_sample_writes_what_was_observed_beside_what_was_drawn(tmp_path, folders, run):
    from PIL import Image

    arguments = (
        "sample",
        folders / "score",
        "-n",
        2,
        "--steps-per-level",
        2,
        "--condition",
        "inpaint=held-out:3,centre",
    )
    assert run(*arguments, "--out", tmp_path / "grid.png")[0] == 0
    # Original, observation, mask; then two samples: 3 columns of 8 pixels.
    grid = np.asarray(Image.open(tmp_path / "grid.png"))[
        ::4, ::4
    ]
    original = (held_out(3)[0] * 255).round().byte().numpy()
    assert grid.shape == (19, 28) and (grid[1:9, 1:9] == original).all()
    assert (
        (grid[3:7, 12:16] == 128).all()
        and (grid[3:7, 21:25] == 0).all()
        and (grid[1:3, 19:27] == 255).all()
    )
    arguments = (
        *arguments,
        "class=3",
        "--classifier",
        folders / "classes",
        "--scale",
        3,
        "--out",
        tmp_path / "x.npz",
    )
    assert run(*arguments)[0] == 0
    archive = np.load(tmp_path / "x.npz")
    assert sorted(archive) == ["images", "mask", "observation", "original"] and archive[
        "images"
    ].shape == (2, 1, 8, 8)


def test_train_classifier_prints_the_accuracy_of_each_level(tmp_path, run):
    small = ("--held-out", 300, "--steps", 5, "--levels", 3, "--width", 16)
    code, out, _ = run("train", "--task", "classifier", "--out", tmp_path / "run", *small)
    assert code == 0 and out.count(" %\n") == 3
    assert len(json.loads((tmp_path / "run" / "report.json").read_text())["accuracy_held_out"]) == 3


@pytest.mark.parametrize(
    "texts, options, message",
    [
        (["klass=3"], {}, "condition must be one of class=K"),
        (["class="], {}, "condition must be one of class=K"),
        (["class=three"], {}, "K a class number; got 'three'"),
        (["class=3"], {}, "needs --classifier RUN"),
        (["class=10"], {"classifier": "CLASSES"}, r"class must be in 0..9; got 10"),
        (["class=1"], {"classifier": "SCORE"}, "holds a score network, not a classifier"),
        (["class=1", "class=2"], {"classifier": "CLASSES"}, "at most one class"),
        (["class=1"], {"classifier": "CLASSES", "scale": float("nan")}, "scale must be finite"),
        (["inpaint=held-out:0"], {}, "must be inpaint=IMAGE,MASK"),
        (["inpaint=held-out:0,right-half", "deblur=held-out:0,1"], {}, "at most one image"),
        (["inpaint=held-out:0,everything"], {}, "MASK must be left-half"),
        (["inpaint=held-out:300,right-half"], {}, "held-out:300 is not there; the run has 300"),
        (["inpaint=held-out:-1,right-half"], {}, "must name an image by its number"),
        (["inpaint=nowhere.png,right-half"], {}, "nowhere.png does not exist"),
        (["inpaint=photo,right-half"], {}, "IMAGE must be held-out:N, data:N or a .png"),
        (["inpaint=held-out:0,SMALL"], {}, "must be a mask of (8, 8) pixels; got (4, 4)"),
        (["super_resolution=SMALL,4"], {}, "must be an image of shape (1, 2, 2); got (1, 4, 4)"),
        (["super_resolution=held-out:0,3"], {}, "must be multiples of the factor 3"),
        (["super_resolution=held-out:0,two"], {}, "FACTOR must be an int"),
        (
            ["super_resolution=held-out:0,2"],
            {"guidance": "replace"},
            "guidance replace belongs to inpaint",
        ),
        (["deblur=held-out:0,wide"], {}, "SIGMA must be a number"),
        (["deblur=held-out:0,-1"], {}, "sigma must be a finite number > 0"),
        (
            ["deblur=held-out:0,1"],
            {"observation_noise": -0.1},
            "noise must be a finite number >= 0",
        ),
        (["deblur=held-out:0,1"], {"guidance": "magic"}, "guidance must be one of replace"),
        (["deblur=held-out:0,1"], {"scale": 2.0}, "scale belongs to a class; got only an image"),
        (["deblur=held-out:0,1"], {"classifier": "CLASSES"}, "classifier belongs to a class"),
        (
            ["class=1"],
            {"classifier": "CLASSES", "guidance": "flat"},
            "guidance belongs to an image; got only a class",
        ),
        (
            ["class=1"],
            {"classifier": "CLASSES", "observation_noise": 0.1},
            "observation_noise belongs to an image",
        ),
        (["colourise=held-out:0"], {}, "the run must be of RGB images"),
    ],
)
def test_a_wrong_condition_is_one_sentence(tmp_path, folders, opened, texts, options, message):
    np.save(tmp_path / "small.npy", np.zeros((4, 4), np.float32))
    texts = [text.replace("SMALL", str(tmp_path / "small.npy")) for text in texts]
    folder = {"CLASSES": folders / "classes", "SCORE": folders / "score"}.get(
        options.get("classifier")
    )
    with pytest.raises(ValueError) as error:
        asked = conditions.ConditionOptions(tuple(texts), **{**options, "classifier": folder})
        drawn(opened, 1, conditions.open_conditions(asked, folders / "score"))
    assert message in str(error.value) and str(error.value).count("\n") == 0


def test_the_command_refuses_in_one_sentence_and_writes_nothing(tmp_path, folders, run):
    out = tmp_path / "grid.png"
    for arguments, words in (
        (("--condition", "class=3"), "--classifier"),
        (("--scale", 2), "belong to a condition"),
        (("--condition", "inpaint=held-out:0,centre", "--path", tmp_path), "path must end in .png"),
    ):
        code, _, message = run("sample", folders / "score", "--out", out, *arguments)
        assert code == 2 and message.count("\n") == 1 and words in message and not out.exists()


@pytest.mark.slow(minutes=5)
def test_digits_of_the_class_that_was_asked_for(tmp_path):
    """At scale 3 another classifier, of clean images, sees the class asked for in 85 % of 500."""
    options = {"width": 256, "depth": 3, "levels": 16, "batch_size": 256}
    score = trained(out=tmp_path / "score", steps=6000, **options)
    smaller = {**options, "width": 128, "depth": 2}
    classes = trained(out=tmp_path / "classes", steps=2000, task="classifier", **smaller)
    opened, classifier = run_folder.open_run(score), run_folder.open_run(classes, "classifier").net
    reader = evaluate.reader(*splits.part(run_folder.read_config(classes)[0], "training"))

    right = []
    for k in range(10):
        requests = [observations.parse(f"class={k}")]
        condition = {"requests": requests, "classifier": classifier, "scale": 3.0}
        samples = drawn(opened, 50, condition, first_sample=50 * k, steps_per_level=None).samples
        right.append(float((evaluate.seen(reader, samples) == k).double().mean()))
    assert np.mean(right) >= 0.85
