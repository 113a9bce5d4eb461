"""One call of jvp or of a loss draws and remembers as one call of f, whatever way it takes and
however often f is evaluated."""

import copy
import functools
import random
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from fastscore import jvp, losses
from fastscore.models import EnergyScore, ScoreMLP

DROPOUTS = {
    "torch.dropout": lambda x: torch.dropout(x, 0.5, True),
    "torch.feature_dropout": lambda x: torch.feature_dropout(x, 0.5, True),
    "torch.native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "torch.alpha_dropout": lambda x: torch.alpha_dropout(x, 0.5, True),
    "torch.feature_alpha_dropout": lambda x: torch.feature_alpha_dropout(x, 0.5, True),
    "torch.rrelu": lambda x: torch.rrelu(x, training=True),
    "torch.ops": lambda x: torch.ops.aten.native_dropout(x, 0.5, True)[0],
    "F.dropout": lambda x: F.dropout(x, 0.5, True),
    "F.dropout2d": lambda x: F.dropout2d(x[:, :, None, None], 0.5)[:, :, 0, 0],
    "F.dropout-in-place": lambda x: (lambda h: F.dropout(h, 0.5, True, True) + h)(x * 1),
    "torch.dropout_": lambda x: (lambda h: torch.dropout_(h, 0.5, True) + h)(x * 1),
    "F.alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "F.rrelu": lambda x: F.rrelu(x, training=True),
    "F.gumbel_softmax": lambda x: F.gumbel_softmax(x, tau=0.7),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()),
    "rand_like": lambda x: x * torch.rand_like(x) + x * torch.rand(x.shape, dtype=x.dtype),
    "normal": lambda x: torch.normal(x, 1.0) * x,
    "generator": lambda x: torch.normal(x, 1.0, generator=GENERATOR) * x,
    "normal_": lambda x: x * torch.empty_like(x).normal_(),
    "vote": lambda x: x * (torch.rand(()) < 0.5) + x[:, torch.randperm(x.shape[1])],
    "attention": lambda x: F.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None], dropout_p=0.5
    )[0, 0],
    "numpy-like": lambda x: Drawn.apply(x),
    "gradient": lambda x: through_gradient(lambda x: F.dropout(x, 0.5).square().sum(), x),
    "as_strided": lambda x: torch.as_strided(F.dropout(x * 1, 0.5), x.shape, (x.shape[1], 1)) * x,
}
GENERATOR = torch.Generator()
# PyTorch's reverse mode takes what normal(x, 1) draws for a constant; its forward mode, jvp and
# differences take it for x + z.
SHIFTED = {
    "normal": lambda x: (x + torch.normal(torch.zeros_like(x), 1.0)) * x,
    "generator": lambda x: (x + torch.normal(torch.zeros_like(x), 1.0, generator=GENERATOR)) * x,
}


class Drawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        mask = (torch.rand(x.shape) < 0.5).to(x.dtype)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def through_gradient(f, x):
    with torch.enable_grad():
        x = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad(f(x), x, create_graph=True)[0]


def seeded():
    torch.manual_seed(7)
    GENERATOR.manual_seed(7)


def reference(f, x, v):
    seeded()
    x = x.clone().requires_grad_()
    y = f(x)
    u = torch.zeros_like(y).requires_grad_()
    (g,) = torch.autograd.grad(y, x, u, create_graph=True)
    js = torch.stack([torch.autograd.grad(g, u, d, retain_graph=True)[0] for d in v])
    return y.detach(), js, torch.get_rng_state(), GENERATOR.get_state()


@pytest.mark.parametrize("name", DROPOUTS)
def test_one_call_draws_once(name):
    f = DROPOUTS[name]
    x, v = torch.randn(4, 6).double(), torch.randn(3, 4, 6).double()
    y, js, *states = reference(SHIFTED.get(name, f), x, v)
    seeded()
    ours = jvp(f, x.clone(), v)
    assert torch.allclose(ours[0], y) and torch.allclose(ours[1], js)
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(
        GENERATOR.get_state(), states[1]
    )


@pytest.mark.parametrize("name", DROPOUTS)
def test_chunks_and_differences_see_one_draw(name):
    f = DROPOUTS[name]
    x = torch.randn(2, 6).double() + 3
    seeded()
    whole = losses.exact(f, x.clone(), chunk=6)
    after = torch.get_rng_state()
    for chunk in (1, 4):
        seeded()
        assert torch.allclose(losses.exact(f, x.clone(), chunk=chunk), whole)
        assert torch.equal(torch.get_rng_state(), after)
    # Whose value jumps, or which no difference of scores measures.
    if name in ("bernoulli", "vote", "gradient"):
        return
    v = torch.randn(2, 2, 6).double()
    seeded()
    sliced = losses.sliced(f, x.clone(), v=v)
    seeded()
    differences = losses.finite_difference_sliced(f, x.clone(), v=v, radius=1e-4)
    assert torch.allclose(differences, sliced, rtol=1e-5) and torch.equal(
        torch.get_rng_state(), after
    )


def test_masks_of_exact_give_multiples_of_four():
    """Of one mask: trace and ½‖s‖² of a factor 2 on k of six coordinates are 2k + 2k."""
    for seed in range(20):
        torch.manual_seed(seed)
        assert losses.exact(nn.Dropout(0.5), torch.ones(1, 6), chunk=1) % 4 == 0


class Average(nn.Module):
    """Remembers in every way."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.calls, self.notes, self.plain = 0, [], torch.zeros(2, dtype=torch.float64)

    def forward(self, x):
        self.calls += 1
        self.notes.append(self.calls)
        self.plain += 1
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x * (1 + self.mean * self.calls) + self.plain.sum()


class ByGradient(nn.Module):
    def forward(self, x):
        return through_gradient(lambda x: x.sin().sum(), x) + x


class Sign(nn.Module):
    def forward(self, x):
        return Drawn.apply(x) + x


def network(*more, norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    layers = (
        nn.Linear(4, 4),
        norm(4),
        nn.SiLU(),
        spectral_norm(nn.Linear(4, 4)),
        old_spectral_norm(nn.Linear(4, 4)),
        Average(),
    )
    return nn.Sequential(*layers, *more, nn.Dropout(0.3), nn.Linear(4, 4)).double()


NETWORKS = {
    "carried": network,
    "function": lambda: network(Sign()),
    "gradient": lambda: network(ByGradient()),
    "script": lambda: network(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))),
}
LOSSES = {
    "jvp": lambda f, x: jvp(f, x, torch.stack([torch.ones_like(x), x, x.cos()])),
    "sliced": lambda f, x: losses.sliced(f, x, seed=0, projections=3),
    "exact": lambda f, x: losses.exact(f, x, chunk=1),
    "finite-difference": lambda f, x: losses.finite_difference_sliced(f, x, seed=0, projections=2),
    "noise-conditional": lambda f, x: losses.noise_conditional(
        lambda x, s: f(x), x, [1.0, 0.5], method="sliced", seed=0, projections=2
    ),
    "noise-conditional-exact": lambda f, x: losses.noise_conditional(
        lambda x, s: f(x), x, [1.0, 0.5], method="exact", seed=0
    ),
    "variance-report": lambda f, x: losses.variance_report(f, x, draws=2, seed=0),
    "no-grad": lambda f, x: torch.no_grad()(lambda: losses.sliced(f, x, seed=0, projections=2))(),
}


def observed(f, counted):
    average = next(m for m in f.modules() if isinstance(m, Average))
    return [
        *(b.clone() for b in f.buffers()),
        average.calls,
        list(average.notes),
        average.plain.clone(),
        list(counted),
    ]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_memory_moves_once(name, loss):
    """Counters and averages by one step of the data's.

    The mean of noisy or shifted data is another, so that is what is compared last.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f, x = NETWORKS[name](), torch.randn(5, 4).double()
        reference, counted, expected = copy.deepcopy(f), [], []
    f[0].register_forward_hook(lambda m, i, o: counted.append(1))
    reference[0].register_forward_hook(lambda m, i, o: expected.append(1))
    torch.manual_seed(3)
    LOSSES[loss](f, x)
    torch.manual_seed(3)
    reference(x.clone())
    got, right = observed(f, counted), observed(reference, expected)
    same_data = loss in ("jvp", "sliced", "exact", "variance-report", "no-grad")
    for a, b in zip(got, right, strict=True):
        if not isinstance(a, torch.Tensor):
            assert a == b
        elif same_data or not a.is_floating_point():
            assert torch.allclose(a, b)
        else:
            assert a.shape == b.shape and a.isfinite().all()


@pytest.mark.parametrize("loss", ["exact", "finite-difference"])
def test_gradients_survive_several_evaluations(loss):
    """What the later evaluations write to is not what the earlier ones saved.

    Backward goes through all of them.
    """
    f, x = network(), torch.randn(5, 4).double()
    LOSSES[loss](f, x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in f.parameters())


def test_a_second_order_attempt_that_fails_leaves_no_trace():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return Drawn.apply(x.sin()).sum(1)

    score, x = EnergyScore(Counted()), torch.randn(3, 4).double()
    for n in (1, 2):
        losses.sliced(score, x, seed=0, variance_reduced=False)
        assert score.f.calls == n


def test_a_large_tensor_that_f_writes_into_is_said():
    table = torch.zeros(2**21)

    def f(x):
        table.add_(1)
        return x * table[0]

    with pytest.raises(RuntimeError, match="has to be evaluated more than once"):
        losses.exact(f, torch.ones(1, 2), chunk=1)


def test_containers_that_may_not_be_written_to_are_left_alone():
    """The configurations of diffusers are frozen dictionaries.

    Lists of tensors have no equality that is a bool.
    """

    class Frozen(dict):
        def clear(self):
            raise TypeError("frozen")

        update = clear

    config, past = Frozen(a=1), [torch.ones(2), (torch.ones(3), 1)]

    def score(x):
        past.append(x.detach())
        return -x * config["a"]

    x = torch.ones(2, 5)
    torch.testing.assert_close(losses.exact(score, x, chunk=2), torch.full((2,), -5 + 2.5))
    assert len(past) == 3


def noise_on(h):
    return h * (torch.rand(h.shape, dtype=h.dtype) + 0.5)


class Drawing(nn.Linear):
    def forward(self, h):
        return noise_on(super().forward(h))


WAYS_TO_DRAW = {
    "hook": lambda f: f[0].register_forward_hook(lambda m, given, result: noise_on(result)),
    "hook before": lambda f: f[1].register_forward_pre_hook(lambda m, given: noise_on(given[0])),
    "another forward": lambda f: vars(f[0]).update(
        forward=lambda h: noise_on(F.linear(h, f[0].weight))
    ),
    "another class": lambda f: setattr(f[0], "__class__", Drawing),
    "hook of all": lambda f: nn.modules.module.register_module_forward_hook(
        lambda m, given, r: noise_on(r) if m is f[0] else r
    ),
}


@pytest.mark.parametrize("way", WAYS_TO_DRAW)
@pytest.mark.parametrize("seed", [0, 1])
def test_known_layers_to_which_a_draw_was_added_see_one_draw(way, seed):
    """Of x -> x * mask the exact trace is the sum of one mask, whatever the chunk."""
    f, x = (
        nn.Sequential(nn.Linear(5, 5, bias=False), nn.Identity()).double(),
        torch.ones(1, 5, dtype=torch.float64),
    )
    nn.init.eye_(f[0].weight)
    handle = WAYS_TO_DRAW[way](f)
    try:
        results = []
        for loss in (
            lambda: losses.exact(f, x),
            lambda: losses.exact(f, x, chunk=1),
            lambda: losses.finite_difference_sliced(f, x, v=torch.ones_like(x), radius=1e-3),
        ):
            torch.manual_seed(seed)
            results.append(loss().item())
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
    assert abs(results[1] - results[0]) < 1e-10 and abs(results[2] - results[0]) < 1e-8


class Tally:
    """An object of the user's.

    A counter, a list and a tensor, by its attributes, a nested object and a method.
    """

    def __init__(self):
        self.calls, self.notes, self.total = 0, [], torch.zeros(2)
        self.inner = types.SimpleNamespace(calls=0)

    def __call__(self, *_):
        self.note()

    def note(self, *_):
        self.calls += 1
        self.notes.append(self.calls)
        self.total += 1
        self.inner.calls += 1

    def seen(self):
        return self.calls, len(self.notes), self.total.tolist(), self.inner.calls


TALLY, CALLS = Tally(), 0


def count_globally(*_):
    global CALLS
    CALLS += 1
    TALLY.note()


class Holder(nn.Module):
    def __init__(self, tally):
        super().__init__()
        self.tally = tally

    def forward(self, x):
        global CALLS
        CALLS += 1
        self.tally.note()
        return x


NOTED = {
    "object": lambda net, tally: net[0].register_forward_hook(tally),
    "method": lambda net, tally: net[0].register_forward_hook(tally.note),
    "pre-hook": lambda net, tally: net[1].register_forward_pre_hook(
        functools.partial(Tally.note, tally)
    ),
    "lambda": lambda net, tally: net[1].register_forward_hook(
        lambda m, args, kwargs, y: tally.note(), with_kwargs=True
    ),
    "on-the-module": lambda net, tally: net[1].register_forward_hook(
        lambda m, *_: setattr(m, "count", getattr(m, "count", 0) + 1)
    ),
    "global": lambda net, tally: net[1].register_forward_hook(count_globally),
    "held-by-a-module": lambda net, tally: net.append(Holder(tally)),
    "of-all-modules": lambda net, tally: nn.modules.module.register_module_forward_hook(
        lambda m, *_: tally.note() if isinstance(m, nn.Tanh) else None
    ),
}


@pytest.mark.parametrize("loss", ["jvp", "exact", "finite-difference"])
@pytest.mark.parametrize("way", NOTED)
def test_what_hooks_and_objects_note_moves_once(way, loss, monkeypatch):
    def noted(call):
        monkeypatch.setitem(globals(), "CALLS", 0)
        TALLY.__init__()
        tally, net = Tally(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
        handle = NOTED[way](net, tally)
        call(lambda x: through_gradient(lambda x: x.sin().sum(), net(x)) * x)
        handle.remove() if hasattr(handle, "remove") else None
        return CALLS, TALLY.seen(), tally.seen(), getattr(net[1], "count", None)

    x = torch.randn(3, 4).double()
    assert noted(lambda f: LOSSES[loss](f, x)) == noted(lambda f: f(x)) != noted(lambda f: None)


class RandomScale(nn.Module):
    def forward(self, x):
        return self.scale() * x

    def scale(self):
        return random.random() * np.random.rand()   # noqa: NPY002


@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        np.random.default_rng(0).random,
        random.Random(0).random,
        np.random.RandomState(0).rand,
    ],
    ids=["python", "generator", "own-python", "random-state"],
)
def test_draws_of_python_and_numpy_are_one_draw(draw):
    """f(x) = c x, c in (0, 1): the loss is vᵀ c v + c² ‖x‖² / 2 = 2c + c².

    With a draw for each side it would have (c₊ - c₋) / ε in it.
    """
    x, v = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 1, 2, dtype=torch.float64)
    for f in (lambda x: draw() * x, lambda x: random.random() * x, RandomScale()):
        for _ in range(10):
            assert 0 < float(losses.finite_difference_sliced(f, x, v=v)) < 3
    found = jvp(
        lambda x: through_gradient(lambda x: x.square().sum(), x) * draw(),
        x,
        torch.eye(2, dtype=torch.float64)[:, None],
    )
    torch.testing.assert_close(found[1][0, 0, 0], found[0][0, 0])
    torch.testing.assert_close(found[1][1, 0, 1], found[0][0, 0])


def test_of_an_object_only_what_f_names_is_looked_at():
    """A trainer's other networks and lists cost nothing, and are left alone."""
    from fastscore.dual.once import Once

    trainer = types.SimpleNamespace(net=network(), average=network(), history=[1])
    once = Once(torch.device("cpu"), lambda x: trainer.net(x))
    owners = [id(memory.owner) for memory in once.memory]
    assert id(trainer.net[1]) in owners and id(trainer.average[1]) not in owners


NOTES = []


def scaled_by_notes(x):
    NOTES.append(1)
    return len(NOTES) * x


class Scale:
    """f(x) = n x, n the number of calls, which it, a list of the module level or a global number
    keeps."""

    def __init__(self):
        self.n, self.inner, self.log = 0, None, []

    def __call__(self, x):
        self.n += 1
        return self.n * x

    def __getitem__(self, i):
        self.n += 1
        return self.n

    def by_list(self, x):
        return scaled_by_notes(x)

    def by_number(self, x):
        global CALLS
        CALLS += 1
        return CALLS * x

    def by_draw(self, x):
        return (1 + random.random()) * x

    def by_inner(self, x):
        return self.inner(x)

    @torch.enable_grad()
    def decorated(self, x):
        self.log.append(1)
        return len(self.log) * x


SCALE = Scale()


class ByList(nn.Module):
    def forward(self, x):
        return scaled_by_notes(x)


class ByGlobal(nn.Module):
    def forward(self, x):
        return SCALE(x)


class ByMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = Scale()

    def forward(self, x):
        return self.scale.by_list(x)


class Derived(ByList):
    def forward(self, x):
        return super().forward(x)


class Odd(type):
    def __getattr__(cls, name):
        raise ValueError(name)


class OfOddClass(metaclass=Odd):
    def __call__(self, x):
        return SCALE(x)


def replaced():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: SCALE(x)
    return layer


def keyword(x, *, notes=NOTES):
    notes.append(1)
    return len(notes) * x


def holding():
    outer = Scale()
    outer.inner = SCALE
    return outer


THROUGH = {
    "called": lambda: lambda x: SCALE(x),
    "indexed": lambda: lambda x: SCALE[0] * x,
    "in-a-closure": lambda: (lambda s: lambda x: s(x))(SCALE),
    "list-of-a-method": lambda: lambda x: SCALE.by_list(x),
    "number-of-a-method": lambda: lambda x: SCALE.by_number(x),
    "held-by-another": lambda: (lambda s: lambda x: s.by_inner(x))(holding()),
    "bound-held-by-another": lambda: holding().by_inner,
    "list-of-a-module": ByList,
    "object-of-a-module's-file": ByGlobal,
    "method-of-a-module's-object": ByMethod,
    "keyword": lambda: keyword,
    "decorated": lambda: lambda x: SCALE.decorated(x),
    "decorated-bound": lambda: SCALE.decorated,
    "super": Derived,
    "class-that-raises": lambda: (lambda s: lambda x: s(x))(OfOddClass()),
    "forward-of-a-layer": replaced,
}


@pytest.mark.parametrize("way", THROUGH)
def test_what_methods_lead_to_moves_once(way, monkeypatch):
    """f(x) = n x, n the number of calls.

    1 on both sides of a finite difference, and the loss vᵀ v + ‖x‖² / 2 = 3 for ones of 2.
    """
    monkeypatch.setitem(globals(), "CALLS", 0)
    NOTES.clear()
    SCALE.n, SCALE.log = 0, []
    x, v = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 1, 2, dtype=torch.float64)
    assert float(losses.finite_difference_sliced(THROUGH[way](), x, v=v)) == pytest.approx(3)
    assert len(NOTES) + len(SCALE.log) + SCALE.n + CALLS == 1


def test_what_methods_draw_is_one_draw():
    """f(x) = c x, c in (1, 2).

    The loss is 2 c + c², where a draw for each side would add (c₊ - c₋) / ε.
    """
    x, v = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 1, 2, dtype=torch.float64)
    for f in (lambda x: SCALE.by_draw(x), SCALE.by_draw):
        for _ in range(10):
            assert 3 < float(losses.finite_difference_sliced(f, x, v=v)) < 8


def _drawing(x):
    return x * torch.rand(x.shape, dtype=x.dtype)


def _put(name, thing):
    """A network of PyTorch's own modules with an attribute."""
    net = nn.Sequential(nn.Identity())
    setattr(net, name, thing)
    return net


class _OfMethods(nn.Module):
    """Whose methods have names of operations."""

    def forward(self, x):
        return x

    def sin(self, x):
        return x * random.random()

    def exp(self, x):
        return self.sin(x)


def _with_global(name, thing, f):
    """f, whose global `name` is thing."""
    return types.FunctionType(f.__code__, {**f.__globals__, name: thing}, closure=f.__closure__)


@pytest.mark.parametrize(
    "f",
    [
        _with_global("sin", _drawing, lambda x: sin(x)),   # noqa: F821
        _with_global("F", types.SimpleNamespace(linear=_drawing), lambda x: F.linear(x)),
        _with_global("F", types.ModuleType("F"), lambda x: F.linear(x)),
        lambda x: x * x.new_empty(x.shape).uniform_(),
        lambda x: torch.nn.functional.dropout(x, 0.5),
        lambda x, g=_drawing: g(x),
        (lambda g: lambda x: g(x))(nn.Sequential(nn.Dropout(0.5))),
        (lambda g: lambda x: g(x))(_drawing),
        (lambda g: lambda x: g.relu(x))(_put("relu", _drawing)),
        (lambda g: lambda x: g(g.norm(x)))(_put("norm", lambda x: x * random.random())),
        (lambda g: lambda x: g.sin(x))(_OfMethods()),
        (lambda g: lambda x: g.exp(x))(_OfMethods()),
        lambda x: (lambda y: _drawing(y))(x),
        torch.bernoulli,
    ],
)
def test_what_looks_like_a_few_operations_draws_once(f):
    """Two evaluations that count as one draw the same numbers, whatever the function's names
    look like."""
    if (
        isinstance(getattr(f, "__globals__", {}).get("F"), types.ModuleType)
        and f.__globals__["F"] is not torch.nn.functional
    ):
        f.__globals__["F"].linear = _drawing
    from fastscore.dual.once import Once

    x, found = torch.full((64,), 0.5), []
    once = Once(x.device, f)
    for _ in range(2):
        with once:
            found.append(f(x))
    assert torch.equal(*found)


def test_a_buffer_that_somebody_put_on_a_still_module_moves_once():
    """f(x) = n x, as above."""
    for net in (nn.Dropout().eval(), nn.BatchNorm1d(2).eval()):
        net.register_buffer("n", torch.zeros((), dtype=torch.float64))

        def f(x, net=net):
            net.n += 1
            return x * net.n

        x, v = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 1, 2, dtype=torch.float64)
        assert float(losses.finite_difference_sliced(f, x, v=v)) == pytest.approx(3)
        assert float(net.n) == 1


@pytest.mark.parametrize("start", [0, torch.zeros(()), [0]], ids=["number", "tensor", "list"])
def test_an_attribute_that_somebody_put_on_a_module_moves_once(start):
    net = _put("n", copy.deepcopy(start))

    def f(x):
        if isinstance(net.n, list):
            net.n.append(net.n[-1] + 1)
            return net(x) * net.n[-1]
        net.n += 1
        return net(x) * net.n

    x, v = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 1, 2, dtype=torch.float64)
    assert float(losses.finite_difference_sliced(f, x, v=v)) == pytest.approx(3)
    assert net.n == ([0, 1] if start == [0] else 1)


def test_what_does_neither_is_seen_at_a_glance():
    from fastscore.dual.once import Once

    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    for f in (
        torch.sin,
        lambda x: x.sin(),
        net,
        lambda x: net(x).tanh(),
        ScoreMLP(2, width=8, sigmas=[1.0]),
    ):
        assert Once(torch.device("cpu"), f).quiet
    net.train()
    assert not Once(torch.device("cpu"), net).quiet
