"""Softmax and products of matrices on stacks (1 + M, *), their gradients and those of these, against plain PyTorch in float64."""

import pytest
import torch

from fastscore import losses
from fastscore.dual.functions import _matmul_stack_ref, _softmax_stack_ref, matmul_stack, softmax_stack

SHAPES = [(5, 6), (2, 3, 5, 6), (1, 1, 1), (2, 0, 3)]


def stacks(M, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1 + M, *shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(M, shape):
    (s,) = stacks(M, shape)
    for dim in range(-len(shape), len(shape)):
        got, expected = softmax_stack(s, dim), _softmax_stack_ref(s, dim if dim < 0 else dim - len(shape))
        g = torch.randn_like(expected)
        assert torch.allclose(got, expected, rtol=0, atol=1e-14)
        assert torch.allclose(*(torch.autograd.grad(y, s, g)[0] for y in (got, expected)), rtol=0, atol=1e-14)
    assert torch.autograd.gradgradcheck(lambda s: softmax_stack(s, -1), s, fast_mode=True) or not s.numel()


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
    for x, y in zip(*(torch.autograd.grad(y, wanted, g, retain_graph=True) for y in (got, expected))):
        assert torch.allclose(x, y, rtol=0, atol=1e-13)
    if a.numel():
        assert torch.autograd.gradgradcheck(lambda *ts: matmul_stack(*(ts if len(ts) == 2 else (ts[0], b) if needed[0] else (a, ts[0]))),
                                            tuple(wanted), fast_mode=True)  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sliced_gradient_of_attention(dtype, masked):
    """Whole rows behind a mask, transposed operands, queries of the data and of a constant; at both orders."""
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
