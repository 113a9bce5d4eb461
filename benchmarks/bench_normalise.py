"""instance_norm_plus with ELU and group_norm_modulate with SiLU, one CPU thread.

Bytes that must move (s: element size): forward 2s (read x, write y); with its backward 5s (and read
x, gy, write gx); tangent 4s (read x, t, write y, ẏ); the sliced-score gradient 11s (tangent; then
read x, t, gy, gẏ, write gx, gt, and once more x to the end).
"""

import functools
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from harness import asked

import fastscore
from fastscore import backend as backends
from fastscore.ops.normalise import Form
from fastscore.ops.normalise_core import in_clusters

SHAPES = [(32, 128, 32, 32), (64, 3, 32, 32), (128, 256, 8, 8)]
BEYOND_L2 = (128, 128, 32, 32)   # of a GPU: 64 MiB in float32


@pytest.fixture(autouse=True)
def large_on_a_gpu_alone(request, device):
    if device == "cpu" and request.node.callspec.params.get("shape") == BEYOND_L2:
        pytest.skip("for GPUs")


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


@pytest.fixture
def ours(ours):
    return [name for name in ours if name != "cuda"]   # which has one case: below


def stock(x, gamma, alpha, beta):
    """Instance norm ++ as a good engineer writes it over PyTorch's own layer."""
    means = x.mean((2, 3))
    m = (means - means.mean(1, keepdim=True)) / torch.sqrt(means.var(1, keepdim=True) + 1e-5)
    h = F.instance_norm(x) + (alpha * m)[..., None, None]
    return F.elu(gamma[:, None, None] * h + beta[:, None, None])


def ours_as(name):
    return functools.partial(fastscore.instance_norm_plus, activation="elu", backend=name)


def forward_backward(f, x, coefficients, g):
    leaves = [t.detach().requires_grad_() for t in (x, *coefficients)]
    return torch.autograd.grad(f(*leaves), leaves, g)


def tangent(f, x, coefficients, t):
    return torch.func.jvp(lambda x: f(x, *coefficients), (x,), (t,))


def forward_mode(f, x, coefficients, t):
    """Gradient of Σ v ẏ + Σ y² to x and the coefficients, reverse over forward."""
    leaves = [c.detach().requires_grad_() for c in (x, *coefficients)]
    y, ty = torch.func.jvp(lambda x: f(x, *leaves[1:]), (leaves[0],), (t,))
    return torch.autograd.grad((ty * t).sum() + y.square().sum(), leaves)


def double_backprop(f, x, coefficients, t):
    leaves = [c.detach().requires_grad_() for c in (x, *coefficients)]
    y = f(*leaves)
    ty = torch.autograd.grad((y * t).sum(), leaves[0], create_graph=True)[0]
    return torch.autograd.grad((ty * t).sum() + y.square().sum(), leaves)


def problem(shape, dtype, where):
    device, smoke = where
    shape = [min(n, 8) for n in shape] if smoke else shape
    x, t = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return x, t, [torch.rand(shape[1], device=x.device).add(0.5).to(dtype) for _ in range(3)]


def check(got, expected, dtype):
    """Against float64, relative to the largest value.

    Forty roundings of the element type or of float32 sums.
    """
    scale = expected.double().abs().max()
    assert (
        float((got.double() - expected.double()).abs().max() / scale)
        < 40 * torch.finfo(dtype).eps + 1e-5
    )


@pytest.fixture
def where(request, device):
    return device, request.config.option.smoke


@pytest.mark.parametrize("shape", [*SHAPES, BEYOND_L2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_instance_norm_plus(compare, where, ours, dtype, shape):
    x, t, c = problem(shape, dtype, where)
    exact = stock(x.double(), *(k.double() for k in c))
    compiled = torch.compile(stock)
    with torch.no_grad():
        for name in ours:
            check(ours_as(name)(x, *c), exact, dtype)
        calls = {
            name: functools.partial(ours_as(asked(name, x.device, cuda=False)), x, *c)
            for name in ours
        }
        peers = {
            "eager": functools.partial(stock, x, *c),
            "torch.compile": functools.partial(compiled, x, *c),
        }
        compare("instance_norm_plus", x, 2 * x.nbytes, calls | peers, from_memory=True)


@pytest.mark.parametrize(
    "shape", [(32, 128, 32, 32), BEYOND_L2, (64, 128, 64, 64)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_norm_in_clusters(compare, where, device, request, dtype, shape):
    """CUDA C++, whose clusters of blocks read x once, beside Triton's two passes."""
    if backends.why_not("cuda", device) is not None:
        pytest.skip("CUDA C++ is not built")
    if where[1]:
        if shape[0] != 32:
            pytest.skip("one size is enough for a dry run")
        shape = 2, 20, 30, 30
    x = torch.randn(shape, device=device).to(dtype)
    c = [torch.rand(shape[1], device=device).add(0.5).to(dtype) for _ in range(3)]
    if not in_clusters(x, Form(0, True, True, 1e-5, "elu")):
        pytest.skip("no cluster takes such a sample here")

    exact = stock(x.double(), *(k.double() for k in c))
    with torch.no_grad():
        for name in ("cuda", "triton"):
            check(ours_as(name)(x, *c), exact, dtype)
        calls = {name: functools.partial(ours_as(name), x, *c) for name in ("cuda", "triton")}
        peers = {"eager": lambda: stock(x, *c)}
        compare("instance_norm_plus in clusters", x, 2 * x.nbytes, calls | peers)


@pytest.mark.parametrize("shape", [*SHAPES, BEYOND_L2], ids=str)
def bench_forward_backward(compare, where, ours, shape):
    x, g, c = problem(shape, torch.float32, where)
    exact = forward_backward(stock, x.double(), [k.double() for k in c], g.double())
    compiled = torch.compile(stock)
    for name in ours:
        for a, b in zip(forward_backward(ours_as(name), x, c, g), exact):
            check(a, b, torch.float32)
    calls = {name: functools.partial(forward_backward, ours_as(name), x, c, g) for name in ours}
    peers = {
        "eager": functools.partial(forward_backward, stock, x, c, g),
        "torch.compile": functools.partial(forward_backward, compiled, x, c, g),
    }
    compare("instance_norm_plus + backward", x, 5 * x.nbytes, calls | peers, from_memory=True)


@pytest.mark.parametrize("shape", [*SHAPES, BEYOND_L2], ids=str)
def bench_tangent(compare, where, ours, shape):
    x, t, c = problem(shape, torch.float32, where)
    exact = tangent(stock, x.double(), [k.double() for k in c], t.double())
    with torch.no_grad():
        for name in ours:
            for a, b in zip(tangent(ours_as(name), x, c, t), exact):
                check(a, b, torch.float32)
        calls = {
            name: functools.partial(
                fastscore.ops.instance_norm_plus_dual,
                x,
                t[None],
                *c,
                activation="elu",
                backend=name,
            )
            for name in ours
        }
        peers = {
            "func.jvp of ours": functools.partial(tangent, ours_as(ours[0]), x, c, t),
            "eager": functools.partial(tangent, stock, x, c, t),
        }
        compare("instance_norm_plus_dual", x, 4 * x.nbytes, calls | peers, from_memory=True)


@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
def bench_sliced_score_gradient(compare, where, ours, shape):
    """Eager is double backprop.

    The stock layer's gradient through func.jvp is wrong, and timed all the same.
    """
    x, t, c = problem(shape, torch.float32, where)
    exact = double_backprop(stock, x.double(), [k.double() for k in c], t.double())
    for name in ours:
        for a, b in zip(forward_mode(ours_as(name), x, c, t), exact):
            check(a, b, torch.float32)
    calls = {name: functools.partial(forward_mode, ours_as(name), x, c, t) for name in ours}
    peers = {
        "double backprop of ours": functools.partial(double_backprop, ours_as(ours[0]), x, c, t)
    }
    peers |= {
        "eager": functools.partial(double_backprop, stock, x, c, t),
        "func.jvp (wrong)": functools.partial(forward_mode, stock, x, c, t),
    }
    compare("sliced-score gradient of the norm", x, 11 * x.nbytes, calls | peers, from_memory=True)


def liger(x, weight, bias, scale, shift):
    """Liger's Triton group norm, the best other kernel that can be installed, and eager around
    it."""
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    h = LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], 8, 1e-5)
    return F.silu(h * (1 + scale)[..., None, None] + shift[..., None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_group_norm_modulate(compare, where, ours, dtype):
    shape = (32, 128, 32, 32)
    x, _, (weight, bias, _) = problem(shape, dtype, where)
    scale, shift = (torch.randn(x.shape[:2], device=x.device).to(dtype) for _ in range(2))

    def eager(x, weight, bias, scale, shift):
        h = F.group_norm(x, 8, weight, bias) * (1 + scale)[..., None, None] + shift[..., None, None]
        return F.silu(h)

    arguments, compiled = (weight, bias, scale, shift), torch.compile(eager)
    exact = eager(x.double(), *(a.double() for a in arguments))

    def call(name):
        ours = functools.partial(fastscore.group_norm_modulate, activation="silu", backend=name)
        return functools.partial(ours, x, 8, *arguments)

    with torch.no_grad():
        for name in ours:
            check(call(name)(), exact, dtype)
        peers = {
            "eager": functools.partial(eager, x, *arguments),
            "torch.compile": functools.partial(compiled, x, *arguments),
        }
        if where[0] == "cuda" and importlib.util.find_spec("liger_kernel"):
            peers["liger"] = functools.partial(liger, x, *arguments)
            check(peers["liger"](), exact, dtype)
        compare(
            "group_norm_modulate",
            x,
            2 * x.nbytes,
            {name: call(asked(name, x.device, cuda=False)) for name in ours} | peers,
            from_memory=True,
        )
