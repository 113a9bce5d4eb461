"""What people write inside a score.

Jvp through it equals double backprop in float64, or is refused in one sentence.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils import checkpoint

import fastscore
from fastscore.dual import jvp
from fastscore.models import EnergyScore

torch.manual_seed(0)
F64 = {"dtype": torch.float64}
W, BIAS = (nn.Parameter(torch.randn(shape, **F64)) for shape in ((4, 4), (4,)))
CONSTANT = torch.randn(5, 4, **F64)
COLUMNS = torch.tensor([0, 2, 1])


def h(x):
    return x @ W + BIAS


def matrices(x):
    """(B, 4, 4), far from singular."""
    return h(x)[:, :, None] * x[:, None] + 3 * torch.eye(4, **F64)


class Product(torch.autograd.Function):
    """w x² without a rule for forward mode."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g * x * w, (g * x * x).sum(0)


def writes(write):
    """The function x -> h · (a copy of h that `write` writes into)."""

    def f(x):
        a = h(x)
        b = a.clone()
        write(b, a)
        return a * b + b.sin()

    return f


def fill_diagonal(x):
    m = matrices(x).clone()
    m.diagonal(dim1=1, dim2=2).mul_(3)
    return m.sin().sum(-1)


def filled(x):
    out = torch.zeros_like(x)
    out[:] = h(x)[0]
    out[0] = h(x)[1, 1]
    out[:, 3] = h(x).mean()
    return out * x


def foreign_buffer(x):
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[:, :2] = h(x)[:, :2].sin()
    return out * x


def unpacked(x):
    a, b, c, d = h(x).t()
    return torch.stack([a * b, b, c * d, d.sin()], 1)


def scores_of(x):
    return matrices(x)[:, None]


def same_noise(x):
    torch.manual_seed(3)
    return (
        h(x) * torch.empty_like(x).normal_()
        + F.rrelu(h(x), training=True)
        + F.alpha_dropout(x, 0.5, training=False)
    )


def activations(x):
    y = h(x)
    simple = (
        F.celu, F.selu, F.mish, F.softsign, F.logsigmoid, F.hardswish, F.relu6, F.tanhshrink,
        F.softshrink, F.hardtanh, F.leaky_relu,
    )
    more = (
        F.gelu(y, approximate="tanh")
        + F.elu(y, 0.5)
        + F.softplus(y, 2)
        + F.threshold(y, 0.1, 0.2)
        + F.glu(torch.cat([y, x], 1), 1)
    )
    return sum(f(y) for f in simple) + more


FUNCTIONS = {
    # in place, and views
    "write-into-a-clone": writes(lambda b, a: b.mul_(2)),
    "write-columns": writes(lambda b, a: b.__setitem__((slice(None), COLUMNS), a[:, :3].sin())),
    "write-where": writes(lambda b, a: b.__setitem__(a > 0, 0.5)),
    "write-scatter": writes(
        lambda b, a: b.scatter_add_(1, COLUMNS.expand(len(a), 3), a[:, :3].sin())
    ),
    "write-into-a-piece": writes(lambda b, a: torch.tensor_split(b, 2, dim=1)[0].mul_(2)),
    "write-into-ravel": writes(lambda b, a: b.ravel()[1:3].zero_()),
    "write-into-unfold": writes(lambda b, a: b.unfold(1, 2, 2)[..., 0].mul_(3)),
    "write-sign": writes(lambda b, a: b[:, :1].sign_()),
    "write-into-a-diagonal": fill_diagonal,
    "write-broadcast": filled,
    "write-into-a-foreign-buffer": foreign_buffer,
    "contiguous-is-the-tensor-itself": writes(lambda b, a: b.contiguous().mul_(2)),
    # complex numbers
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(h(x)) * (1 + 2j), n=4).square(),
    "complex": lambda x: (
        torch.fft.fft(h(x)).abs()
        + (torch.complex(h(x), x) * 1j).real
        + torch.view_as_real(h(x) * 1j)[..., 1]
    ),
    # promotion and broadcasting
    "unsigned": lambda x: (
        h(x).square()
        - (CONSTANT[: len(x)] > 0).to(torch.uint8)
        + torch.full((4,), 200, dtype=torch.uint8)
    ),
    "where-number": lambda x: torch.where(h(x) > 0, h(x).square(), 0.1),
    "where-broadcast": lambda x: torch.where(CONSTANT[: len(x)] > 0, h(x)[0].square(), x[:, :1]),
    "where-method": lambda x: CONSTANT[: len(x)].where(h(x) > 0, h(x).square()),
    "masked-fill": lambda x: (
        h(x)[0].square().masked_fill(CONSTANT[: len(x)] > 0, 0.5) * x.masked_fill(x > 0, h(x).sum())
    ),
    "constants-in-front": lambda x: (
        BIAS.expand_as(h(x))
        * BIAS.float().type_as(x)
        * BIAS.to(x)
        * CONSTANT[: len(x)].view_as(x)
        * x.to(x)
    ),
    "addcmul": lambda x: (
        torch.addcmul(h(x), BIAS, BIAS, value=2)
        + torch.addcmul(BIAS, x, x)
        + torch.lerp(BIAS, CONSTANT[: len(x)], x)
    ),
    "zeroth-power": lambda x: (x - x.detach()) ** 0 * h(x) + torch.float_power(h(x), 2),
    "keywords": lambda x: (
        torch.sum(input=h(x).sin(), axis=1, keepdims=True) * x
        + torch.cat((h(x), x), axis=1)[:, 2:6]
    ),
    "no-dimensions": lambda x: (
        h(x).square().mean().sum(-1) * x + h(x).mean().softmax(-1) * x + x.mean().cumsum(-1)
    ),
    # what is picked
    "unpacking": unpacked,
    "rows": lambda x: torch.stack([i * row.sin() for i, row in enumerate(h(x))]),
    "numpy-index": lambda x: (
        matrices(x)[np.arange(len(x)), :, np.array([1] * len(x))]
        + matrices(x)[range(len(x)), :, (1,) * len(x)]
    ),
    "sorted": lambda x: (
        h(x).sort(1).values * torch.arange(4) + torch.cat([h(x).topk(3, 1).values, x[:, :1]], 1)
    ),
    "gathered": lambda x: (
        torch.gather(h(x), 1, h(x).argsort(1)) * x + h(x).kthvalue(2, 1, keepdim=True).values
    ),
    "integers": lambda x: (
        W[h(x).abs().to(torch.int64).clamp(max=3)][..., 0] * x + F.one_hot(x.argmax(1), 4) * h(x)
    ),
    "control-flow": lambda x: (
        h(x).sin() * float(x.mean()) if h(x).sum() > 0 else h(x).cos() * x.sum().item()
    ),
    "extremes": lambda x: (
        h(x).clamp(-0.5, 0.5) * x
        + torch.minimum(h(x), x) * h(x).min()
        + h(x).amax(1, keepdim=True)
        + x.abs()
    ),
    "cumulative": lambda x: (
        h(x).cumsum(1)
        + x.cumprod(1)
        + torch.logcumsumexp(h(x), 1)
        + torch.cummax(h(x), 1).values * x
    ),
    "metadata": lambda x: (
        h(x).square() * x.ndim if x.is_cpu and not x.storage_offset() and x.itemsize == 8 else x
    ),
    # networks' other building blocks
    "activations": activations,
    "same-noise-for-all-tangents": same_noise,
    "padding": lambda x: sum(
        F.pad(h(x)[:, None], (1, 1), mode=m)[:, 0, 1:5]
        for m in ("reflect", "replicate", "circular")
    ).square(),
    "resizing": lambda x: sum(
        F.interpolate(h(x).square().view(-1, 1, 2, 2), scale_factor=2, mode=m).flatten(1)[:, 5:9]
        for m in ("nearest", "bilinear", "bicubic", "area")
    ),
    "convolution-without-batch": lambda x: (
        F.conv_transpose1d(x.T.square(), W[..., None].expand(4, 4, 3), padding=1).T
    ),
    "autograd-function": lambda x: Product.apply(h(x), BIAS) * x,
    "checkpoint": lambda x: (
        checkpoint.checkpoint(
            lambda x: F.layer_norm(h(x).sin(), (4,), BIAS), x, use_reentrant=False
        )
        * x
    ),
    "gradient-inside": lambda x: (
        torch.func.vjp(lambda y: h(y).sin(), x)[1](x)[0]
        + torch.vmap(lambda row: (row @ W).sin())(x)
    ),
    "jvp-inside": lambda x: jvp(lambda y: h(y).sin(), x, x.cos())[1] * x,
    "functional-call": lambda x: torch.func.functional_call(
        nn.LayerNorm(4).double(), {"weight": BIAS, "bias": BIAS}, (h(x),)
    ),
    "coefficients-of-x": lambda x: (
        F.layer_norm(CONSTANT[: len(x)], (4,), h(x)[0])
        + F.group_norm(x[..., None] * BIAS, 2, h(x)[0], x[0]).mean(-1)
    ),
    "hypernetwork": lambda x: (
        F.linear(x, h(x).repeat(4, 1)[:4], x[0]) + F.linear(CONSTANT[: len(x)], matrices(x)[0])
    ),
    # attention
    "attention-masks": lambda x: sum(
        F.scaled_dot_product_attention(scores_of(x), scores_of(x).sin(), scores_of(x), **o)[:, 0, 1]
        for o in (
            {"attn_mask": torch.ones(4, 4).tril(-1).bool()},
            {"is_causal": True, "scale": 0.3},
            {"attn_mask": W[None]},
        )
    ),
    "grouped-attention": lambda x: F.scaled_dot_product_attention(
        scores_of(x) * torch.arange(1, 5)[:, None, None],
        *[scores_of(x) * torch.arange(1, 3)[:, None, None]] * 2,
        enable_gqa=True,
    )[:, 3, 0],
    # linear algebra: PyTorch's forward mode keeps the factorisation of solve and det as a constant,
    # and loses part of the gradient
    "solve": lambda x: (
        torch.linalg.solve(matrices(x), x)
        + torch.linalg.solve(matrices(x), matrices(x).sin())[..., 0]
    ),
    "determinants": lambda x: (
        x * (torch.linalg.det(matrices(x)) + matrices(x).slogdet().logabsdet)[:, None]
        + (matrices(x) @ matrices(x).mT).logdet()[:, None]
    ),
    "inverse": lambda x: (
        torch.linalg.inv(matrices(x))[..., 0]
        + torch.linalg.cholesky(matrices(x) @ matrices(x).mT)[..., 0]
    ),
}


def double_backprop(f, x, v):
    x = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        y = f(x)
    vj = torch.stack(
        [torch.autograd.grad(y, x, d, create_graph=True, materialize_grads=True)[0] for d in v]
    )
    return x, y, (vj * v).flatten(1).sum(1)


def gradients(x, y, vjv, v):
    loss = (vjv + 0.5 * (y * v).flatten(1).sum(1).square()).sum()
    return torch.autograd.grad(loss, [x, W, BIAS], allow_unused=True, materialize_grads=True)


def close(a, b):
    return float((a - b).abs().max()) <= 1e-9 * max(1e-3, float(b.abs().max()))


# a stack of 1 + M
@pytest.mark.parametrize(
    "M, B", [(1, 5), (4, 5), (3, 4)], ids=["one", "as-many-as-samples", "as-many-as-columns"]
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_carried_as_double_backprop_has_it(name, M, B):
    torch.manual_seed(1)
    f, x, v = FUNCTIONS[name], 0.8 * torch.randn(B, 4, **F64), torch.randn(M, B, 4, **F64)
    leaf, y, vjv = double_backprop(f, x, v)
    expected = gradients(leaf, y, vjv, v)
    leaf = x.clone().requires_grad_()
    got, js = jvp(f, leaf, v)
    found = gradients(leaf, got, (js * v).flatten(1).sum(1), v)
    assert close(got, y) and close((js * v).flatten(1).sum(1), vjv)
    assert all(close(a, b) for a, b in zip(found, expected))
    with torch.no_grad():
        assert close(jvp(f, x, v)[1], js)


SCRIPTED = torch.jit.trace(
    nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double(), torch.zeros(2, 4, **F64)
)


@pytest.mark.parametrize(
    "f, message",
    [
        (
            lambda x: torch.ops.aten.layer_norm(x, [4], BIAS),
            "native_layer_norm is reached from TorchScript, torch.ops",
        ),
        (SCRIPTED, "native_layer_norm is reached from TorchScript"),
        (
            lambda x: torch.special.bessel_j0(x) * x,
            "PyTorch counts torch.special.bessel_j0 as a constant",
        ),
        (
            lambda x: torch.special.hermite_polynomial_h(x, 3) * Product.apply(x, BIAS),
            "PyTorch counts torch.special.hermite_polynomial_h",
        ),
        (
            lambda x: x.as_strided_scatter(x[0, 0], (), ()),
            "PyTorch's gradient of as_strided_scatter is wrong",
        ),
        (
            lambda x: torch._native_batch_norm_legit(x, None, None, True, 0.1, 1e-5)[0],
            "_native_batch_norm_legit has no right forward",
        ),
    ],
)
def test_what_pytorch_differentiates_wrongly_is_refused(f, message):
    with pytest.raises(NotImplementedError, match=message) as found:
        jvp(f, CONSTANT.clone(), CONSTANT)
    assert "\n" not in str(found.value)


def test_batch_norm_of_one_value_is_refused_as_in_pytorch():
    with pytest.raises(ValueError, match="more than one value per channel"):
        jvp(nn.BatchNorm1d(4), torch.randn(1, 4), torch.randn(1, 4))


def test_threads_have_grad_modes_of_their_own():
    """One thread under no_grad must not turn another one's constant block into a function of x."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    barrier, x = Barrier(2), torch.full((1, 1), 2.0)

    def f(x):
        barrier.wait()
        with torch.no_grad():
            c = x * 1
        barrier.wait()
        return c * x

    def slope(grad):
        with torch.set_grad_enabled(grad):
            return float(jvp(f, x, torch.ones(1, 1))[1])

    with ThreadPoolExecutor(2) as pool:
        # Under no_grad the block cannot be told from the rest.
        assert list(pool.map(slope, (True, False))) == [2.0, 4.0]


def transformer(**options):
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)


def attention(mask, **options):
    return Taken(nn.MultiheadAttention(8, 2, batch_first=True), 3, attn_mask=mask, **options)


LAYERS = {
    "transformer": transformer,
    "transformer-norm-first": lambda: transformer(norm_first=True, activation="gelu"),
    "encoder": lambda: nn.TransformerEncoder(transformer(), 2),
    "attention": lambda: attention(CAUSAL, need_weights=False, key_padding_mask=PADDING),
    "attention-with-weights": lambda: attention(CAUSAL.double().mul(-2)),
    "attention-with-biases": lambda: Taken(
        nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True), 3, need_weights=False
    ),
    "attention-separate": lambda: Taken(
        nn.MultiheadAttention(8, 2, batch_first=True, kdim=8, vdim=8, bias=False),
        3,
        need_weights=False,
    ),
    "lstm": lambda: Taken(nn.LSTM(8, 8, 2, batch_first=True), 1),
    "gru": lambda: Taken(nn.GRU(8, 4, bidirectional=True), 1),
    "weight-norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 8)
    ),
    "spectral-norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).eval(), nn.Tanh()
    ),
}
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.zeros(3, 5, dtype=torch.bool).index_fill(1, torch.tensor([4]), True)


class Taken(nn.Module):
    """The first result of a layer that is called with x several times over."""

    def __init__(self, layer, times, **options):
        super().__init__()
        self.layer, self.times, self.options = layer, times, options

    def forward(self, x):
        return self.layer(*[x] * self.times, **self.options)[0]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", LAYERS)
def test_attention_and_recurrent_layers(name, training):
    torch.manual_seed(0)
    net = LAYERS[name]().double()
    # In training it moves its vectors at every call.
    net = net if name == "spectral-norm" else net.train(training)
    x, v, parameters = (
        torch.randn(3, 5, 8, **F64),
        torch.randn(2, 3, 5, 8, **F64),
        list(net.parameters()),
    )
    # Its recurrent layers cannot be differentiated twice.
    with torch.backends.mkldnn.flags(enabled=False):
        leaf, y, vjv = double_backprop(net, x, v)
        expected = torch.autograd.grad(
            vjv.sum() + y.square().sum(), parameters, allow_unused=True, materialize_grads=True
        )
    y, js = jvp(net, x, v)
    got = torch.autograd.grad(
        (js * v).sum() + y.square().sum(), parameters, allow_unused=True, materialize_grads=True
    )
    assert all(close(a, b) for a, b in zip(got, expected)) and math.isclose(
        float((js * v).sum()), float(vjv.sum()), rel_tol=1e-10
    )
    with torch.no_grad():   # where the layers would take a fast path without derivatives
        assert close(jvp(net, x, v)[1], js)


def test_dropout_inside_attention_is_one_draw():
    """f is linear for a given draw of its masks, so the product along x itself is f(x)."""
    torch.manual_seed(0)
    x = torch.randn(3, 6, 4, **F64)
    scores = torch.randn(3, 6, 4, **F64)

    def f(x):
        return F.scaled_dot_product_attention(scores, scores, x, dropout_p=0.5)

    y, js = jvp(f, x, torch.stack([x, 2 * x]))
    assert close(js[0], y) and close(js[1], 2 * y)
    assert not close(y, jvp(f, x, x)[0])   # a new call draws anew


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)],
    ids=lambda norm: type(norm).__name__,
)
def test_the_gradient_of_an_energys_loss_is_right_through_pytorchs_norms(norm):
    """Third derivatives, which PyTorch gets wrong through layer and batch norm.

    The difference quotient of the loss is the yardstick.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), norm, nn.Tanh(), nn.Linear(8, 1)).double()
    x, parameters = torch.randn(6, 4, **F64), list(net.parameters())
    score = fastscore.models.EnergyScore(net)

    def loss():
        return fastscore.losses.sliced(score, x, seed=1).sum()

    direction = [torch.randn_like(p) for p in parameters]
    found = torch.autograd.grad(loss(), parameters, materialize_grads=True, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(found, direction))
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
            ends.append(float(loss()))
            torch._foreach_add_(parameters, direction, alpha=-step)
    assert math.isclose(float(slope), (ends[0] - ends[1]) / 2e-5, rel_tol=1e-6)


def _both_parts(z):
    return 1.3 * z.real + z.imag.sin()


TO_COMPLEX = {
    "to": lambda x: _both_parts(x.to(torch.complex128) * (1 + 2j)),
    "type": lambda x: _both_parts(x.sin().type(torch.complex128) * 1j + x),
    "type_as": lambda x: _both_parts(x.type_as(torch.zeros((), dtype=torch.complex128)) ** 2),
    "complex base": lambda x: _both_parts((x + 2j) ** x),
    "complex exponent": lambda x: _both_parts(x.exp() ** (1 + 2j)),
    "complex tensor as exponent": lambda x: _both_parts(
        torch.pow(x.exp(), torch.tensor(1 + 2j, dtype=torch.complex128))
    ),
    "complex number to a power": lambda x: _both_parts((1 + 2j) ** x),
    "complex tensor to a power": lambda x: _both_parts(
        torch.tensor(1 + 2j, dtype=torch.complex128) ** x
    ),
    "real to a complex power": lambda x: _both_parts(2.0 ** (x * 1j)),
    "both complex": lambda x: _both_parts((x + 2j) ** (x * 1j)),
    "both real": lambda x: x.exp() ** x,
    "sgn": lambda x: _both_parts((x + 2j).sgn()),
    "sgn in place": lambda x: _both_parts((x + 2j).sgn_()),
    "nested tensors": lambda x: (
        torch.nested.to_padded_tensor(torch.nested.as_nested_tensor([*x.sin()]), 0.0) * x
    ),
}


@pytest.mark.filterwarnings("ignore::fastscore.FallbackWarning")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("wanted", [True, False], ids=["gradients", "values"])
@pytest.mark.parametrize("name", TO_COMPLEX)
def test_complex_numbers_made_of_real_ones_keep_their_tangents(name, wanted, mode):
    f, generator = TO_COMPLEX[name], torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    start = x.clone().requires_grad_(wanted)
    with mode():
        y, jv = jvp(f, start, v)
    leaf = x.clone().requires_grad_()
    expected = f(leaf)
    u = torch.ones_like(expected).requires_grad_()
    (g,) = torch.autograd.grad(expected, leaf, u, create_graph=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(jv, torch.autograd.grad(g, u, v)[0])


def _no_grad_sign(z):
    with torch.no_grad():
        return z.sgn()


def test_a_complex_sign_without_gradients_inside_f_is_a_constant():
    x = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    _, jv = jvp(lambda x: (_no_grad_sign(x + 2j) * x).real, x, torch.ones_like(x))
    torch.testing.assert_close(jv, (x + 2j).sgn().real)


def _while(x):
    def body(i, y):
        return i + 1, y * y.sin()

    start = torch.tensor(0), x
    return torch._higher_order_ops.while_loop(lambda i, y: i < 2, body, start)[1]


BRANCHES = {
    "cond": lambda x: torch.cond(x.sum() > 0, torch.sin, lambda x: x * x, (x,)),
    "cond, several": lambda x: torch.cond(
        x.sum() > 9, lambda x, y: (-x, -y), lambda x, y: (y * x, -x), (x, x.cos())
    )[0],
    "cond by a bool": lambda x: torch.cond(True, torch.sin, torch.cos, (x,)),
    "while_loop": _while,
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", BRANCHES)
def test_control_flow_of_torch_is_followed(name, mode):
    f = BRANCHES[name]
    x = torch.tensor([[0.5, 1.0, -0.25]], dtype=torch.float64)
    v = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    with mode():
        y, jv = jvp(f, x, v)
    torch.testing.assert_close(y, f(x))
    torch.testing.assert_close(
        jv, (f(x + 1e-6 * v) - f(x - 1e-6 * v)) / 2e-6, rtol=1e-8, atol=1e-9
    )


def test_the_gradient_of_a_branch_is_that_of_what_it_calls():
    x = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def branches(x):
        return torch.cond(x.sum() > 0, lambda x: (w * x).sin(), lambda x: w * x, (x,))

    losses = [
        fastscore.losses.sliced(f, x, seed=0).sum() for f in (branches, lambda x: (w * x).sin())
    ]
    found, wanted = (torch.autograd.grad(loss, w)[0] for loss in losses)
    assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_other_operators_of_higher_order_are_refused_in_one_sentence():
    x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotImplementedError, match=r"flex_attention, .* cannot be"):
        jvp(lambda x: flex_attention(x, x, x), x, torch.ones_like(x))


@pytest.mark.parametrize(
    "convert",
    [lambda x: x.to(torch.complex128), lambda x: x.type(torch.complex128)],
    ids=["to", "type"],
)
def test_an_energy_of_complex_numbers_keeps_its_derivatives(convert):
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = torch.ones(1, 4, 3, dtype=torch.float64)
    score = EnergyScore(lambda x: -(convert(x) * (1 + 1j)).abs().square().sum(1))   # -2 ‖x‖²
    slope, curvature = score.along(x, v)
    torch.testing.assert_close(slope[0], -4 * x.sum(1))
    torch.testing.assert_close(curvature[0], torch.full((4,), -12.0, dtype=torch.float64))
