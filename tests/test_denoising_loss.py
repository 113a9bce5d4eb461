"""denoising_loss: value, derivatives, closed form, and no stored noise."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastscore
from fastscore import backend as backends
from fastscore import random
from fastscore.ops.noisy_update_functions import DOT, LOSS

KEY = {"seed": 12, "step": 1, "offset": 6}


def exact(s, sigma):
    z = random.normal(
        s.shape, stream=random.PERTURB, dtype=torch.float64, backend="reference", **KEY
    )
    sigma = (
        sigma.double().reshape(-1, *[1] * (s.dim() - 1))
        if isinstance(sigma, torch.Tensor) and sigma.dim()
        else sigma
    )
    return 0.5 * (sigma * s.double() + z).square().flatten(1).sum(1)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "shape", [(4, 1), (300, 2), (7, 3, 5, 5), (3, 1025), (2, 20_000), (0, 4), (3, 0)], ids=str
)
def test_value(backend, dtype, shape):
    if backend == "triton" and math.prod(shape) > 30_000:
        pytest.skip("too large for the interpreter")
    s, sigma = torch.randn(shape).to(dtype), torch.rand(shape[0])
    for value in (0.7, sigma):
        loss = fastscore.denoising_loss(s, value, **KEY)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.allclose(loss.double(), exact(s, value), rtol=3e-6, atol=1e-5)
        strided = s.repeat_interleave(2, -1)[..., ::2]
        assert torch.allclose(fastscore.denoising_loss(strided, value, **KEY), loss, rtol=1e-6)


def test_derivatives_in_every_mode(backend):
    s = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    sigma = torch.rand(2, dtype=torch.float64).add(0.1).requires_grad_()

    def f(s, sigma):
        return fastscore.denoising_loss(s, sigma, **KEY)

    assert gradcheck(f, (s, sigma), check_forward_ad=True)
    assert gradgradcheck(f, (s, sigma), check_fwd_over_rev=True)
    hessian = torch.func.hessian(lambda s: f(s, 0.3).sum())(s.detach())
    assert torch.allclose(hessian.reshape(6, 6), 0.09 * torch.eye(6, dtype=torch.float64))
    rows = torch.vmap(lambda s: f(s, 0.3))(torch.stack([s.detach(), 2 * s.detach()]))
    assert torch.allclose(rows[1], f(2 * s.detach(), 0.3))


@pytest.mark.parametrize(
    "nesting", ["".join(c) for k in (2, 3) for c in itertools.product("FR", repeat=k)]
)
def test_every_nesting_of_transforms(backend, nesting):
    """F: jvp, R: grad, inner to outer, against plain PyTorch on the given noise, to the noise in
    float32 that higher orders amplify."""
    torch.manual_seed(0)
    x = torch.randn(3, 4).double()
    v, z = (
        torch.ones_like(x).cumsum(-1) / 4,
        random.normal((3, 4), stream=random.PERTURB, dtype=torch.float64, **KEY),
    )

    def nested(key):
        def f(x):
            return fastscore.denoising_loss(x.sin() * x, x.square().mean(1), **key)[:, None] * x

        wrap = {
            "F": lambda f: lambda x: torch.func.jvp(f, (x,), (v * x.cos(),))[1],
            "R": lambda f: torch.func.grad(lambda x: f(x).sin().sum()),
        }
        for letter in nesting:
            f = wrap[letter](f)
        return f(x)

    expected = nested({"noise": z})
    assert float((nested(KEY) - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def test_compiled_gradient_equals_eager_gradient(backend):
    if backend == "triton":
        pytest.skip("the interpreter cannot be compiled")
    s, sigma = torch.randn(4, 6, requires_grad=True), torch.rand(4)
    compiled = torch.compile(
        lambda s: fastscore.denoising_loss(s.sin(), sigma, **KEY).sum(), fullgraph=True
    )
    expected = torch.autograd.grad(fastscore.denoising_loss(s.sin(), sigma, **KEY).sum(), s)[0]
    assert torch.allclose(torch.autograd.grad(compiled(s), s)[0], expected, atol=1e-6)


def test_no_noise_is_kept_for_the_backward_pass():
    s, kept = torch.randn(4, 50, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        fastscore.denoising_loss(s, 0.5, **KEY)
    assert all(t.data_ptr() == s.data_ptr() for t in kept) and len(kept) == 1


def test_raw_op_refuses_derivatives_and_passes_opcheck(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch, no raw op")
    s, sigma = torch.randn(3, 4), torch.rand(3)
    op, key = backends.raw(backend, "noise_reduce"), (0, 0, random.PERTURB, 0)
    arguments = [
        (torch.empty(3), s, each, 0.5, None, *key, mode)
        for each in (None, sigma)
        for mode in (LOSS, DOT)
    ]
    for tensors in arguments + [(torch.empty(3), s, sigma, 0.0, torch.tensor([3, 1]), *key, LOSS)]:
        torch.library.opcheck(op, tensors)
    for at in (1, 2):   # the score, sigma
        before, x, after = arguments[2][:at], arguments[2][at], arguments[2][at + 1 :]
        with pytest.raises(NotImplementedError, match="has no forward-mode rule"):
            torch.func.jvp(lambda x, a=before, b=after: (op(*a, x, *b), a[0])[1], (x,), (x,))
        with pytest.raises(NotImplementedError, match="has no derivative rule"):
            op(*before, x.clone().requires_grad_(), *after)


def test_expected_loss_of_a_linear_score_matches_closed_form(backend):
    """s = -A x + b on N(0, S): E = ½ tr(A (S + σ²I) Aᵀ) + ½|b|² - tr A + d/(2σ²)."""
    n, sigma = (2**20 if backend == "cpp" else 2**12), 0.8
    a, b = torch.tensor([[0.9, 0.2], [0.1, 0.5]]), torch.tensor([0.3, -0.4])
    root = torch.tensor([[1.0, 0.0], [0.5, 0.7]])
    x = random.normal((n, 2), seed=5, stream=1024, backend="cpp") @ root.T
    losses = fastscore.losses.denoising(lambda x, sigma: b - x @ a.T, x, sigma, seed=3).double()
    spread = a @ (root @ root.T + sigma**2 * torch.eye(2)) @ a.T
    expected = 0.5 * float(spread.trace()) + 0.5 * float(b @ b) - float(a.trace()) + 1 / sigma**2
    assert abs(float(losses.mean()) - expected) < 5 * float(losses.std()) / math.sqrt(n)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "give either the noise or the seed"),
        ({"seed": 1, "noise": torch.zeros(2, 3)}, "got both"),
        ({"seed": 1, "sigma": -1.0}, "sigma must be finite and >= 0"),
        ({"noise": torch.zeros(3)}, "noise must have the shape of score"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fastscore.denoising_loss(torch.zeros(2, 3), **{"sigma": 1.0, **arguments})
