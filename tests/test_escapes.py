"""Losses in unusual places.

Inside an autograd.Function or checkpoint, under other modes of PyTorch, and numbers that leave f.
"""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastscore
from fastscore import losses
from fastscore.models import EnergyMLP, EnergyScore

X = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)


class Cube(torch.autograd.Function):
    """Without a forward mode: two backward passes take it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def energy():
    torch.manual_seed(0)
    f = EnergyMLP(3, width=8, depth=1).double()
    for p in f.parameters():   # it starts at zero
        nn.init.normal_(p, std=0.3)
    return EnergyScore(f)


SCORES = {
    "rules": torch.neg,
    "forward mode": torch.ops.aten.sinh,
    "double backward": Cube.apply,
    "energy": energy(),
}
LOSSES = {
    "sliced": lambda f, x: losses.sliced(f, x, seed=0),
    "plain": lambda f, x: losses.sliced(f, x, seed=0, variance_reduced=False),
    "exact": losses.exact,
    "finite differences": lambda f, x: losses.finite_difference_sliced(f, x, seed=0),
    "rademacher_jvp": lambda f, x: fastscore.rademacher_jvp(f, x, seed=0)[1].sum(0),
}


def test_a_loss_in_a_reentrant_checkpoint_keeps_its_trace():
    """½‖x‖² - 3 = -0.375; without the trace it is 2.625."""
    x = X.clone().requires_grad_()
    loss = checkpoint(lambda z: losses.sliced(torch.neg, z, seed=0), x, use_reentrant=True)
    assert loss.item() == -0.375
    loss.sum().backward()
    assert torch.equal(x.grad, X)


@pytest.mark.parametrize("place", ["checkpoint", "Function", "Function with setup_context"])
@pytest.mark.parametrize("route", SCORES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_inside_a_function_is_the_loss(name, route, place):
    """There grad mode and forward gradients are off."""

    def loss(x):
        return LOSSES[name](SCORES[route], x)

    class Old(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return loss(x)

    class New(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return loss(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

    x = X.clone().requires_grad_()
    expected = loss(x)
    if place == "checkpoint":
        found = checkpoint(loss, x, use_reentrant=True)
        (slope,) = torch.autograd.grad(expected.sum(), x)
        found.sum().backward()
        torch.testing.assert_close(x.grad, slope, rtol=1e-12, atol=1e-12)
    else:
        found = (Old if place == "Function" else New).apply(x)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-12, atol=1e-12)


def test_a_loss_with_forward_gradients_off_is_the_loss():
    with torch.autograd.forward_ad._set_fwd_grad_enabled(False):
        assert losses.sliced(torch.neg, X, seed=0).item() == -0.375
        assert not torch._C._is_fwd_grad_enabled()


# ---- other derivatives around a loss


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.GroupNorm(2, 8), nn.SiLU(), nn.Linear(8, 3)).double()


def images_network():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Conv2d(4, 1, 3, padding=1),
    )
    return nn.Sequential(nn.Unflatten(1, (1, 1, 3)), *layers, nn.Flatten(1)).double()


class Then(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.net, self.function = network(), function

    def forward(self, x):
        return self.function(self.net(x))


NETWORKS = {
    "linear": network(),
    "convolutions": images_network(),
    "no rule": Then(torch.sinh),
    "forward mode": Then(torch.ops.aten.sinh),
    "energy": energy(),
    "cubic": lambda x: -(x**3),
}


def difference(f, x, v, h=1e-4):
    """∂f/∂x v to O(h⁴)."""
    near = f(x + h * v) - f(x - h * v)
    far = f(x + 2 * h * v) - f(x - 2 * h * v)
    return ((8 * near - far) / (12 * h)).detach()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("net", NETWORKS)
@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_around_a_loss_equals_finite_differences(name, net, grad):
    """Differences of a fourth order at h = 1e-4 keep h⁴ and 1e-16 / h of values of order 1 to
    100."""
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    v = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(x):
        return LOSSES[name](NETWORKS[net], x)

    expected = difference(loss, x, v)
    with torch.set_grad_enabled(grad), torch.autograd.forward_ad.dual_level():
        y = loss(torch.autograd.forward_ad.make_dual(x, v))
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("net", ["linear", "convolutions", "no rule", "energy"])
def test_forward_mode_around_a_loss_in_float32(net, backend):
    """The kernels are those of float32.

    A network of some 10 roundings of 6e-8 on values of order 10.
    """
    net = copy.deepcopy(NETWORKS[net])
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    v = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tangents = []
    for dtype in (torch.float64, torch.float32):
        net = net.to(dtype)
        with torch.autograd.forward_ad.dual_level():
            y = losses.sliced(
                net, torch.autograd.forward_ad.make_dual(x.to(dtype), v.to(dtype)), seed=0
            )
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent.double())
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-4)


def test_forward_mode_through_a_function_without_it_is_refused():
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="implement the jvp"),
    ):
        losses.sliced(Cube.apply, torch.autograd.forward_ad.make_dual(X, X), seed=0)


@pytest.mark.parametrize("net", NETWORKS)
@pytest.mark.parametrize("name", LOSSES)
def test_batched_gradients_are_right_or_refused(name, net):
    """PyTorch's old vmap has no rules for kernels; torch.func's has."""
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss(x):
        return LOSSES[name](NETWORKS[net], x)

    expected = torch.autograd.functional.jacobian(loss, x)
    way_out = "torch.func.jacrev"
    for attempt in (
        lambda: torch.autograd.functional.jacobian(loss, x, vectorize=True),
        lambda: torch.autograd.functional.jacobian(
            loss, x, vectorize=True, strategy="forward-mode"
        ),
        lambda: torch.func.jacrev(loss)(x),
    ):
        try:
            found = attempt()
        except NotImplementedError as error:
            assert way_out in str(error)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)   # of the way out


def test_the_batched_gradient_of_a_network_names_the_way_out():
    x = X.clone().requires_grad_()
    loss = losses.sliced(network(), x, seed=0)
    with pytest.raises(NotImplementedError, match=r"is_grads_batched.*torch\.func\.vjp"):
        torch.autograd.grad(loss, x, torch.ones(5, 1, dtype=torch.float64), is_grads_batched=True)
    with pytest.raises(NotImplementedError, match=r"vectorize=True.*torch\.func"):
        torch.autograd.functional.hessian(
            lambda x: losses.sliced(network(), x, seed=0).sum(), X, vectorize=True
        )


# ---- numbers that leave f


class Keeps(nn.Module):
    """Keeps what it computed, before and after each layer, in many ways."""

    def __init__(self, inplace=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.b = nn.Linear(3, 8), nn.SiLU(inplace), nn.Linear(8, 3)
        self.kept = {}

    def forward(self, x):
        h = self.a(x)
        self.kept["hidden"] = h.clone() if self.act.inplace else h
        h = self.act(h)
        self.kept["activation"] = h
        self.aux = h.square().mean()
        y = self.b(h)
        self.list = [y, (y * 2, x)]
        return y


PENALTIES = {
    "scalar": lambda net: net.aux,
    "hidden": lambda net: net.kept["hidden"].square().mean(),
    "activation": lambda net: net.kept["activation"].pow(2).sum(),
    "output": lambda net: torch.cat([net.list[0], net.list[1][0]]).abs().sum(),
    "norm of all": lambda net: torch.stack(
        [net.aux, net.list[0].norm(), net.list[1][1].sum()]
    ).sum(),
}


def by_double_backprop(net, x, v):
    x = x.clone().requires_grad_()
    s = net(x)
    (vj,) = torch.autograd.grad(s, x, v, create_graph=True)
    return (vj * v).sum(1) + 0.5 * s.square().sum(1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", PENALTIES)
def test_what_a_network_keeps_is_its_value_with_its_gradient(name, inplace):
    net = Keeps(inplace).double()
    v = torch.ones_like(X)
    expected = by_double_backprop(net, X, v).mean() + 0.1 * PENALTIES[name](net)
    slopes = torch.autograd.grad(expected, list(net.parameters()))

    found = losses.sliced(net, X, v=v).mean() + 0.1 * PENALTIES[name](net)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for g, e in zip(torch.autograd.grad(found, list(net.parameters()), retain_graph=True), slopes):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)

    found.backward()
    for p, e in zip(net.parameters(), slopes):
        torch.testing.assert_close(p.grad, e, rtol=1e-12, atol=1e-12)


def test_what_is_kept_looks_like_a_tensor():
    net = Keeps().double()
    losses.sliced(net, X, seed=0)
    value = net.a(X)

    kept = net.kept["hidden"]
    assert (
        kept.shape == value.shape
        and kept.dtype == value.dtype
        and kept.requires_grad
        and not kept.is_leaf
    )
    assert (
        torch.equal(kept, value)
        and kept.tolist() == value.tolist()
        and repr(kept.detach()) == repr(value.detach())
    )
    assert (
        torch.equal(kept.detach().clone(), value.detach())
        and (kept.detach().numpy() == value.detach().numpy()).all()
    )
    assert net.aux.item() == pytest.approx(value.sigmoid().mul(value).square().mean().item())
    net.aux.backward()
    assert net.a.weight.grad.abs().sum() > 0


def test_what_is_kept_without_gradients_is_its_value():
    net = Keeps().double()
    with torch.no_grad():
        losses.sliced(net, X, seed=0)
        assert (
            torch.equal(net.kept["hidden"] + 0, net.a(X)) and not net.kept["hidden"].requires_grad
        )


@pytest.mark.parametrize("loss", ["sliced", "exact", "energy"])
def test_what_an_earlier_call_kept_is_a_constant_of_the_next(loss):
    """A network with a memory: its last state is a function of the last x, not of this one."""

    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.last = nn.Linear(3, 3), nn.Linear(3, 3), torch.zeros(1, 3)

        def forward(self, x):
            h = torch.tanh(self.a(x)) + self.last * x
            self.last = h
            y = self.b(h)
            return y.square().sum(1) if loss == "energy" else y

    def run(form):
        net = Remembers().double()
        for x in (X, 2 * X):
            f = EnergyScore(net) if loss == "energy" else net
            if loss == "exact":
                value = losses.exact(f, x, chunk=3)
            else:
                value = losses.sliced(f, x, v=torch.ones_like(x), variance_reduced=loss != "energy")
        return value, torch.autograd.grad(
            value.mean(), list(net.parameters()), materialize_grads=True
        )

    def truth():
        net = Remembers().double()
        for x in (X, 2 * X):
            x = x.clone().requires_grad_()
            s = net(x)
            if loss == "energy":
                (s,) = torch.autograd.grad(s.sum(), x, create_graph=True)
            J = torch.stack(
                [torch.autograd.grad(s[:, i].sum(), x, create_graph=True)[0] for i in range(3)], 1
            )
            trace = J.diagonal(dim1=1, dim2=2).sum(1) if loss == "exact" else J.sum((1, 2))
            rest = s.sum(1) if loss == "energy" else s.square().sum(1).sqrt()
            value = trace + 0.5 * rest.square()
        return value, torch.autograd.grad(
            value.mean(), list(net.parameters()), materialize_grads=True
        )

    (found, slopes), (expected, right) = run(loss), truth()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for g, e in zip(slopes, right):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


def test_what_a_hook_keeps():
    net, kept = network(), []
    handle = net[2].register_forward_hook(lambda module, inputs, output: kept.append(output))
    v = torch.ones_like(X)
    expected = by_double_backprop(net, X, v).mean() + kept.pop().square().mean()
    found = losses.sliced(net, X, v=v).mean() + kept.pop().square().mean()
    handle.remove()
    slopes = [torch.autograd.grad(value, list(net.parameters())) for value in (found, expected)]
    for g, e in zip(*slopes):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


def test_what_is_kept_in_a_checkpoint():
    """The checkpoint takes the numbers up again during the backward pass, and has their
    tangents."""
    net = Keeps().double()
    v = torch.ones_like(X)
    expected = by_double_backprop(net, X, v).mean()
    slopes = torch.autograd.grad(expected, list(net.parameters()))
    found = losses.sliced(lambda x: checkpoint(net, x, use_reentrant=False), X, v=v).mean()
    for g, e in zip(torch.autograd.grad(found, list(net.parameters())), slopes):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


def test_a_kept_number_inside_a_function_is_refused():
    """A Function would not see that it depends on anything."""
    net = Keeps().double()
    losses.sliced(net, X, seed=0)
    with pytest.raises(RuntimeError, match=r"kept.*clone\(\)"):
        Cube.apply(net.aux)
    assert Cube.apply(net.aux.clone()).item() == pytest.approx(net.aux.item() ** 3)


# ---- modes of PyTorch


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 3))


def gradient(loss, net):
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(loss.sum(), list(net.parameters()), materialize_grads=True)
        ]
    )


def modes():
    net = small()
    yield "FlopCounterMode", FlopCounterMode(display=False)
    yield "FlopCounterMode of the modules", FlopCounterMode(net, display=False)
    yield "allow_mutation_on_saved_tensors", torch.autograd.graph.allow_mutation_on_saved_tensors()
    yield "save_on_cpu", torch.autograd.graph.save_on_cpu()


@pytest.mark.parametrize("score", ["network", "energy", "aten"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_under_a_mode_is_the_loss(name, score):
    """Modes change the order of a few sums at most: 1e-5 of float32's 1e-7."""
    x = X.float()
    net = EnergyScore(energy().f.float()) if score == "energy" else small()
    f = (lambda x: torch.ops.aten.sinh(net(x))) if score == "aten" else net
    if score == "aten":
        net[1] = nn.Identity()   # PyTorch's LayerNorm is refused beside what no rule carries
    expected = LOSSES[name](f, x)
    slope = gradient(expected, net)
    for mode, context in modes():
        with context:
            found = LOSSES[name](f, x)
            found_slope = gradient(found, net)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=mode)
        torch.testing.assert_close(found_slope, slope, rtol=1e-5, atol=1e-4, msg=mode)


SIGMAS = torch.tensor([1.0, 0.1])
OF_SIGMA = {
    "perturb": lambda x, sigma: fastscore.perturb(x, sigma, seed=1),
    "langevin_step": lambda x, sigma: fastscore.langevin_step(x, x, sigma, seed=1),
    "denoising_loss": lambda x, sigma: fastscore.denoising_loss(x, sigma, seed=1),
    "a ladder of numbers": lambda x, sigma: losses.noise_conditional(
        lambda x, sigma: -x, x, [1.0, 0.1], seed=1, method="sliced-vr"
    ),
    "a ladder": lambda x, sigma: losses.noise_conditional(lambda x, sigma: -x, x, sigma, seed=1),
    "labels": lambda x, sigma: losses.noise_conditional(
        lambda x, sigma: -x, x, sigma, seed=1, labels=torch.tensor([0, 1])
    ),
    "denoising": lambda x, sigma: losses.denoising(lambda x, sigma: -x, x, sigma, seed=1),
}


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", OF_SIGMA)
def test_a_traced_function_of_sigma_holds_for_other_sigmas(name, mode):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    traced = make_fx(OF_SIGMA[name], tracing_mode=mode)(x, SIGMAS)
    for sigma in (SIGMAS, torch.tensor([2.0, 0.5])):
        torch.testing.assert_close(
            traced(2 * x, sigma), OF_SIGMA[name](2 * x, sigma), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("name", OF_SIGMA)
def test_a_fake_tensor_of_sigma(name):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = OF_SIGMA[name](mode.from_tensor(torch.zeros(2, 3)), mode.from_tensor(SIGMAS))
    assert type(y).__name__ == "FakeTensor" and y.shape in ((2,), (2, 3))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("score", ["network", "energy"])
def test_a_loss_of_fake_tensors_has_its_shape(name, score):
    net = EnergyScore(energy().f.float()) if score == "energy" else small()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss = LOSSES[name](net, mode.from_tensor(X.float()))
        assert loss.shape == (1,) and loss.dtype == torch.float32
        assert gradient(loss, net).shape == (sum(p.numel() for p in net.parameters()),)


def test_what_fails_below_a_mode_leaves_pytorch_as_it_was():
    net = energy()
    with pytest.raises(AssertionError, match="FakeTensor"):
        make_fx(lambda x: fastscore.jvp(net, x, torch.ones_like(x))[1], tracing_mode="fake")(X)
    x = X.clone().requires_grad_()
    assert x.sinh().requires_grad
    assert losses.sliced(torch.ops.aten.sinh, X, seed=0).isfinite().all()


def test_a_ladder_of_numbers_is_checked_while_tracing():
    with pytest.raises(ValueError, match=r"strictly descending; got \[0\.1, 1\.0\]"):
        make_fx(lambda x: losses.noise_conditional(lambda x, s: -x, x, [0.1, 1.0], seed=0))(X)


# ---- torch.export


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "name",
    [
        "InstanceNorm2dPlus",
        "ConditionalInstanceNorm2dPlus",
        "ConditionalInstanceNorm2d",
        "GroupNormAct",
    ],
)
def test_exported_norms(name, backend, strict):
    """Kernels have no derivative in a graph: it runs without, or is exported on the reference.

    B = C ties nothing.
    """
    torch.manual_seed(0)
    x, labels = torch.randn(4, 4, 6, 6), torch.tensor([0, 1, 2, 0])
    conditional = name.startswith("Conditional")
    sizes = (4, 3) if conditional else (2, 4) if name == "GroupNormAct" else (4,)
    norm = getattr(fastscore.nn, name)(*sizes)
    inputs = (x, labels) if conditional else (x,)
    batch = torch.export.Dim("B", min=2)
    shapes = [{0: batch} for _ in inputs]

    with fastscore.use_backend(backend):
        exported = torch.export.export(norm, inputs, strict=strict, dynamic_shapes=shapes).module()
    halves = [t[:3] for t in inputs]
    with torch.no_grad():
        torch.testing.assert_close(exported(*halves), norm(*halves), rtol=1e-6, atol=1e-6)

    if backend == "reference":
        for f in (exported, norm):
            f(*inputs).square().sum().backward()
        slopes = dict(exported.named_parameters())
        for key, p in norm.named_parameters():
            torch.testing.assert_close(slopes[key].grad, p.grad, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(
            NotImplementedError, match=r'torch\.no_grad\(\).*use_backend\("reference"\)'
        ):
            exported(*inputs)


def test_export_of_an_energys_score_names_the_way_out():
    score, x = energy(), torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="make_fx"):
        torch.export.export(score, (x,), strict=False)
    exported = torch.export.export(make_fx(score)(x), (x,)).module()
    torch.testing.assert_close(exported(2 * x), score(2 * x), rtol=1e-12, atol=1e-12)
