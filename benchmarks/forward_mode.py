"""How far the parameter gradient of a sliced-score loss is off in forward mode, layer by layer: `python benchmarks/forward_mode.py`.

The loss is Σ vᵀ(∂s/∂x)v + ½(vᵀs)² in float64. Double backprop is right for every layer (finite differences agree), so it is the yardstick.
"""

import torch
import torch.nn.functional as F
from torch import nn

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


def gradient(score, parameters, x, v, forward):
    if forward:
        s, js = torch.func.jvp(score, (x,), (v,))
    else:
        x = x.clone().requires_grad_()
        s = score(x)
        js = torch.autograd.grad((s * v).sum(), x, create_graph=True)[0]
    loss = (v * js).sum() + 0.5 * (v * s).flatten(1).sum(1).square().sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def error(net, x, v, call=None):
    score, parameters = call or net, [p for p in net.parameters() if p.requires_grad]
    right = gradient(score, parameters, x, v, forward=False)
    return float((gradient(score, parameters, x, v, forward=True) - right).norm() / right.norm())


def small(norm):
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 16, 3, padding=1), norm, nn.ELU(), nn.Conv2d(16, 16, 3, padding=1), nn.ELU(), nn.Conv2d(16, 3, 3, padding=1)]
    return nn.Sequential(*blocks).double()


def rows():
    """(network, relative error of the gradient in forward mode)."""
    torch.manual_seed(0)
    x, v = torch.rand(4, 3, 16, 16).double(), torch.randn(4, 3, 16, 16).double().sign()
    layers = {
        "nn.InstanceNorm2d": nn.InstanceNorm2d(16),
        "nn.LayerNorm": nn.LayerNorm((16, 16, 16)),
        "nn.BatchNorm2d, batch statistics": nn.BatchNorm2d(16, track_running_stats=False),   # else func.jvp refuses the counter
        "nn.BatchNorm2d, running statistics": nn.BatchNorm2d(16).eval(),
        "nn.GroupNorm": nn.GroupNorm(4, 16),
        "fastscore.nn.InstanceNorm2d": fastscore.nn.InstanceNorm2d(16),
        "fastscore.nn.InstanceNorm2dPlus": fastscore.nn.InstanceNorm2dPlus(16),
        "fastscore.nn.GroupNormAct": fastscore.nn.GroupNormAct(4, 16, activation="silu"),
    }
    for name, layer in layers.items():
        yield name, error(small(layer), x, v)
    for name, change in (("NCSN (ngf 16) on stock instance norm", stock_norms), ("fastscore.models.NCSN (ngf 16)", lambda net: net)):
        torch.manual_seed(0)
        net = change(fastscore.models.NCSN(3, 16).double())
        yield name, error(net, x, v, lambda x, net=net: net(x, net.sigmas[3]))


if __name__ == "__main__":
    print(f"torch {torch.__version__.split('+')[0]}\n\n| network | relative error of the parameter gradient in forward mode |\n|---|---|")
    for name, value in rows():
        print(f"| {name} | {value:.1e} |" if value < 1e-3 else f"| {name} | **{100 * value:.0f} %** |", flush=True)
