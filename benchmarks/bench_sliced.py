"""Sliced score matching: loss and gradient of every parameter, one CPU thread or a GPU in float32.

"eager" is double backprop on a batch repeated M times, as it is usually written; the ceiling is not
a copy here but the work that nobody can avoid: the 3(1+M)F of the network's matrix products, or its
convolutions on the stacked batch with their gradients. "func.jvp" gives wrong gradients through the
stock norms, and is timed all the same. "compiled func.vjp" is double backprop with one forward pass
for all directions under torch.compile, which refuses the other ways to write it. We draw the signs
within the time; the peers get them.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastscore
from fastscore import losses
from fastscore.losses.projections import directions


@pytest.fixture(autouse=True)
def one_thread(threads, monkeypatch):
    torch.set_num_threads(1)
    # float32 for all: TensorFloat-32 keeps three digits.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def ours(ours):
    return [name for name in ours if name != "cuda"]   # a GPU runs the Triton kernels


def ours_loss(net, x, M):
    return torch.autograd.grad(
        losses.sliced(net, x, projections=M, seed=0).mean(), list(net.parameters())
    )


def double_backprop(net, x, v):
    M = len(v)
    tiled = x.repeat(M, *(1,) * (x.dim() - 1)).requires_grad_()
    s, flat = net(tiled), v.flatten(0, 1)
    js = torch.autograd.grad((s * flat).sum(), tiled, create_graph=True)[0]
    loss = ((js * flat).sum() + 0.5 * s.square().sum()) / M / len(x)
    return torch.autograd.grad(loss, list(net.parameters()))


def func_jvp(net, x, v):
    pairs = [torch.func.jvp(net, (x,), (d,)) for d in v]
    s, js = pairs[0][0], torch.stack([t for _, t in pairs])
    loss = ((js * v).sum() / len(v) + 0.5 * s.square().sum()) / len(s)
    return torch.autograd.grad(loss, list(net.parameters()))


def vjp_loss(net, parameters, x, v):
    s, pull = torch.func.vjp(lambda x: torch.func.functional_call(net, parameters, (x,)), x)
    return (sum((pull(d)[0] * d).sum() for d in v) / len(v) + 0.5 * s.square().sum()) / len(s)


def compiled_vjp(net, x, v, smoke):
    """Plain in a smoke run: a compilation takes ten seconds."""
    gradient = torch.func.grad(functools.partial(vjp_loss, net))
    gradient = gradient if smoke else torch.compile(gradient, dynamic=False)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    return lambda: list(gradient(parameters, x, v).values())


def verify(found, reference, x, v, tolerance=1e-4):
    for a, b in zip(found, double_backprop(reference, x, v), strict=True):
        # float32 sums of up to a million terms.
        assert float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-6


def mlp(*widths):
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def products(net, rows):
    """The three matrix products of every linear layer on `rows` rows, narrow ones in the order
    that BLAS is quick at."""
    weights = [layer.weight for layer in net if isinstance(layer, nn.Linear)]
    pairs = [
        (
            torch.randn(rows, w.shape[1], device=w.device),
            torch.randn(rows, w.shape[0], device=w.device),
        )
        for w in weights
    ]

    def call():
        with torch.no_grad():
            for w, (a, g) in zip(weights, pairs):
                (
                    a @ w.T,
                    g @ (w.T.contiguous().T if len(w) < 16 else w),
                    a.T @ g if w.shape[1] < 16 else g.T @ a,
                )

    return call


@pytest.mark.parametrize("M", [1, 4])
@pytest.mark.parametrize(
    "widths, batch", [((2, 128, 128, 2), 1024), ((784, 1024, 1024, 784), 256)], ids=str
)
def bench_mlp(compare, device, ours, request, widths, batch, M):
    if request.config.option.smoke:
        widths, batch = tuple(min(w, 16) for w in widths), 8
    torch.manual_seed(0)
    net, x = mlp(*widths).to(device), torch.rand(batch, widths[0], device=device)
    v = directions("bench", x, M, seed=0)
    calls = {
        ours[0]: functools.partial(ours_loss, net, x, M),
        "eager": functools.partial(double_backprop, net, x, v),
    }
    calls |= {"func.jvp": functools.partial(func_jvp, net, x, v)}
    calls |= {"compiled func.vjp": compiled_vjp(net, x, v, request.config.option.smoke)}
    for call in calls.values():
        verify(call(), net, x, v)
    name = "×".join(map(str, widths))
    compare(
        f"sliced loss + gradient, MLP {name}, M={M}, 1 thread",
        x,
        (1 + M) * x.nbytes,
        calls,
        ceiling=products(net, (1 + M) * batch),
    )


class Block(nn.Module):
    """A residual block of an InstanceNorm++ network, on our layer or on PyTorch's."""

    def __init__(self, channels, convolution, stock):
        super().__init__()
        self.norm, self.stock = fastscore.nn.InstanceNorm2dPlus(channels, activation="elu"), stock
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if convolution else nn.Identity()

    def forward(self, x):
        return x + self.conv(self._stock(x) if self.stock else self.norm(x))

    def _stock(self, x):
        n, means = self.norm, x.mean((2, 3))
        m = (means - means.mean(1, keepdim=True)) / torch.sqrt(means.var(1, keepdim=True) + 1e-5)
        h = F.instance_norm(x) + (n.alpha * m)[..., None, None]
        return F.elu(n.gamma[:, None, None] * h + n.beta[:, None, None])


def convolutions(channels, shape, device):
    net = nn.Sequential(*[nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]).to(device)
    x, g = (torch.randn(shape, device=device) for _ in range(2))
    x.requires_grad_()
    return lambda: torch.autograd.grad(net(x), [x, *net.parameters()], g)


@pytest.mark.parametrize(
    "convolution", [True, False], ids=["with-convolutions", "without-convolutions"]
)
def bench_conv_blocks(compare, device, ours, request, convolution):
    shape = (4, 8, 8, 8) if request.config.option.smoke else (32, 64, 16, 16)
    C = shape[1]
    torch.manual_seed(0)
    net = nn.Sequential(*[Block(C, convolution, stock=False) for _ in range(3)]).to(device)
    reference = nn.Sequential(*[Block(C, convolution, stock=True) for _ in range(3)]).to(device)
    reference.load_state_dict(net.state_dict())
    x = torch.randn(shape, device=device)
    v = directions("bench", x, 1, seed=0)
    calls = {
        ours[0]: functools.partial(ours_loss, net, x, 1),
        "eager": functools.partial(double_backprop, reference, x, v),
    }
    calls |= {"double backprop of ours": functools.partial(double_backprop, net, x, v)}
    calls |= {"compiled func.vjp": compiled_vjp(reference, x, v, request.config.option.smoke)}
    verify(calls[ours[0]](), reference, x, v)
    # 1.4e-4 off at this size; uncompiled 1e-6
    verify(calls["compiled func.vjp"](), reference, x, v, 1e-3)
    calls |= {"func.jvp": functools.partial(func_jvp, reference, x, v)}
    stacked = convolutions(C, (2 * shape[0], *shape[1:]), device) if convolution else None
    name = "conv blocks" if convolution else "blocks without conv"
    compare(f"sliced loss + gradient, {name}, 1 thread", x, 2 * x.nbytes, calls, ceiling=stacked)
