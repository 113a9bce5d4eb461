"""An activation with its derivatives: reads a stack, writes one; its gradient reads two."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastscore.ops.activate import activate_dual, activate_jet


@pytest.fixture
def ours(ours):
    return [name for name in ours if name != "cuda"]   # a GPU runs the Triton kernels


def eager_dual(s: torch.Tensor) -> torch.Tensor:
    sigmoid = s[:1].sigmoid()
    slope = sigmoid * (1 + s[:1] * (1 - sigmoid))
    return torch.cat([F.silu(s[:1]), slope * s[1:]])


def eager_jet(s: torch.Tensor) -> torch.Tensor:
    u, u1, u2 = s.chunk(3)
    sigmoid = u.sigmoid()
    slope = sigmoid * (1 + u * (1 - sigmoid))
    bend = sigmoid * (1 - sigmoid) * (2 + u * (1 - 2 * sigmoid))
    return torch.cat([F.silu(u), slope * u1, slope * u2 + bend * u1.square()])


ORDERS = {
    "activate_dual": (2, lambda s, backend: activate_dual(s, "silu", backend), eager_dual),
    "activate_jet": (3, lambda s, backend: activate_jet(s, 1, "silu", backend), eager_jet),
}


def with_gradient(call, s):
    """The value's cotangent is the stack itself, so the gradient reads no third one."""
    leaf = s.detach().requires_grad_()
    return torch.autograd.grad(call(leaf), leaf, s)[0]


@pytest.mark.parametrize("exponent", [18, 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ORDERS)
def bench_activate(compare, size, device, ours, name, dtype, exponent):
    rows, call, eager = ORDERS[name]
    s = torch.randn(rows, size(exponent), device=device).to(dtype)
    exact = eager(s.double())
    for backend in ours:
        bound = torch.finfo(dtype).eps * exact.abs() + 3e-6 * (1 + exact.abs())
        assert bool(((call(s, backend).double() - exact).abs() <= bound).all())

    calls = {backend: functools.partial(call, s, backend) for backend in ours}
    peers = {
        "eager": functools.partial(eager, s),
        "torch.compile": functools.partial(compiled(name), s),
    }
    compare(name, s, 2 * s.nbytes, calls | peers, from_memory=True)


@pytest.mark.parametrize("name", ORDERS)
def bench_activate_and_gradient(compare, size, device, ours, name):
    rows, call, eager = ORDERS[name]
    s = torch.randn(rows, size(22), device=device)
    exact = with_gradient(eager, s.double())
    calls = {
        backend: functools.partial(with_gradient, functools.partial(call, backend=backend), s)
        for backend in ours
    }
    for ours_too in calls.values():
        assert bool(((ours_too().double() - exact).abs() <= 1e-5 * (1 + exact.abs())).all())

    peers = {
        "eager": functools.partial(with_gradient, eager, s),
        "torch.compile": functools.partial(with_gradient, compiled(name), s),
    }
    compare(f"{name} + backward", s, 5 * s.nbytes, calls | peers, from_memory=True)


@functools.cache
def compiled(name):
    return torch.compile(ORDERS[name][2])
