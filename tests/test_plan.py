"""What `fastscore train` chooses by data and budget, says beforehand, and refuses to begin."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from commands import command
from PIL import Image

from fastscore import datasets, memory, models
from fastscore.cli import draw, emphasis, networks, pictures, plan, run_folder, splits, train
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.models import unet
from fastscore.training.ranks import Ranks

SMALL = {"width": 8, "levels": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of 16 pixels a side, in a file."""
    path = tmp_path_factory.mktemp("data") / "x.npz"
    np.savez(path, images=np.random.default_rng(0).random((40, 16, 16), np.float32))
    return path


def source(*shape, n=50):
    return datasets.open(torch.rand(n, *shape, generator=torch.Generator().manual_seed(0)))


def resolved(shape, **options):
    return networks.resolved(TrainConfig(data="x.npz", **options), source(*shape))


# What is chosen


def test_the_defaults_of_the_digits_are_what_they_were():
    config = networks.resolved(TrainConfig(), datasets.open("digits"))
    chosen = {"network": "mlp", "width": 256, "depth": 3, "levels": 16, "sigma_max": 1.0}
    chosen |= {"sigma_min": 0.01, "steps": 9000, "batch_size": 256, "lr": 2e-3, "classes": 0}
    assert config == TrainConfig() and {k: getattr(config, k) for k in chosen} == chosen


@pytest.mark.parametrize(
    "shape, options, chosen",
    [
        ((1, 8, 8), {}, {"network": "mlp", "width": 256}),
        ((3, 15, 15), {}, {"network": "mlp", "width": 704}),   # 675 values
        ((1, 28, 28), {}, {"network": "unet", "width": 32, "multipliers": (1, 2), "patch": 2}),
        ((3, 32, 32), {"width": 48}, {"network": "unet", "width": 48, "levels": 50}),
        ((3, 40, 32), {}, {"network": "unet", "multipliers": (1, 2, 2)}),
        ((1, 64, 64), {}, {"network": "unet", "multipliers": (1, 2, 2)}),
        ((1, 28, 28), {"depth": 3}, {"network": "mlp", "width": 832, "levels": 16}),
        ((1, 28, 28), {"depth": 3, "width": 256}, {"network": "mlp", "width": 256}),
        ((1, 28, 28), {"network": "ncsn"}, {"network": "ncsn", "width": 32, "batch_size": 64}),
        ((1, 28, 28), {"task": "classifier"}, {"network": "mlp", "width": 256}),
        ((5,), {}, {"network": "mlp", "width": 256}),
    ],
)
def test_the_network_follows_from_the_data(shape, options, chosen):
    config = resolved(shape, **options)
    assert {name: getattr(config, name) for name in chosen} == chosen
    assert networks.resolved(config, source(*shape)) == config


def bright(n=300, side=16, channels=3):
    """Images that differ in how bright they are as a whole, and a little in each pixel."""
    generator = torch.Generator().manual_seed(0)
    level = torch.rand(n, 1, 1, 1, generator=generator)
    noise = 0.05 * torch.randn(n, channels, side, side, generator=generator)
    return level.expand(-1, channels, side, side) + noise


def test_noise_hides_how_bright_an_image_is():
    """σ_max is twice the deviation of whole images; samples then forget the start's brightness."""
    x = bright()
    config = networks.resolved(TrainConfig(data="x.npz"), datasets.open(x))
    dim = math.prod(x.shape[1:])
    spread = math.sqrt(dim) * float(x.mean((1, 2, 3)).std(correction=0))
    assert config.sigma_max == pytest.approx(2 * spread, rel=0.01)
    assert config.sigma_max > 3 * 8 * config.data_std

    # What is left of the start after four steps a level, in closed form along that direction.
    for sigma_max, least, most in ((config.sigma_max, 0, 0.12), (8 * config.data_std, 0.6, 1)):
        left = 1.0
        ends = math.log10(sigma_max), math.log10(config.sigma_min)
        for sigma in torch.logspace(*ends, config.levels).tolist():
            left *= (1 - 0.1 * sigma**2 / (spread**2 + sigma**2)) ** 4
        assert least < left < most


def test_levels_that_hide_whole_images_are_trained_on():
    """A quarter of all samples spread over all levels; the normal law alone has 10⁻⁴ there."""
    config = networks.resolved(TrainConfig(data="x.npz"), datasets.open(bright()))
    _, sigmas = networks.build(config, (3, 16, 16))
    shares = emphasis.shares(config, sigmas)
    assert float(shares.sum()) == pytest.approx(1, abs=1e-12)
    assert float(shares.min()) >= 0.25 / config.levels
    near = networks.resolved(TrainConfig(data="x.npz"), source(1, 16, 16))
    _, sigmas = networks.build(near, (1, 16, 16))
    assert near.sigma_max == pytest.approx(8 * near.data_std, rel=1e-3)
    assert float(emphasis.shares(near, sigmas).min()) < 0.2 / near.levels


def test_the_ladder_of_a_table_begins_at_its_largest_distance():
    x = torch.randn(300, 4, dtype=torch.float64).float() * 3
    config = networks.resolved(TrainConfig(data="x.csv"), datasets.open(x))
    assert config.sigma_max == pytest.approx(float(torch.cdist(x, x).max()), rel=1e-3)
    assert config.sigma_min == pytest.approx(0.01 * float(x.std(correction=0)), rel=1e-3)

    # The whole chain in closed form, one data direction of variance s² at a time.
    for s in x.std(0).tolist():
        v = config.sigma_max**2
        for sigma in torch.logspace(
            math.log10(config.sigma_max), math.log10(config.sigma_min), config.levels
        ).tolist():
            t = s**2 + sigma**2
            a = (1 - 0.1 * sigma**2 / t) ** (2 * 20)
            v = a * v + (1 - a) * t / (1 - 0.05 * sigma**2 / t)
        assert 0.99 < v / s**2 < 1.08


@pytest.mark.parametrize(
    "multipliers, blocks, patch", [((1,), 1, 1), ((1, 1), 1, 2), ((1, 1, 1), 2, 1)]
)
def test_what_a_pixel_sees_is_what_its_gradient_reaches(monkeypatch, multipliers, blocks, patch):
    """With the norms left out, which see everything: up to the rounding of the resampling."""
    monkeypatch.setattr(unet, "_activated", lambda norm, x, *modulation: x)
    net = models.UNet(1, 1, 4, multipliers=multipliers, blocks=blocks, patch=patch).double()
    with torch.no_grad():
        for p in net.parameters():
            p.uniform_(0.1, 1.0)
    x = torch.zeros(1, 1, 480, dtype=torch.float64, requires_grad=True)
    net._network(x, torch.zeros(1, 16, dtype=torch.float64))[0, 0, 240].backward()
    reached = x.grad[0, 0].nonzero()
    seen = networks.sight(multipliers, blocks, patch)
    slack = 2 * patch * 2 ** (len(multipliers) - 1)
    assert seen <= int(reached.max() - reached.min()) + 1 + slack <= seen + 3 * slack


def test_a_unet_that_sees_less_than_an_image_is_refused():
    with pytest.raises(ValueError, match="sees 25 pixels a side, fewer than the 28 of an image"):
        resolved((1, 28, 28), multipliers=(1,), patch=1)
    assert resolved((1, 28, 28), multipliers=(1,), patch=1, attention=(0,)).patch == 1
    for side in (16, 28, 32, 64, 128, 256):
        assert resolved((1, side, side), classes=0).network == "unet"


def test_networks_of_images_refuse_tables():
    for network in ("unet", "ncsn"):
        config = TrainConfig(data="x.npz", network=network)
        with pytest.raises(ValueError, match="is for images; samples of shape"):
            networks.build(networks.resolved(config, source(5)), (5,))


# What is said, and how many steps there are


def test_every_option_has_its_help():
    for option in dataclasses.fields(TrainConfig):
        if option.name != "file":
            assert f"\n        {option.name}: " in TrainConfig.__doc__, option.name


def made(**options):
    return plan.made(TrainConfig(**options), Ranks())


@pytest.fixture
def tenth(monkeypatch):
    """A step takes a tenth of a second."""
    monkeypatch.setattr(plan, "_seconds", lambda *arguments: 0.1)


def test_the_budget_buys_steps(images, tmp_path, tenth):
    options = {"data": str(images), "out": tmp_path / "run", **SMALL}
    assert made(**options).config.steps == 6000
    assert made(**options, budget=2.5).config.steps == 1500
    assert made(**options, budget=0.01).config.steps == 100
    assert made(**options, steps=7).config.steps == 7
    assert made(**options, depth=1).config.steps == 9000
    assert made(**options, depth=1, budget=1.0).config.steps == 600
    with pytest.raises(ValueError, match="give either steps or budget; got both"):
        made(**options, steps=7, budget=1.0)


def test_the_plan_says_what_it_takes(images, tmp_path, tenth):
    found = made(data=str(images), out=tmp_path / "run", **SMALL)
    net, _ = networks.build(found.config, (1, 16, 16))
    assert found.parameters == sum(p.numel() for p in net.parameters())
    words = f"unet of width 8, {found.parameters} parameters, for 40 samples of 1x16x16"
    assert str(found).startswith(words)
    # 200 calls for 64 images, each a third of 16 steps.
    line = "6000 steps of 4: 100 ms each, 10.0 minutes in all, and 106.7 s for pictures;"
    assert line in str(found)
    rough = made(data=str(images), out=tmp_path / "run", **SMALL, budget=1.0)
    assert str(rough).endswith("samples are rough below some 2000 steps: --budget 4 buys these")
    narrow = made(data=str(images), out=tmp_path / "run", depth=1, width=64)
    assert "narrower than a sample, 64 of 256: its loss cannot fall below 0.38" in str(narrow)


def test_saves_take_the_disk_that_is_said(images, tmp_path):
    options = {"data": str(images), "out": tmp_path / "run", **SMALL, "steps": 2}
    said = made(**options).disk
    list(fit(TrainConfig(**options)))
    save = tmp_path / "run" / "step-000000002"
    assert sum(f.stat().st_size for f in save.iterdir()) == pytest.approx(said / 2, rel=0.15)


def test_planning_changes_nothing(images, tmp_path, monkeypatch):
    """The weights are those of a run without a plan, and torch's generator is where it was."""
    options = {"data": str(images), **SMALL, "steps": 3, "network": "unet"}
    before = torch.get_rng_state()
    made(**options, out=tmp_path / "none")
    assert torch.equal(torch.get_rng_state(), before) and not (tmp_path / "none").exists()

    monkeypatch.setattr(train, "_finish", lambda *arguments: None)
    words = "--width 8 --levels 3 --batch-size 4 --steps 3".split()
    code, out, _ = command("train", "--data", images, "--out", tmp_path / "planned", *words)
    assert code == 0 and out.startswith("unet of width 8")
    list(fit(TrainConfig(**options, out=tmp_path / "plain")))
    planned, plain = (run_folder.read_weights(tmp_path / name) for name in ("planned", "plain"))
    assert all(torch.equal(planned[name], plain[name]) for name in plain)


def test_a_run_that_goes_on_keeps_the_steps_that_its_budget_bought(
    images, tmp_path, tenth, monkeypatch
):
    # No pictures: they take longer than all the rest.
    monkeypatch.setattr(train, "_finish", lambda *arguments: None)
    words = "--width 8 --levels 3 --batch-size 4 --budget 0.2".split()
    code, out, _ = command("train", "--data", images, "--out", tmp_path / "run", *words)
    assert code == 0 and "120 steps" in out
    assert run_folder.read_config(tmp_path / "run")[0].steps == 120
    # Its config is a file of options as any.
    again = made(file=tmp_path / "run" / "config.toml", out=tmp_path / "other")
    assert again.config.steps == 120
    code, out, _ = command("train", "--out", tmp_path / "run", "--resume")
    assert code == 0 and "steps of" not in out
    assert run_folder.read_config(tmp_path / "run")[0].steps == 120


def test_a_step_is_measured_in_seconds(images, tmp_path):
    found = made(data=str(images), out=tmp_path / "run", **SMALL, steps=2)
    assert 1e-4 < found.seconds < 10


# What does not fit


@pytest.mark.parametrize(
    "words, message",
    [
        (("--batch-size", 10**9), "a batch of 1000000000 takes"),
        (("--width", 10**6), "a network of"),
        (("--levels", 10**9), "levels must be at most 1000000; got 1000000000"),
        (("--network", "unet", "--width", 10**6), "trillion parameters takes"),
        (("--network", "ncsn", "--width", 10**6), "trillion parameters takes"),
        (("--task", "classifier", "--width", 10**6), "trillion parameters takes"),
        (("--task", "classifier", "--batch-size", 10**9), "a batch of 1000000000 takes"),
    ],
)
def test_a_training_that_does_not_fit_is_refused_before_it_begins(tmp_path, words, message):
    code, _, error = command("train", *words, "--out", tmp_path / "run")
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_activations_count(images, tmp_path, monkeypatch):
    """They are what a batch of a convolutional network takes most of."""
    config = {"data": str(images), "out": tmp_path / "run", "width": 32, "steps": 2}
    needed = made(**config, batch_size=64).memory
    assert needed > 64 * 100_000
    monkeypatch.setattr(memory, "available", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"with a batch of 64 takes .* raise accumulate"):
        made(**config, batch_size=64)
    assert made(**config, batch_size=64, accumulate=2).memory < needed


def test_saves_that_do_not_fit_on_the_disk_are_refused(images, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    code, _, error = command("train", "--data", images, "--out", tmp_path / "deep" / "run")
    assert code == 2 and "more than the 9.8 KiB that are free in" in error
    assert error.count("\n") == 1 and not (tmp_path / "deep").exists()


def test_samples_that_do_not_fit_are_refused(tmp_path):
    list(fit(TrainConfig(out=tmp_path / "run", steps=1, width=16, depth=1, levels=2)))
    code, _, error = command("sample", tmp_path / "run", "-n", 10**12, "--out", tmp_path / "x.npz")
    assert code == 2 and "sample: 1000000000000 samples takes" in error
    assert error.count("\n") == 1 and not (tmp_path / "x.npz").exists()
    with pytest.raises(ValueError, match="more than the memory"):
        draw.draw_run(tmp_path / "run", 10**12)


def test_the_loss_of_a_short_run_is_seen(tmp_path):
    """The colour of the first level, in the middle of the picture and not in the legend alone."""
    record = {"step": 50, "loss": 1.0, "levels": [1.0, 2.0, 3.0, 4.0]}
    pictures.save_loss_curve(tmp_path / "loss.png", [record], [1.0, 0.5, 0.2, 0.1])
    with Image.open(tmp_path / "loss.png") as picture:
        middle = np.asarray(picture.convert("RGB"))
    width = middle.shape[1]
    middle = middle[:, int(0.45 * width) : int(0.6 * width)].astype(int)
    assert (np.abs(middle - [31, 119, 180]).max(-1) < 20).any()


# Vectors


def test_a_table_is_learnt(tmp_path):
    """A Gaussian in three dimensions: the mean within 0.2, which is 3.2 standard errors of 1,000
    samples, and the covariance within 1.8 of theirs and the 7 % of the ladder."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, generator=generator) @ torch.tensor(
        [[1.0, 0.6, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, 2.0]]
    )
    np.savetxt(tmp_path / "x.csv", x.numpy(), delimiter=",", header="a,b,c", comments="")
    options = {"width": 32, "depth": 1, "steps": 800}
    list(fit(TrainConfig(data=str(tmp_path / "x.csv"), out=tmp_path / "run", **options)))
    net, sigmas, shape, config = run_folder.open_run(tmp_path / "run")
    assert shape == (3,) and config.sigma_max > 5
    units = splits.units(tmp_path / "run")
    samples = draw.draw(draw.prepare(net, sigmas, shape, 1000)).samples
    samples = units.to_units(samples).float()
    assert samples.shape == (1000, 3)
    assert torch.allclose(samples.mean(0), x.mean(0), atol=0.2)
    spread = float(x.var(0).max())
    assert torch.allclose(samples.T.cov(), x.T.cov(), atol=0.15 * spread)
