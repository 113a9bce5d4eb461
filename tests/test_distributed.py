"""Samples of several ranks are those of one process: shares, noise to the bit, torchrun."""

import sys

import children
import numpy as np
import pytest
import torch

from fastscore import cli, distributed, models, schedules
from fastscore.cli import conditions, drawing, ranks, runs

SIGMAS = schedules.geometric(1.0, 0.1, 4)


@pytest.mark.parametrize("n", [0, 1, 3, 64, 101])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_shares_are_contiguous_and_differ_by_one_at_most(n, world_size):
    shares = [distributed.share(n, rank, world_size) for rank in range(world_size)]
    assert [i for first, count in shares for i in range(first, first + count)] == list(range(n))
    assert max(count for _, count in shares) - min(count for _, count in shares) <= 1


class Elementwise(torch.nn.Module):
    """The score of N(0.7, 0.2²): no sum whose order could depend on the batch."""

    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(0.7), requires_grad=False)

    def forward(self, x, sigma):
        return (self.mean - x) / (0.04 + sigma.square())[:, None, None, None]


def network():
    torch.manual_seed(0)
    net = models.ScoreMLP(64, width=32, depth=1, sigmas=SIGMAS)
    torch.nn.init.normal_(net.last.weight, std=0.1)
    return net.requires_grad_(False)


@pytest.mark.parametrize("sampler", drawing.NAMES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_draw_what_one_process_draws(monkeypatch, world_size, sampler):
    """Bit for bit where the score is; within 1e-5 where a network's sums depend on the size of the batch."""
    monkeypatch.setattr(distributed, "gather", lambda samples, n: samples)   # each rank hands back its own share
    options = {"seed": 3, "first_sample": 5, "batch_size": 4, "sampler": sampler}
    if sampler == "consistent_annealed":
        options["step_size"] = 0.02   # the ladder is coarse

    def split(net):
        parts = []
        for rank in range(world_size):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            parts.append(ranks.draw(net, SIGMAS, (1, 8, 8), 11, **options)[0])
        return torch.cat(parts)

    for net, tolerance in ((Elementwise(), 0), (network(), 1e-5)):
        whole, path = drawing.draw_from(net, SIGMAS, (1, 8, 8), 11, **options)
        torch.testing.assert_close(split(net), whole, rtol=0, atol=tolerance)
        assert float(whole.std()) > 0.05


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("guide, noise", [("replace", 0.0), ("replace", 0.2), ("moments", 0.0), ("flat", 0.2)])
def test_ranks_draw_under_conditions_what_one_process_draws(monkeypatch, world_size, guide, noise):
    """An image and a class at once: the observation, its noise, the hook's noise and the sampler's are those of the global number; three
    samples on four ranks, so that one has none."""
    requests = [conditions.parse("inpaint=held-out:3,right-half"), conditions.parse("class=1")]
    options = {"noise": noise, "guide": guide, "seed": 3, "first_sample": 5, "batch_size": 2, "steps_per_level": 2}
    options |= {"config": runs.TrainConfig(held_out=300)}
    options |= {"classifier": lambda x, sigma: torch.stack([x[:, 0, 0, 0], -x[:, 0, 0, 0]], 1)}
    shares, gathered = [], []

    def gather(samples, n):
        shares.append(samples)
        return torch.cat(shares) if len(shares) == world_size else None   # the last rank plays rank 0

    whole = conditions.draw(Elementwise(), SIGMAS, (1, 8, 8), requests, 3, **options)
    monkeypatch.setattr(distributed, "gather", gather)
    for rank in reversed(range(world_size)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        gathered.append(conditions.draw_shared(Elementwise(), SIGMAS, (1, 8, 8), requests, 3, **options))
    assert gathered[:-1] == [None] * (world_size - 1)
    assert len(shares) == world_size and torch.equal(torch.cat(shares[::-1]), whole.samples)
    assert torch.equal(gathered[-1].observation, whole.observation) and torch.equal(gathered[-1].mask, whole.mask)
    assert len({tuple(x.flatten().tolist()) for x in whole.samples}) == 3


@pytest.mark.processes
def test_torchrun_writes_what_one_process_writes(tmp_path):
    """Two processes, five samples in batches of two; only one of them prints, and no unfinished batches stay behind."""
    for _ in runs.train(runs.TrainConfig(out=tmp_path / "run", steps=50, width=16, depth=1, levels=3, batch_size=32)):
        pass
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = ["fastscore", "sample", str(tmp_path / "run"), "-n", "5", "--batch-size", "2"]
    done = children.run([*torchrun, *command, "--out", tmp_path / "two.npz"])
    assert done.returncode == 0 and done.stdout == f"5 samples: {tmp_path / 'two.npz'}\n", done.stderr
    samples, _ = runs.draw(tmp_path / "run", 5, batch_size=2)
    found = np.load(tmp_path / "two.npz")["images"]
    assert found.shape == (5, 1, 8, 8) and np.abs(found - samples.clamp(0, 1).numpy()).max() < 1e-5
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
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE must both be integers; got '1' and None"):
        distributed.environment()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.environment() == (1, 2) and distributed.share(5) == (3, 2)
    with pytest.raises(ValueError, match="rank 1 of 2 must hold 2 of the 5 samples; got 3"):
        distributed.gather(torch.zeros(3, 1), 5)
    with pytest.raises(ValueError, match="the ranks meet at MASTER_ADDR and MASTER_PORT"):
        distributed.gather(torch.zeros(2, 1), 5)
    with pytest.raises(ValueError, match="train: runs as one process; got WORLD_SIZE 2"):
        cli.train(runs.TrainConfig())
