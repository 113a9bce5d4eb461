"""jvp through unmodified networks.

Value, product and every parameter's gradient against double backprop.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastscore
from fastscore.dual import jvp, routes


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class Attention(nn.Module):
    """Tokens of an image, normalised, attending to each other, by the fused op or by hand."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.norm, self.qkv, self.out = (
            fused,
            nn.LayerNorm(8),
            nn.Linear(8, 24),
            nn.Linear(8, 8),
        )

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = (
            self.qkv(self.norm(x.flatten(2).transpose(1, 2)))
            .view(B, H * W, 3, 2, 4)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        a = (
            F.scaled_dot_product_attention(q, k, v)
            if self.fused
            else ((q @ k.transpose(-2, -1)) / 2).softmax(dim=-1) @ v
        )
        return x + self.out(a.transpose(1, 2).reshape(B, H * W, C)).transpose(1, 2).reshape(
            B, C, H, W
        )


class Odd(nn.Module):
    """What people write: in-place, slices, cat, chunk, padding, resizing, reductions, where,
    indexing, einsum, stack."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.rand(1, 8, 1, 1))

    def forward(self, x):
        h = self.first(x)
        h = h * self.scale
        h += 0.5
        F.elu_(h)
        a, b = h.chunk(2, dim=1)
        h = torch.cat([a * torch.sigmoid(b), b - a.mean(dim=(2, 3), keepdim=True)], dim=1)
        h = F.interpolate(F.avg_pool2d(F.pad(h, (1, 1, 1, 1)), 2), scale_factor=2, mode="bilinear")[
            :, :, 1:-1, 1:-1
        ]
        h = torch.where(h > 0, h, 0.1 * h) / (1 + h.square().sum(dim=1, keepdim=True).sqrt())
        h = torch.einsum(
            "bchw,dc->bdhw", h, self.scale.flatten()[:3, None] * torch.ones(3, 8, dtype=x.dtype)
        )
        out = torch.zeros_like(x)
        out[:, :2] = h[:, [2, 0]]
        out[:, 2] = torch.stack([h[:, 1], x[:, 1]], dim=0).amax(dim=0)
        return (
            out * x.shape[1]
            - x.clamp(-1, 1)
            + torch.norm(x, dim=1, keepdim=True)
            + x.roll(1, -1).flip(-2)
            + 2 ** (x / 4)
        )


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


NETWORKS = {
    "instance-norm": lambda: nn.Sequential(
        conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ELU(), conv(8, 3)
    ),
    "instance-norm-running": lambda: nn.Sequential(
        conv(3, 8), nn.InstanceNorm2d(8, track_running_stats=True), nn.ELU(), conv(8, 3)
    ),
    "layer-norm": lambda: nn.Sequential(conv(3, 8), nn.LayerNorm((8, 6, 6)), nn.SiLU(), conv(8, 3)),
    "batch-norm": lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.GELU(), conv(8, 3)),
    "group-norm": lambda: nn.Sequential(
        conv(3, 8), nn.GroupNorm(2, 8), nn.SiLU(inplace=True), conv(8, 3)
    ),
    "rms-norm": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(108, 30),
        nn.RMSNorm(30),
        nn.Tanh(),
        nn.Linear(30, 108),
        nn.Unflatten(1, (3, 6, 6)),
    ),
    "ours": lambda: nn.Sequential(
        conv(3, 8), fastscore.nn.InstanceNorm2dPlus(8, activation="elu"), conv(8, 3)
    ),
    "mixed-residual": lambda: nn.Sequential(
        conv(3, 8),
        Residual(
            fastscore.nn.GroupNormAct(2, 8, activation="silu"),
            conv(8, 8),
            nn.BatchNorm2d(8),
            nn.Softplus(),
            conv(8, 8),
        ),
        Residual(nn.InstanceNorm2d(8), nn.Tanh(), conv(8, 8)),
        nn.PixelUnshuffle(2),
        nn.Sigmoid(),
        nn.PixelShuffle(2),
        nn.ConvTranspose2d(8, 3, 3, padding=1),
    ),
    "attention": lambda: nn.Sequential(conv(3, 8), Attention(False), nn.SiLU(), conv(8, 3)),
    "fused-attention": lambda: nn.Sequential(conv(3, 8), Attention(True), nn.SiLU(), conv(8, 3)),
    "dropout": lambda: nn.Sequential(
        conv(3, 8), nn.Dropout(0.0), nn.LeakyReLU(0.2), nn.MaxPool2d(1), conv(8, 3)
    ),
    "odd": Odd,
}


def both_gradients(net, x, v):
    """(loss, value, product, gradients) by jvp and by double backprop, for M directions."""
    parameters = list(net.parameters())
    y, jv = jvp(net, x, v)
    loss = (v * jv).sum() + 0.5 * (v * y).flatten(2).sum(2).square().sum()
    found = (loss, y, jv, torch.autograd.grad(loss, parameters, allow_unused=True))
    leaf = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):   # the others cannot be differentiated twice
        y = net(leaf)
    # Vector-Jacobian products give vᵀJ; vᵀJv is what the loss needs.
    vj = torch.stack([torch.autograd.grad((y * d).sum(), leaf, create_graph=True)[0] for d in v])
    loss = (v * vj).sum() + 0.5 * (v * y).flatten(2).sum(2).square().sum()
    return found, (loss, y, vj, torch.autograd.grad(loss, parameters, allow_unused=True))


def relative(a, b):
    a, b = (torch.cat([g.flatten() for g in gradients if g is not None]) for gradients in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.fixture
def no_detour(monkeypatch):
    """Fail where the engine gives up and takes the function as a whole."""

    def detour(*args):
        raise AssertionError("the stacked path gave up")

    monkeypatch.setattr(routes, "_forward_mode", detour)


@pytest.mark.parametrize("M", [1, 4])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_loss_and_every_gradient_equal_double_backprop(
    no_detour, name, training, M, dtype, tolerance
):
    torch.manual_seed(0)
    net = NETWORKS[name]().to(dtype).train(training)
    x, v = torch.randn(4, 3, 6, 6, dtype=dtype), torch.randn(M, 4, 3, 6, 6, dtype=dtype).sign()
    (loss, y, jv, gradients), (expected, y2, _, expected_gradients) = both_gradients(net, x, v)
    assert torch.allclose(y, y2, rtol=10 * tolerance, atol=tolerance)
    assert torch.allclose(loss, expected, rtol=10 * tolerance)
    assert relative(gradients, expected_gradients) < tolerance
    assert any(bool(g.abs().max() > 0) for g in gradients if g is not None)


@pytest.mark.parametrize("name", ["mixed-residual", "instance-norm", "batch-norm"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_every_back_end_gives_these_gradients(backend, no_detour, name, dtype, tolerance):
    torch.manual_seed(0)
    net = NETWORKS[name]().to(dtype)
    x, v = torch.randn(2, 3, 4, 4, dtype=dtype), torch.randn(2, 2, 3, 4, 4, dtype=dtype).sign()
    (loss, *_, gradients), (expected, *_, expected_gradients) = both_gradients(net, x, v)
    assert (
        torch.allclose(loss, expected, rtol=10 * tolerance)
        and relative(gradients, expected_gradients) < tolerance
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_product_equals_the_difference_quotient(no_detour, name):
    torch.manual_seed(1)
    net = NETWORKS[name]().double().eval()
    x, v = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 2, 3, 6, 6).double()
    _, jv = jvp(net, x, v)
    with torch.no_grad():
        quotient = torch.stack([(net(x + 1e-6 * d) - net(x - 1e-6 * d)) / 2e-6 for d in v])
    assert torch.allclose(jv, quotient, atol=1e-6)
    one = jvp(net, x, v[0])[1]
    assert one.shape == x.shape and torch.allclose(one, jv[0], atol=1e-12)


@pytest.mark.parametrize("name", ["NCSN", "NCSNv2", "ScoreMLP"])
def test_score_networks(no_detour, name):
    torch.manual_seed(0)
    models = fastscore.models
    net = (
        models.ScoreMLP(192, 32, 2, sigmas=[1.0, 0.1])
        if name == "ScoreMLP"
        else getattr(models, name)(3, 8)
    )
    net = net.double()
    sigma = net.sigmas[:2] if hasattr(net, "sigmas") else torch.tensor([1.0, 0.1]).double()
    if hasattr(net, "last"):
        nn.init.normal_(net.last.weight)
    x, v = torch.rand(2, 3, 8, 8).double(), torch.randn(2, 2, 3, 8, 8).double()
    parameters = list(net.parameters())
    f = lambda x: net(x, sigma)   # noqa: E731
    y, jv = jvp(f, x, v)
    got = torch.autograd.grad((jv * v).sum(), parameters, allow_unused=True)
    leaf = x.clone().requires_grad_()
    vj = torch.stack(
        [torch.autograd.grad((f(leaf) * d).sum(), leaf, create_graph=True)[0] for d in v]
    )
    expected = torch.autograd.grad((vj * v).sum(), parameters, allow_unused=True)
    assert (
        relative(
            [a for a, b in zip(got, expected) if b is not None],
            [b for b in expected if b is not None],
        )
        < 1e-10
    )


def test_running_statistics_move_as_in_an_ordinary_pass():
    torch.manual_seed(0)
    ours, theirs = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    x = torch.randn(4, 8, 3, 3)
    jvp(ours, x, torch.randn(3, 4, 8, 3, 3)), theirs(x)
    for a, b in zip(ours.buffers(), theirs.buffers()):
        assert torch.allclose(a, b, atol=1e-6)


def test_dropout_draws_one_mask_for_value_and_tangents():
    torch.manual_seed(0)
    y, jv = jvp(nn.Dropout(0.5), torch.ones(50, 40), torch.ones(2, 50, 40))
    assert torch.equal(jv[0], y) and torch.equal(jv[1], y) and 0 < int((y == 0).sum()) < 2000


def test_constants_inside_f():
    x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()

    def frozen(x):
        with torch.no_grad():
            scale = x.norm()
        return x * scale + x.detach() * x

    assert torch.allclose(jvp(frozen, x, v)[1], v * x.norm() + x * v)
    with torch.no_grad():
        y, jv = jvp(torch.sin, x, v)
    assert not y.requires_grad and torch.allclose(jv, x.cos() * v)
    assert torch.equal(jvp(lambda x: torch.ones(3, 2), x, v)[1], torch.zeros(3, 2))


def test_a_clone_owns_its_memory():
    """It shared the stack of its source, so that writing into it changed both."""
    x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()

    def f(x):
        y = x.clone()
        y += 1
        return x * y

    y, jv = jvp(f, x, v)
    assert torch.allclose(y, x * (x + 1)) and torch.allclose(jv, v * (2 * x + 1))


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g

    @staticmethod
    def jvp(ctx, t):
        return 3 * ctx.saved_tensors[0] ** 2 * t


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()


def test_an_autograd_function_inside_f_is_no_constant():
    """Its forward runs without gradients, like a block that means to be constant.

    Its own jvp, or two levels of backward, or a refusal.
    """
    x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    assert torch.allclose(jvp(lambda x: Cubed.apply(x) + x, x, v)[1], v * (3 * x**2 + 1))
    with pytest.raises(
        NotImplementedError,
        match="You must implement either the backward or vjp method for your custom",
    ):
        jvp(lambda x: Sine.apply(x) + x, x, v)


def test_gradient_inside_f_is_carried_as_a_whole():
    """A score that is the gradient of an energy.

    No rule can carry autograd.grad, stock forward mode over it can.
    """
    weight = torch.randn(4, 4).double().requires_grad_()

    def score(x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            return torch.autograd.grad((x @ weight).sin().sum(), x, create_graph=True)[0]

    x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    _, jv = jvp(score, x.clone(), v)
    expected = torch.stack(
        [-(weight * ((xi @ weight).sin())) @ weight.T @ vi for xi, vi in zip(x, v)]
    )
    assert torch.allclose(jv, expected)
    (g,) = torch.autograd.grad((jv * v).sum(), weight)
    assert torch.allclose(g, torch.autograd.grad((expected * v).sum(), weight)[0])


def test_gradients_reach_x_and_the_directions():
    x, v = (
        torch.randn(2, 3, 4, 4).double().requires_grad_(),
        torch.randn(2, 2, 3, 4, 4).double().requires_grad_(),
    )
    net = nn.Sequential(conv(3, 4), nn.InstanceNorm2d(4), nn.SiLU(), conv(4, 3)).double()
    assert torch.autograd.gradcheck(lambda x, v: jvp(net, x, v), (x, v))
    assert torch.autograd.gradgradcheck(
        lambda x, v: jvp(net, x, v)[1], (x[:1, :, :2, :2], v[:, :1, :, :2, :2])
    )


def test_transforms_around_it():
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    expected = jvp(net, x, v)[1]
    rows = torch.vmap(lambda x, v: jvp(net, x[None], v[None])[1][0])(x, v)
    assert torch.allclose(rows, expected)
    g = torch.func.grad(lambda x: jvp(net, x, v)[1].sum())(x)
    leaf = x.clone().requires_grad_()
    assert torch.allclose(g, torch.autograd.grad(jvp(net, leaf, v)[1].sum(), leaf)[0])


def test_low_precision_and_channels_last():
    torch.manual_seed(0)
    net = NETWORKS["mixed-residual"]().to(memory_format=torch.channels_last).eval()
    x, v = torch.randn(2, 3, 8, 8), torch.randn(1, 2, 3, 8, 8)
    y, jv = jvp(net, x, v)
    last = jvp(net, x.to(memory_format=torch.channels_last), v)
    assert torch.allclose(last[0], y, atol=1e-5) and torch.allclose(last[1], jv, atol=1e-4)
    low = jvp(net.bfloat16(), x.bfloat16(), v.bfloat16())
    assert low[1].dtype == torch.bfloat16 and float((low[1].float() - jv).norm() / jv.norm()) < 0.05


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: jvp(torch.sin, torch.ones(2, 3), torch.ones(3)),
            ValueError,
            r"v must have the shape of x, \(2, 3\)",
        ),
        (
            lambda: jvp(torch.sin, torch.ones(2), torch.ones(2).double()),
            ValueError,
            "v must be torch.float32",
        ),
        (
            lambda: jvp(torch.sin, torch.ones(2, dtype=torch.int64), torch.ones(2)),
            TypeError,
            "x must be float32",
        ),
        (
            lambda: jvp(lambda x: (x, x), torch.ones(2), torch.ones(2)),
            TypeError,
            "f must return a tensor; got tuple",
        ),
        (
            lambda: jvp(
                lambda x: torch.native_layer_norm(x, (2,), None, None, 1e-5)[0],
                torch.ones(2),
                torch.ones(2),
            ),
            NotImplementedError,
            "torch.native_layer_norm has no right forward mode",
        ),
        (
            lambda: jvp(torch.sin, torch.ones(2, 3), torch.ones(0, 2, 3)),
            ValueError,
            "v must hold at least one direction",
        ),
    ],
)
def test_refusals_are_one_sentence(call, error, message):
    with pytest.raises(error, match=message) as found:
        call()
    assert "\n" not in str(found.value)


def test_a_rules_own_type_error_comes_through(monkeypatch):
    """Taken for a spelling that the rule does not know, it would hide a fault behind a slower
    path."""
    from fastscore.dual.table import RULES

    def broken(x):
        return x + None

    monkeypatch.setitem(RULES, torch.Tensor.asinh, broken)
    with pytest.raises(TypeError, match="unsupported operand"):
        jvp(lambda x: x.asinh(), torch.ones(2), torch.ones(2))


def test_arguments_by_their_other_names():
    x = torch.randn(3, 4, dtype=torch.float64)
    for f in (
        lambda x: torch.sum(input=x, axis=1, keepdims=True),
        lambda x: x.mean(axis=0),
        lambda x: torch.slogdet(input=x[:, :3])[1][None],
        lambda x: torch.softmax(input=x, dim=1),
    ):
        found, expected = jvp(f, x, x.sin()), torch.func.jvp(f, (x,), (x.sin(),))
        assert torch.allclose(found[0], expected[0]) and torch.allclose(found[1], expected[1])
