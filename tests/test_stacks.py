"""Softmax and products of matrices on stacks (1 + M, *), their gradients and those of these,
against plain PyTorch in float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastscore import losses
from fastscore.dual.functions import (
    _matmul_stack_ref,
    _softmax_stack_ref,
    matmul_stack,
    softmax_stack,
)

SHAPES = [(5, 6), (2, 3, 5, 6), (1, 1, 1), (2, 0, 3)]


def stacks(M, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1 + M, *shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(M, shape):
    (s,) = stacks(M, shape)
    for dim in range(-len(shape), len(shape)):
        got, expected = (
            softmax_stack(s, dim),
            _softmax_stack_ref(s, dim if dim < 0 else dim - len(shape)),
        )
        g = torch.randn_like(expected)
        assert torch.allclose(got, expected, rtol=0, atol=1e-14)
        assert torch.allclose(
            *(torch.autograd.grad(y, s, g)[0] for y in (got, expected)), rtol=0, atol=1e-14
        )
    assert (
        torch.autograd.gradgradcheck(lambda s: softmax_stack(s, -1), s, fast_mode=True)
        or not s.numel()
    )


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
def test_matmul(M, shape, needed):
    a, b = stacks(M, shape, (*shape[:-2], shape[-1], 4))
    a, b = a.requires_grad_(needed[0]), b.requires_grad_(needed[1])
    wanted = [t for t in (a, b) if t.requires_grad]
    got, expected = matmul_stack(a, b), _matmul_stack_ref(a, b)
    g = torch.randn_like(expected)
    assert torch.allclose(got, expected, rtol=0, atol=1e-13)
    for x, y in zip(
        *(torch.autograd.grad(y, wanted, g, retain_graph=True) for y in (got, expected))
    ):
        assert torch.allclose(x, y, rtol=0, atol=1e-13)
    if a.numel():
        assert torch.autograd.gradgradcheck(
            lambda *ts: matmul_stack(
                *(ts if len(ts) == 2 else (ts[0], b) if needed[0] else (a, ts[0]))
            ),
            tuple(wanted),
            fast_mode=True,
        )


PRODUCTS = [(softmax_stack, _softmax_stack_ref, (-1,), 1), (matmul_stack, _matmul_stack_ref, (), 2)]


@pytest.mark.parametrize(("by_hand", "plain", "rest", "n"), PRODUCTS, ids=["softmax", "matmul"])
def test_many_cotangents_at_once(by_hand, plain, rest, n):
    """By is_grads_batched and by torch.func around autograd.grad, as plain PyTorch takes them."""
    inputs = stacks(2, *[(3, 4, 4)] * n)
    y, z = by_hand(*inputs, *rest), plain(*inputs, *rest)
    G = torch.randn(5, *y.shape, dtype=y.dtype)

    def gradient(y, g, **how):
        return torch.autograd.grad(y, inputs, g, retain_graph=True, **how)

    expected = [torch.stack(gs) for gs in zip(*(gradient(z, g) for g in G))]
    for found in (
        gradient(y, G, is_grads_batched=True),
        torch.func.vmap(lambda g: gradient(y, g))(G),
    ):
        for a, b in zip(found, expected):
            assert torch.allclose(a, b, rtol=0, atol=1e-13)
    pushed = torch.func.jvp(lambda g: gradient(y, g), (G[0],), (G[1],))[1]
    for a, b in zip(pushed, expected):
        assert torch.allclose(a, b[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("by_hand", "plain", "rest", "n"), PRODUCTS, ids=["softmax", "matmul"])
def test_many_directions_in_half_precision(by_hand, plain, rest, n, dtype):
    """The value's gradient sums over the directions.

    Rounded once, as in PyTorch, not once a direction, which makes 3 times its error.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(65, 2, 32, 32, generator=generator).to(dtype) for _ in range(n)]
    g = torch.randn(65, 2, 32, 32, generator=generator).to(dtype)

    def gradient(f, dtype):
        ts = [t.to(dtype).requires_grad_() for t in inputs]
        return torch.autograd.grad(f(*ts, *rest), ts, g.to(dtype))

    for got, own, exact in zip(
        gradient(by_hand, dtype), gradient(plain, dtype), gradient(plain, torch.float64)
    ):
        ours, theirs = ((t[0] - exact[0]).norm() for t in (got, own))
        assert ours <= 1.1 * theirs


def test_products_are_counted():
    """FlopCounterMode: 1 + 2M products of 2 n k m, and twice as many backward."""
    a, b = stacks(2, (2, 4, 5), (2, 5, 6))
    with FlopCounterMode(display=False) as forward:
        y = matmul_stack(a, b)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    once = 2 * (2 * 4 * 5 * 6)
    assert (forward.get_total_flops(), backward.get_total_flops()) == (5 * once, 10 * once)


@pytest.mark.parametrize("shapes", [((3, 4), (4, 0)), ((3, 0), (0, 4)), ((0, 4), (4, 2))], ids=str)
def test_products_without_elements(shapes):
    a, b = stacks(2, *shapes)
    got, expected = matmul_stack(a, b), _matmul_stack_ref(a, b)
    assert torch.equal(got, expected)
    for x, y in zip(*(torch.autograd.grad(y.sum(), (a, b)) for y in (got, expected))):
        assert torch.equal(x, y)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sliced_gradient_of_attention(dtype, masked):
    """Whole rows behind a mask, transposed operands, queries of the data and of a constant.

    At both orders.
    """
    torch.manual_seed(0)
    q, k, w = (torch.nn.Linear(4, 4).to(dtype) for _ in range(3))
    x, v = torch.randn(3, 5, 4, dtype=dtype), torch.randn(2, 3, 5, 4, dtype=dtype)
    mask = torch.rand(5, 5) > 0.4
    mask[0] = False

    def score(x):
        scores = q(x) @ k(x).mT / 2
        if masked:
            scores = scores.masked_fill(~mask, -1e9)
        return scores.softmax(-1) @ w(x.tanh()) + (q.weight.expand(3, 4, 4) @ x.mT).softmax(1).mT

    parameters = [p for layer in (q, k, w) for p in layer.parameters()]
    got = losses.sliced(score, x, v=v).sum()
    z = x.clone().requires_grad_()
    s = score(z)
    expected = 0
    for u in v:
        jv = torch.autograd.grad((s * u).sum(), z, create_graph=True)[0]
        expected = expected + (0.5 * s.square() + jv * u).sum() / len(v)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    first = [torch.autograd.grad(loss, parameters, create_graph=True) for loss in (got, expected)]
    second = [torch.autograd.grad(sum(p.square().sum() for p in gs), parameters) for gs in first]
    for a, b in [(got, expected), *zip(*first), *zip(*second)]:
        assert float((a - b).abs().max()) <= tolerance * (1 + float(b.abs().max()))
