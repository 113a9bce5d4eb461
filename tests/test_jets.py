"""First and second derivatives of an energy along directions, in one pass.

Against double backprop, and every detour.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastscore
from fastscore import losses
from fastscore.dual.call import NoRule
from fastscore.dual.jets import Jet, second_order
from fastscore.models import EnergyMLP, EnergyScore
from fastscore.ops.activate import activate_jet, activate_jet_ref


def conv(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


def head(channels, side):
    return nn.Flatten(), nn.Linear(channels * side * side, 1)


class Pooled(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        h = x + self.layers(x)
        return h.mean(dim=(1, 2, 3)) - 0.5 * x.square().flatten(1).sum(1)


class Odd(nn.Module):
    """What people write: in-place, slices, cat, indexing, writing, quotients, roots, attention
    by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.mix = conv(2, 8), nn.Linear(9, 6)

    def forward(self, x):
        h = self.first(x)
        h = h * self.mix.weight[0, :8, None, None]
        h += 0.5
        a, b = h.chunk(2, dim=1)
        h = torch.cat(
            [a * torch.sigmoid(b), b - a.mean(dim=(2, 3), keepdim=True), torch.ones_like(a[:, :1])],
            1,
        )
        h *= 0.7
        q = self.mix(h.flatten(2).transpose(1, 2))                    # (B, 36, 6)
        h = (q @ q.transpose(1, 2) / 3).softmax(-1) @ q
        out = torch.zeros_like(h)
        out[:, :, 1:] = h[..., [0, 2, 3, 4, 5]]
        out[:, :, 0] = F.gelu(h[:, :, 1], approximate="tanh") / (
            2 + torch.stack([h[:, :, 2], q[:, :, 0]], 1).square().sum(1)
        )
        out = (
            torch.where(out > 0, out.log1p(), out.expm1())
            - F.leaky_relu(q, 0.2) ** 3
            + (1 + out**2).sqrt()
        )
        return out.logsumexp((1, 2)) - (1 - x[:, 0].flatten(1)).exp().mean(1)


CONVOLUTIONS = {
    "group-norm": lambda: nn.Sequential(
        conv(2, 8), nn.GroupNorm(2, 8), nn.SiLU(), conv(8, 8, 2), nn.Softplus(), *head(8, 3)
    ),
    "instance-norm": lambda: nn.Sequential(
        conv(2, 8), nn.InstanceNorm2d(8, affine=True), nn.Tanh(), nn.AvgPool2d(2), *head(8, 3)
    ),
    "layer-norm": lambda: nn.Sequential(
        conv(2, 4), nn.LayerNorm((4, 6, 6)), nn.GELU(), nn.AdaptiveAvgPool2d(2), *head(4, 2)
    ),
    "rms-norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 9), nn.RMSNorm(9), nn.ELU(), nn.Linear(9, 1)
    ),
    "ours": lambda: nn.Sequential(
        conv(2, 8),
        fastscore.nn.InstanceNorm2dPlus(8, activation="elu"),
        fastscore.nn.GroupNormAct(2, 8, activation="silu"),
        *head(8, 6),
    ),
    "in-place": lambda: nn.Sequential(
        conv(2, 8),
        nn.SiLU(inplace=True),
        nn.Dropout(0.0),
        conv(8, 8),
        nn.ELU(inplace=True),
        *head(8, 6),
    ),
    "pooled-residual": lambda: Pooled(
        conv(2, 8), nn.Sigmoid(), nn.Upsample(scale_factor=2), nn.AvgPool2d(2), conv(8, 2)
    ),
    "odd": Odd,
}


@pytest.fixture
def no_detour(monkeypatch):
    """Fail where double backprop is taken instead."""
    monkeypatch.setattr(
        EnergyScore, "_along_by_jvp", lambda *args: pytest.fail("the second-order pass gave up")
    )


def plain(f, x, v, *arguments):
    """vᵀ∇f and vᵀ∇²f v by double backprop, norms as compositions.

    Those of PyTorch have wrong third derivatives.
    """
    with fastscore.dual.norms.RightNorms():
        leaf = x if x.requires_grad else x.clone().requires_grad_()
        (s,) = torch.autograd.grad(f(leaf, *arguments).sum(), leaf, create_graph=True)
        hv = torch.stack([torch.autograd.grad(s, leaf, d, create_graph=True)[0] for d in v])
    return (v * s).flatten(2).sum(2), (v * hv).flatten(2).sum(2)


def loss(pair):
    slope, curvature = pair
    return (curvature + 0.5 * slope.square()).mean()


def relative(a, b):
    a, b = (
        torch.cat([torch.zeros(0) if g is None else g.double().flatten() for g in t])
        for t in (a, b)
    )
    return float(((a - b).norm() / b.norm()).detach())


def agree(score, x, v, *arguments, tolerance):
    """Value, curvature, and the gradient of every parameter and of x, against double backprop."""
    x = x.clone().requires_grad_()
    inputs = [x, *(p for p in score.parameters() if p.requires_grad)]
    got, expected = score.along(x, v, *arguments), plain(score.f, x, v, *arguments)
    assert all(t.shape == v.shape[:2] for t in got)
    assert all(relative([a], [b]) < tolerance for a, b in zip(got, expected))
    found, right = (
        torch.autograd.grad(loss(pair), inputs, allow_unused=True) for pair in (got, expected)
    )
    found, right = (
        [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs)]
        for grads in (found, right)
    )
    assert all(
        float((a - b).norm()) <= tolerance * float(torch.cat([g.flatten() for g in right]).norm())
        for a, b in zip(found, right)
    )
    assert float(right[1].norm()) > 0


PRECISIONS = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)


@PRECISIONS
@pytest.mark.parametrize("M", [1, 4])
@pytest.mark.parametrize("conditional", [False, True], ids=["plain", "sigmas"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "softplus", "tanh"])
def test_energy_mlp_equals_double_backprop(no_detour, activation, conditional, M, dtype, tolerance):
    torch.manual_seed(0)
    net = EnergyMLP(
        6, width=19, depth=2, activation=activation, sigmas=[2.0, 0.1] if conditional else None
    ).to(dtype)
    nn.init.normal_(net.last.weight)
    x, v = torch.randn(5, 1, 2, 3, dtype=dtype), torch.randn(M, 5, 1, 2, 3, dtype=dtype)
    agree(
        EnergyScore(net),
        x,
        v,
        *([torch.rand(5, dtype=dtype) + 0.1] if conditional else []),
        tolerance=tolerance,
    )


@PRECISIONS
@pytest.mark.parametrize("M", [1, 4])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutional_energies_equal_double_backprop(
    no_detour, name, training, M, dtype, tolerance
):
    torch.manual_seed(0)
    net = CONVOLUTIONS[name]().to(dtype).train(training)
    agree(
        EnergyScore(net),
        torch.randn(3, 2, 6, 6, dtype=dtype),
        torch.randn(M, 3, 2, 6, 6, dtype=dtype),
        tolerance=tolerance,
    )


INSTANCE = nn.Sequential(nn.Unflatten(1, (1, 7)), nn.InstanceNorm1d(1), nn.Flatten())


@pytest.mark.parametrize("layer", [nn.LayerNorm(7), INSTANCE], ids=["layer", "instance"])
@pytest.mark.parametrize("path", ["along", "jvp", "forward"])
def test_gradients_through_stock_norms_are_difference_quotients(path, layer):
    """PyTorch's own third derivatives of these norms are wrong by a third.

    Both our paths compose them instead.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 7), layer, nn.Tanh(), nn.Linear(7, 1)).double()
    score, x, v, weight = (
        EnergyScore(net),
        torch.randn(3, 4).double(),
        torch.randn(1, 3, 4).double(),
        net[0].weight,
    )

    def total():
        if path == "along":
            return loss(score.along(x, v))
        if path == "jvp":
            return score.jvp(x, v)[1].square().sum()
        leaf = x.clone().requires_grad_()
        return (
            torch.autograd.grad((score(leaf) * v[0]).sum(), leaf, create_graph=True)[0]
            .square()
            .sum()
        )

    (g,) = torch.autograd.grad(total(), weight)
    direction, original = torch.randn_like(weight), weight.data.clone()
    values = []
    for t in (1e-5, -1e-5):
        weight.data = original + t * direction
        values.append(float(total().detach()))
    slope = float((g * direction).sum())
    assert abs((values[0] - values[1]) / 2e-5 - slope) < 1e-6 * abs(slope) + 1e-8


def test_quadratic_energies_are_exact(no_detour):
    """f = xᵀAx + bᵀx + c on integers: float32 holds every number on the way."""
    A, b = torch.tensor([[2.0, 1.0], [-3.0, 4.0]]), torch.tensor([1.0, -2.0])
    x, v = torch.tensor([[1.0, 2.0], [-3.0, 5.0]]), torch.tensor([[[1.0, -1.0], [2.0, 0.0]]])
    slope, curvature = EnergyScore(lambda x: (x @ A * x).sum(1) + x @ b + 7).along(x, v)
    assert torch.equal(slope[0], (v[0] * (x @ (A + A.T) + b)).sum(1))
    assert torch.equal(curvature[0], (v[0] @ (A + A.T) * v[0]).sum(1))
    slope, curvature = EnergyScore(lambda x: (x @ b)[:, None]).along(x, v)
    assert torch.equal(slope[0], v[0] @ b) and not curvature.any()


@pytest.mark.parametrize("name", ["rms-norm", "ours", "odd"])
def test_third_and_fourth_derivatives(no_detour, name):
    torch.manual_seed(0)
    net = CONVOLUTIONS[name]().double()
    score, x, v = (
        EnergyScore(net),
        torch.randn(1, 2, 6, 6).double().requires_grad_(),
        torch.randn(2, 1, 2, 6, 6).double().requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda x, v: score.along(x, v), (x, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, v: score.along(x, v), (x, v), fast_mode=True)


@pytest.mark.parametrize("straight", [True, False])
@pytest.mark.parametrize(
    "name", ["elu", "silu", "relu", "gelu", "gelu_tanh", "softplus", "tanh", "sigmoid"]
)
def test_fused_activation_is_its_reference(backend, name, straight):
    """Against the equations in float64.

    Each slope is off by a few ulp of 1, which u'² and u'' multiply, and g in reverse.
    """
    if backend == "reference":
        pytest.skip("plain PyTorch rounds every step to the element type")
    torch.manual_seed(0)
    M = 3
    s, g = torch.randn(1 + M if straight else 1 + 2 * M, 41, 7), torch.randn(1 + 2 * M, 41, 7)
    s[0] *= 4
    room = 1 + s[1:].square().sum(0) + s[1:].abs().sum(0)
    back = room * (1 + g.abs().sum(0))
    for dtype, ulp in (
        (torch.float32, 2.0**-23),
        (torch.bfloat16, 2.0**-8),
        (torch.float16, 2.0**-11),
        (torch.float64, 2.0**-52),
    ):
        low = s.to(dtype).requires_grad_()
        exact = low.detach().double().requires_grad_()
        y, got = activate_jet_ref(exact, M, name), activate_jet(low, M, name)
        assert got.dtype == dtype and float(((got - y).abs() / room).max()) < 4 * ulp
        (right,) = torch.autograd.grad(y, exact, g.to(dtype).double())
        (found,) = torch.autograd.grad(got, low, g.to(dtype))
        assert float(((found - right).abs() / back).max()) < 4 * ulp
    with torch.no_grad():
        assert torch.equal(
            activate_jet(s, M, name), activate_jet(s.clone().requires_grad_(), M, name).detach()
        )
    wide = s.repeat(1, 1, 2)[..., ::2]  # not contiguous
    torch.testing.assert_close(
        activate_jet(wide, M, name), activate_jet(wide.contiguous(), M, name), rtol=0, atol=0
    )


@pytest.mark.parametrize("straight", [True, False])
@pytest.mark.parametrize("name", ["elu", "silu", "relu", "gelu", "softplus", "tanh", "sigmoid"])
def test_fused_activation_of_the_whole_range(backend, name, straight):
    """From where exp underflows to where it overflows, of a straight line too.

    Whole programs, a tail and nothing.
    """
    ends = [-1e4, -200.0, -90.0, -88.0, -40.0, -1e-3, -1e-6, -1e-30]
    u = torch.cat([torch.tensor(ends), torch.linspace(-30, 30, 2100), -torch.tensor(ends)])
    s = torch.stack([u] + [torch.ones_like(u)] * (1 if straight else 2)).requires_grad_()
    for part in (s, s[:, :1024], s[:, :0]):
        exact = part.detach().double().requires_grad_()
        y, got = activate_jet_ref(exact, 1, name), activate_jet(part, 1, name)
        (right,) = torch.autograd.grad(y.sum(), exact)
        (found,) = torch.autograd.grad(got.sum(), part)
        for a, b in ((got, y), (found, right)):
            assert bool(((a - b).abs() <= 24 * 2.0**-23 * (1 + b.abs())).all())


def test_fused_activation_in_every_mode(backend):
    """Forward mode, vmap and a compiled graph as well: all of them against the equations."""
    s, t = torch.randn(5, 7), torch.randn(3, 5, 7)

    def f(s):
        return activate_jet(s, 2, "silu")

    tangent = torch.func.jvp(f, (s,), (t[0],))[1]
    assert torch.allclose(
        tangent,
        torch.func.jvp(lambda s: activate_jet_ref(s, 2, "silu"), (s,), (t[0],))[1],
        atol=1e-6,
    )
    assert torch.allclose(
        torch.func.vmap(f)(t), torch.stack([activate_jet_ref(a, 2, "silu") for a in t]), atol=1e-6
    )
    assert torch.allclose(
        torch.func.grad(lambda s: f(s).square().sum())(s),
        torch.autograd.functional.vjp(f, s, 2 * f(s))[1],
        atol=1e-5,
    )
    wide = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, wide) and torch.autograd.gradgradcheck(f, wide)


def test_compiled_fused_activation_equals_eager(backend):
    if backend == "triton":
        pytest.skip("the interpreter cannot be compiled")
    s = torch.randn(5, 7, requires_grad=True)
    compiled = torch.compile(lambda s: activate_jet(s.sin(), 2, "gelu"), fullgraph=True)
    assert torch.allclose(compiled(s), activate_jet(s.sin(), 2, "gelu"), atol=1e-6)
    gradients = [
        torch.autograd.grad(f(s).square().sum(), s)[0]
        for f in (compiled, lambda s: activate_jet(s.sin(), 2, "gelu"))
    ]
    assert torch.allclose(*gradients, atol=1e-5)


class Cubic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def frozen(x):
    with torch.no_grad():
        scale = x.cos()
    return (x.square() * scale).sum(1)


def aliased(x):
    y = x.clone()
    y += 1
    part = y[:, :1]
    part *= 2
    return (x * y).sum(1)


NO_RULE = {
    "einsum": lambda x: torch.einsum("bi,bj->b", x.sin(), x),
    "prod": lambda x: x.prod(1),
    "autograd-function": lambda x: Cubic.apply(x).sum(1),
    "no-grad-block": frozen,
    "gradient-inside": lambda x: torch.func.grad(lambda y: y.pow(4).sum())(x).sum(1),
    "vmap-inside": lambda x: torch.vmap(lambda r: r.sin() @ r)(x),
    "first-op-only": lambda x: torch.linalg.vector_norm(x, dim=1) * x.sum(1),
}
COUPLED = {
    "mean-over-samples": lambda x: (x - x.mean(0)).square().sum(1) * x.sum(1),
    "sum-of-all": lambda x: x.sum() * x.sin().sum(1),
    "permuted": lambda x: (x * x[[2, 0, 1]]).sum(1),
    "permuted-behind-dots": lambda x: x.sum(1)[..., [2, 0, 1]] * x[:, 0],
    "gram": lambda x: (x @ x.T).sin().sum(1),
    "gram-by-hand": lambda x: (x[None] * x[:, None]).sin().sum((1, 2)),
    "broadcast-across": lambda x: (x[:, :3] * x.sum(1)).sum(1),
    "softmax-over-samples": lambda x: (x.softmax(0) * x).sum(1),
    "rolled": lambda x: (x.roll(1, 0) * x).sum(1),
    "cumulated": lambda x: x.sin().cumsum(0).square().sum(1),
    "transposed": lambda x: x[:, :3].T.sin().sum(1) * x[:, 0],
    "outer-constant": lambda x: (x.sum(1) * torch.arange(9.0).double().view(3, 3)).sin().sum(1),
    "batch-norm": lambda x: (
        F.batch_norm(x.sin(), None, None, training=True).square().sum(1) * x[:, 0]
    ),
}


@pytest.mark.parametrize("name", [*NO_RULE, *COUPLED])
def test_what_no_rule_covers_takes_double_backprop(name):
    """And equals it, for a function without a module; the second call does not try again."""
    torch.manual_seed(0)
    g, weight = (NO_RULE | COUPLED)[name], torch.randn(4, dtype=torch.float64, requires_grad=True)
    x, v = torch.randn(3, 4).double(), torch.randn(2, 3, 4).double()

    def f(x):
        f.calls += 1
        return g(x * weight)

    f.calls, score = 0, EnergyScore(f)
    with pytest.raises(Exception):  # noqa: B017  what it is differs; that it is not carried matters
        second_order(f, x, v)
    for calls in (2, 1):
        f.calls = 0
        pair = score.along(x, v)
        assert f.calls == calls
        expected = plain(f, x, v)
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(pair, expected))
        assert (
            relative(
                torch.autograd.grad(loss(pair), weight), torch.autograd.grad(loss(expected), weight)
            )
            < 1e-10
        )


def viewed(x):
    x = x.unflatten(1, (2, 2)).mT.flatten(1).movedim(1, -1).roll(1, 1)
    return x[:, None].expand(3, 2, 4).permute(0, 2, 1).reshape(3, -1)


CARRIED = {
    "aliases": aliased,
    "detached": lambda x: (x.detach() * x.square()).sum(1),
    "detached-means": lambda x: (x.detach().mean(0) * x.square()).sum(1),
    "integers": lambda x: (x.square() * x.to(torch.int64)).sum(1),
    "powers": lambda x: (
        (x**3).sum(1)
        + (x**1).sum(1)
        + (x**0).sum(1) * x[:, 0]
        + (x.abs() ** 1.5).sum(1)
        + (x.square() ** -1).sum(1)
    ),
    "quotients": lambda x: (
        (1 / (1 + x * x)).sum(1) + (x[:, 0].square() / x.exp()[:, 1]).log1p().sin()
    ),
    "roots": lambda x: (x.square() + 1).rsqrt().sum(1) * (x.square() + 1).sqrt()[:, 0],
    "waves": lambda x: (x.sin() * x.cos() + x.sinh() / x.cosh() + x.erf() + F.logsigmoid(x)).sum(1),
    "log-softmax": lambda x: (x.log_softmax(1) * x).sum(1) + x.logsumexp(1, keepdim=True)[:, 0],
    "stacked": lambda x: torch.stack([x.sin(), x, torch.ones_like(x)], 1).square().sum((1, 2)),
    "matrices": lambda x: (
        (x.sin()[:, None] @ x[:, :, None]).flatten()
        + (torch.ones(2, 4).double() @ x[..., None].exp()).sum((1, 2))
    ),
    "masks": lambda x: (
        x.masked_fill(x < 0, 3.0).square()
        + torch.where(x > 0, x.exp(), 2.0)
        + torch.where(x > 0, 0.0, x)
    ).sum(1),
    "gathered": lambda x: (
        x.gather(1, torch.tensor([[0], [2], [1]])).exp()[:, 0] * x.flip(1)[:, -1] * x[:, ::2].sum(1)
    ),
    "mixed": lambda x: (
        torch.lerp(x, x.sin(), 0.3)
        + torch.addcmul(x, x, x.sin(), value=0.5)
        + torch.sub(x, x.exp(), alpha=2)
    ).sum(1),
    "viewed": lambda x: viewed(x).view_as(x.repeat(1, 2)).sin().cumsum(1).mean(1),
    "control-flow": lambda x: x.exp().sum(1) if bool((x > 0).any()) else x.sum(1),
}


@pytest.mark.parametrize("name", CARRIED)
def test_operations_that_are_carried(no_detour, name):
    torch.manual_seed(0)
    g, weight = CARRIED[name], (torch.rand(4, dtype=torch.float64) + 0.5).requires_grad_()
    x, v = torch.randn(3, 4).double(), torch.randn(2, 3, 4).double()

    def f(x):
        return g(x * weight)

    pair, expected = EnergyScore(f).along(x, v), plain(f, x, v)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(pair, expected))
    assert (
        relative(
            torch.autograd.grad(loss(pair), weight), torch.autograd.grad(loss(expected), weight)
        )
        < 1e-10
    )


def test_one_mask_of_dropout_for_all_coefficients(no_detour):
    torch.manual_seed(0)
    x, v = torch.randn(50, 30), torch.randn(2, 50, 30)
    value, slope, curvature = second_order(lambda x: F.dropout(x, 0.5).square().sum(1), x, v)
    torch.manual_seed(1)
    seeded = second_order(lambda x: F.dropout(x, 0.5).square().sum(1), x, v)
    torch.manual_seed(1)
    mask = F.dropout(torch.ones_like(x), 0.5)
    torch.testing.assert_close(seeded[0][0], (mask * x).square().sum(1))
    torch.testing.assert_close(seeded[1], 2 * (mask.square() * x * v).sum(2))
    torch.testing.assert_close(seeded[2], 2 * (mask * v).square().sum(2))
    assert not torch.equal(value, seeded[0]) and not torch.equal(curvature, seeded[2])
    net = nn.Sequential(nn.Linear(30, 20), nn.Dropout1d(0.3), nn.Tanh(), nn.Linear(20, 1))
    EnergyScore(net).along(x, v)


def test_batch_norm_counts_a_batch_once_and_equals_double_backprop():
    """Batch statistics mix samples.

    The whole call goes by double backprop, before a first attempt could touch the statistics.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh(), nn.Linear(6, 1)
    ).double()
    twin, score = copy.deepcopy(net), EnergyScore(net)
    x, v = torch.randn(7, 4).double(), torch.randn(2, 7, 4).double()
    pair, expected = score.along(x, v), plain(twin, x, v)
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(pair, expected))
    assert int(net[1].num_batches_tracked) == 1 and torch.allclose(
        net[1].running_var, twin[1].running_var
    )
    found = torch.autograd.grad(loss(pair), [*net.parameters()], allow_unused=True)
    assert (
        relative(
            found[:5],
            torch.autograd.grad(loss(expected), [*twin.parameters()], allow_unused=True)[:5],
        )
        < 1e-10
    )
    assert not score._without_rule
    score.eval()
    agree(score, x, v, tolerance=1e-10)
    assert not score._without_rule


def test_sliced_loss_of_an_energy_goes_this_way(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fastscore.models.energy.second_order",
        lambda *args, **kwargs: calls.append(1) or second_order(*args, **kwargs),
    )
    net, x = EnergyMLP(6, width=16, depth=1), torch.rand(5, 6)
    nn.init.normal_(net.last.weight)
    value = losses.sliced(EnergyScore(net), x, seed=1, projections=3, variance_reduced=False)
    v = losses.projections.directions("sliced", x, projections=3, seed=1)
    slope, curvature = plain(net, x, v)
    torch.testing.assert_close(
        value, (curvature + 0.5 * slope.square()).mean(0), rtol=1e-5, atol=1e-5
    )
    assert calls and value.requires_grad


def test_a_wrong_call_does_not_change_the_path_of_the_next(request):
    net, x, v = EnergyMLP(6, width=8, depth=1), torch.rand(3, 6), torch.ones(2, 3, 6)
    score = EnergyScore(net)
    for wrong in (torch.rand(3, 5), torch.rand(3, 6).double()):
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            score.along(wrong, torch.ones(2, *wrong.shape).to(wrong.dtype))
    request.getfixturevalue("no_detour")
    score.along(x, v)


def test_no_rule_is_remembered_for_samples_of_that_shape_alone(monkeypatch):
    tried = []
    monkeypatch.setattr(
        "fastscore.models.energy.second_order",
        lambda *args, **kwargs: tried.append(1) or second_order(*args, **kwargs),
    )
    score = EnergyScore(
        lambda x: x.sum(1) ** 2 if x.shape[1] == 2 else torch.linalg.svdvals(x[:, :, None])[:, 0]
    )
    for width, tries in ((3, 1), (3, 1), (2, 2), (2, 3), (3, 3)):
        score.along(torch.rand(4, width).double(), torch.ones(1, 4, width).double())
        assert len(tried) == tries


def test_graphs_where_they_are_wanted(no_detour):
    net, x, v = EnergyMLP(6, width=8, depth=1), torch.rand(3, 6), torch.ones(2, 3, 6)
    score = EnergyScore(net)
    assert all(t.requires_grad for t in score.along(x, v))
    with torch.no_grad():
        assert not any(t.requires_grad for t in score.along(x.requires_grad_(), v))
    net.requires_grad_(False)
    assert not any(t.requires_grad for t in score.along(x.detach(), v))
    assert all(t.requires_grad for t in score.along(x, v))
    net.last.weight.requires_grad_()
    assert all(t.requires_grad for t in score.along(x.detach(), v))


@pytest.mark.parametrize("path", ["along", "whole"])
def test_gradients_reach_the_directions_of_a_frozen_energy(path, monkeypatch):
    net, x, v = (
        EnergyMLP(6, width=8, depth=1).double(),
        torch.rand(3, 6).double(),
        torch.randn(2, 3, 6).double().requires_grad_(),
    )
    nn.init.normal_(net.requires_grad_(False).last.weight)
    score = EnergyScore(net)
    if path == "whole":
        monkeypatch.setattr("fastscore.models.energy._needs_whole", lambda f, x: True)
    (g,) = torch.autograd.grad(score.along(x, v)[1].sum(), v)
    torch.testing.assert_close(g, 2 * score.jvp(x, v.detach())[1])


def test_transforms_forward_mode_autocast_and_empty_batches_take_the_other_path():
    net, x, v = (
        EnergyMLP(4, width=8, depth=1).double(),
        torch.rand(3, 4).double(),
        torch.randn(1, 3, 4).double(),
    )
    nn.init.normal_(net.last.weight)
    score = EnergyScore(net)
    expected = score.along(x, v)
    g = torch.func.grad(lambda x: score.along(x, v)[1].sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(g, torch.autograd.grad(score.along(leaf, v)[1].sum(), leaf)[0])
    with torch.autograd.forward_ad.dual_level():
        pair = score.along(torch.autograd.forward_ad.make_dual(x, v[0]), v)
        torch.testing.assert_close(
            torch.autograd.forward_ad.unpack_dual(pair[0]).tangent, expected[1]
        )
    single = EnergyScore(copy.deepcopy(net).float())
    with torch.autocast("cpu", torch.bfloat16):
        slope, curvature = single.along(x.float(), v.float())
        assert torch.equal(slope, (single.jvp(x.float(), v.float())[0] * v.float()).sum(2))
    assert [t.shape for t in score.along(x[:0], v[:, :0])] == [(1, 0), (1, 0)]
    assert not score._without_rule


def test_low_precision_strides_and_frozen_parameters(no_detour):
    torch.manual_seed(0)
    net = CONVOLUTIONS["group-norm"]()
    x, v = torch.randn(4, 2, 6, 6), torch.randn(2, 4, 2, 6, 6)
    slope, curvature = EnergyScore(net).along(x, v)
    last = x.to(memory_format=torch.channels_last), v.transpose(3, 4).contiguous().transpose(3, 4)
    for a, b in zip(EnergyScore(net).along(*last), (slope, curvature)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    net[0].requires_grad_(False)
    agree(EnergyScore(copy.deepcopy(net).double()), x.double(), v.double(), tolerance=1e-10)
    low = EnergyScore(copy.deepcopy(net).bfloat16()).along(x.bfloat16(), v.bfloat16())
    assert all(t.dtype == torch.float32 for t in low)  # the compute dtype
    assert (
        float((low[0] - slope).norm() / slope.norm()) < 0.05
        and float((low[1] - curvature).norm() / curvature.norm()) < 0.1
    )


def test_errors_are_those_of_double_backprop():
    x, v = torch.zeros(2, 6), torch.ones(1, 2, 6)
    with pytest.raises(
        ValueError, match=r"f\(x\) must be one value per sample, \(2,\); got \(2, 6\)"
    ):
        EnergyScore(torch.sin).along(x, v)
    with pytest.raises(ValueError, match=r"f\(x\) must depend on x"):
        EnergyScore(lambda x: torch.zeros(2)).along(x, v)
    with pytest.raises(NoRule, match="no rule carries prod"):
        second_order(lambda x: x.prod(1), x, v)
    assert "1 directions" in repr(Jet(torch.zeros(2, 3), 1))


class Failures:
    """Counted where no call is undone."""

    left = 0


def test_only_a_missing_rule_is_remembered():
    """An f that fails once, whatever it was, takes the fast way again afterwards."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def f(x):
        if Failures.left:
            Failures.left -= 1
            raise OSError("a file is being written")
        return net(x)

    score, Failures.left = EnergyScore(f), 1
    x, v = torch.randn(7, 4).double(), torch.randn(2, 7, 4).double()
    pair = score.along(x, v)   # by two backward passes, once
    assert not score._without_rule
    torch.testing.assert_close(pair, score.along(x, v))
