"""jvp and the losses inside torch.func: the rules, and the refusals, of every other route."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_dual import NETWORKS
from test_dual_functions import FUNCTIONS, Product
from torch import nn
from torch.func import functional_call, grad, grad_and_value, jacfwd, jacrev, linearize, vmap
from torch.utils import checkpoint

import fastscore
from fastscore import losses
from fastscore.dual import jvp
from fastscore.models import EnergyMLP, EnergyScore

F64 = {"dtype": torch.float64}
EYE = torch.eye(4, **F64)


def m(x):
    """(3, 4, 4), far from singular."""
    return x.sin()[:, :, None] * x[:, None] + 3 * EYE


ALGEBRA = {
    "solve": lambda x: torch.linalg.solve(m(x), x),
    "solve-from-the-right": lambda x: torch.linalg.solve(m(x), m(x).sin(), left=False)[..., 0],
    "solve-ex": lambda x: torch.linalg.solve_ex(m(x), x)[0],
    "tensorsolve": lambda x: (
        torch.linalg.tensorsolve(m(x)[0].reshape(2, 2, 4), x[0].reshape(2, 2)) * x
    ),
    "det": lambda x: torch.linalg.det(m(x))[:, None] * x,
    "slogdet": lambda x: torch.linalg.slogdet(m(x)).logabsdet[:, None] * x,
    "logdet": lambda x: torch.logdet(m(x) @ m(x).mT)[:, None] * x,
    "householder-product": lambda x: torch.linalg.householder_product(m(x), x)[..., 0],
    "cholesky-inverse": lambda x: torch.cholesky_inverse(m(x))[..., 0],
    "by-torch-ops": lambda x: (
        torch.ops.aten.linalg_solve(m(x), x) + torch.ops.aten.linalg_det(m(x))[:, None] * x
    ),
    "cumprod": lambda x: x.relu().cumprod(1),
    "scattered-product": lambda x: x.scatter_reduce(
        1, torch.tensor([[0, 0, 1, 0]] * 3), x.relu(), "prod"
    ),
    "glu": lambda x: F.glu(torch.cat([x, x.sin()], 1)),
    "views-and-writes": lambda x: (
        lambda y: (y[:, 1:].mul_(x[:, :1]), y.t().contiguous().view(2, 6).sin())[1]
    )(x * 2),
    "chunks": lambda x: torch.cat([t.square() for t in x.tensor_split(3, 1)], 1),
}
# Not the numbers of a transform: a choice by value, a draw, an autograd.Function without rules for
# torch.func, hooks on what is saved, an nn.Module made inside, a write of what is mapped into what
# is not.
LEFT = (
    "write-where", "integers", "control-flow", "same-noise-for-all-tangents", "autograd-function",
    "checkpoint", "functional-call", "write-into-a-foreign-buffer",
)
# Buffers change.
NETS = {
    k: v
    for k, v in NETWORKS.items()
    if k not in ("instance-norm-running", "batch-norm", "mixed-residual")
}


def problem(name):
    torch.manual_seed(0)
    if name in NETS:
        return (
            NETS[name]().double(),
            torch.randn(2, 3, 6, 6, **F64),
            torch.randn(2, 2, 3, 6, 6, **F64),
        )
    return {**FUNCTIONS, **ALGEBRA}[name], torch.randn(3, 4, **F64), torch.randn(2, 3, 4, **F64)


def loss(f, x, v):
    y, jv = jvp(f, x, v)
    return (jv * jv.detach().cos()).sum() + y.square().sum()


WAYS = {
    "grad": lambda f, x, v: grad(f)(x, v),
    "grad-and-value": lambda f, x, v: grad_and_value(f)(x, v)[0],
    "jacrev": lambda f, x, v: jacrev(lambda x: torch.stack([f(x, v), 2 * f(x, v)]))(x)[1] / 2,
    "jacfwd": lambda f, x, v: jacfwd(f)(x, v),
    "vmap-grad": lambda f, x, v: vmap(grad(f), (0, None))(torch.stack([x.cos(), x]), v)[1],
    "vmap-over-directions": lambda f, x, v: vmap(grad(f), (None, 0))(x, torch.stack([v.cos(), v]))[
        1
    ],
}


SOON = [(name, way) for name in ALGEBRA for way in ("jacrev", "vmap-grad")] + [
    (name, "vmap-grad") for name in ("layer-norm", "attention")
]
LATER = [
    (name, way)
    for name in (*ALGEBRA, *NETS, *(k for k in FUNCTIONS if k not in LEFT))
    for way in WAYS
    if (name, way) not in SOON
]


@pytest.mark.parametrize(
    "name, way", [*SOON, *(pytest.param(*case, marks=pytest.mark.slow) for case in LATER)]
)
def test_gradients_are_those_outside(name, way):
    f, x, v = problem(name)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(f, leaf, v), leaf)
    found = WAYS[way](lambda x, v: loss(f, x, v), x, v)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())), (
        name,
        way,
    )


def test_linearize_refuses_writes():
    """torch.func.linearize itself loses them.

    Of a plain function with a write into a slice its product is 82 % off.
    """
    for name, message in (
        ("views-and-writes", "loses in-place operations"),
        ("by-torch-ops", "only where the rules of fastscore do"),
    ):
        f, x, v = problem(name)
        with pytest.raises(NotImplementedError, match=f"torch.func.linearize .*{message}"):
            linearize(lambda x: jvp(f, x, v)[1], x)   # noqa: B023


NORMED = nn.Sequential(
    nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)
).double()


@pytest.mark.parametrize(
    "name", ["solve", "det", "slogdet", "cholesky-inverse", "chunks", "network"]
)
def test_linearize(name):
    f, x, v = problem("chunks" if name == "network" else name)
    f = NORMED if name == "network" else f
    value, product = linearize(lambda x: jvp(f, x, v)[1], x)
    t = x.cos()
    quotient = (jvp(f, x + 1e-5 * t, v)[1] - jvp(f, x - 1e-5 * t, v)[1]) / 2e-5
    assert torch.allclose(value, jvp(f, x, v)[1]) and torch.allclose(
        product(t), quotient, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "f, message",
    [
        (lambda x: torch.ops.aten.layer_norm(x, [4]), "native_layer_norm"),
        (lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5)[0], "native_layer_norm"),
        (lambda x: torch.special.bessel_j0(x), "torch.special.bessel_j0"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_wrong_is_refused(f, message, way):
    x, v = torch.randn(3, 4, **F64), torch.randn(2, 3, 4, **F64)
    with pytest.raises(NotImplementedError, match=f"fastscore.*{message}") as found:
        WAYS[way](lambda x, v: loss(f, x, v), x, v)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: Product.apply(x, x[0]),
        lambda x: checkpoint.checkpoint(torch.sin, x, use_reentrant=False),
    ],
)
def test_what_no_transform_takes_is_an_error(f):
    x = torch.randn(3, 4, **F64)
    with pytest.raises(RuntimeError):
        grad(lambda x: loss(f, x, x[None]))(x)


SCORES = {
    "mlp": lambda: copy.deepcopy(NORMED),
    "energy": lambda: EnergyScore(EnergyMLP(4, width=8, depth=1)),
    "energy-with-norm": lambda: EnergyScore(
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Softplus(), nn.Linear(8, 1))
    ),
}
LOSSES = {
    "sliced": lambda s, x: losses.sliced(s, x, seed=0),
    "sliced-3": lambda s, x: losses.sliced(s, x, projections=3, seed=0),
    "plain": lambda s, x: losses.sliced(s, x, variance_reduced=False, seed=0),
    "sphere": lambda s, x: losses.sliced(s, x, distribution="sphere", seed=0),
    "exact": losses.exact,
    "finite-difference": lambda s, x: losses.finite_difference_sliced(s, x, seed=0),
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, score):
    """Gradients of parameters, by functional_call."""
    torch.manual_seed(0)
    net = SCORES[score]().double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    x, named = torch.randn(3, 4, **F64), dict(net.named_parameters())

    def total(named, x):
        def called(x):
            return functional_call(net, named, (x,))

        return LOSSES[name](with_parameters(net, called, named), x).sum()

    expected = dict(
        zip(
            named,
            torch.autograd.grad(
                LOSSES[name](net, x).sum(),
                named.values(),
                materialize_grads=True,
                allow_unused=True,
            ),
        )
    )
    detached = {k: p.detach() for k, p in named.items()}
    found = grad(total)(detached, x)
    for key in named:
        assert torch.allclose(found[key], expected[key], rtol=1e-9, atol=1e-9), key


def test_exact_loss_per_sample():
    x = torch.randn(3, 4, **F64)
    for score in (NORMED, SCORES["energy-with-norm"]().double()):
        rows = vmap(lambda row: losses.exact(score, row[None])[0])(x)   # noqa: B023
        assert torch.allclose(rows, losses.exact(score, x))


def with_parameters(net, called, named):
    """An energy keeps its kind: its f is called with the parameters."""
    if not isinstance(net, EnergyScore):
        return called or net
    return EnergyScore(
        lambda x: functional_call(net.f, {k.removeprefix("f."): p for k, p in named.items()}, (x,))
    )


LINEARIZED = {
    "normal": lambda x: x * fastscore.random.normal(x.shape, seed=1, stream=1024),
    "uniform": lambda x: x * fastscore.random.uniform(x.shape, seed=1, stream=1024),
    "rademacher": lambda x: x * fastscore.random.rademacher(x.shape, seed=1, stream=1024),
    "perturb": lambda x: fastscore.perturb(x, x[:, 0].square(), seed=2).sin(),
    "langevin_step": lambda x: fastscore.langevin_step(x, x.sin(), 0.3, seed=2).sin(),
    "denoising_loss": lambda x: fastscore.denoising_loss(x, 0.3, seed=2).sin(),
    "instance_norm_plus": lambda x: fastscore.instance_norm_plus(x[None], torch.ones(4)).sin(),
    "sliced": lambda x: fastscore.losses.sliced(torch.sin, x, seed=1).sin(),
}


@pytest.mark.parametrize("name", LINEARIZED)
def test_ops_inside_linearize(name):
    """What kernels wrote into a constant of its graph was lost: tangents were of any memory."""
    f = LINEARIZED[name]
    x, t = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    value, product = linearize(f, x)
    wanted = torch.func.jvp(f, (x,), (t,))
    for a, b in zip((value, product(t)), wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_back_end_asked_for_inside_linearize_is_refused():
    with pytest.raises(ValueError, match=r"'cpp' was requested, but torch\.func\.linearize loses"):
        linearize(lambda x: fastscore.perturb(x, 0.3, seed=2, backend="cpp"), torch.ones(2, 3))
