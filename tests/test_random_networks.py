"""The sliced losses on random networks of stock layers: value and every gradient against two levels of backward in float64.

The networks follow from fixed seeds; PyTorch's norms are compositions in the reference, for their own third derivatives are wrong.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from fastscore import losses
from fastscore.dual.norms import RightNorms
from fastscore.losses.projections import directions
from fastscore.models import EnergyScore

ACTIVATIONS = (
    *(lambda c=c, i=i: c(inplace=i) for c in (nn.SiLU, nn.ELU, nn.ReLU, nn.SELU, nn.Mish, nn.Hardswish) for i in (False, True)),
    *(nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.PReLU, nn.LogSigmoid, lambda: nn.GELU("tanh"), lambda: nn.Softmax(1)),
)


class Wrapped(nn.Module):
    """f(m, x) as a module."""

    def __init__(self, f, m=None):
        super().__init__()
        self.f, self.m = f, m

    def forward(self, x):
        return self.f(self.m, x)


def written(_, x):
    y = x * 1
    y[:, 0] = y[:, -1] * 2
    y.mul_(1.5)
    y += x.sin()
    z = y[:, 1:]
    z[..., 0] += 1
    return y


def scaled(m, x):
    h = m(x)
    with torch.no_grad():
        size = h.square().mean().sqrt() + 1
    return h / size + x.detach() * 0.1


def attended(m, x):
    t = x.flatten(2).transpose(1, 2) if x.dim() > 2 else x[:, None].expand(-1, 2, -1)
    y = m(t, t.cos(), t, need_weights=False)[0]
    return x + (y.transpose(1, 2).reshape(x.shape) if x.dim() > 2 else y.mean(1))


AROUND = (
    lambda m, x: x + m(x),
    lambda m, x: m(F.silu(m(x))),   # the same layers twice
    lambda m, x: (lambda y: y[:, ::2] + y.flip(1)[:, 1::2])(torch.cat([m(x), x], 1)),
    scaled,
)


def layer(r, channels, images):
    if images:
        kind = r.choice([nn.Conv2d, nn.ConvTranspose2d])
        m = kind(channels, channels, 3, padding=1, bias=r.random() < 0.7)
    else:
        m = nn.Linear(channels, channels, bias=r.random() < 0.7)
    m = r.choice([weight_norm, spectral_norm, *[lambda m: m] * 8])(m)
    return m.requires_grad_(r.random() < 0.9)


def norm(r, c, images):
    if images:
        kinds = (nn.BatchNorm2d(c), nn.GroupNorm(2, c), nn.InstanceNorm2d(c, affine=True), nn.LayerNorm([c, 3, 4]), nn.RMSNorm(4))
    else:
        kinds = nn.LayerNorm(c), nn.BatchNorm1d(c), nn.GroupNorm(2, c), nn.RMSNorm(c)
    return r.choice(kinds)


def network(r, c, images, depth=0):
    def over_the_last(m, x):
        return F.silu(m(x.transpose(1, -1))).transpose(1, -1)

    layers = []
    for _ in range(r.randint(2, 4)):
        make = r.choice(["layer"] * 3 + ["norm", "dropout", "written", "attended", "last", "around", "around"])
        if make == "around" and depth < 2:
            layers.append(Wrapped(r.choice(AROUND), network(r, c, images, depth + 1)))
        elif make == "norm":
            layers.append(norm(r, c, images))
        elif make == "dropout":
            layers.append(nn.Dropout(0.3))
        elif make == "written":
            layers.append(Wrapped(written))
        elif make == "attended":
            layers.append(Wrapped(attended, nn.MultiheadAttention(c, 2, batch_first=True)))
        elif make == "last":
            layers.append(Wrapped(over_the_last, nn.Linear(c, c)) if images else nn.Linear(c, c))
        else:
            layers += [layer(r, c, images), r.choice(ACTIVATIONS)()]
    return nn.Sequential(*layers)


def reference(net, x, v, mask, variance_reduced, energy):
    x = x if x.requires_grad else x.detach().requires_grad_()
    keep = {"create_graph": True, "materialize_grads": True}
    v = v if mask is None else v * mask
    with RightNorms(), sdpa_kernel(SDPBackend.MATH):
        s = torch.autograd.grad(net(x).sum(), x, **keep)[0] if energy else net(x)
        u = torch.zeros_like(s).requires_grad_()
        (g,) = torch.autograd.grad(s, x, u, **keep)
        js = torch.stack([torch.autograd.grad(g, u, d, **keep)[0] if g.requires_grad else torch.zeros_like(s) for d in v])
    rest = (s if mask is None else s * mask).square()[None] if variance_reduced else None
    rest = (v * s).flatten(2).sum(2).square() if rest is None else rest.flatten(2).sum(2)
    return ((v * js).flatten(2).sum(2) + 0.5 * rest).mean(0)


def problem(seed):
    r, c = random.Random(seed), 4
    torch.manual_seed(seed)
    images, energy = r.random() < 0.4, r.random() < 0.2
    net = network(r, c, images).double().train(r.random() < 0.5)
    if energy:   # without dropout: where no rule of second order holds, f is called again and draws again
        for m in net.modules():
            m.train(m.training and not isinstance(m, nn.Dropout))
        net = Wrapped(lambda m, x: m(x).sin().flatten(1).sum(1), net)
    x = torch.randn((3, c, 3, 4) if images else (3, c), dtype=torch.float64, requires_grad=r.random() < 0.5)
    mask = (torch.rand(x.shape) < 0.7).double() if r.random() < 0.25 else None
    return net, x, mask, energy, {"projections": r.choice([1, 3]), "variance_reduced": r.random() < 0.5}, r.random() < 0.4


def outcome(net, state, seed, loss, inputs):
    net.load_state_dict(state)
    torch.manual_seed(seed)
    value = loss()
    weights = torch.linspace(0.5, 1, len(value), dtype=value.dtype)
    wanted = [t for t in inputs if t.requires_grad] if value.requires_grad else []
    gradients = torch.autograd.grad(value @ weights, wanted, materialize_grads=True) if wanted else ()
    return value.detach(), *gradients, *(t.clone() for t in net.state_dict().values())


@pytest.mark.parametrize("start", range(0, 200, 25))
def test_loss_and_gradients_of_random_networks(start):
    """Ours and theirs sum the same numbers in another order; 1e-8 leaves room for small normalised variances."""
    for seed in range(start, start + 25):
        net, x, mask, energy, options, given = problem(seed)
        M, key = options["projections"], {"seed": seed}
        v = torch.randn(M, *x.shape, dtype=x.dtype, requires_grad=seed % 2 == 0) if given else directions("t", x.detach(), M, **key)
        state = {k: t.clone() for k, t in net.state_dict().items()}
        noise = {"v": v} if given else key

        def ours(net=net, x=x, mask=mask, options=options, noise=noise, energy=energy):
            return losses.sliced(EnergyScore(net) if energy else net, x, mask=mask, **options, **noise)

        def theirs(net=net, x=x, v=v, mask=mask, options=options, energy=energy):
            return reference(net, x, v, mask, options["variance_reduced"], energy)

        inputs = [*net.parameters(), x, v]
        for a, b in zip(outcome(net, state, seed, ours, inputs), outcome(net, state, seed, theirs, inputs), strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-8 * (1 + float(b.abs().max()))), (seed, net, options)
