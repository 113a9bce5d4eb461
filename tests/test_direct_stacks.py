"""The direct way to the CPU kernels of dual numbers' stacks.

It runs what is plain, as the checked way does, and refuses everything else.
"""

import pytest
import torch
from test_direct import LAYOUTS, ODD_TENSORS, FunctionMode, Mode

import fastscore
from fastscore import direct, losses, random
from fastscore.dual import Dual, stacked_jvp
from fastscore.dual.functions import normalise_stack
from fastscore.ops import activate
from fastscore.ops import normalise as core
from fastscore.ops.activations import ACTIVATIONS
from fastscore.ops.rademacher_project import (
    project_stack,
    run_project,
    run_spread,
    signed_stack,
    signs,
    spread_stack,
)

_, *KEY = random.noise_key(
    "test", -(2**70) + 5, 2**33 + 9, random.PROJECTION, 0, 13, torch.device("cpu")
)
HALF = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(
    direct.door is None,
    reason="the extension is not built, or PyTorch has no table of DLPack functions",
)


@pytest.fixture
def closed(monkeypatch):
    """call() by the way that goes through PyTorch's dispatcher."""

    def checked(call):
        with monkeypatch.context() as patch:
            patch.setattr(direct, "door", None)
            return call()

    return checked


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found, wanted):
    return (
        found.dtype == wanted.dtype
        and found.stride() == wanted.stride()
        and torch.equal(found, wanted)
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS.keys() - {None}))
def test_an_activation_and_its_gradient_have_the_same_bits(name, dtype, closed):
    s, g = randn(3, 5, 7, dtype=dtype), randn(3, 5, 7, dtype=dtype, seed=1)
    code = ACTIVATIONS[name].code
    y = direct.door.activate(s, None, None, code, False)
    assert same(y, closed(lambda: activate.activated(s, name, "cpp")))
    assert same(activate.activated(s, name, "cpp"), y)

    wanted = closed(lambda: activate.gradient(s, g, name, "cpp"))
    assert same(direct.door.activate(s, g, None, code, False), wanted)
    version = g._version
    written = direct.door.activate(s, g, None, code, True)
    assert written is g and g._version > version and same(written, wanted)


@pytest.mark.parametrize("rows", [3, 5, 9], ids=["M=1", "M=2", "M=4"])
@pytest.mark.parametrize("straight", [True, False], ids=["straight", "curved"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS.keys() - {None}))
def test_a_jet_and_its_gradient_have_the_same_bits(name, dtype, straight, rows, closed):
    directions = rows // 2
    g = randn(rows, 5, 7, dtype=dtype, seed=1)
    s = randn(1 + directions if straight else rows, 5, 7, dtype=dtype)
    arguments, code = (directions, name, "cpp"), ACTIVATIONS[name].code
    y = direct.door.activate(s, None, directions, code, False)
    assert same(y, closed(lambda: activate._run_jet(s, *arguments)))
    assert same(activate._run_jet(s, *arguments), y)

    gs = direct.door.activate(s, g, directions, code, False)
    assert same(gs, closed(lambda: activate._jet_gradient(s, g, *arguments)))
    assert same(activate._jet_gradient(s, g, *arguments), gs)
    if straight:   # the gradient of fewer rows does not fit into g's memory
        assert direct.door.activate(s, g, directions, code, True) is None
    else:
        assert direct.door.activate(s, g, directions, code, True) is g and same(g, gs)


@pytest.mark.parametrize("n", [1, 16384, 16385, 300_000])
def test_activations_of_one_and_of_many_threads(n, closed):
    s = randn(2, n)
    assert same(
        activate.activated(s, "silu", "cpp"), closed(lambda: activate.activated(s, "silu", "cpp"))
    )


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("shape", [(4,), (5, 3), (2, 3, 4, 5), (1, 20_000), (3, 9000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_a_stack_begins_as_x_beside_its_signs(dtype, shape, directions):
    x = randn(*shape, dtype=dtype)
    found = signed_stack(x, directions, None, KEY, "cpp")
    assert same(found, torch.cat([x[None], signs(x, directions, None, KEY, "cpp")]))


def stacks(dtype, layout):
    """(1 + M, B, *), of few and of many elements a sample."""
    for shape in ((2, 5, 3), (4, 5, 3, 2, 2), (2, 2, 9000)):
        made = randn(*shape, dtype=dtype)
        if layout == "samples-last":
            made = made.movedim(1, -1).contiguous().movedim(-1, 1)
        elif made.dim() == 5 and layout == "channels-last":
            made = made.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            made = made.unflatten(0, shape[:2])
        yield made


@pytest.mark.parametrize("layout", ["contiguous", "samples-last", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_projections_and_their_cotangents_have_the_same_bits(dtype, layout):
    for stack in stacks(dtype, layout):
        M = len(stack) - 1
        wanted = run_project(stack[1:], stack[0], M, None, KEY, "cpp")
        sums = direct.door.project_stack(stack, *KEY)
        assert (sums is None) == (dtype in HALF)
        for found in (sums or wanted, project_stack(stack, None, KEY, "cpp")):
            assert all(map(same, found, wanted))

        g_vjv, g_vs, g_ss = (torch.randn_like(t) for t in wanted)
        for given in ((g_vjv, g_vs, None), (g_vjv, None, g_ss), (g_vjv, g_vs, g_ss)):
            g = torch.empty_like(stack)
            run_spread(*given, stack[0], (g[1:], g[0]), M, None, KEY, "cpp")
            assert same(direct.door.spread_stack(stack, *given, *KEY), g)
            assert same(spread_stack(stack, *given, None, KEY, "cpp"), g)


FORMS = {
    "gamma": core.Form(0, False, False, 1e-5, None),
    "plus": core.Form(0, True, True, 1e-5, "elu"),
    "without-bias": core.Form(0, True, False, 1e-3, "silu"),
    "groups": core.Form(2, False, True, 1e-5, "gelu"),
}


@pytest.mark.parametrize("rows", ["one", "each", "labels"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_a_norm_of_a_stack_and_its_statistics_have_the_same_bits(dtype, form, rows, closed):
    form = FORMS[form]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    width = 1 + form.alpha + form.beta
    for shape in ((2, 3, 4, 5), (4, 3, 4, 3, 7), (2, 3, 4, 65, 64)):
        s = randn(*shape, dtype=dtype)
        count = {"one": 1, "each": 3, "labels": 5}[rows]
        coef = randn(count, width * 4, dtype=wide, seed=2)
        labels = torch.tensor([4, 0, 4]) if rows == "labels" else None
        out = torch.empty_like(s)
        stats = core.run_forward(
            s[0], s[1:], coef, None, labels, form, "cpp", True, into=(out[0], out[1:])
        )[-1]

        assert same(core.run_stack_directly(s, coef, labels, form, "cpp"), out)
        kept = core.run_stack_directly(s, coef, labels, form, "cpp", keep=True)
        assert (kept is None) == (dtype in HALF)
        if kept is not None:
            assert same(kept[0], out) and same(kept[1], stats)
        assert same(normalise_stack(s, coef, labels, form, None), out)
        assert same(closed(lambda s=s, c=coef, n=labels: normalise_stack(s, c, n, form, None)), out)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Linear(16, 3)
    ).double()


@pytest.mark.parametrize("way", ["direct", "checked"])
@pytest.mark.parametrize("variance_reduced", [True, False])
@pytest.mark.parametrize("projections", [1, 3])
def test_a_loss_and_its_derivatives_are_those_of_double_backprop(
    projections, variance_reduced, way, closed
):
    net, x = network(), randn(5, 3).double()
    parameters = list(net.parameters())
    v = signs(x, projections, None, (3, 0, random.PROJECTION, 0), "cpp")

    def ours():
        return losses.sliced(
            net, x, projections=projections, variance_reduced=variance_reduced, seed=3
        )

    def theirs():
        leaf = x.clone().requires_grad_()
        s = net(leaf)
        total = 0
        for direction in v:
            along = (s * direction).sum(1)
            (jv,) = torch.autograd.grad(along.sum(), leaf, create_graph=True)
            total = total + (jv * direction).sum(1)
            total = total + 0.5 * (s.square().sum(1) if variance_reduced else along.square())
        return total / projections

    def all_of(loss):
        value = loss()
        first = torch.autograd.grad(value.square().mean(), parameters, create_graph=True)
        squared = sum(g.square().sum() for g in first)
        return [value, *first, *torch.autograd.grad(squared, parameters)]

    found = all_of(ours) if way == "direct" else closed(lambda: all_of(ours))
    for one, other in zip(found, all_of(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)

    value = ours()
    plain = torch.autograd.grad(value.square().mean(), parameters)
    for one, other in zip(plain, found[1:]):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def squared(x: torch.Tensor):
    return x * x


def test_what_f_wrote_into_x_does_not_change_the_directions_of_the_fallback():
    def f(x):
        if isinstance(x, Dual):
            x.mul_(3)
            return torch.jit.script(squared)(x)   # no rule: f is called again, as a whole
        return x * x

    x = randn(4, 2).double()
    with pytest.warns(fastscore.FallbackWarning):
        loss = losses.sliced(f, x.clone(), seed=3)
    wanted = (2 * x).sum(1) + 0.5 * x.square().square().sum(1)   # the Jacobian is diagonal
    torch.testing.assert_close(loss, wanted)


def calls():
    """Each door with plain arguments, the tensors among them first."""
    s, sums = torch.ones(2, 4, 3), (torch.ones(1, 4), torch.ones(1, 4), torch.ones(4))
    code = ACTIVATIONS["silu"].code
    return {
        "activate": ([s], [None, None, code, False]),
        "activate-gradient": ([s, s.clone()], [None, code, False]),
        "activate-in-place": ([s, s.clone()], [None, code, True]),
        "activate-second-order": ([torch.ones(3, 4, 3)], [None, 1, code, False]),
        "activate-second-order-gradient": ([torch.ones(3, 4, 3)] * 2, [1, code, False]),
        "signed_stack": ([torch.ones(4, 3)], [1, *KEY]),
        "project_stack": ([s], list(KEY)),
        "spread_stack": ([s, *sums], list(KEY)),
        "normalise_stack": (
            [torch.ones(2, 3, 4, 5), torch.ones(2, 8), torch.tensor([1, 0, 1])],
            [0, True, False, 1e-5, 0, False],
        ),
    }


def run(name, tensors, rest):
    return getattr(direct.door, name.split("-")[0])(*tensors, *rest)


@pytest.mark.parametrize("odd", ODD_TENSORS)
@pytest.mark.parametrize("name", calls())
def test_tensors_that_are_not_plain_are_refused(name, odd):
    tensors, rest = calls()[name]
    assert run(name, tensors, rest) is not None
    fits = {
        "signed_stack": ("dtype", "shape", "dims"), "project_stack": ("dtype", "shape"),
        "activate": ("shape", "dims"), "activate-second-order": ("shape",),
    }
    for k in range(len(tensors)):
        if odd in fits.get(name, ()) or (odd == "none" and "activate-" in name and k):
            continue
        if name == "spread_stack" and k >= 2 and odd == "none":   # one of the two may be missing
            continue
        if name == "normalise_stack" and k == 2 and odd == "none":   # a row for each sample, then
            tensors[1] = torch.ones(3, 8)
            assert run(name, [*tensors[:2], None], rest) is not None
            continue
        given = [*tensors[:k], ODD_TENSORS[odd], *tensors[k + 1 :]]
        assert run(name, given, rest) is None, k


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"contiguous"}))
def test_other_layouts_go_the_checked_way(layout):
    t = LAYOUTS[layout](torch.ones(3, 4, 5, 6))
    assert direct.door.activate(t, None, None, ACTIVATIONS["silu"].code, False) is None
    assert direct.door.activate(t.contiguous(), t, None, ACTIVATIONS["silu"].code, False) is None
    assert direct.door.signed_stack(t, 1, *KEY) is None


@pytest.mark.parametrize(
    ("name", "at", "values"),
    [
        ("activate", 1, [torch.ones(2, 4, 4), torch.ones(2, 4, 3).double()]),
        ("activate", 2, [0, -1, 2, 2**63, True, 1.0, "1"]),
        ("activate", 3, [0, 9, -1, True, None, "silu"]),
        ("signed_stack", 1, [0, -1, 65537, True, 1.0, None]),
        ("signed_stack", 4, [0, 65536]),
        ("project_stack", 1, [True, 0.5, None, torch.tensor(1)]),
        ("project_stack", 4, [-1, 2**63, 1.0]),
        ("spread_stack", 1, [None, torch.ones(4, 1), torch.ones(3, 4), torch.ones(2, 4)[:, ::2]]),
        ("spread_stack", 3, [torch.ones(3), torch.ones(4).double(), torch.ones(8)[::2]]),
        ("spread_stack", 4, [None, 1.0]),
        ("normalise_stack", 0, [torch.ones(1, 3, 4, 5), torch.ones(2, 3, 4)]),
        ("normalise_stack", 0, [torch.ones(2, 3, 5, 4).transpose(2, 3)]),
        ("normalise_stack", 1, [torch.ones(2, 4), torch.ones(2, 16)[:, ::2], torch.ones(16)]),
        ("normalise_stack", 2, [torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 1]), None]),
        ("normalise_stack", 2, [torch.tensor([0, 1]), torch.tensor([0, 0, 0, 0, 0, 0])[::2]]),
        ("normalise_stack", 3, [3, -1, 2, True, None]),
        ("normalise_stack", 4, [False, 1, None]),
        ("normalise_stack", 6, [0.0, -1.0, float("nan"), float("inf"), 1]),
        ("normalise_stack", 7, [-1, 9, None]),
        ("normalise_stack", 8, [None, 1]),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name, at, values):
    tensors, rest = calls()[name]
    given = [*tensors, *rest]
    door = getattr(direct.door, name)
    assert door(*given) is not None
    for value in values:
        if name == "spread_stack" and value is not None and getattr(value, "shape", None) == (4, 1):
            continue   # four cotangents in a row, whatever they are called
        assert door(*given[:at], value, *given[at + 1 :]) is None, value
    assert door(*given[:-1]) is None


def test_a_stack_without_directions_is_refused():
    s = torch.ones(1, 4, 3)
    assert direct.door.project_stack(s, *KEY) is None
    assert direct.door.spread_stack(s, torch.ones(1, 4), None, torch.ones(4), *KEY) is None


def around():
    def level():
        return torch.autograd.forward_ad.dual_level()

    return {"mode": Mode, "function-mode": FunctionMode, "forward-mode": level}


@pytest.mark.parametrize("what", around())
@pytest.mark.parametrize("name", calls())
def test_nothing_goes_past_a_mode(name, what):
    tensors, rest = calls()[name]
    with around()[what]():
        assert run(name, tensors, rest) is None
    assert run(name, tensors, rest) is not None


def test_a_stack_that_has_begun_is_carried_like_x_beside_v():
    net, x = network().float(), randn(5, 3)
    v = signs(x, 2, None, KEY, "cpp")
    start = signed_stack(x, 2, None, KEY, "cpp")
    with torch.no_grad():
        assert torch.equal(stacked_jvp(net, x, lambda: v, start), stacked_jvp(net, x, v))
