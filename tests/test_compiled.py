"""Networks that torch.compile has had.

Our numbers, forward mode and energies run them as they were written.
"""

import copy
import gc
import threading

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastscore
from fastscore import losses
from fastscore.losses.noise_conditional import METHODS
from fastscore.models import EnergyMLP, EnergyScore, ScoreMLP

BACKENDS = ["eager", "aot_eager", "inductor"]
LONG_WITH_INDUCTOR = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
# Inductor compiles for seconds what our numbers then run as it was written.
FORMS = [
    *(pytest.param(backend, None, id=backend) for backend in ("eager", "aot_eager")),
    pytest.param("inductor", ("module", "net.compile()"), id="inductor"),
    pytest.param("inductor", None, id="inductor-every-form", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def points(n=3, d=4):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Bent(nn.Module):
    def forward(self, x):
        return x * x + x


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4), Bent()
    ).double()


def compiled_forms(net, backend):
    """The same network, compiled in every way that there is; each shares its parameters."""
    yield "module", torch.compile(net, backend=backend)
    yield "fullgraph", torch.compile(net, backend=backend, fullgraph=True)
    yield "dynamic", torch.compile(net, backend=backend, dynamic=True)
    yield "function", torch.compile(lambda x: net(x), backend=backend)
    yield (
        "compiled within compiled",
        torch.compile(torch.compile(net, backend=backend), backend=backend),
    )

    parts = [torch.compile(part, backend=backend) for part in net]
    yield "parts", nn.Sequential(*parts)

    inside = copy.copy(net)
    inside.compile(backend=backend)
    yield "net.compile()", inside

    yield "compiled while it runs", lambda x: torch.compile(net, backend=backend)(x)


def gradient(value, net):
    grads = torch.autograd.grad(value.mean(), list(net.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def by_double_backprop(net, x, v):
    """s and vᵀJ as the losses have them, from the definition; LayerNorm is right there, too."""
    x = x.clone().requires_grad_()
    s = net(x)
    (vj,) = torch.autograd.grad(s, x, v, create_graph=True)
    return (vj * v).sum(1) + 0.5 * s.square().sum(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jvp_of_a_compiled_function(backend):
    c = torch.compile(lambda x: x * x + x, backend=backend)
    x, v = torch.full((2, 3), 2.0), torch.ones(2, 3)

    for _ in range(2):   # once traced, once from the cache
        y, jv = fastscore.jvp(c, x, v)
        assert torch.equal(y, torch.full((2, 3), 6.0)) and torch.equal(jv, torch.full((2, 3), 5.0))
        assert torch.equal(c(x), y)   # also after the compiled code exists


@pytest.mark.parametrize("backend, forms", FORMS)
def test_losses_of_a_compiled_network_equal_double_backprop(backend, forms):
    net, x = network(), points()
    v = torch.ones_like(x)
    expected = by_double_backprop(net, x, v)
    slope = gradient(expected, net)

    for name, c in compiled_forms(net, backend):
        if forms is not None and name not in forms:
            continue
        c(x)   # as it is used elsewhere
        for f in (c, lambda x, c=c: c(x)):
            found = losses.sliced(f, x, v=v)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)
            torch.testing.assert_close(
                gradient(found, net), slope, rtol=1e-10, atol=1e-10, msg=name
            )


@pytest.mark.parametrize("backend", LONG_WITH_INDUCTOR)
def test_every_loss_of_a_compiled_network_is_that_of_the_network(backend):
    x, sigmas = points(), [1.0, 0.1]
    torch.manual_seed(0)
    net = ScoreMLP(4, width=8, depth=1, sigmas=sigmas).double()
    for p in net.parameters():   # it starts at zero
        nn.init.normal_(p, std=0.3)
    c = torch.compile(net, backend=backend)

    for method in METHODS:
        expected, found = (
            losses.noise_conditional(f, x, sigmas, method=method, seed=3) for f in (net, c)
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=method)
        torch.testing.assert_close(
            gradient(found, net), gradient(expected, net), rtol=1e-10, atol=1e-10, msg=method
        )

    for name in ("exact", "sliced", "finite_difference_sliced"):
        loss = getattr(losses, name)
        key = {} if name == "exact" else {"seed": 3}
        expected, found = (loss(lambda x, f=f: f(x, 0.1), x, **key) for f in (net, c))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)
        torch.testing.assert_close(
            gradient(found, net), gradient(expected, net), rtol=1e-10, atol=1e-10, msg=name
        )


def test_log_density_of_a_compiled_score():
    net, x = network(), points()
    options = {"sigma_min": 0.01, "sigma_max": 2.0, "steps": 3, "seed": 0}
    with torch.no_grad():
        expected, found = (
            fastscore.likelihood.log_density(lambda x, sigma, f=f: f(x), x, **options)
            for f in (net, torch.compile(net, backend="eager"))
        )
    assert torch.equal(torch.as_tensor(expected[0]), torch.as_tensor(found[0]))


class Odd(nn.Module):
    """An operation, and a Function, that no rule carries: the other routes."""

    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x):
        return self.function(self.net(x))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


@pytest.mark.parametrize(
    "function", [torch.ops.aten.sinh, Cube.apply], ids=["forward mode", "double backward"]
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_other_routes_through_a_compiled_network(backend, function):
    net, x = Odd(network(), function), points()
    v = torch.ones_like(x)
    expected = by_double_backprop(net, x, v)
    slope = gradient(expected, net)

    for name, c in compiled_forms(net.net, backend):
        for f in (Odd(c, function), torch.compile(Odd(c, function), backend=backend)):
            found = losses.sliced(f, x, v=v)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)
            torch.testing.assert_close(
                gradient(found, net), slope, rtol=1e-10, atol=1e-10, msg=name
            )


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_compiled_network_inside_torch_func(transform):
    net, x = network(), points()
    v = torch.ones(4, dtype=torch.float64)

    def loss(f):
        return lambda x: losses.sliced(lambda y: f(y), x[None], v=v[None])[0]

    around = torch.func.grad if transform == "grad" else lambda f: f
    expected, found = (
        torch.stack([around(loss(f))(sample) for sample in x])
        for f in (net, torch.compile(net, backend="eager"))
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if transform == "vmap":
        found = torch.vmap(loss(torch.compile(net, backend="eager")))(x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_energy(backend):
    x = points()
    torch.manual_seed(0)
    f = EnergyMLP(4, width=8, depth=2).double()
    for p in f.parameters():
        nn.init.normal_(p, std=0.3)
    plain = EnergyScore(f)

    inside = copy.copy(f)
    inside.compile(backend=backend)
    for name, c in (
        ("energy", EnergyScore(torch.compile(f, backend=backend))),
        ("net.compile()", EnergyScore(inside)),
    ):
        assert torch.allclose(c(x), plain(x), rtol=1e-12, atol=1e-12), name
        with torch.no_grad():
            assert torch.allclose(c(x), plain(x), rtol=1e-12, atol=1e-12), name

        for form in (True, False):
            expected, found = (
                losses.sliced(s, x, variance_reduced=form, seed=1) for s in (plain, c)
            )
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)
            torch.testing.assert_close(
                gradient(found, f), gradient(expected, f), rtol=1e-10, atol=1e-10, msg=name
            )

        expected, found = (losses.exact(s, x) for s in (plain, c))
        torch.testing.assert_close(
            gradient(found, f), gradient(expected, f), rtol=1e-10, atol=1e-10, msg=name
        )

        expected, found = (
            losses.denoising(lambda x, sigma, s=s: s(x), x, 0.5, seed=1) for s in (plain, c)
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)
        torch.testing.assert_close(
            gradient(found, f), gradient(expected, f), rtol=1e-10, atol=1e-10, msg=name
        )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_score_of_an_energy(backend):
    """torch.compile around EnergyScore itself."""
    x = points()
    torch.manual_seed(0)
    f = EnergyMLP(4, width=8, depth=2).double()
    for p in f.parameters():
        nn.init.normal_(p, std=0.3)
    plain = EnergyScore(f)
    c = torch.compile(EnergyScore(f), backend=backend)

    torch.testing.assert_close(c(x), plain(x), rtol=1e-10, atol=1e-10)
    for form in (True, False):
        expected, found = (losses.sliced(s, x, variance_reduced=form, seed=1) for s in (plain, c))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            gradient(found, f), gradient(expected, f), rtol=1e-10, atol=1e-10
        )
    expected, found = (
        losses.denoising(lambda x, sigma, s=s: s(x), x, 0.5, seed=1) for s in (plain, c)
    )
    torch.testing.assert_close(gradient(found, f), gradient(expected, f), rtol=1e-10, atol=1e-10)


def test_a_compiled_step_around_a_compiled_network():
    net, x = network(), points()
    expected = losses.sliced(net, x, seed=3).mean()
    c = torch.compile(net, backend="aot_eager")
    found = torch.compile(lambda x: losses.sliced(c, x, seed=3).mean(), backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        gradient(found, net), gradient(expected, net), rtol=1e-10, atol=1e-10
    )


def test_a_compiled_network_still_compiles_after_a_loss_or_an_error():
    """The stance of the compiler is the caller's again."""
    graphs = []

    def counter(graph, example_inputs):
        graphs.append(graph)
        return graph

    net, x = network(), points()
    c = torch.compile(net, backend=counter, fullgraph=True)
    losses.sliced(c, x, seed=0)
    assert not graphs
    with pytest.raises(ZeroDivisionError):
        losses.sliced(lambda x: c(x) / (1 // 0), x, seed=0)
    assert torch.equal(c(x), net(x)) and len(graphs) == 1

    with torch.compiler.set_stance("fail_on_recompile"):
        losses.sliced(c, x, seed=0)
        with pytest.raises(RuntimeError, match="recompile"):
            c(x[:1].float().double().reshape(4).expand(9, 5, 4))


def test_losses_in_several_threads_leave_the_compiler_as_it_was():
    graphs = []

    def counter(graph, example_inputs):
        graphs.append(graph)
        return graph

    net, x = network(), points()
    c = torch.compile(net, backend=counter)
    expected, found = losses.sliced(net, x, seed=0), []
    threads = [
        threading.Thread(
            target=lambda: found.extend(losses.sliced(c, x, seed=0) for _ in range(20))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 80 and all(torch.equal(loss, expected) for loss in found)
    assert torch.equal(c(x), net(x)) and len(graphs) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_in_a_checkpoint(backend):
    """The checkpoint calls the network once more during the backward pass, with our numbers but
    outside our call."""
    net, x = network(), points()
    v = torch.ones_like(x)
    expected = by_double_backprop(net, x, v)
    slope = gradient(expected, net)

    for name, c in compiled_forms(net, backend):
        if name == "fullgraph":
            continue   # torch refuses: it finds no frame to compile
        found = losses.sliced(lambda x, c=c: checkpoint(c, x, use_reentrant=False), x, v=v)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)
        torch.testing.assert_close(gradient(found, net), slope, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_posterior_of_a_compiled_likelihood_can_be_differentiated(backend):
    net, x = network(), points()
    v = torch.ones_like(x)

    def likelihood(f):
        return lambda x: f(x).square().sum(1)

    def score(f):
        return fastscore.guidance.posterior(lambda x: -x, likelihood(f))

    plain, c = score(net), score(torch.compile(net, backend=backend))
    torch.testing.assert_close(c(x), plain(x), rtol=1e-12, atol=1e-12)
    slopes = [gradient((f(x) * v).sum(1), net) for f in (plain, c)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)

    tangents = []
    for f in (plain, c):
        with torch.autograd.forward_ad.dual_level():
            y = f(torch.autograd.forward_ad.make_dual(x, v))
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-10)

    found = [losses.sliced(f, x, v=v) for f in (plain, c)]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*(gradient(loss, net) for loss in found), rtol=1e-10, atol=1e-10)


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    gc.collect()   # modules before their group: its last holder joins gloo's thread
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", ["DDP of compiled", "compiled of DDP"])
@pytest.mark.processes
def test_a_compiled_network_under_ddp(order, backend, process_group):
    net, x = network(), points()
    v = torch.ones_like(x)
    expected = by_double_backprop(net, x, v)
    slope = gradient(expected, net)

    if order == "DDP of compiled":
        ddp = DistributedDataParallel(torch.compile(net, backend=backend))
    else:
        ddp = torch.compile(DistributedDataParallel(net), backend=backend)
    for _ in range(2):   # a second step fails where the first left a gradient out
        ddp.zero_grad()
        loss = losses.sliced(ddp, x, v=v)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        loss.mean().backward()
        torch.testing.assert_close(
            torch.cat([p.grad.flatten() for p in net.parameters()]), slope, rtol=1e-10, atol=1e-10
        )

    del ddp   # before its process group
