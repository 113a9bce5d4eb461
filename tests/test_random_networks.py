"""The sliced losses on random networks of stock layers.

Value and every gradient against two levels of backward in float64.

The networks follow from fixed seeds; PyTorch's norms are compositions in the reference, for their
own third derivatives are wrong.
"""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from fastscore import losses
from fastscore.dual.norms import RightNorms
from fastscore.losses.projections import directions
from fastscore.models import EnergyScore

ACTIVATIONS = (
    *(
        lambda c=c, i=i: c(inplace=i)
        for c in (nn.SiLU, nn.ELU, nn.ReLU, nn.SELU, nn.Mish, nn.Hardswish)
        for i in (False, True)
    ),
    *(
        nn.GELU,
        nn.Tanh,
        nn.Sigmoid,
        nn.Softplus,
        nn.PReLU,
        nn.LogSigmoid,
        lambda: nn.GELU("tanh"),
        lambda: nn.Softmax(1),
    ),
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


class Dropout(nn.Dropout):
    """Masks are drawn in the order of memory, which a transposed result of ours need not share
    with PyTorch's."""

    def forward(self, x):
        return super().forward(x.contiguous())


class Ternary(torch.autograd.Function):
    """Straight through, from a forward that hides its argument."""

    @staticmethod
    def forward(ctx, x):
        return x.detach().sign()

    @staticmethod
    def backward(ctx, g):
        return g * 0.5


class Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return (x * scale).sin(), "unused"

    @staticmethod
    def backward(ctx, g, _):
        return None if g is None else g * (ctx.saved_tensors[0] * ctx.scale).cos() * ctx.scale, None


class Remembers(nn.Module):
    """Averages in buffers, a counter, and a scale that follows from both."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            self.average.lerp_(x.detach().mean().to(self.average), 0.1)
        return x * (1 + 0.1 * self.average.to(x.dtype).sin() + 0.01 * self.calls)


def accumulated(_, x):
    sums = torch.zeros(x.shape, dtype=x.dtype)
    sums += x.sin()
    sums[:, 1:] += x[:, :-1]
    out = x.new_empty(x.shape)
    out.copy_(sums)
    return out * 0.5 + x


NUDGE = [0.0]   # of the float32 mean and its gradient, relative


def scaled_by_a_number(_, x):
    narrow = x.float().mean()
    if NUDGE[0]:
        narrow = narrow * (1 + NUDGE[0]) + NUDGE[0] * x.detach().abs().float().mean()
    return x / (x.detach().std() + 1e-6) + x * (x.mean() * 0.3 + 1.5) - narrow.to(x.dtype) * 0.1


def checkpointed(m, x):
    """But a power iteration goes one step further each time that it is computed again, and
    PyTorch's gradient is that of no one weight."""
    iterates = any(
        isinstance(part, nn.Module) and type(part).__name__ == "_SpectralNorm"
        for part in m.modules()
    )
    return x + (m(x) if iterates else checkpoint(m, x, use_reentrant=False))


class Unbatched(nn.Sequential):
    """With hooks that count, and one that changes what comes out."""

    def __init__(self, m):
        super().__init__(m)
        self.seen = 0
        self.register_forward_hook(self.count)
        self.register_forward_pre_hook(lambda _, args: (args[0] * 1.1,))

    def count(self, _, __, y):
        self.seen += 1
        return y + 0.01 * self.seen


PARTS = {
    "straight-through": lambda r, c, m: Wrapped(lambda _, x: Ternary.apply(x) + x),
    "function": lambda r, c, m: Wrapped(lambda _, x: Bent.apply(x, 0.7)[0]),
    "remembers": lambda r, c, m: Remembers(),
    "hooks": lambda r, c, m: Unbatched(m()),
    "accumulated": lambda r, c, m: Wrapped(accumulated),
    "numbers": lambda r, c, m: Wrapped(scaled_by_a_number),
    "torch.dropout": lambda r, c, m: Wrapped(lambda _, x: torch.dropout(x.contiguous(), 0.3, True)),
    "checkpoint": lambda r, c, m: Wrapped(checkpointed, m()),
    "compiled": lambda r, c, m: torch.compile(m(), backend="eager"),
    "silu-in-place": lambda r, c, m: Wrapped(lambda _, x: F.silu(x * 1, True)),
}

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
        kinds = (
            nn.BatchNorm2d(c),
            nn.GroupNorm(2, c),
            nn.InstanceNorm2d(c, affine=True),
            nn.LayerNorm([c, 3, 4]),
            nn.RMSNorm(4),
        )
    else:
        kinds = nn.LayerNorm(c), nn.BatchNorm1d(c), nn.GroupNorm(2, c), nn.RMSNorm(c)
    return r.choice(kinds)


def network(r, c, images, depth=0, parts=()):
    def over_the_last(m, x):
        return F.silu(m(x.transpose(1, -1))).transpose(1, -1)

    layers = []
    for _ in range(r.randint(2, 4)):
        make = r.choice(
            ["layer"] * 3
            + ["norm", "dropout", "written", "attended", "last", "around", "around", *parts]
        )
        if make == "around" and depth < 2:
            layers.append(Wrapped(r.choice(AROUND), network(r, c, images, depth + 1, parts)))
        elif make in PARTS:
            layers.append(PARTS[make](r, c, lambda: nn.Sequential(layer(r, c, images), nn.Tanh())))
        elif make == "norm":
            layers.append(norm(r, c, images))
        elif make == "dropout":
            layers.append(Dropout(0.3))
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
        js = torch.stack(
            [
                torch.autograd.grad(g, u, d, **keep)[0] if g.requires_grad else torch.zeros_like(s)
                for d in v
            ]
        )
    rest = (s if mask is None else s * mask).square()[None] if variance_reduced else None
    rest = (v * s).flatten(2).sum(2).square() if rest is None else rest.flatten(2).sum(2)
    return ((v * js).flatten(2).sum(2) + 0.5 * rest).mean(0)


def problem(seed, parts=()):
    r, c = random.Random(seed), 4
    torch.manual_seed(seed)
    images, energy = r.random() < 0.4, r.random() < (0 if parts else 0.2)
    net = network(r, c, images, 0, parts).double().train(r.random() < 0.5)
    # Without dropout: where no rule of second order holds, f is called again and draws again.
    if energy:
        for m in net.modules():
            m.train(m.training and not isinstance(m, nn.Dropout))
        net = Wrapped(lambda m, x: m(x).sin().flatten(1).sum(1), net)
    x = torch.randn(
        (3, c, 3, 4) if images else (3, c), dtype=torch.float64, requires_grad=r.random() < 0.5
    )
    mask = (torch.rand(x.shape) < 0.7).double() if r.random() < 0.25 else None
    return (
        net,
        x,
        mask,
        energy,
        {"projections": r.choice([1, 3]), "variance_reduced": r.random() < 0.5},
        r.random() < 0.4,
    )


def outcome(net, state, seed, loss, inputs):
    net.load_state_dict(state)
    torch.manual_seed(seed)
    value = loss()
    weights = torch.linspace(0.5, 1, len(value), dtype=value.dtype)
    wanted = [t for t in inputs if t.requires_grad] if value.requires_grad else []
    gradients = (
        torch.autograd.grad(value @ weights, wanted, materialize_grads=True) if wanted else ()
    )
    return value.detach(), *gradients, *(t.clone() for t in net.state_dict().values())


@pytest.mark.parametrize("start", range(0, 200, 25))
def test_loss_and_gradients_of_random_networks(start):
    """Ours and theirs sum the same numbers in another order.

    1e-8 leaves room for small normalised variances.
    """
    for seed in range(start, start + 25):
        net, x, mask, energy, options, given = problem(seed)
        M, key = options["projections"], {"seed": seed}
        v = (
            torch.randn(M, *x.shape, dtype=x.dtype, requires_grad=seed % 2 == 0)
            if given
            else directions("t", x.detach(), M, **key)
        )
        state = {k: t.clone() for k, t in net.state_dict().items()}
        noise = {"v": v} if given else key

        def ours(net=net, x=x, mask=mask, options=options, noise=noise, energy=energy):
            return losses.sliced(
                EnergyScore(net) if energy else net, x, mask=mask, **options, **noise
            )

        def theirs(net=net, x=x, v=v, mask=mask, options=options, energy=energy):
            return reference(net, x, v, mask, options["variance_reduced"], energy)

        inputs = [*net.parameters(), x, v]
        for a, b in zip(
            outcome(net, state, seed, ours, inputs),
            outcome(net, state, seed, theirs, inputs),
            strict=True,
        ):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-8 * (1 + float(b.abs().max()))), (
                seed,
                net,
                options,
            )


def memory(net):
    counters = [
        getattr(m, "calls", getattr(m, "seen", None))
        for m in net.modules()
        if isinstance(m, Remembers | Unbatched)
    ]
    return [*(b.clone() for b in net.buffers()), *counters]


def everything(net, x, v, loss, seed):
    """Value, gradients and memory of one loss."""
    torch.manual_seed(seed)
    value = loss(net, x, v)
    inputs = [t for t in (*net.parameters(), x) if t.requires_grad]
    gradients = (
        torch.autograd.grad(value.mean(), inputs, materialize_grads=True)
        if inputs and value.requires_grad
        else ()
    )
    return value.detach(), *gradients, *memory(net)


def error(a, b):
    return float((a.double() - b.double()).norm())


def check_parts(seed, dtype):
    """In float64 equal to double backprop, else as near to it as double backprop in the same dtype,
    within four times and some roundings.

    Two ways to sum the same rounded numbers: their errors have one distribution, and four times the
    other's bounds all but its tail; where that is small by luck, 32 roundings of the whole's size
    per layer of at most 20 (their growth is what random signs leave of it). A mean in float32
    inside a float64 network is rounded: four times what one rounding of it changes in double
    backprop, as measured.
    """
    net, x, mask, _, options, _ = problem(seed, tuple(PARTS))
    mask = None if mask is None else mask.to(dtype)
    v = directions("t", x.detach(), options["projections"], seed=seed)

    def ours(net, x, v):
        m = None if mask is None else mask.to(x.dtype)
        return losses.sliced(net, x, v=v, mask=m, variance_reduced=options["variance_reduced"])

    def theirs(net, x, v):
        return reference(
            net,
            x,
            v,
            None if mask is None else mask.to(x.dtype),
            options["variance_reduced"],
            False,
        )

    def cast(kind):
        made = x.detach().to(dtype).to(kind).requires_grad_(x.requires_grad)
        return copied(net, seed).to(dtype).to(kind), made, v.to(dtype).to(kind)

    got, same = everything(*cast(dtype), ours, seed), everything(*cast(dtype), theirs, seed)
    wide = everything(*cast(torch.float64), theirs, seed)
    NUDGE[0] = torch.finfo(torch.float32).eps
    try:
        nudged = everything(*cast(torch.float64), theirs, seed) if dtype == torch.float64 else wide
    finally:
        NUDGE[0] = 0.0

    for k, (a, b, right, moved) in enumerate(zip(got, same, wide, nudged, strict=True)):
        if not isinstance(a, torch.Tensor):
            assert a == b == right, (seed, dtype, k, a, b)
            continue
        assert a.shape == b.shape and (k == 0 or a.dtype == b.dtype), (seed, dtype, k)
        allowed = (
            1e-8 * (1 + float(right.double().norm()))
            if dtype == torch.float64
            else 4 * error(b, right)
        )
        allowed += 32 * 20**0.5 * torch.finfo(dtype).eps * (1 + float(right.double().norm()))
        allowed += 4 * error(moved, right)  # 0 without such a mean
        assert error(a, right) <= allowed or not right.double().isfinite().all(), (
            seed,
            dtype,
            k,
            error(a, right),
            error(b, right),
            net,
        )


def copied(net, seed):
    """The same network anew.

    Compiled parts and hooks bound to a module do not survive a deep copy.
    """
    again = problem(seed, tuple(PARTS))[0]
    again.load_state_dict(copy.deepcopy(net.state_dict()))
    return again


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_networks_with_functions_buffers_hooks_and_writes(dtype):
    for seed in range(1000, 1015):
        check_parts(seed, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(2000, 4000, 10))
def test_two_thousand_networks(start):
    for seed in range(start, start + 10):
        check_parts(seed, DTYPES[seed % 3])
