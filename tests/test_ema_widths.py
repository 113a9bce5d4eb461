"""`train --ema-widths` keeps averages in the saves; `sample --ema-width` makes one of another
width."""


import numpy as np
import pytest
import torch

from fastscore import training
from fastscore.cli import draw, run_folder, widths
from fastscore.cli import fit as fitting
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.training import saves
from fastscore.training.post_hoc import gamma_of

SMALL = {"width": 16, "depth": 1, "levels": 3, "batch_size": 16, "steps": 120}


def trained(out, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "SAVE_EVERY", 10)
        list(fit(TrainConfig(**{**SMALL, "out": out, **options})))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "run", ema_widths=(0.05, 0.1), keep=12)


def weights(net):
    return torch.cat([p.flatten().double() for p in net.parameters()])


def averaged_along(out, width):
    """The average of the weights of each step of the same run, made beside it."""
    averages = []

    class Beside(fitting.Run):
        def step(self, done, sums):
            if not averages:
                averages.append(training.power_averaged(self.net, width))
            averages[0].update_parameters(self.net)
            super().step(done, sums)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "Run", Beside)
        trained(out)
    return averages[0].module


@pytest.mark.parametrize("width", [0.05, 0.1, 0.08, 0.13])
def test_a_width_is_that_of_an_average_kept_beside_the_run(tmp_path, folder, width):
    """The kept ones themselves, and others but for what the profiles differ by.

    With ‖q - p‖ at most a tenth of ‖p‖ (`post_hoc` refuses more) and p = (γ + 1)/T (τ/T)^γ, the
    weights are off by at most 0.1 (γ + 1)/√(2γ + 1) times their longest way from their average.
    """
    net = run_folder.open_run(folder).net
    start = weights(run_folder.build(run_folder.read_config(folder)[0], (1, 8, 8))[0])
    made = weights(widths.network(folder, net, width))
    expected = weights(averaged_along(tmp_path / "run", width))
    gamma = gamma_of(width)
    off = 1e-6 if width in (0.05, 0.1) else 0.1 * (gamma + 1) / (2 * gamma + 1) ** 0.5
    assert (made - expected).norm() < off * (expected - start).norm()
    assert not torch.equal(made, weights(net))


def test_averages_change_nothing_else(tmp_path, folder):
    plain = run_folder.read_weights(trained(tmp_path / "plain"))
    kept = run_folder.read_weights(folder)
    assert all(torch.equal(plain[name], kept[name]) for name in plain)


def test_a_resumed_run_keeps_the_same_averages(tmp_path, folder):
    options = {**SMALL, "out": tmp_path / "run", "ema_widths": (0.05, 0.1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "SAVE_EVERY", 10)
        interrupted = fit(TrainConfig(**options))
        for _ in range(25):
            next(interrupted)
        interrupted.close()
        list(fit(TrainConfig(out=tmp_path / "run", resume=True)))
    whole, parts = (saves.of_run(out)[0].read(widths.FILE) for out in (folder, tmp_path / "run"))
    assert whole == parts


def test_the_command_draws_with_the_width_that_is_asked_for(tmp_path, folder, fastscore):
    job = ("sample", folder, "-n", 3, "--steps-per-level", 2, "--out", tmp_path / "x.npz")
    code, _, error = fastscore(*job, "--ema-width", 0.08)
    assert code == 0, error
    net, sigmas, shape, _ = run_folder.open_run(folder)
    net = widths.network(folder, net, 0.08)
    drawn = draw.draw(draw.prepare(net, sigmas, shape, 3, steps_per_level=2)).samples
    assert np.array_equal(np.load(tmp_path / "x.npz")["images"], drawn.clamp(0, 1).numpy())


def test_the_command_takes_widths(tmp_path, monkeypatch, fastscore):
    seen = []
    monkeypatch.setattr(fitting, "Run", lambda config, *things: seen.append(config))
    words = "train --steps 3 --width 16 --depth 1 --ema-widths 0.05 0.1 --out".split()
    with pytest.raises(AttributeError):
        fastscore(*words, tmp_path / "run")
    assert seen[0].ema_widths == (0.05, 0.1)


def test_what_cannot_be_made_is_refused_in_one_sentence(tmp_path, folder, fastscore):
    trained(tmp_path / "plain", steps=2)
    for run, words, message in (
        (tmp_path / "plain", ("--ema-width", 0.1), "needs a run that keeps averages"),
        (folder, ("--ema-width", 0.5), "width must be"),
        (folder, ("--ema-width", 0.005), "train with --keep for more saves"),
        (tmp_path / "x.pth", ("--ema-width", 0.1), "ema_width is for run folders"),
    ):
        code, _, error = fastscore("sample", run, *words, "--out", tmp_path / "x.png")
        assert code == 2 and message in error and error.count("\n") == 1, error
        assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        ((0.5,), "ema_widths must be in 0.001..0.28; got 0.5"),
        ((0.1, 0.1), "ema_widths must differ"),
        ((float("nan"),), "ema_widths must be in"),
    ],
)
def test_wrong_widths_are_refused(given, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        TrainConfig(ema_widths=given)


def test_widths_are_options_of_a_file(tmp_path, folder):
    assert run_folder.read_config(folder)[0].ema_widths == (0.05, 0.1)
    (tmp_path / "run.toml").write_text("ema_widths = [0.05, 0.1]\n")
    assert TrainConfig(file=tmp_path / "run.toml").ema_widths == (0.05, 0.1)
