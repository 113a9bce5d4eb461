"""Chains of linear layers and activations inside jvp.

Computed late, once, with right gradients, or refused; and the loss along signs.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastscore import backend as backends
from fastscore import losses
from fastscore.dual import chains, jvp
from fastscore.losses.projections import directions


def mlp(*widths, activation=nn.SiLU, bias=True):
    torch.manual_seed(0)
    layers = [
        layer
        for a, b in zip(widths, widths[1:])
        for layer in (nn.Linear(a, b, bias=bias), activation())
    ]
    return nn.Sequential(*layers[:-1])


def gradients(net, x, v, inputs, product=jvp):
    y, jv = product(net, x, v)
    loss = (v * jv).sum() + (y**3).sum()
    return (y, jv, *torch.autograd.grad(loss, inputs, allow_unused=True))


def setting(net, *shape, M=2, dtype=torch.float64):
    torch.manual_seed(1)
    return (
        net.to(dtype),
        torch.randn(shape, dtype=dtype, requires_grad=True),
        torch.randn(M, *shape, dtype=dtype),
    )


@pytest.fixture
def runs(monkeypatch):
    """The lengths of the chains that were computed."""
    lengths, run = [], chains.run
    monkeypatch.setattr(
        chains, "run", lambda s, steps: (lengths.append(len(steps)), run(s, steps))[1]
    )
    return lengths


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "activation", [nn.SiLU, nn.ELU, nn.GELU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.ReLU]
)
def test_one_chain_with_the_products_and_gradients_of_stock_forward_mode(runs, activation, bias):
    """Over linear layers and activations stock forward mode is right."""
    net, x, v = setting(mlp(3, 12, 7, 3, activation=activation, bias=bias), 5, 3)
    inputs = [x, *net.parameters()]
    found = gradients(net, x, v, inputs)
    assert runs == [5]

    def stock(net, x, v):
        pairs = [torch.func.jvp(net, (x,), (d,)) for d in v]
        return pairs[0][0], torch.stack([t for _, t in pairs])

    for a, b in zip(found, gradients(net, x, v, inputs, stock), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9, 130])
def test_narrow_and_wide_layers_in_float32(width):
    """Against float64: sums of up to 600 terms in float32."""
    net, x, v = setting(mlp(width, 64, width), 300, width, dtype=torch.float32)
    found = gradients(net, x, v, list(net.parameters()))
    net, x, v = net.double(), x.detach().double().requires_grad_(), v.double()
    for a, b in zip(found, gradients(net, x, v, list(net.parameters()))):
        assert (
            a.dtype == torch.float32
            and a.is_contiguous()
            and float((a - b).norm()) <= 2e-6 * float(b.norm())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "activation", [nn.SiLU, nn.ELU, nn.GELU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.ReLU]
)
def test_chains_on_every_back_end(backend, runs, activation, dtype):
    """Activations in a row and one at the end.

    Gradients overwrite each other's cotangents, but not the caller's or what the graph keeps.

    In float32 to 60 roundings of the largest entry.
    """
    layers = mlp(3, 6, 5, activation=activation)
    net, x, v = setting(nn.Sequential(*layers, activation(), activation()), 4, 3, M=2, dtype=dtype)
    inputs, g = [x, *net.parameters()], torch.randn(4, 5, dtype=dtype)

    def found(net, x, v, inputs):
        y, jv = jvp(net, x, v)
        a, b = (
            torch.autograd.grad((y, jv), inputs, (g.to(x.dtype), h), retain_graph=True)
            for h in [jv.detach().clone()] * 2
        )
        # The second backward pass reads what the first one left.
        assert all(map(torch.equal, a, b))
        return y.detach(), jv.detach(), *a

    kept = g.clone()
    result = found(net, x, v, inputs)
    assert runs == [5] and torch.equal(g, kept)
    with backends.use_backend("reference"):
        net, x, v = net.double(), x.detach().double().requires_grad_(), v.double()
        for a, b in zip(result, found(net, x, v, [x, *net.parameters()]), strict=True):
            assert a.dtype == dtype and float((a - b).abs().max()) <= 60 * torch.finfo(
                dtype
            ).eps * max(1, float(b.abs().max()))


@pytest.mark.parametrize("shape", [(3,), (4, 2, 3)], ids=["no batch", "two batch dimensions"])
def test_shapes(runs, shape):
    net, x, v = setting(mlp(3, 6, 3), *shape)
    y, jv = jvp(net, x, v)
    expected = [torch.func.jvp(net, (x,), (d,)) for d in v]
    assert (
        runs == [3]
        and torch.allclose(y, expected[0][0])
        and torch.allclose(jv, torch.stack([t for _, t in expected]))
    )


def test_gradients_of_every_order():
    net, x, v = setting(mlp(2, 3, 2), 3, 2)
    parameters = list(net.parameters())

    def f(x, v, *parameters):
        named = dict(zip((n for n, _ in net.named_parameters()), parameters))
        return jvp(lambda x: torch.func.functional_call(net, named, (x,)), x, v)

    inputs = (x, v.requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


def test_weights_that_depend_on_x():
    """The second derivative must not count the path from x to the weight twice."""
    x, v = (
        torch.randn(2, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(1, 2, 2, dtype=torch.float64),
    )

    def f(x, v):
        return jvp(lambda y: F.linear(torch.tanh(F.linear(y, x.sin())), x.exp(), x[0]), x.cos(), v)

    v.requires_grad_()
    assert torch.autograd.gradcheck(f, (x, v)) and torch.autograd.gradgradcheck(f, (x, v))


@pytest.mark.parametrize("frozen", [(0,), (2,), (0, 2), (0, 2, 4)], ids=str)
def test_frozen_layers(frozen):
    net, x, v = setting(mlp(3, 6, 5, 3), 4, 3)
    x = x.detach()
    expected = dict(
        zip(
            (n for n, _ in net.named_parameters()), gradients(net, x, v, list(net.parameters()))[2:]
        )
    )
    for k in frozen:
        net[k].requires_grad_(False)
    named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    if not named:
        assert not jvp(net, x, v)[1].requires_grad
        return
    for (name, _), g in zip(named, gradients(net, x, v, [p for _, p in named])[2:], strict=True):
        assert torch.allclose(g, expected[name])


def test_what_f_still_holds_is_computed_once(runs):
    first, second = mlp(3, 6).double(), mlp(6, 3).double()

    def f(x):
        h = first(x)
        return second(F.silu(h)) + h[:, :3] * x

    _, x, v = setting(first, 4, 3)
    found = gradients(f, x, v, [x, *first.parameters(), *second.parameters()])
    assert runs == [1, 2]
    expected = [torch.func.jvp(f, (x,), (d,)) for d in v]
    assert torch.allclose(found[0], expected[0][0]) and torch.allclose(
        found[1], torch.stack([t for _, t in expected])
    )


def test_writing_in_place_does_not_reach_what_was_computed_before():
    layer = mlp(3, 3).double()

    def f(x, inplace):
        h = x * 1
        early = layer(h)
        late = F.tanh(early)
        if inplace:
            h.mul_(3)
            early += h
            h[:, 0] = x[:, 1]
        else:
            h = h * 3
            early = early + h
            h = torch.cat([x[:, 1:2], h[:, 1:]], 1)
        return late + early * layer(h)

    _, x, v = setting(layer, 4, 3)
    with torch.no_grad():
        for a, b in zip(*(jvp(lambda x, i=i: f(x, i), x, v) for i in (True, False))):
            assert torch.equal(a, b)
    # The layer keeps its input: h takes another stack.
    for a, b in zip(
        *(gradients(lambda x, i=i: f(x, i), x, v, [x, *layer.parameters()]) for i in (True, False))
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_parameter_written_in_between_is_refused():
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)

    def f(x):
        y = layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
        return y

    with pytest.raises(
        RuntimeError,
        match="f changed the parameters of a linear layer in place after it had used them",
    ):
        jvp(f, x, x)


def test_blocks_without_gradients_are_constants():
    net, x, v = setting(mlp(3, 5, 3), 4, 3)

    def f(x):
        y = net[0](x)
        with torch.no_grad():
            scale = y.norm()
        return net[2](net[1](y)) * scale

    y, jv = jvp(f, x, v)
    assert y.requires_grad and torch.allclose(jv, jvp(net, x, v)[1] * net[0](x).norm())
    with torch.no_grad():
        assert not jvp(f, x, v)[0].requires_grad


def test_autocast_is_respected(runs):
    net, x, v = setting(mlp(3, 5, 3), 4, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert jvp(net, x, v)[0].dtype == torch.bfloat16
    assert not runs


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_pass_inside_autocast_is_that_outside(runs, create_graph):
    """Its products would be of half precision, half as long as what the kernels read.

    The heap was written over.
    """
    net, x, v = setting(mlp(3, 7, 5, 3), 64, 3, dtype=torch.float32)
    y, jv = jvp(net, x, v)
    loss, inputs = (v * jv).sum() + (y**3).sum(), [x, *net.parameters()]
    options = {"retain_graph": True, "create_graph": create_graph}
    wanted = torch.autograd.grad(loss, inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, inputs, **options)
    assert runs == [5] and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_errors_are_those_of_the_layer():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        jvp(mlp(4, 3), torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="same dtype"):
        jvp(mlp(3, 3), torch.ones(2, 3).double(), torch.ones(2, 3).double())


def test_the_graph_keeps_the_input_of_every_layer_once():
    """Of the three products and two activations.

    Their five inputs (1 + M, B, *), and nothing for a frozen product.
    """
    net, x, v = setting(mlp(3, 16, 16, 3), 8, 3, M=3, dtype=torch.float32)

    def kept():
        storages, own = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}

        def keep(t):
            storages.setdefault(t.untyped_storage().data_ptr(), t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            result = chains.run(
                torch.cat([x[None], v]),
                [chains.Step(p[0], p[1]) if p else chains.Step(name="silu") for p in layers],
            )
        assert result.requires_grad
        return sum(
            t.untyped_storage().nbytes() for address, t in storages.items() if address not in own
        )

    layers = [list(layer.parameters()) for layer in net]
    row = 4 * 8 * 4   # (1 + M) B floats
    assert kept() == row * (3 + 4 * 16)
    net[2].requires_grad_(False)
    assert kept() == row * (3 + 3 * 16)


# --- the sliced loss along signs


def conv_net():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 3, 3, padding=1),
        nn.GroupNorm(1, 3),
        nn.SiLU(),
        nn.Conv2d(3, 1, 3, padding=1),
    )
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("projections", [1, 3])
@pytest.mark.parametrize("variance_reduced", [True, False], ids=["variance-reduced", "plain"])
def test_signs_of_a_key_give_the_loss_of_given_signs(variance_reduced, projections):
    """To float64 rounding; noise, value and every gradient."""
    net, x, key = (
        conv_net(),
        torch.randn(3, 1, 4, 5, dtype=torch.float64, requires_grad=True),
        {"seed": 5, "step": 3},
    )
    v = directions("t", x.detach(), projections, offset=40, **key)
    found = losses.sliced(
        net, x, projections=projections, variance_reduced=variance_reduced, first_sample=2, **key
    )
    given = losses.sliced(net, x, v=v, variance_reduced=variance_reduced)
    assert torch.allclose(found, given, rtol=1e-13, atol=1e-13)
    weights = torch.rand(3, dtype=torch.float64)
    for a, b in zip(
        *(torch.autograd.grad(loss @ weights, [x, *net.parameters()]) for loss in (found, given))
    ):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("variance_reduced", [True, False], ids=["variance-reduced", "plain"])
def test_derivatives_of_the_loss_along_signs(variance_reduced):
    net, x = mlp(2, 3, 2).double(), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def f(x):
        return losses.sliced(net, x, projections=2, variance_reduced=variance_reduced, seed=1)

    assert torch.autograd.gradcheck(f, (x,)) and torch.autograd.gradgradcheck(f, (x,))
    t, v = torch.randn(3, 2, dtype=torch.float64), directions("t", x.detach(), 2, seed=1)
    (g,) = torch.autograd.grad(f(x).sum(), x)
    assert torch.allclose(torch.func.jvp(f, (x,), (t,))[1].sum(), (g * t).sum())   # forward over it
    assert torch.allclose(torch.func.grad(lambda x: f(x).sum())(x), g)
    rows = torch.vmap(f)(torch.stack([x, 2 * x]))
    for row, scaled in zip(rows, (x, 2 * x)):
        assert torch.allclose(
            row, losses.sliced(net, scaled, v=v, variance_reduced=variance_reduced)
        )


def test_no_signs_are_kept_for_the_backward_pass():
    x, kept = torch.randn(50, 40), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        losses.sliced(nn.Linear(40, 40), x, seed=1, projections=2)
    big = {t.untyped_storage().data_ptr(): t for t in kept if t.numel() >= x.numel()}
    # Input of the layer; s and Jv.
    assert sorted(t.untyped_storage().nbytes() for t in big.values()) == [3 * 50 * 40 * 4] * 2


def test_the_dtype_of_the_loss_is_that_of_x():
    x = torch.randn(4, 3)
    for a, b in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        loss = losses.sliced(lambda x, b=b: x.to(b).sin(), x.to(a), seed=1)
        assert loss.dtype == a and torch.allclose(
            loss.double(), losses.sliced(torch.sin, x.double(), seed=1), atol=1e-5
        )
