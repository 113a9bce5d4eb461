"""Sliced score matching of the field's networks as their authors lay them out.

Loss and gradient of every parameter, one CPU thread.

The peer is double backprop as the authors' own losses write it, one projection. "cpp, stock norms"
is ours on the network untouched, "cpp" after `replace_norms`.
"""

import copy
import functools
import warnings

import pytest
import torch
from networks import DiT, RefineNet
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastscore
from fastscore import losses
from fastscore.losses.projections import directions


@pytest.fixture(autouse=True)
def one_thread(threads, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def no_detour():
    """A network that leaves the path of one call is a failure, not a slow row."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=fastscore.FallbackWarning)
        yield


def official(score, parameters, x, v):
    """½‖s‖² + vᵀ(∂s/∂x)v by two backward passes."""
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):   # fused attention cannot be differentiated twice
        s = score(x)
    jv = torch.autograd.grad((s * v).sum(), x, create_graph=True)[0]
    loss = (0.5 * s.square().flatten(1).sum(1) + (v * jv).flatten(1).sum(1)).mean()
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def ours_loss(score, parameters, x, v):
    return torch.autograd.grad(losses.sliced(score, x, v=v).mean(), parameters, allow_unused=True)


def ncsn(small):
    net = RefineNet(1, 4 if small else 32, levels=10)
    return (
        net,
        (2 if small else 8, 1, 8 if small else 28, 8 if small else 28),
        lambda B: torch.arange(B) % 10,
    )


def ncsnv2(small):
    net = RefineNet(3, 4 if small else 32, levels=None)
    return net, (2, 3, 8, 8) if small else (8, 3, 32, 32), None


def unet(small):
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(
        sample_size=8 if small else 32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16) if small else (32, 64, 64),
        norm_num_groups=4 if small else 8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D")
        if small
        else ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D")
        if small
        else ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    net.forward = functools.partial(_sample, net.forward)
    return net, (2, 3, 8, 8) if small else (8, 3, 32, 32), lambda B: torch.arange(B)


def _sample(forward, x, t):
    return forward(x, t).sample


def dit(small):
    net = DiT(4, 8, 2, 16, 1, 2) if small else DiT(4, 16, 2, 192, 4, 3)
    return net, (2, 4, 8, 8) if small else (8, 4, 16, 16), lambda B: torch.linspace(0, 1, B)


@pytest.mark.parametrize(
    "build", [ncsn, ncsnv2, unet, dit], ids=["NCSN", "NCSNv2", "diffusers UNet2DModel", "DiT"]
)
def bench_network(compare, device, ours, request, build):
    torch.manual_seed(0)
    net, shape, condition = build(request.config.option.smoke)
    net = net.to(device)
    x = torch.rand(shape, device=device)
    arguments = () if condition is None else (condition(len(x)).to(device),)
    v = directions("bench", x, 1, seed=0)[0]
    swapped = copy.deepcopy(net)
    fastscore.nn.replace_norms(swapped)

    def of(loss, network):
        parameters = [p for p in network.parameters() if p.requires_grad]
        return lambda: loss(lambda z: network(z, *arguments), parameters, x, v)

    calls = {
        ours[0]: of(ours_loss, swapped),
        "cpp, stock norms": of(ours_loss, net),
        "eager": of(official, net),
    }
    expected = calls["eager"]()
    for name in (ours[0], "cpp, stock norms"):
        for a, b in zip(calls[name](), expected, strict=True):
            assert (a is None) == (b is None)
            # float32, through up to 60 layers.
            assert a is None or float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-5
    name = request.node.callspec.id
    compare(f"sliced loss + gradient, {name}, 1 thread", x, 2 * x.nbytes, calls)
