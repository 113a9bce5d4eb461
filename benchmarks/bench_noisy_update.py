"""langevin_step: reads x and s, writes x': three times the element size per element."""

import functools

import pytest
import torch
from harness import asked

import fastscore

EPSILON = 1e-3


def plain(x, s, e):
    return x + e / 2 * s + e**0.5 * torch.randn_like(x)


def careful(x, s, e):
    """Eager as a good engineer writes it: three passes and no temporary but the result."""
    return torch.randn_like(x).mul_(e**0.5).add_(x).add_(s, alpha=e / 2)


def careful_each(x, s, e):
    return torch.randn_like(x).mul_(e.sqrt()).add_(x).addcmul_(s, e / 2)


def verify(name, x, s, e):
    exact = fastscore.langevin_step(x.double(), s.double(), e, seed=1, backend="reference")
    got = fastscore.langevin_step(x, s, e, seed=1, backend=name)
    assert bool(((got - exact).abs() <= torch.finfo(x.dtype).eps * exact.abs() + 3e-6).all())


def bench(compare, op, x, s, e, ours, peers):
    """e: a float or (B,). Peers take it in the shape that they need."""
    each = isinstance(e, torch.Tensor)
    for name in ours:
        verify(name, x[:64], s[:64], e[:64] if each else e)
    shaped = e.reshape(-1, *(1,) * (x.dim() - 1)) if each else e
    calls = {
        name: functools.partial(
            fastscore.langevin_step, x, s, e, seed=1, backend=asked(name, x.device)
        )
        for name in ours
    }
    compare(
        op,
        x,
        3 * x.nbytes,
        calls | {name: functools.partial(peer, x, s, shaped) for name, peer in peers.items()},
        from_memory=True,
    )


@pytest.mark.parametrize("exponent", [12, 18, 24, 27])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def bench_langevin_step(compare, size, device, ours, dtype, exponent):
    if exponent > 24 and device == "cpu":
        pytest.skip("says on the CPU what 2^24 says")
    x, s = (torch.randn(size(exponent), device=device).to(dtype) for _ in range(2))
    peers = {"eager": plain, "careful eager": careful, "torch.compile": torch.compile(plain)}
    with torch.no_grad():
        bench(compare, "langevin_step", x, s, EPSILON, ours, peers)


@pytest.mark.parametrize("exponent", [18, 24])
def bench_per_sample_step_size(compare, size, device, ours, exponent):
    x, s = (torch.randn(size(exponent) // 64, 64, device=device) for _ in range(2))
    e = torch.full((len(x),), EPSILON, device=device)
    peers = {"eager": plain, "careful eager": careful_each, "torch.compile": torch.compile(plain)}
    with torch.no_grad():
        bench(compare, "langevin_step, ε (B,)", x, s, e, ours, peers)
