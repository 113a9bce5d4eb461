"""How far the parameter gradient of a sliced-score loss is off in forward mode, network by network:
`python benchmarks/forward_mode.py`.

Stock is torch.func.jvp, beside fastscore.jvp. The loss is Σ vᵀ(∂s/∂x)v + ½(vᵀs)² in float64. Double
backprop is right for every layer (finite differences agree), so it is the yardstick.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastscore


class StockInstanceNormPlus(nn.Module):
    """Our layer's coefficients around PyTorch's own instance norm."""

    def __init__(self, ours):
        super().__init__()
        self.embed, self.activation = ours.embed, ours.activation

    def forward(self, x, labels):
        gamma, alpha, beta = (c[..., None, None] for c in self.embed(labels).chunk(3, -1))
        means = x.mean((2, 3), keepdim=True)
        m = (means - means.mean(1, keepdim=True)) / (means.var(1, keepdim=True) + 1e-5).sqrt()
        y = gamma * (F.instance_norm(x) + alpha * m) + beta
        return F.elu(y) if self.activation else y


def stock_norms(module):
    for name, child in module.named_children():
        if isinstance(child, fastscore.nn.ConditionalInstanceNorm2dPlus):
            setattr(module, name, StockInstanceNormPlus(child))
        else:
            stock_norms(child)
    return module


def double_backprop(score, x, v):
    x = x.clone().requires_grad_()
    s = score(x)
    return s, torch.stack([torch.autograd.grad(s, x, d, create_graph=True)[0] for d in v])


def stock(score, x, v):
    pairs = [torch.func.jvp(score, (x,), (d,)) for d in v]
    return pairs[0][0], torch.stack([js for _, js in pairs])


def gradient(products, score, parameters, x, v):
    s, js = products(score, x, v)
    loss = (v * js).sum() + 0.5 * (v * s).flatten(2).sum(2).square().sum()
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(
                loss, parameters, allow_unused=True, materialize_grads=True
            )
        ]
    )


def errors(net, x, v, call=None):
    """Relative, of torch.func.jvp and of fastscore.jvp."""
    score, parameters = call or net, [p for p in net.parameters() if p.requires_grad]
    # Fused attention has neither forward mode nor double backprop.
    with sdpa_kernel(SDPBackend.MATH):
        right = gradient(double_backprop, score, parameters, x, v)
        return [
            distance(lambda p=p: gradient(p, score, parameters, x, v), right)
            for p in (stock, fastscore.jvp)
        ]


def distance(found, right):
    try:
        return float((found() - right).norm() / right.norm())
    except RuntimeError:   # PyTorch's group norm, where its input is not contiguous
        return float("nan")


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class Tokens(nn.Module):
    """A transformer layer over the pixels."""

    def __init__(self, channels):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            channels, 4, 2 * channels, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, x):
        return self.layer(x.flatten(2).mT).mT.reshape(x.shape)


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def small(*middle):
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 16), *middle, conv(16, 16), nn.ELU(), conv(16, 3)).double()


def unet():
    """diffusers' U-Net with attention, if it is installed."""
    import diffusers

    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return net.double()


def networks():
    """(name, network, how to call it)."""
    norms = {
        "nn.InstanceNorm2d": nn.InstanceNorm2d(16),
        "nn.LayerNorm": nn.LayerNorm((16, 8, 8)),
        # Else func.jvp refuses the counter.
        "nn.BatchNorm2d, batch statistics": nn.BatchNorm2d(16, track_running_stats=False),
        "nn.BatchNorm2d, running statistics": nn.BatchNorm2d(16).eval(),
        "nn.GroupNorm": nn.GroupNorm(4, 16),
        "fastscore.nn.InstanceNorm2d": fastscore.nn.InstanceNorm2d(16),
        "fastscore.nn.InstanceNorm2dPlus": fastscore.nn.InstanceNorm2dPlus(16),
        "fastscore.nn.GroupNormAct": fastscore.nn.GroupNormAct(4, 16, activation="silu"),
    }
    for name, norm in norms.items():
        yield f"conv, {name}, ELU", small(norm, nn.ELU()), None
    yield "conv, nn.InstanceNorm2d, SiLU", small(nn.InstanceNorm2d(16), nn.SiLU()), None
    yield (
        "residual, nn.InstanceNorm2d",
        small(Residual(nn.InstanceNorm2d(16), nn.SiLU(), conv(16, 16))),
        None,
    )
    yield (
        "residual, nn.GroupNorm",
        small(Residual(nn.GroupNorm(4, 16), nn.SiLU(), conv(16, 16))),
        None,
    )
    yield "nn.TransformerEncoderLayer", small(Tokens(16)), None
    mixed = (
        fastscore.nn.GroupNormAct(4, 16, activation="silu"),
        conv(16, 16),
        nn.BatchNorm2d(16, track_running_stats=False),
        nn.Softplus(),
    )
    yield (
        "mixed: ours and nn.BatchNorm2d",
        small(Residual(*mixed), fastscore.nn.InstanceNorm2dPlus(16)),
        None,
    )
    if importlib.util.find_spec("diffusers"):
        net = unet()
        yield "diffusers.UNet2DModel", net, lambda x, net=net: net(x, 3).sample
    for name, change in (
        ("NCSN (ngf 16) on stock instance norm", stock_norms),
        ("fastscore.models.NCSN (ngf 16)", lambda net: net),
    ):
        torch.manual_seed(0)
        net = change(fastscore.models.NCSN(3, 16).double())
        yield name, net, lambda x, net=net: net(x, net.sigmas[3])


def rows(projections=(1, 4)):
    """(network, relative errors of the gradient: stock and ours for each number of projections)."""
    torch.manual_seed(0)
    x, v = (
        torch.rand(4, 3, 8, 8).double(),
        torch.randn(max(projections), 4, 3, 8, 8).double().sign(),
    )
    for name, net, call in networks():
        yield name, [e for M in projections for e in errors(net, x, v[:M], call)]


def written(error):
    if error != error:
        return "raises"
    return f"{error:.1e}" if error < 1e-3 else f"**{100 * error:.0f} %**"


if __name__ == "__main__":
    print(f"torch {torch.__version__.split('+')[0]}\n")
    print(
        "| network | torch.func.jvp, M = 1 | fastscore.jvp, M = 1 | torch.func.jvp, M = 4 | "
        "fastscore.jvp, M = 4 |"
    )
    print("|---|---|---|---|---|")
    for name, values in rows():
        print(f"| {name} | {' | '.join(map(written, values))} |", flush=True)
