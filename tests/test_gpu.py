"""On a GPU: the same words, the same values, the same law."""

import pytest
import torch

import fastscore
from fastscore import backend as backends
from fastscore import random

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def gpu_backend(request):
    reason = backends.why_not(request.param, "cuda")
    if reason is not None:
        pytest.skip(reason)
    with fastscore.use_backend(request.param):
        yield request.param


def cpu(function, *args, **kwargs):
    with fastscore.use_backend("reference"):
        return function(*(a.detach().cpu() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)


def close(got, expected, dtype):
    got, expected = got.double().cpu(), expected.double()
    return bool(((got - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 5e-6).all())


@pytest.mark.parametrize("offset", [0, 3, 2**31 - 2, 2**32 + 5])
@pytest.mark.parametrize("kind", ["words", "uniform", "normal", "rademacher"])
def test_noise_equals_that_of_the_cpu(kind, offset):
    key = {"seed": -(2**40) - 1, "step": 3, "stream": 9, "substream": 2, "offset": offset}
    got, expected = getattr(random, kind)(10_007, device="cuda", **key).cpu(), cpu(getattr(random, kind), 10_007, **key)
    assert torch.equal(got, expected) if kind != "normal" else torch.allclose(got, expected, atol=1e-6, rtol=5e-7)


def test_normals_are_within_a_millionth_or_four_ulp():
    """2^30 of them: half a billion radii, up to about 6.3."""
    worst = 0.0
    for step in range(64):
        key = {"seed": 1, "step": step, "stream": 9, "device": "cuda", "dtype": torch.float64}
        worst = max(worst, float((random.normal(2**24, **key) - random.normal(2**24, backend="reference", **key)).abs().max()))
    assert worst <= 4 * 2**-21   # four units of the last place of a normal in [4, 8)


def layouts():
    x = torch.randn(6, 3, 8, 10)
    yield pytest.param(x, id="contiguous")
    yield pytest.param(torch.randn(3, 4096, 3), id="whole-tiles")
    yield pytest.param(torch.randn(2, 4099), id="tile-and-tail")
    yield pytest.param(x.to(memory_format=torch.channels_last), id="channels-last")
    yield pytest.param(x.transpose(1, 3), id="transposed")
    yield pytest.param(torch.cat([x, x])[3:, :, 1:], id="storage-offset")
    yield pytest.param(x[:0], id="empty")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x", layouts())
@pytest.mark.parametrize("offset", [0, 3])
def test_ops_equal_those_of_the_cpu(dtype, x, offset):
    x = x.to("cuda", dtype)
    s, each = torch.randn_like(x), torch.rand(len(x), device="cuda")
    for e in (0.3, each, torch.tensor(0.3, device="cuda")):
        key = {"seed": 5, "offset": offset}
        got = fastscore.langevin_step(x, s, e, **key)
        assert got.stride() == torch.empty_like(x).stride()
        assert close(got, cpu(fastscore.langevin_step, x, s, e, **key), dtype)
        assert close(fastscore.perturb(x, e, **key), cpu(fastscore.perturb, x, e, **key), dtype)
        loss = fastscore.denoising_loss(s, e, **key).double().cpu()
        assert torch.allclose(loss, cpu(fastscore.denoising_loss, s, e, **key).double(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 1), (300, 2), (7, 33), (3, 1025), (2, 100_000)], ids=str)
def test_loss_at_every_group_size(shape):
    s = torch.randn(shape, device="cuda", requires_grad=True)
    loss = fastscore.denoising_loss(s, 0.5, seed=5)
    assert torch.allclose(loss.cpu(), cpu(fastscore.denoising_loss, s.detach(), 0.5, seed=5), rtol=1e-5)
    z = random.normal(shape, seed=5, stream=random.PERTURB, device="cuda")
    assert torch.allclose(torch.autograd.grad(loss.sum(), s)[0], 0.5 * (0.5 * s + z).detach(), atol=3e-6)


def test_derivatives_in_every_mode():
    s = torch.randn(2, 5, dtype=torch.float64, device="cuda", requires_grad=True)
    e = torch.rand(2, dtype=torch.float64, device="cuda").add(0.1).requires_grad_()
    for f in (lambda s, e: fastscore.langevin_step(s.sin(), s, e, seed=3), lambda s, e: fastscore.denoising_loss(s, e, seed=3)):
        assert torch.autograd.gradcheck(f, (s, e), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, (s, e), check_fwd_over_rev=True)


def test_compiled_equals_eager():
    x = torch.randn(64, 100, device="cuda", requires_grad=True)
    f = torch.compile(lambda x, step: fastscore.langevin_step(x, x.sin(), 0.1, seed=4, step=step), fullgraph=True)
    for step in range(3):
        assert torch.allclose(f(x, step), fastscore.langevin_step(x, x.sin(), 0.1, seed=4, step=step), atol=2e-6)
    assert torch.allclose(torch.autograd.grad(f(x, 0).sum(), x)[0], 1 + 0.05 * x.cos(), atol=1e-6)


def test_stationary_variance_matches_closed_form():
    n, x = 2**20, random.normal((2**20,), seed=9, stream=1024, device="cuda") * (8 / 7) ** 0.5
    for step in range(60):
        fastscore.langevin_step(x, -x, 0.5, seed=7, step=step, out=x)
    assert abs(float(x.double().var()) - 8 / 7) < 5 * 8 / 7 * (2 / n) ** 0.5


def test_a_captured_graph_advances_with_its_step():
    x, step = torch.zeros(5000, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    fastscore.langevin_step(x, x, 0.1, seed=1, step=step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fastscore.langevin_step(x, x, 0.1, seed=1, step=step)
        step += 1
    for k in range(3):
        graph.replay()
        assert torch.equal(y, fastscore.langevin_step(x, x, 0.1, seed=1, step=k))
