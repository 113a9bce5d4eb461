"""autograd.Functions inside f.

What their backward says is what jvp and the losses take, or they are refused. Against double
backprop.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import fastscore
from fastscore import jvp, losses
from fastscore.guidance import posterior
from fastscore.models import EnergyScore


def function(forward, backward, setup=None, **more):
    """A Function: forward(x, ...) or forward(ctx, x, ...), backward(ctx, *cotangents)."""
    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(backward),
        **{k: staticmethod(m) for k, m in more.items()},
    }
    if setup is not None:
        members["setup_context"] = staticmethod(setup)
    return type("Custom", (Function,), members)


def save(ctx, x, y):
    ctx.save_for_backward(x)
    return y


def cosine(ctx, g):
    return g * ctx.saved_tensors[0].cos()


def numpy_sine(x):
    return torch.from_numpy(np.sin(x.detach().cpu().numpy())).to(x)


Sign = function(lambda ctx, x: x.sign(), lambda ctx, g: g)
sign = Sign.apply   # as people write it
Detached = function(lambda ctx, x: save(ctx, x, x.detach().sin()), cosine)
Data = function(lambda ctx, x: save(ctx, x, x.data.sin()), cosine)
Numpy = function(lambda ctx, x: save(ctx, x, numpy_sine(x)), cosine)
Lists = function(lambda ctx, x: save(ctx, x, torch.tensor(x.tolist(), dtype=x.dtype).sin()), cosine)
Compared = function(lambda ctx, x: save(ctx, x, (x > 0).to(x.dtype)), cosine)
Reversed = function(lambda ctx, x: x, lambda ctx, g: -2 * g)
Viewed = function(lambda ctx, x: x.view_as(x), lambda ctx, g: -2 * g)
Setup = function(
    lambda x, scale: x.sign() * scale,
    lambda ctx, g: (g * ctx.scale * ctx.saved_tensors[0].cos(), None),
    lambda ctx, inputs, output: (
        ctx.save_for_backward(inputs[0]),
        setattr(ctx, "scale", inputs[1]),
    ),
)
Outputs = function(
    lambda ctx, x: save(ctx, x, (x.detach().sin(), "a word", x.detach().square(), 7)),
    lambda ctx, a, _, b, __: a * ctx.saved_tensors[0].cos() + 2 * b * ctx.saved_tensors[0],
)


def marked(ctx, x):
    index = x.argsort(-1)
    mask = (x > 0).to(x.dtype)
    ctx.mark_non_differentiable(index, mask)
    return save(ctx, x, (x.gather(-1, index), mask, index))


Marked = function(marked, lambda ctx, g, _, __: g * ctx.saved_tensors[0].cos())


def dirty(ctx, x):
    ctx.mark_dirty(x)
    return x.mul_(3).round_()


Dirty = function(dirty, lambda ctx, g: 3 * g)
Nested = function(
    lambda ctx, x: save(ctx, x, Sign.apply(Detached.apply(x))),
    lambda ctx, g: Sign.apply(g) * 0 + cosine(ctx, g),
)
Two = function(
    lambda ctx, x, w: (ctx.save_for_backward(x, w), (x.detach() @ w.detach()).round())[1],
    lambda ctx, g: (g @ ctx.saved_tensors[1].t(), ctx.saved_tensors[0].t() @ g),
)
Listed = function(
    lambda ctx, many, x: save(ctx, x, many[0].sin() + x.detach()), lambda ctx, g: (None, g)
)
Unmaterialised = function(
    lambda ctx, x: (ctx.set_materialize_grads(False), save(ctx, x, (x.sin(), x.cos())))[1],
    lambda ctx, a, b: (
        (0 if a is None else a * ctx.saved_tensors[0].cos())
        + (0 if b is None else -b * ctx.saved_tensors[0].sin())
    ),
)
Reduced = function(
    lambda ctx, x: save(ctx, x, x.detach().square().sum()),
    lambda ctx, g: 2 * g * ctx.saved_tensors[0],
)
Complex = function(
    lambda ctx, x: save(ctx, x, torch.complex(x.detach().sin(), x.detach())),
    lambda ctx, g: g.real * ctx.saved_tensors[0].cos() + g.imag,
)
NoGradient = function(lambda ctx, x: x.sign(), lambda ctx, g: None)
Halved = function(
    lambda ctx, x: save(ctx, x, x.sin()), cosine, vjp=lambda *a: None
)   # what else a class may hold changes nothing
WEIGHT = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3).requires_grad_()


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.1, 1, 9, dtype=torch.float64).view(3, 3))

    def forward(self, x):
        return Two.apply(F.silu(x), self.weight) + x


class Through(nn.Module):
    def forward(self, x):
        return sign(x) + x


RIGHT = {
    "sign": lambda x: Sign.apply(x) + x,
    "bound": lambda x: sign(x) * x,
    "detached": lambda x: Detached.apply(x) + x,
    "data": lambda x: Data.apply(x) * x,
    "numpy": lambda x: Numpy.apply(x * 2),
    "lists": lambda x: Lists.apply(x),
    "compared": lambda x: Compared.apply(x) * x.sin(),
    "reversed": lambda x: Reversed.apply(x) + x.square(),
    "viewed": lambda x: Viewed.apply(x.sin()),
    "setup": lambda x: Setup.apply(x, 3.0) + x,
    "outputs": lambda x: (lambda o: o[0] * o[2] + o[3])(Outputs.apply(x)),
    "one-of-several": lambda x: Outputs.apply(x)[2] + x,
    "marked": lambda x: (lambda s, m, i: s * m + x.gather(-1, i))(*Marked.apply(x)),
    "dirty": lambda x: (lambda y: Dirty.apply(y) * y)(x.sin()),
    "nested": lambda x: Nested.apply(x) + Nested.apply(Sign.apply(x)),
    "two-arguments": lambda x: Two.apply(x, WEIGHT) + Two.apply(x, x.t() @ x),
    "in-a-list": lambda x: Listed.apply([x], x),
    "unmaterialised": lambda x: (
        Unmaterialised.apply(x)[0] + (lambda a, b: a * b)(*Unmaterialised.apply(x))
    ),
    "reduced": lambda x: x * Reduced.apply(x),
    "complex": lambda x: (Complex.apply(x) * (1 + 2j)).abs().square(),
    "no-gradient": lambda x: NoGradient.apply(x) + x.sin(),
    "module": Learned(),
    "under-no-grad": lambda x: x * Constant()(x),
    "network": nn.Sequential(nn.Linear(3, 5), nn.SiLU(), Through(), nn.Linear(5, 3)).double(),
    "checkpoint": lambda x: checkpoint(lambda z: sign(z) * z, x, use_reentrant=False) + x,
    "reentrant": lambda x: checkpoint(lambda z: F.silu(z @ WEIGHT), x, use_reentrant=True) + x,
}


class Constant:
    def __call__(self, x):
        with torch.no_grad():
            return Detached.apply(x) + Sign.apply(x)


def by_double_backprop(f, x, v):
    y = f(x)
    u = torch.zeros_like(y).requires_grad_()
    (g,) = torch.autograd.grad(y, x, u, create_graph=True)
    return y, torch.stack([torch.autograd.grad(g, u, d, create_graph=True)[0] for d in v])


def gradients(y, jv, x, f):
    parameters = [WEIGHT, *(f.parameters() if isinstance(f, nn.Module) else ())]
    return torch.autograd.grad(
        (y * y).sum() + (jv * jv.detach().cos()).sum(),
        [x, *parameters],
        allow_unused=True,
        materialize_grads=True,
    )


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("name", RIGHT)
def test_products_and_gradients_are_those_of_double_backprop(name, M):
    f, torch_f = RIGHT[name], RIGHT[name]
    if name == "reentrant":   # which takes no torch.autograd.grad
        torch_f = lambda x: F.silu(x @ WEIGHT) + x   # noqa: E731
    torch.manual_seed(0)
    x, v = torch.randn(3, 3).double().requires_grad_(), torch.randn(M, 3, 3).double()
    ours, theirs = jvp(f, x, v), by_double_backprop(torch_f, x, v)
    for a, b in zip((*ours, *gradients(*ours, x, f)), (*theirs, *gradients(*theirs, x, f))):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        y, jv = jvp(f, x.detach(), v)
    # Where the caller is under no_grad, the block inside is no constant.
    if name != "under-no-grad":
        assert torch.allclose(jv, theirs[1], rtol=1e-10, atol=1e-10) and not jv.requires_grad


def test_straight_through_in_a_loss():
    x = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    assert torch.allclose(
        jvp(lambda x: sign(x) + x, x, torch.ones_like(x))[1], torch.full_like(x, 2)
    )
    s = x.sign() - 2 * x
    expected = -3 + 0.5 * s.square().sum()
    assert torch.allclose(losses.sliced(lambda x: sign(x) - 2 * x, x, seed=0), expected)
    assert torch.allclose(losses.exact(lambda x: sign(x) - 2 * x, x), expected)


HIDDEN = {
    "backward-detaches": function(
        lambda ctx, x: save(ctx, x, x.sin()),
        lambda ctx, g: (g * ctx.saved_tensors[0].cos()).detach(),
    ),
    "backward-data": function(
        lambda ctx, x: save(ctx, x, x.sin()), lambda ctx, g: g.data * ctx.saved_tensors[0].cos()
    ),
    "backward-numpy": function(
        lambda ctx, x: save(ctx, x, x.sin()), lambda ctx, g: numpy_sine(g.detach())
    ),
    "half-of-it": function(
        lambda ctx, x: save(ctx, x, x.sin()),
        lambda ctx, g: g * ctx.saved_tensors[0].cos() + g.detach(),
    ),
    "clipped": function(lambda ctx, x: x.sign(), lambda ctx, g: g.clamp(-0.5, 0.5)),
    "once": function(lambda ctx, x: save(ctx, x, x.sin()), once_differentiable(cosine)),
    "without": type("Custom", (Function,), {"forward": staticmethod(lambda ctx, x: x.sin())}),
    "writes": function(lambda ctx, x: x.mul_(2).clone(), lambda ctx, g: 2 * g),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_backward_hides_is_refused(name):
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4)
    with pytest.raises(NotImplementedError, match=r"fastscore\.jvp: ") as found:
        jvp(lambda x: HIDDEN[name].apply(x * 1) + x, x, torch.ones_like(x))
    assert "\n" not in str(found.value) and "Custom" in str(found.value)


def test_its_own_forward_mode_serves_where_its_backward_has_no_transpose():
    Own = function(
        lambda x: x.sin(), once_differentiable(cosine),
        lambda ctx, inputs, output: (ctx.save_for_backward(*inputs), ctx.save_for_forward(*inputs)),
        jvp=lambda ctx, t: t * ctx.saved_tensors[0].cos(),
    )  # fmt: skip
    x, v = torch.randn(3, 4).double().requires_grad_(), torch.randn(2, 3, 4).double()
    y, jv = jvp(lambda x: Own.apply(x) * x, x, v)
    assert torch.allclose(jv, v * (x.cos() * x + x.sin()))
    (g,) = torch.autograd.grad((jv * v).sum(), x)
    assert torch.allclose(g, (v.square() * (2 * x.cos() - x.sin() * x)).sum(0))


def test_an_energy_with_a_function():
    """The second-order pass takes none; double backprop does."""
    from fastscore.models import EnergyScore

    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4)
    for f in (
        lambda x: Data.apply(x).sum(1) - x.square().sum(1),
        lambda x: Reversed.apply(x.sin()).sum(1),
    ):
        score = EnergyScore(f)
        leaf = x.clone().requires_grad_()
        s = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)[0]
        v = torch.ones_like(x)
        h = torch.autograd.grad((s * v).sum(), leaf)[0]
        expected = (h * v).sum(1) + 0.5 * (s * v).sum(1).square()
        assert torch.allclose(losses.sliced(score, x, v=v, variance_reduced=False), expected)


def test_torch_script_and_custom_operators_are_called_once():
    calls = []

    @torch.library.custom_op("fastscore_tests::counted_sine", mutates_args=())
    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x.sin()

    counted.register_autograd(
        cosine, setup_context=lambda ctx, inputs, output: save(ctx, *inputs, None)
    )
    x, v = torch.randn(3, 4).double(), torch.randn(2, 3, 4).double()
    assert (
        torch.allclose(jvp(lambda x: counted(x) * x, x, v)[1], v * (x.cos() * x + x.sin()))
        and len(calls) == 1
    )
    script = torch.jit.script(lambda_free)
    assert torch.allclose(jvp(lambda x: script(x) * x, x, v)[1], v * (x.cos() * x + x.sin()))


def lambda_free(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def test_numpy_outside_a_function_is_no_constant():
    x = torch.ones(2, 3)
    with pytest.raises((RuntimeError, NotImplementedError), match="detach"):
        jvp(lambda x: torch.from_numpy(np.sin(x.numpy())), x, x)
    with pytest.raises((RuntimeError, NotImplementedError), match="detach"):
        jvp(lambda x: torch.from_numpy(np.sin(np.asarray(x))), x, x)
    assert torch.equal(jvp(lambda x: torch.from_numpy(x.detach().numpy()) + x, x, x)[1], x)


def test_inside_a_transform():
    Smooth = function(
        lambda x: x.detach().sin(),
        cosine,
        lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        generate_vmap_rule=True,
    )
    Smooth.generate_vmap_rule = True
    x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    (g,) = torch.func.grad(
        lambda x: (jvp(lambda x: Smooth.apply(x) * x, x, v)[1] * v).sum(), argnums=(0,)
    )(x)
    assert torch.allclose(g, v.square() * (2 * x.cos() - x.sin() * x))


KEPT = {}


def keeping(what):
    """The sine, whose forward keeps its argument or its result beside the graph."""

    def forward(ctx, x):
        y = save(ctx, x, x.sin())
        KEPT["it"] = x if what == "argument" else y
        return y

    return function(forward, cosine).apply


@pytest.mark.parametrize("what", ["argument", "result"])
def test_what_a_forward_keeps_goes_on_depending_on_x(what):
    """Python holds on to the very tensor of the graph: in stock autograd no constant."""
    kept_sine = keeping(what)
    x, v = torch.randn(3, 4).double(), torch.randn(2, 3, 4).double()

    with pytest.warns(fastscore.FallbackWarning, match="Custom keeps its argument or its result"):
        y, jv = jvp(lambda x: kept_sine(x) * KEPT["it"], x, v)

    other = x if what == "argument" else x.sin()
    slope = torch.ones_like(x) if what == "argument" else x.cos()
    assert torch.allclose(y, x.sin() * other)
    assert torch.allclose(jv, v * (x.cos() * other + x.sin() * slope))


def test_what_a_forward_keeps_on_its_node_is_of_the_graph(recwarn):
    def forward(ctx, x):
        ctx.x, ctx.y = x, x.sin()
        return ctx.y

    kept_sine = function(forward, lambda ctx, g: g * ctx.x.cos()).apply
    x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    assert torch.allclose(jvp(kept_sine, x, v)[1], v * x.cos())
    assert not [w for w in recwarn if w.category is fastscore.FallbackWarning]


# What a forward saves beside its arguments and results: 4 x², whose backward takes it from there.


def of_attribute(ctx, x):
    ctx.t = 2 * x
    return ctx.t.square()


def of_list(ctx, x):
    ctx.parts = ["name", [2 * x, None]]
    return ctx.parts[1][0].square()


def of_saved(ctx, x):
    t = 2 * x
    ctx.save_for_backward(torch.zeros(2), x, t)
    return t.square()


def of_view(ctx, x):
    ctx.save_for_backward(x[:, :2], x[:, 2:])
    return 4 * x.square()


def setup_of_attribute(ctx, inputs, output):
    ctx.t = 2 * inputs[0]


SAVED = {
    "attribute": function(of_attribute, lambda ctx, g: 4 * ctx.t * g),
    "list": function(of_list, lambda ctx, g: 4 * ctx.parts[1][0] * g),
    "saved": function(of_saved, lambda ctx, g: 4 * ctx.saved_tensors[2] * g),
    "view": function(of_view, lambda ctx, g: 8 * torch.cat(ctx.saved_tensors, 1) * g),
    "setup": function(
        lambda x: 4 * x.square(), lambda ctx, g: 4 * ctx.t * g, setup=setup_of_attribute
    ),
}


def operator_of(setup, backward, name):
    def square(x: torch.Tensor, factor: float = 4.0) -> torch.Tensor:
        return factor * x.square()

    op = torch.library.custom_op(f"fastscore_tests::{name}", square, mutates_args=())
    op.register_fake(lambda x, factor=4.0: torch.empty_like(x))
    op.register_autograd(lambda ctx, g: (backward(ctx, g), None), setup_context=setup)
    return op


def setup_of_saved(ctx, inputs, output):
    x, factor = inputs
    ctx.save_for_backward(x, factor / 2 * x)


OPERATORS = {
    "operator, attribute": operator_of(setup_of_attribute, lambda ctx, g: 4 * ctx.t * g, "one"),
    "operator, saved": operator_of(
        setup_of_saved, lambda ctx, g: 4 * ctx.saved_tensors[1] * g, "two"
    ),
}
APPLIED = {**{name: f.apply for name, f in SAVED.items()}, **OPERATORS}


def gradient_of(loss, weight):
    return torch.autograd.grad(loss.sum(), weight)[0]


@pytest.mark.parametrize("kind", APPLIED)
@pytest.mark.parametrize("loss", ["sliced", "exact", "finite_difference_sliced"])
@pytest.mark.parametrize("model", ["score", "energy"])
def test_what_a_forward_has_computed_and_saved_is_differentiated(kind, loss, model):
    """PyTorch's own double backward takes it for a constant, in silence."""
    weight = torch.randn(4, 4).double().requires_grad_()
    x = torch.randn(6, 4).double()

    def value(square):
        if model == "score":
            score = lambda x: square(x @ weight) @ weight   # noqa: E731
        else:
            score = EnergyScore(lambda x: square((x @ weight).tanh()).sum(1))
        named = {} if loss == "exact" else {"seed": 1}
        return getattr(losses, loss)(score, x, **named)

    got, expected = value(APPLIED[kind]), value(lambda h: 4 * h.square())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient_of(got, weight), gradient_of(expected, weight))


def test_a_fallback_differentiates_it_too():
    weight = torch.randn(4, 4).double().requires_grad_()
    x, v = torch.randn(2, 6, 4).double()
    script = torch.jit.script(lambda_free)

    def products(square):
        return jvp(lambda x: script(square(x @ weight)), x, v)[1].square()

    with pytest.warns(fastscore.FallbackWarning):
        got = products(SAVED["saved"].apply)
    expected = products(lambda h: 4 * h.square())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient_of(got, weight), gradient_of(expected, weight))


def test_a_likelihood_differentiates_it_too():
    weight = torch.randn(4, 4).double().requires_grad_()
    x = torch.randn(6, 4).double()

    def score(square):
        return posterior(lambda x: -x, lambda x: square(x @ weight).sum(1))(x)

    got, expected = score(SAVED["attribute"].apply), score(lambda h: 4 * h.square())
    torch.testing.assert_close(gradient_of(got, weight), gradient_of(expected, weight))


CALLS = nn.Module()
CALLS.register_buffer("count", torch.zeros(()))


def masked(ctx, x):
    CALLS.count += 1
    mask = (torch.rand(x.shape) < 0.5).to(x.dtype) * 2
    ctx.save_for_backward(mask, (x > 0).to(x.dtype), torch.full_like(x, 3))
    return x * mask


def test_constants_that_a_forward_saves_are_constants_and_are_made_once():
    """A mask that was drawn, one of comparisons, a number: in agreement with x itself, and without
    a second draw or count."""
    Masked = function(masked, lambda ctx, g: g * ctx.saved_tensors[0])
    weight = torch.randn(4, 4).double().requires_grad_()
    x, v = torch.randn(6, 4).double(), torch.randn(6, 4).double()

    CALLS.count.zero_()
    torch.manual_seed(3)
    y, jv = jvp(lambda x: Masked.apply(x @ weight).sin(), x, v)
    after = torch.rand(())
    assert CALLS.count == 1

    torch.manual_seed(3)
    mask = (torch.rand(6, 4, dtype=torch.float32) < 0.5).double() * 2
    assert torch.equal(after, torch.rand(()))
    h = x @ weight
    torch.testing.assert_close(y, (h * mask).sin())
    torch.testing.assert_close(jv, (h * mask).cos() * mask * (v @ weight))
    expected = ((h * mask).cos() * mask * (v @ weight)).square()
    torch.testing.assert_close(gradient_of(jv.square(), weight), gradient_of(expected, weight))


def quantised(ctx, x):
    scale = x.abs().max() / 7
    ctx.save_for_backward(x, scale)
    return (x / scale).round() * scale


def test_a_straight_through_estimate_stays_one():
    """Its backward compares with a scale that depends on x, and takes no derivative of it."""

    def straight(ctx, g):
        x, scale = ctx.saved_tensors
        return g * (x.abs() < 5 * scale)

    Quantised = function(quantised, straight)
    x, v = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    x.requires_grad_()
    _, jv = jvp(lambda x: Quantised.apply(x) * x, x, v)
    scale = (x.abs().max() / 7).detach()
    inside = (x.abs() < 5 * scale).double()
    value = (x.detach() / scale).round() * scale
    torch.testing.assert_close(jv, (inside * x + value) * v)
    torch.testing.assert_close(gradient_of(jv, x), inside * v * 2)


def hidden(ctx, x):
    ctx.save_for_backward(numpy_sine(x))
    return x.cos()


def hidden_in_few(ctx, x):
    """One element of 24, among constants."""
    ctx.save_for_backward(x)
    ctx.t = torch.ones_like(x)
    ctx.t[0, 0] = 1 + x[0, 0].item() ** 2
    return x.cos()


def detached(ctx, x):
    ctx.save_for_backward(x.detach())
    return x.cos()


def overwritten(ctx, x):
    ctx.t = x.cos()
    ctx.mark_dirty(x)
    return x.sin_()


@pytest.mark.parametrize(
    ("forward", "backward", "why"),
    [
        (hidden, lambda ctx, g: -g * ctx.saved_tensors[0], "hides from autograd how"),
        (
            hidden_in_few,
            lambda ctx, g: -g * ctx.saved_tensors[0].sin() * ctx.t / ctx.t.detach(),
            "hides from autograd how",
        ),
        (detached, lambda ctx, g: -g * ctx.saved_tensors[0].sin(), "hides from autograd how"),
        (overwritten, lambda ctx, g: g * ctx.t, "overwrites its argument"),
    ],
)
def test_what_cannot_be_followed_is_refused(forward, backward, why):
    Custom = function(forward, backward)
    weight = torch.randn(4, 4).double().requires_grad_()
    x, v = torch.randn(6, 4).double(), torch.randn(6, 4).double()

    with pytest.raises(NotImplementedError, match=f"Custom saves what it has computed and {why}"):
        jvp(lambda x: Custom.apply(x @ weight), x, v)
    y, jv = jvp(lambda x: Custom.apply(x @ weight.detach()), x, v)
    exact = fastscore.jvp(torch.sin if forward is overwritten else torch.cos, x @ weight.detach(),
                          v @ weight.detach())
    torch.testing.assert_close((y, jv), exact)


def normalised(ctx, x, running):
    mean, deviation = x.mean(0), x.std(0)
    running.mul_(0.9).add_(mean, alpha=0.1)
    ctx.save_for_backward(x, mean, deviation)
    return (x - mean) / deviation


def gradient_of_normalised(ctx, g):
    x, mean, deviation = ctx.saved_tensors
    h, n = (x - mean) / deviation, len(x)
    return (g - g.mean(0) - h * (g * h).sum(0) / (n - 1)) / deviation, None


def test_what_a_forward_remembers_in_an_argument_is_remembered_once():
    """A batch norm that saves its statistics, beside its composition."""
    Normalised = function(normalised, gradient_of_normalised)
    weight = torch.randn(4, 4).double().requires_grad_()
    x, v = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    running = torch.zeros(4).double()

    y, jv = jvp(lambda x: Normalised.apply(x @ weight, running).sin(), x, v)
    h = (x @ weight).detach()
    assert torch.equal(running, 0.1 * h.mean(0))

    def composed(x):
        h = x @ weight
        return ((h - h.mean(0)) / h.std(0)).sin()

    expected = jvp(composed, x, v)
    torch.testing.assert_close((y, jv), expected)
    torch.testing.assert_close(
        gradient_of(jv.square(), weight), gradient_of(expected[1].square(), weight)
    )


class Elsewhere:
    """Counts where nobody sees it."""

    times = 0


def unlike(ctx, x):
    Elsewhere.times += 1
    ctx.t = x * Elsewhere.times
    return x.sin()


def test_a_forward_that_does_something_else_each_time_is_refused():
    Custom = function(unlike, lambda ctx, g: g * ctx.t)
    weight = torch.randn(4, 4).double().requires_grad_()
    x, v = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    with pytest.raises(NotImplementedError, match="another result when it is carried out again"):
        jvp(lambda x: Custom.apply(x @ weight), x, v)


def now_and_then(ctx, x):
    """Saves what it has computed where x is negative on average, and draws."""
    ctx.t = 2 * x if x.mean() < 0 else None
    ctx.save_for_backward(x)
    return 4 * x.square() + 0 * torch.rand(())


def test_a_forward_that_takes_by_surprise_is_followed():
    Custom = function(
        now_and_then,
        lambda ctx, g: 8 * ctx.saved_tensors[0] * g if ctx.t is None else 4 * ctx.t * g,
    )
    weight = torch.eye(4).double().requires_grad_()
    v = torch.randn(6, 4).double()
    x = torch.rand(6, 4).double()
    for sign in (1, -1, -1, 1):
        torch.manual_seed(0)
        _, jv = jvp(lambda x: Custom.apply(x @ weight), sign * x, v)
        after = torch.rand(())
        torch.manual_seed(0)
        torch.rand(())
        assert torch.equal(after, torch.rand(()))
        expected = jvp(lambda x: 4 * (x @ weight).square(), sign * x, v)[1]
        torch.testing.assert_close(
            gradient_of(jv.square(), weight), gradient_of(expected.square(), weight)
        )
