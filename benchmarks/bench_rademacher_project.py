"""Rademacher projection: draw signs, multiply, sum; and the gradient of that sum.

Bytes that must move: read Jv (project); read s and Jv, read s again, write both gradients
(reduction with its gradient).
"""

import functools

import pytest
import torch

from fastscore import random
from fastscore.ops.rademacher_project import project, project_ref

NUMBERS = (1, 0, random.PROJECTION, 0)


@pytest.fixture
def ours(ours):
    return [name for name in ours if name != "cuda"]   # a GPU runs the Triton kernels


def bernoulli_signs(x):
    return torch.empty_like(x).bernoulli_() * 2 - 1


def randint_signs(x):
    return torch.randint_like(x, 2) * 2 - 1


def eager(js, signs):
    return (js * signs(js)).flatten(1).sum(1)


@torch.compile
def compiled(js):
    return (js * (torch.randint_like(js, 2) * 2 - 1)).flatten(1).sum(1)


def verify(name, s, js):
    """Values and gradients against float64."""
    v = random.rademacher(
        (1, *s.shape),
        seed=1,
        stream=random.PROJECTION,
        device=s.device,
        dtype=torch.float64,
        backend="reference",
    )
    leaves, wide = (
        [t.detach().clone().requires_grad_() for t in (s, js)],
        [t.double().requires_grad_() for t in (s, js)],
    )
    got, exact = project(*leaves, None, NUMBERS, name), project_ref(*wide, v)
    for a, b in zip(got, exact):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6 * s[0].numel() ** 0.5 * 10)
    for a, b in zip(
        torch.autograd.grad([t.sum() for t in got], leaves),
        torch.autograd.grad([t.sum() for t in exact], wide),
    ):
        assert torch.allclose(a.double(), b, rtol=torch.finfo(s.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("exponent", [18, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_project(compare, size, device, ours, dtype, exponent):
    js = torch.randn(64, size(exponent) // 64, device=device).to(dtype)
    for name in ours:
        verify(name, js.flip(0), js[None])
    calls = {
        name: functools.partial(project, None, js[None], None, NUMBERS, name) for name in ours
    }
    peers = {
        "eager (bernoulli)": functools.partial(eager, js, bernoulli_signs),
        "eager (randint)": functools.partial(eager, js, randint_signs),
        "torch.compile": functools.partial(compiled, js),
    }
    compare("project and reduce", js, js.nbytes, calls | peers, from_memory=True)


def gradient(s, js, projected):
    """Of the variance-reduced sliced-score loss vᵀJv + ½‖s‖², with respect to s and Jv."""
    s, js = s.detach().requires_grad_(), js.detach().requires_grad_()
    return torch.autograd.grad(projected(s, js).sum(), (s, js))


def eager_loss(s, js, signs=randint_signs):
    return (js * signs(js)).flatten(1).sum(1) + 0.5 * s.square().flatten(1).sum(1)


compiled_loss = torch.compile(eager_loss)


@pytest.mark.parametrize("exponent", [18, 24])
def bench_project_and_gradient(compare, size, device, ours, exponent):
    s, js = (torch.randn(64, size(exponent) // 64, device=device) for _ in range(2))

    def loss(name):
        def projected(s, js):
            vjv, _, ss = project(s, js[None], None, NUMBERS, name)
            return vjv + 0.5 * ss

        return projected

    losses = {name: loss(name) for name in ours} | {
        "eager (bernoulli)": functools.partial(eager_loss, signs=bernoulli_signs),
        "eager (randint)": eager_loss,
        "torch.compile": compiled_loss,
    }
    calls = {name: functools.partial(gradient, s, js, f) for name, f in losses.items()}
    compare("sliced-score reduction + gradient", s, 5 * s.nbytes, calls, from_memory=True)
