"""A run that goes on: what is given is obeyed or refused, and its images stay what they were."""

import dataclasses
import functools
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastscore import cli, datasets
from fastscore.cli import held_out, observations, run_folder, splits, train
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.training import saves

TINY = {"width": 16, "depth": 1, "levels": 3, "batch_size": 32}


def trained(**options):
    return list(fit(TrainConfig(**options)))


@pytest.mark.parametrize(
    "option, kept",
    [
        ("lr", 1e-3),
        ("width", 16),
        ("seed", 3),
        ("held_out", 5),
        ("levels", 3),
        ("loss", "sliced"),
        ("data", "other.npz"),
        ("ema_decay", 0.9),
    ],
)
def test_a_value_that_equals_the_default_is_refused_where_the_run_has_another(
    tmp_path, option, kept
):
    np.savez(tmp_path / "other.npz", images=np.random.default_rng(0).random((40, 4, 4), np.float32))
    kept = str(tmp_path / kept) if option == "data" else kept
    trained(**{**TINY, "out": tmp_path / "run", "steps": 2, option: kept})
    default = getattr(TrainConfig(), option)
    assert default != kept
    with pytest.raises(
        ValueError, match=f"has {option} .*, which --resume cannot change; got {default}"
    ):
        fit(TrainConfig(**{"out": tmp_path / "run", "resume": True, option: default}))
    with pytest.raises(ValueError, match="cannot change"):
        train.train(TrainConfig(**{"out": tmp_path / "run", "resume": True, option: default}))


def test_steps_that_equal_the_default_are_obeyed(tmp_path, monkeypatch):
    """A run of more steps than the default, which goes on to the default only."""
    options = {**TINY, "out": tmp_path / "run"}
    trained(**options, steps=3)
    config, shape = run_folder.read_config(tmp_path / "run")
    run_folder.write_config(tmp_path / "run", dataclasses.replace(config, steps=12000), shape)
    assert run_folder.resumed(TrainConfig(out=tmp_path / "run", resume=True)).steps == 12000
    assert (
        run_folder.resumed(TrainConfig(out=tmp_path / "run", resume=True, steps=9000)).steps == 9000
    )
    # The run's own values.
    assert (
        run_folder.resumed(TrainConfig(out=tmp_path / "run", resume=True, width=16, seed=0)).steps
        == 12000
    )


def test_the_command_line_tells_what_was_given(tmp_path, monkeypatch, capsys):
    trained(**TINY, out=tmp_path / "run", steps=2)
    # The default, and not the run's.
    words = [
        "train",
        "--out",
        str(tmp_path / "run"),
        "--resume",
        "--batch-size",
        "256",
    ]
    monkeypatch.setattr(sys, "argv", ["fastscore", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (
        stop.value.code == 2
        and "has batch_size 32, which --resume cannot change; got 256" in capsys.readouterr().err
    )


def test_the_command_line_takes_every_option_and_fills_in_the_defaults(monkeypatch):
    seen = []
    monkeypatch.setattr(
        train, "train", functools.wraps(train.train)(lambda config: seen.append(config))
    )
    for words in ([], ["--lr", "0.1", "--steps", "5", "--task", "classifier"]):
        monkeypatch.setattr(sys, "argv", ["fastscore", "train", *words])
        cli.main()
    assert seen[0] == TrainConfig() and seen[0].given == {"resume"}
    assert (seen[1].lr, seen[1].steps, seen[1].task, seen[1].width) == (0.1, 5, "classifier", 256)
    assert seen[1].given == {"resume", "lr", "steps", "task"}


def folder_of(path, numbers):
    """Images whose grey level is their number."""
    path.mkdir(exist_ok=True)
    for number in numbers:
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(path / f"{number:03d}.png")
    return str(path)


def numbers_of(images):
    return sorted((images.flatten(1).mean(1) * 255).round().int().tolist())


def test_held_out_images_stay_held_out_where_the_folder_has_grown(tmp_path):
    """40 images, 10 held out; then 60 more, before, between and after them."""
    data, out = folder_of(tmp_path / "images", range(60, 140, 2)), tmp_path / "run"
    trained(**TINY, data=data, out=out, steps=3, held_out=10)
    images, _ = datasets.load(data)
    training, apart = datasets.split(40, 10)
    wanted = numbers_of(images[training]), numbers_of(images[apart])

    folder_of(tmp_path / "images", [*range(20, 60), *range(61, 81, 2), *range(200, 210)])
    config, _ = run_folder.read_config(out)
    grown, _ = datasets.load(data)
    with pytest.warns(
        UserWarning,
        match="has 60 images that the run in .* did not begin with; they are neither trained on "
        "nor held out",
    ):
        now = splits.split(config, grown)
    assert (numbers_of(grown[now[0]]), numbers_of(grown[now[1]])) == wanted
    # And in their order.
    assert torch.equal(grown[now[1]], images[apart]) and torch.equal(
        grown[now[0]], images[training]
    )

    with pytest.warns(UserWarning, match="did not begin with"):
        image, _ = observations.load_image("held-out:3", config)
    assert torch.equal(image, images[apart][3])


def test_a_run_that_goes_on_beside_new_images_ends_where_it_would_have_ended(tmp_path):
    options = {**TINY, "data": folder_of(tmp_path / "images", range(60, 140, 2)), "held_out": 10}
    trained(**options, out=tmp_path / "whole", steps=20)
    trained(**options, out=tmp_path / "parts", steps=20 // 2)
    # The learning rate follows the number of steps: the first half of a longer run is another one.
    trained(**options, out=tmp_path / "same", steps=10)
    folder_of(tmp_path / "images", range(20, 60))
    with pytest.warns(UserWarning, match="has 40 images"):
        trained(out=tmp_path / "parts", steps=20, resume=True)
    for number in range(20, 60):
        (tmp_path / "images" / f"{number:03d}.png").unlink()
    trained(out=tmp_path / "same", steps=20, resume=True)
    one, two = (saves.read_newest(tmp_path / f, "weights.safetensors") for f in ("parts", "same"))
    assert one == two is not None


def test_a_run_whose_images_are_gone_is_refused(tmp_path):
    data, out = folder_of(tmp_path / "images", range(60, 140, 2)), tmp_path / "run"
    trained(**TINY, data=data, out=out, steps=3, held_out=10)
    (tmp_path / "images" / "060.png").unlink()
    folder_of(tmp_path / "images", [61])
    with pytest.raises(
        ValueError,
        match=r"must still hold the images that the run in .* began with; 1 of its 40 are gone or "
        "changed",
    ):
        trained(out=out, steps=5, resume=True)
    with pytest.raises(ValueError, match="are gone or changed"):
        held_out.report(out, 5)


def test_images_that_are_there_twice_are_found_twice(tmp_path):
    """With their labels: one image under two labels is two."""
    images = np.repeat(np.linspace(0, 1, 10, dtype=np.float32), 4).reshape(40, 1, 1) * np.ones(
        (1, 4, 4), np.float32
    )
    labels = np.arange(40) % 4
    order = np.random.default_rng(0).permutation(40)
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    trained(
        **TINY,
        data=str(tmp_path / "x.npz"),
        out=tmp_path / "run",
        task="classifier",
        steps=2,
        held_out=15,
    )
    config, _ = run_folder.read_config(tmp_path / "run")
    before = [splits.part(config, name) for name in ("training", "held_out")]

    np.savez(tmp_path / "x.npz", images=images[order], labels=labels[order])
    after = [splits.part(config, name) for name in ("training", "held_out")]
    assert all(torch.equal(a, b) for one, two in zip(before, after) for a, b in zip(one, two))


def test_a_run_without_a_record_says_that_it_has_none(tmp_path):
    out = tmp_path / "run"
    trained(**TINY, out=out, steps=2, held_out=100)
    for file in out.glob("split.safetensors*"):
        file.unlink()
    with pytest.warns(
        UserWarning, match="has no record of the images that it held out; it goes on with the 100"
    ):
        trained(out=out, steps=3, resume=True)
    assert (out / "split.safetensors").exists()


def test_a_run_that_was_moved_keeps_its_images(tmp_path):
    trained(**TINY, out=tmp_path / "run", steps=2, held_out=100)
    (tmp_path / "run").rename(tmp_path / "moved")
    config = run_folder.open_run(tmp_path / "moved").config
    assert config.out == str(tmp_path / "moved")
