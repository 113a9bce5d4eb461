"""fastscore evaluate --likelihood: a network that is the truth reports the entropy."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from fastscore import cli, models, random, schedules
from fastscore.cli import evaluate, held_out, run_folder
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit


class Truth(torch.nn.Module):
    """The score of N(½, 0.1²) at every noise."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, sigma):
        return self.scale * (0.5 - x) / (0.01 + sigma.square())[:, None, None, None]


def test_the_true_network_reports_the_entropy(tmp_path, monkeypatch):
    """-½ log(2πe (s² + σ²)) nats per dimension.

    Seed 1; five standard errors (once in 1.7 million), and what the fitted prior is off.
    """
    x = (0.5 + 0.1 * random.normal((600, 2, 2), seed=1, stream=1024)).clamp(0, 1)
    np.savez(tmp_path / "x.npz", images=x.numpy())
    config, sigmas = (
        TrainConfig(data=str(tmp_path / "x.npz"), held_out=300),
        schedules.geometric(2.0, 0.05, 8),
    )
    monkeypatch.setattr(run_folder, "open_run", lambda folder: (Truth(), sigmas, (1, 2, 2), config))
    result = held_out.report(tmp_path, 250)
    entropy = 0.5 * math.log(2 * math.pi * math.e * (0.01 + 0.05**2))
    for name in ("held_out", "training"):
        row = result["nats_per_dim"][name]
        assert row["n"] == 250
        # √½ of a Gaussian's log-density.
        assert (
            0.5 / math.sqrt(4 * 250) < row["standard_error"] < 1 / math.sqrt(4 * 250)
        )
        assert abs(row["mean"] + entropy) < 5 * row["standard_error"] + 2e-3
    with pytest.raises(ValueError, match="multiples of 1/255"):
        held_out.report(tmp_path, 250, grey_levels=256)


def test_the_command_writes_its_table_and_refuses_in_one_sentence(tmp_path, monkeypatch, capsys):
    small = {"steps": 60, "width": 16, "depth": 1, "levels": 4, "batch_size": 64}
    for name, kept in (("run", 20), ("whole", 0)):
        list(fit(TrainConfig(out=tmp_path / name, held_out=kept, **small)))
    # Of the command and of `report` alike.
    monkeypatch.setattr(held_out, "STEPS", 8)
    options = ["--likelihood", "-n", "12", "--grey-levels", "17"]
    monkeypatch.setattr(sys, "argv", ["fastscore", "evaluate", str(tmp_path / "run"), *options])
    cli.main()
    assert "bits per dimension, 17 grey levels" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "likelihood.json").read_text())
    assert result == held_out.report(tmp_path / "run", 12, grey_levels=17)
    assert held_out.markdown(result) == (tmp_path / "run" / "likelihood.md").read_text()
    for name, options, message in (
        ("whole", {"n": 12}, "must keep images apart"),
        ("run", {"n": 1}, "n must be at least 2"),
        ("run", {"n": 12, "grey_levels": 256}, "multiples of 1/255"),
    ):
        with pytest.raises(ValueError, match=message):
            held_out.report(tmp_path / name, **options)
    with pytest.raises(ValueError, match="grey_levels belongs to --likelihood"):
        evaluate.evaluate(tmp_path / "run", grey_levels=17)


def test_a_network_of_fixed_levels_is_evaluated_on_its_ladder():
    net = models.NCSN(channels=1, ngf=4, image_size=8, sigmas=[1.0, 0.5, 0.2]).requires_grad_(False)
    prior = models.Gaussian([0.5] * 64, 0.1)
    assert bool(
        held_out.density(net, net.sigmas, torch.rand(2, 1, 8, 8), prior, 0).isfinite().all()
    )
