"""perturb, then denoising_loss forward and backward, with an identity for the network.

Bytes that must move: read x, write the perturbed x (perturb); read s (forward); read s, write its
gradient (backward).
"""

import functools

import pytest
import torch

import fastscore

SIGMA = 0.5


def ours_step(x, backend):
    s = fastscore.perturb(x, SIGMA, seed=1, backend=backend).requires_grad_()
    loss = fastscore.denoising_loss(s, SIGMA, seed=1, backend=backend).sum()
    return torch.autograd.grad(loss, s)[0]


def eager_step(x, z=None):
    z = torch.randn_like(x) if z is None else z
    s = (x + SIGMA * z).requires_grad_()
    loss = 0.5 * (s * SIGMA + z).square().flatten(1).sum()
    return torch.autograd.grad(loss, s)[0]


@torch.compile
def compiled_loss(x):
    z = torch.randn_like(x)
    return 0.5 * ((x + SIGMA * z) * SIGMA + z).square().flatten(1).sum()


def compiled_step(x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(compiled_loss(x), x)[0]


@pytest.mark.parametrize("exponent", [18, 22, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_perturb_and_denoising_loss(compare, size, device, ours, dtype, exponent):
    x = torch.randn(64, size(exponent) // 64, device=device).to(dtype)
    z = fastscore.random.normal(
        x.shape,
        seed=1,
        stream=fastscore.random.PERTURB,
        device=device,
        dtype=torch.float64,
        backend="reference",
    )
    exact = eager_step(x.double(), z)
    for name in ours:
        # Two roundings to the element type: s itself, and the gradient.
        bound = 2 * torch.finfo(dtype).eps * (exact.abs() + 1)
        assert bool(((ours_step(x, name).double() - exact).abs() <= bound + 3e-6).all())
    calls = {name: functools.partial(ours_step, x, name) for name in ours}
    peers = {
        "eager": functools.partial(eager_step, x),
        "torch.compile": functools.partial(compiled_step, x),
    }
    compare("perturb + denoising_loss", x, 5 * x.nbytes, calls | peers, from_memory=True)
