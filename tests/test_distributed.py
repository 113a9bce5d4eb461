"""Samples of several ranks are those of one process: shares, noise to the bit, torchrun."""

import contextlib
import sys

import children
import numpy as np
import pytest
import torch

from fastscore import distributed, models, schedules
from fastscore.cli import draw, observations, train
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.cli.sampler_options import SAMPLERS

SIGMAS = schedules.geometric(1.0, 0.1, 4)


@pytest.mark.parametrize("n", [0, 1, 3, 64, 101])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_shares_are_contiguous_and_differ_by_one_at_most(n, world_size):
    shares = [distributed.share(n, rank, world_size) for rank in range(world_size)]
    assert [i for first, count in shares for i in range(first, first + count)] == list(range(n))
    assert max(count for _, count in shares) - min(count for _, count in shares) <= 1


def network():
    torch.manual_seed(0)
    net = models.ScoreMLP(64, width=32, depth=1, sigmas=SIGMAS)
    torch.nn.init.normal_(net.last.weight, std=0.1)
    return net.requires_grad_(False)


def split(job, world_size, monkeypatch):
    """What rank 0 hands back, in one process: it runs last and finds what the others sent."""
    sent = []
    number = 0

    def gather(samples, n):
        nonlocal number
        if rank:
            sent[rank].append(samples)
            return None
        number += 1
        return torch.cat([samples, *(sent[other][number - 1] for other in range(1, world_size))])

    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(distributed, "process_group", contextlib.nullcontext)
    sent = [[] for _ in range(world_size)]
    results = []
    for rank in reversed(range(world_size)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        results.append(draw.draw(job))
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    assert all(result is None for result in results[:-1])
    return results[-1]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_ranks_draw_what_one_process_draws(monkeypatch, world_size, sampler):
    """Bit for bit, though a network's sums depend on the size of the batch; up to seven ranks."""
    options = {"seed": 3, "first_sample": 5, "batch_size": 3, "sampler": sampler}
    if sampler == "consistent_annealed":
        options["step_size"] = 0.02   # the ladder is coarse
    job = draw.prepare(network(), SIGMAS, (1, 8, 8), 13, **options)
    whole, found = draw.draw(job), split(job, world_size, monkeypatch)
    assert torch.equal(found.samples, whole.samples) and torch.equal(found.path, whole.path)
    assert float(whole.samples.std()) > 0.05 and whole.path.shape[1] == 8


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    "guide, noise", [("replace", 0.0), ("replace", 0.2), ("moments", 0.0), ("flat", 0.2)]
)
def test_ranks_draw_under_conditions_what_one_process_draws(monkeypatch, world_size, guide, noise):
    """An image and a class at once, three batches on up to four ranks, so that one has none.

    The observation, its noise, the hook's noise and the sampler's are those of the global number.
    """
    requests = [observations.parse("inpaint=held-out:3,right-half"), observations.parse("class=1")]
    condition = {
        "requests": requests,
        "noise": noise,
        "guide": guide,
        "config": TrainConfig(held_out=300),
    }
    condition["classifier"] = lambda x, sigma: torch.stack([x[:, 0, 0, 0], -x[:, 0, 0, 0]], 1)
    options = {
        "seed": 3,
        "first_sample": 5,
        "batch_size": 2,
        "steps_per_level": 2,
        "condition": condition,
    }
    job = draw.prepare(network(), SIGMAS, (1, 8, 8), 5, **options)
    whole, found = draw.draw(job), split(job, world_size, monkeypatch)
    assert torch.equal(found.samples, whole.samples) and torch.equal(found.path, whole.path)
    assert all(
        torch.equal(found.shown[name], whole.shown[name])
        for name in ("original", "observation", "mask")
    )
    assert len({tuple(x.flatten().tolist()) for x in whole.samples}) == 5


@pytest.mark.processes
def test_torchrun_writes_what_one_process_writes(tmp_path):
    """Two processes, five samples in batches of two; one prints, and no finished batches stay."""
    for _ in fit(
        TrainConfig(out=tmp_path / "run", steps=50, width=16, depth=1, levels=3, batch_size=32)
    ):
        pass
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
    ]
    command = ["fastscore", "sample", str(tmp_path / "run"), "-n", "5", "--batch-size", "2"]
    done = children.run([*torchrun, *command, "--out", tmp_path / "two.npz"])
    assert done.returncode == 0 and done.stdout == f"5 samples: {tmp_path / 'two.npz'}\n", (
        done.stderr
    )
    samples = draw.draw_run(tmp_path / "run", 5, batch_size=2).samples
    found = np.load(tmp_path / "two.npz")["images"]
    assert found.shape == (5, 1, 8, 8) and (found == samples.clamp(0, 1).numpy()).all()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run", "two.npz"]


def test_the_environment_and_shares_are_checked(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.environment() == (0, 1) and distributed.share(7) == (0, 7)
    with pytest.raises(ValueError, match="share: n must be an int of at least 0; got -1"):
        distributed.share(-1)
    with pytest.raises(ValueError, match="share: give rank and world_size together, or neither"):
        distributed.share(3, 1)
    with pytest.raises(ValueError, match="share: 0 <= rank < world_size must hold; got 2 and 2"):
        distributed.share(3, 2, 2)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(
        ValueError, match="RANK and WORLD_SIZE must both be integers; got '1' and None"
    ):
        distributed.environment()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.environment() == (1, 2) and distributed.share(5) == (3, 2)
    with pytest.raises(ValueError, match="rank 1 of 2 must hold 2 of the 5 samples; got 3"):
        distributed.gather(torch.zeros(3, 1), 5)
    with pytest.raises(ValueError, match="the ranks meet at MASTER_ADDR and MASTER_PORT"):
        distributed.gather(torch.zeros(2, 1), 5)
    with pytest.raises(ValueError, match="train: the processes meet at MASTER_ADDR and MASTER_PO"):
        train.train(TrainConfig())
