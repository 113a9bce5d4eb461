"""An activation of a stack on every back end: value, tangents and gradients against float64."""

import math
import re
from pathlib import Path

import pytest
import torch

from fastscore import backend as backends
from fastscore.ops.activate import activate_dual, activate_jet
from fastscore.ops.activations import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = [name for name in ACTIVATIONS if name]


def problem(shape, M, dtype, name):
    """The stack and its cotangent, in `dtype` and exactly those numbers in float64.

    u keeps away from the kink of relu.
    """
    generator = torch.Generator().manual_seed(0)
    s, g = (torch.randn(1 + M, *shape, generator=generator).to(dtype) for _ in range(2))
    s[0] *= 4
    if name == "relu":
        s[0] += s[0].sign() * 0.125
    return s, g, s.double(), g.double()


def function(name):
    """PyTorch's own; of gelu's approximation the second derivative is hundreds of units off
    there, where 1 - tanh² cancels."""
    if name == "gelu_tanh":
        return lambda u: _gelu_tanh(u, u.clamp(-12, 12))
    return ACTIVATIONS[name].function


def _gelu_tanh(u, v):
    """v is u where it matters.

    Beyond, the sigmoid is 0 or 1 to 60 digits and the powers of its exponential overflow.
    """
    return u / (1 + (-math.sqrt(8 / math.pi) * (v + 0.044715 * v**3)).exp())


def exact(name, s):
    """By autograd of the function in float64."""
    u = s[0].detach().requires_grad_()
    slope = torch.autograd.grad(function(name)(u).sum(), u, create_graph=True)[0]
    return torch.cat([ACTIVATIONS[name].function(s[:1]), slope.detach() * s[1:]])


def exact_gradient(name, s, g):
    u = s[0].detach().requires_grad_()
    t = s[1:].detach().requires_grad_()
    y = function(name)(u)
    slope = torch.autograd.grad(y.sum(), u, create_graph=True)[0]
    gu, gt = torch.autograd.grad((y * g[0]).sum() + (slope * t * g[1:]).sum(), (u, t))
    return torch.cat([gu[None], gt])


def close(got, expected, dtype, units=20):
    """One rounding to the element type, and before it `units` of the compute dtype relative to
    the larger of the result and 1."""
    eps = torch.finfo(dtype).eps
    least = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return bool(
        (
            (got.double() - expected).abs()
            <= eps * expected.abs() + units * least * (1 + expected.abs())
        ).all()
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_tangents_and_gradient(backend, dtype, name):
    if backend == "reference" and dtype.itemsize == 2:
        pytest.skip("plain PyTorch rounds every step to the element type")
    # tails, whole programs, nothing.
    for shape, M in (((3, 5, 7), 1), ((2, 600), 3), ((1024,), 2), ((2, 0, 3), 1)):
        s, g, s_, g_ = problem(shape, M, dtype, name)
        y = activate_dual(s.requires_grad_(), name)
        assert y.dtype == dtype and close(y.detach(), exact(name, s_), dtype)
        with torch.no_grad():
            assert torch.equal(activate_dual(s, name), y)
        # f'' meets a sum of up to three products of two normals.
        assert close(torch.autograd.grad(y, s, g)[0], exact_gradient(name, s_, g_), dtype, 60)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_range(backend, name):
    """Relative to the larger of the result and 1, from where exp underflows to where it overflows.

    Infinities and NaN as in PyTorch.
    """
    ends = [-1e4, -200.0, -90.0, -88.0, -40.0, -1e-3, -1e-6, -1e-30, -0.0]
    u = torch.cat([torch.tensor(ends), torch.linspace(-30, 30, 2001), -torch.tensor(ends)])
    s = torch.stack([u, torch.ones_like(u)])
    keep = u != 0 if name == "relu" else u == u
    assert close(activate_dual(s, name)[:, keep], exact(name, s.double())[:, keep], torch.float32)
    beyond = torch.tensor([float("inf"), float("nan")])
    expected = ACTIVATIONS[name].function(beyond.double())
    # PyTorch's gelu(inf) is NaN in float32
    for got in activate_dual(beyond[None], name) if backend != "reference" else ():
        assert torch.equal(got[:1].double(), expected[:1]) and bool(got[1].isnan())


@pytest.mark.parametrize("name", NAMES)
def test_slopes_at_zero_are_those_of_double_backprop(backend, name):
    """elu's second slope jumps there, where the normalised pixels of a blank image are."""
    u = torch.tensor([0.0, -0.0])
    s = torch.stack([u, torch.full_like(u, 2), torch.full_like(u, -3)])
    g = torch.arange(1.0, 7).reshape(3, 2)
    expected = exact_gradient(name, s.double(), g.double())
    leaf = s.clone().requires_grad_()
    found = torch.autograd.grad(activate_dual(leaf, name), leaf, g)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)

    # (value, tangent, and f'' t² of a second-order number) at 0.
    jet = torch.stack([u, torch.full_like(u, 2), torch.zeros_like(u)])
    x = u.double().requires_grad_()
    slope = torch.autograd.grad(function(name)(x).sum(), x, create_graph=True)[0]
    bend = torch.zeros_like(x)
    if slope.requires_grad:
        bend = torch.autograd.grad(slope.sum(), x)[0]
    found = activate_jet(jet, 1, name)[2]
    torch.testing.assert_close(found.double(), 4 * bend, rtol=1e-6, atol=1e-6)


def test_any_layout(backend):
    s = torch.randn(3, 4, 5, 6).transpose(1, 3)
    expected = activate_dual(s.contiguous(), "silu", backend="reference")
    leaf = s.detach().requires_grad_()
    y = activate_dual(leaf, "silu")
    assert torch.allclose(y, expected, atol=1e-6)
    g = torch.randn(3, 4, 5, 6).transpose(1, 3)
    again = s.contiguous().requires_grad_()
    reference = torch.autograd.grad(activate_dual(again, "silu", backend="reference"), again, g)[0]
    assert torch.allclose(torch.autograd.grad(y, leaf, g)[0], reference, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_at_every_order(backend, name):
    s = problem((3,), 2, torch.float64, name)[0].requires_grad_()
    fast = backend == "triton"   # the interpreter is slow: a random direction instead of every one
    assert torch.autograd.gradcheck(lambda s: activate_dual(s, name), s, fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda s: activate_dual(s, name), s, fast_mode=fast)


def test_compiled_equals_eager(backend):
    if backend == "triton":
        pytest.skip("the interpreter cannot be compiled")
    s = torch.randn(3, 4, 50, requires_grad=True)
    compiled = torch.compile(lambda s: activate_dual(s.sin(), "gelu"), fullgraph=True)
    assert torch.allclose(compiled(s), activate_dual(s.sin(), "gelu"), atol=1e-6)
    gradients = [
        torch.autograd.grad(f(s).square().sum(), s)[0]
        for f in (compiled, lambda s: activate_dual(s.sin(), "gelu"))
    ]
    assert torch.allclose(*gradients, atol=1e-5)


def test_raw_op_refuses_derivatives_and_passes_opcheck(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch, no raw op")
    op = backends.raw(backend, "activate_dual")
    s = torch.randn(2, 30)
    for g in (None, torch.randn(2, 30)):
        torch.library.opcheck(op, (torch.empty_like(s), s, g, ACTIVATIONS["tanh"].code))
    with pytest.raises(NotImplementedError, match="has no forward-mode rule"):
        torch.func.jvp(lambda s: (op(torch.empty_like(s), s, None, 1), s)[1], (s,), (s,))
    with pytest.raises(NotImplementedError, match="has no derivative rule"):
        op(torch.empty_like(s), s.clone().requires_grad_(), None, 1)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_second_gradients_far_out(backend, dtype, name):
    """Where a gelu is flat its higher derivatives are 0.

    A power of u that float16 cannot hold made 0 times infinity of them.
    """
    u = torch.tensor([-1000.0, -300, -100, -20, 20, 100, 300, 1000], dtype=dtype)
    slope, curvature = ACTIVATIONS[name].slopes(u.requires_grad_())
    assert slope.tolist() == [0] * 4 + [1] * 4 and not curvature.any()
    assert not torch.autograd.grad(curvature.sum(), u)[0].any()
    # There the value is PyTorch's own function, whose second derivative in float16 is NaN
    if backend == "reference":
        return
    s = torch.stack([u.detach(), torch.ones_like(u)]).requires_grad_()
    first = torch.autograd.grad(
        activate_dual(s, name, backend=backend).sum(), s, create_graph=True
    )[0]
    assert not torch.autograd.grad(first.square().sum(), s)[0].any()


def test_the_numbers_of_activations_are_those_of_the_kernels():
    """Three languages, one order.

    A name that moved in one of them would run another activation in silence.
    """
    names = [
        name or "identity" for name, _ in sorted(ACTIVATIONS.items(), key=lambda item: item[1].code)
    ]
    assert [a.code for a in ACTIVATIONS.values()] == list(range(len(ACTIVATIONS)))

    root = Path(__file__).parent.parent
    cpp = re.search(
        r"enum Activation : int \{(.*?)\}", (root / "csrc/activate.h").read_text()
    )[1]
    assert [name.strip().removeprefix("k").lower() for name in cpp.split(",")] == [
        n.replace("_", "") for n in names
    ]

    triton = re.search(
        r"^([A-Z_, ]+) = \(\s*tl.constexpr",
        (root / "kernels/activation.py").read_text(),
        re.MULTILINE,
    )[1]
    assert [name.strip().lower() for name in triton.split(",")] == names
