"""Noise alone: writes one element, reads nothing."""

import functools

import pytest
import torch
from harness import asked

from fastscore import random

PEERS = {
    "normal": torch.Tensor.normal_,
    "uniform": torch.Tensor.uniform_,
    "rademacher": lambda t: t.bernoulli_().mul_(2).sub_(1),
}


def eager(kind, like):
    return PEERS[kind](torch.empty_like(like))


@pytest.mark.parametrize("exponent", [18, 24])
@pytest.mark.parametrize("kind", PEERS)
def bench_noise(compare, size, device, ours, kind, exponent):
    draw = functools.partial(
        getattr(random, kind), seed=1, stream=1024, dtype=torch.float32, device=device
    )
    out = torch.empty(size(exponent), device=device)
    for name in ours:
        assert bool(
            ((draw(4096, backend=name) - draw(4096, backend="reference")).abs() <= 1e-6).all()
        )
    calls = {
        name: functools.partial(draw, tuple(out.shape), backend=asked(name, out.device))
        for name in ours
    }
    compare(
        f"random.{kind}",
        out,
        out.nbytes,
        calls | {"eager": functools.partial(eager, kind, out)},
        from_memory=True,
    )
