"""Plain sliced score matching of an energy: loss and gradient of every parameter, one CPU thread.

"eager" is double backprop as it is usually written, on a batch repeated M times; "func.jvp of
func.grad" is forward over reverse mode, "reverse over forward" the gradient of vᵀ∇f by stock
forward mode. The ceiling is the work that nobody can avoid: the three matrix products of every
linear layer on the values, first and second derivatives, less what is zero before the first bend
and the gradient of x.
"""

import functools

import pytest
import torch
from torch import nn

from fastscore import losses
from fastscore.models import EnergyMLP, EnergyScore


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


def finish(slope, curvature, net):
    loss = (curvature + 0.5 * slope.square()).mean()
    # The last bias has none.
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)


def jets(net, x, v):
    score = EnergyScore(net)
    return torch.autograd.grad(
        losses.sliced(score, x, v=v, variance_reduced=False).mean(),
        list(net.parameters()),
        allow_unused=True,
    )


def double_backprop(net, x, v):
    tiled, flat = x.repeat(len(v), *(1,) * (x.dim() - 1)).requires_grad_(), v.flatten(0, 1)
    (s,) = torch.autograd.grad(net(tiled).sum(), tiled, create_graph=True)
    slope = (s * flat).flatten(1).sum(1)
    (hv,) = torch.autograd.grad(slope.sum(), tiled, create_graph=True)
    return finish(slope, (hv * flat).flatten(1).sum(1), net)


def forward_over_reverse(net, x, v):
    gradient = torch.func.grad(lambda x: net(x).sum())
    pairs = [torch.func.jvp(gradient, (x,), (d,)) for d in v]
    slope = torch.stack([(s * d).flatten(1).sum(1) for (s, _), d in zip(pairs, v)])
    return finish(
        slope, torch.stack([(hv * d).flatten(1).sum(1) for (_, hv), d in zip(pairs, v)]), net
    )


def reverse_over_forward(net, x, v):
    leaf = x.clone().requires_grad_()
    slopes = torch.stack([torch.func.jvp(net, (leaf,), (d,))[1].reshape(len(x)) for d in v])
    rows = [torch.autograd.grad(slope.sum(), leaf, create_graph=True)[0] for slope in slopes]
    return finish(slopes, torch.stack([(hv * d).flatten(1).sum(1) for hv, d in zip(rows, v)]), net)


def verify(net, x, v, *calls):
    expected = double_backprop(net.double(), x.double(), v.double())
    net.float()
    for call in calls:
        for a, b in zip(call(net, x, v), expected):
            if b is not None and a is not None:
                # float32 sums of up to a million terms.
                assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6, call


def products(net, rows, first_rows):
    """The matrix products of every linear layer.

    The first on straight jets, and without the gradient of its input.
    """
    layers = [(m.weight, rows, True) for m in net.modules() if isinstance(m, nn.Linear)]
    layers[0] = (layers[0][0], first_rows, False)
    pairs = [
        (
            w,
            torch.randn(n, w.shape[1], device=w.device),
            torch.randn(n, w.shape[0], device=w.device),
            g,
        )
        for w, n, g in layers
    ]

    def call():
        with torch.no_grad():
            for w, a, g, back in pairs:
                a @ w.T, g.T @ a
                if back:
                    g @ w

    return call


def run(compare, ours, name, net, x, v, ceiling=None):
    peers = {
        "func.jvp of func.grad": forward_over_reverse,
        "reverse over forward": reverse_over_forward,
    }
    calls = {ours[0]: jets, "eager": double_backprop} | peers
    calls = {name: functools.partial(call, net, x, v) for name, call in calls.items()}
    compare(
        f"energy, sliced loss + gradient, {name}, M={len(v)}, 1 thread",
        x,
        (1 + len(v)) * x.nbytes,
        calls,
        ceiling=ceiling,
    )


@pytest.mark.parametrize("M", [1, 4])
@pytest.mark.parametrize("dim, width, batch", [(2, 128, 1024), (784, 1024, 256)])
def bench_energy_mlp(compare, device, ours, request, dim, width, batch, M):
    if request.config.option.smoke:
        dim, width, batch = 4, 16, 8
    torch.manual_seed(0)
    net, x = EnergyMLP(dim, width, depth=1).to(device), torch.rand(batch, dim, device=device)
    nn.init.normal_(net.last.weight, std=width**-0.5)
    v = torch.randn(M, *x.shape, device=device).sign()
    verify(net, x, v, jets, forward_over_reverse, reverse_over_forward)
    run(
        compare,
        ours,
        f"EnergyMLP {dim}-{width}×{width}×2-1",
        net,
        x,
        v,
        products(net, (1 + 2 * M) * batch, (1 + M) * batch),
    )


def conv_energy(channels):
    def conv(inputs, stride=1):
        return nn.Conv2d(inputs, channels, 3, stride=stride, padding=1)

    layers = [
        conv(1),
        nn.SiLU(),
        conv(channels, 2),
        nn.GroupNorm(4, channels),
        nn.SiLU(),
        conv(channels),
        nn.SiLU(),
        nn.AvgPool2d(2),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(1))


def bench_conv_energy(compare, device, ours, request):
    channels, batch, side = (8, 4, 8) if request.config.option.smoke else (32, 32, 28)
    torch.manual_seed(0)
    net, x = conv_energy(channels), torch.rand(batch, 1, side, side)
    net(x)
    net, x = net.to(device), x.to(device)
    v = torch.randn(1, *x.shape, device=device).sign()
    verify(net, x, v, jets)
    run(compare, ours, f"3 convolutions of {channels}", net, x, v)
