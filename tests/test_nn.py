"""Our layers are the originals in value, state_dict and initialisation, and right in every mode
of differentiation."""

import copy
import math

import originals
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastscore import losses
from fastscore import nn as fnn

C, L = 3, 4
LABELS = torch.tensor([2, 0, 2, 3])
CONDITIONAL = [
    "ConditionalBatchNorm2d",
    "ConditionalInstanceNorm2d",
    "ConditionalInstanceNorm2dPlus",
    "ConditionalNoneNorm2d",
    "ConditionalVarianceNorm2d",
]
ORIGINALS = [*CONDITIONAL, "InstanceNorm2dPlus", "NoneNorm2d", "VarianceNorm2d"]
STOCK = {
    "AdaGroupNorm": lambda: fnn.AdaGroupNorm(5, C, 1, act_fn="silu"),
    "GroupNormAct": lambda: fnn.GroupNormAct(1, C),
    "InstanceNorm2d": lambda: fnn.InstanceNorm2d(C, affine=True),
}


def layer_class(name):
    return getattr(fnn, name, None) or getattr(fnn.ablations, name)


def build(name, bias=True, of=layer_class):
    """In float64, with every parameter drawn from N(0, 1)."""
    torch.manual_seed(0)
    if name in STOCK:
        layer = STOCK[name]()
    else:
        layer = of(name)(*((C, L) if name in CONDITIONAL else (C,)), bias=bias)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer.double()


def arguments(name):
    """What the layer takes beside x, for the samples 0 to 3."""
    if name == "AdaGroupNorm":
        return (torch.linspace(-1, 2, 20, dtype=torch.float64).reshape(4, 5),)
    return (LABELS,) if name in CONDITIONAL else ()


def images(*size):
    torch.manual_seed(1)
    return 1 + 2 * torch.randn(4, C, *(size or (5, 6)), dtype=torch.float64)


# --- values


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ORIGINALS)
def test_layer_equals_the_original_in_value_and_state_dict(name, bias):
    ours, theirs = build(name, bias), build(name, bias, lambda name: getattr(originals, name))
    ours.load_state_dict(theirs.state_dict())
    # BatchNorm: of the batch, then of the running statistics that it left.
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        for x in (images(), 3 - images(2, 2)):
            torch.testing.assert_close(
                ours(x, *arguments(name)), theirs(x, *arguments(name)), rtol=1e-12, atol=1e-12
            )
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    for key, value in theirs.state_dict().items():  # the running statistics too
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-13, atol=0)


def test_stock_layers_equal_their_definition():
    x, (emb,) = images(), arguments("AdaGroupNorm")
    ada, group, instance = (build(name) for name in STOCK)
    scale, shift = F.linear(F.silu(emb), ada.linear.weight, ada.linear.bias)[..., None, None].split(
        C, 1
    )
    expected = F.group_norm(x, 1) * (1 + scale) + shift
    torch.testing.assert_close(ada(x, emb), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        group(x), F.group_norm(x, 1, group.weight, group.bias), rtol=1e-12, atol=1e-12
    )
    expected = F.instance_norm(x, weight=instance.weight, bias=instance.bias)
    torch.testing.assert_close(instance(x), expected, rtol=1e-12, atol=1e-12)
    # Without a batch, as nn.InstanceNorm2d.
    torch.testing.assert_close(instance(x[1]), expected[1], rtol=1e-12, atol=1e-12)
    assert {"linear.weight": (2 * C, 5), "linear.bias": (2 * C,)} == {
        k: tuple(v.shape) for k, v in ada.state_dict().items()
    }
    assert list(group.state_dict()) == list(instance.state_dict()) == ["weight", "bias"]


def test_initial_values_follow_the_original():
    """20 000 draws of seed 0 for each.

    Mean and spread within 5 standard errors (9 z-scores: false alarm 5e-6).
    """
    torch.manual_seed(0)
    C, L = 2000, 10
    drawn = {
        "plus γ, α": (fnn.ConditionalInstanceNorm2dPlus(C, L).embed.weight[:, : 2 * C], 1, 0.02),
        "variance γ": (fnn.ablations.ConditionalVarianceNorm2d(C, L).embed.weight, 1, 0.02),
        "unconditional": (
            torch.cat(
                [p for _ in range(10) for p in list(fnn.InstanceNorm2dPlus(C).parameters())[:2]]
            ),
            1,
            0.02,
        ),
        **{
            name: (layer_class(name)(C, L).embed.weight[:, :C], 0.5, math.sqrt(1 / 12))
            for name in (
                "ConditionalInstanceNorm2d",
                "ConditionalBatchNorm2d",
                "ConditionalNoneNorm2d",
            )
        },
    }
    for name, (values, mean, spread) in drawn.items():
        n = values.numel()
        assert abs(values.mean() - mean) < 5 * spread / math.sqrt(n), name
        # At most the error of a normal; a uniform has less.
        assert abs(values.std() / spread - 1) < 5 / math.sqrt(n), name
    for name, columns in (
        ("ConditionalInstanceNorm2dPlus", 2),
        ("ConditionalInstanceNorm2d", 1),
        ("ConditionalBatchNorm2d", 1),
    ):
        assert not layer_class(name)(C, L).embed.weight[:, columns * C :].any()
    assert (
        drawn["ConditionalNoneNorm2d"][0].min() >= 0 and drawn["ConditionalNoneNorm2d"][0].max() < 1
    )
    assert not fnn.InstanceNorm2dPlus(C).beta.any()


@pytest.mark.parametrize("activation", ["elu", "silu", "relu", "gelu", "softplus"])
@pytest.mark.parametrize(
    "name",
    ["ConditionalInstanceNorm2dPlus", "InstanceNorm2dPlus", "ConditionalInstanceNorm2d", *STOCK],
)
def test_activation_follows_the_norm(name, activation):
    layer, x = build(name), images()
    plain = layer(x, *arguments(name))
    keys = list(layer.state_dict())
    layer.activation = activation
    torch.testing.assert_close(
        layer(x, *arguments(name)), getattr(F, activation)(plain), rtol=1e-12, atol=1e-12
    )
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in (*ORIGINALS, *STOCK) if "None" not in n])
def test_statistics_of_half_precision_are_float32(name, dtype):
    """Pixels near 6e4, whose squares overflow float16.

    The error is the rounding of the result, and float32's in the statistics.
    """
    x = (6e4 + 100 * images()).to(dtype)
    layer = build(name).to(dtype)
    expected = copy.deepcopy(layer).double()(
        x.double(), *(a.to(dtype).double() if a.is_floating_point() else a for a in arguments(name))
    )
    y = layer(x, *(a.to(dtype) if a.is_floating_point() else a for a in arguments(name)))
    assert y.dtype == dtype
    # AdaGroupNorm's scale and shift come out of a linear layer in `dtype`: a few roundings of
    # numbers near 4.
    rtol, atol = (
        torch.finfo(dtype).eps,
        32 * torch.finfo(dtype).eps if name == "AdaGroupNorm" else 0.01,
    )
    # 6e4 * 2^-24 / 200, times coefficients, < 0.01
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", [*ORIGINALS, *STOCK])
def test_channels_last_stays_channels_last(name):
    layer, x = build(name), images()
    y = layer(x.contiguous(memory_format=torch.channels_last), *arguments(name))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x, *arguments(name)), rtol=1e-12, atol=1e-12)


def test_one_pixel_has_variance_zero():
    x = images(1, 1)
    for name in ("ConditionalVarianceNorm2d", "VarianceNorm2d"):
        layer = build(name)
        scale = layer.embed(LABELS) if name in CONDITIONAL else layer.alpha
        torch.testing.assert_close(
            layer(x, *arguments(name)),
            scale[..., None, None] * x / math.sqrt(1e-5),
            rtol=1e-12,
            atol=0,
        )
    assert torch.equal(fnn.InstanceNorm2d(C)(x), torch.zeros_like(x))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: fnn.ablations.ConditionalBatchNorm2d(3, 2)(
                torch.zeros(1, 4, 2, 2), torch.zeros(1, dtype=torch.int64)
            ),
            r"x must be \(B, 3, H, W\); got",
        ),
        (
            lambda: fnn.ablations.ConditionalBatchNorm2d(3, 2)(
                torch.zeros(1, 3, 1, 1), torch.zeros(1, dtype=torch.int64)
            ),
            "more than one value",
        ),
        (
            lambda: fnn.ablations.VarianceNorm2d(3)(torch.zeros(1, 3)),
            r"x must be \(B, 3, H, W\); got \(1, 3\)",
        ),
        (lambda: fnn.GroupNormAct(2, 3), "num_groups must divide the number of channels, 3; got 2"),
        (
            lambda: fnn.AdaGroupNorm(4, 6, 4),
            "num_groups must divide the number of channels, 6; got 4",
        ),
        (lambda: fnn.AdaGroupNorm(4, 6, 3, act_fn="tanh"), "act_fn must be None, silu"),
        (
            lambda: fnn.GroupNormAct(3, 6)(torch.zeros(2, 3, 4)),
            r"GroupNormAct: x must be \(B, 6, \*\); got \(2, 3, 4\)",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- derivatives


@pytest.mark.parametrize("name", [*ORIGINALS, *STOCK])
def test_every_mode_is_right_to_second_order(name):
    layer, x = build(name), images(2, 1)[:2].requires_grad_()
    parameters = {k: p.detach().requires_grad_() for k, p in layer.named_parameters()}

    def f(x, *values):
        return torch.func.functional_call(
            layer, dict(zip(parameters, values)), (x, *(a[:2] for a in arguments(name)))
        )

    assert torch.autograd.gradcheck(f, (x, *parameters.values()), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, *parameters.values()), check_fwd_over_rev=True)


def sliced_gradient(f, x, parameters, forward_mode):
    """Of Σ v·J v, by dual numbers or by two backward passes."""
    torch.manual_seed(2)
    v = torch.randint(0, 2, x.shape, dtype=x.dtype) * 2 - 1
    if forward_mode == "dual numbers":
        with torch.autograd.forward_ad.dual_level():
            jv = torch.autograd.forward_ad.unpack_dual(
                f(torch.autograd.forward_ad.make_dual(x, v))
            ).tangent
    elif forward_mode == "torch.func":
        _, jv = torch.func.jvp(f, (x,), (v,))
    else:
        x = x.clone().requires_grad_()
        (jv,) = torch.autograd.grad((f(x) * v).sum(), x, create_graph=True)
    return torch.autograd.grad(
        (v * jv).sum(), parameters, allow_unused=True, materialize_grads=True
    )


def relative_error(gradients, expected):
    return math.sqrt(
        sum((a - b).square().sum() for a, b in zip(gradients, expected))
        / sum(b.square().sum() for b in expected)
    )


@pytest.mark.parametrize("mode", ["dual numbers", "torch.func"])
@pytest.mark.parametrize("name", [n for n in (*ORIGINALS, *STOCK) if n != "NoneNorm2d"])
def test_gradient_through_forward_mode_equals_double_backward(name, mode):
    """With a convolution in front, so that the statistics depend on a parameter.

    Where PyTorch's own layers go wrong.
    """
    layer, x = build(name), images()
    torch.manual_seed(3)
    conv = nn.Conv2d(C, C, 3, padding=1).double()
    parameters = [conv.weight, *layer.parameters()]
    forward, reverse = (
        sliced_gradient(lambda x: layer(conv(x), *arguments(name)), x, parameters, m)
        for m in (mode, None)
    )
    assert relative_error(forward, reverse) < 1e-12


@pytest.mark.parametrize("mode", ["dual numbers", "torch.func", "compiled"])
def test_batch_norm_tracks_its_statistics_once_in_every_mode(mode):
    layer, x = build("ConditionalBatchNorm2d"), images()
    if mode == "compiled":
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x, LABELS)
    else:
        sliced_gradient(lambda x: layer(x, LABELS), x, list(layer.parameters()), mode)
    torch.testing.assert_close(layer.bn.running_mean, 0.1 * x.mean((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        layer.bn.running_var, 0.9 + 0.1 * x.var((0, 2, 3)), rtol=1e-12, atol=0
    )
    assert layer.bn.num_batches_tracked == 1 and layer.bn.running_mean.grad_fn is None


# --- replace_norms


class Original(nn.Module):
    """A small score network of one conditional layer and everything else that replace_norms
    knows."""

    def __init__(self, norm="ConditionalInstanceNorm2dPlus"):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), getattr(originals, norm)(4, 3)
        self.second, self.plus = nn.Conv2d(4, 4, 3, padding=1), originals.InstanceNorm2dPlus(4, 232)
        self.tail = nn.Sequential(
            nn.InstanceNorm2d(4, eps=1e-3, affine=True),
            nn.Conv2d(4, 4, 1),
            nn.GroupNorm(2, 4, eps=1e-2),
            nn.SiLU(),
            nn.ModuleDict({"norm": nn.InstanceNorm2d(4)})["norm"],
            nn.Conv2d(4, 2, 1),
        )
        self.alone = nn.GroupNorm(1, 2, affine=False)

    def forward(self, x, y):
        h = self.plus(self.second(F.elu(self.norm(self.first(x), y))))
        return self.alone(self.tail(h)) + x


def original(norm="ConditionalInstanceNorm2dPlus"):
    torch.manual_seed(4)
    net = Original(norm).double()
    for p in net.parameters():
        nn.init.normal_(p)
    return net, torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 2])


def test_replace_norms_reports_every_place():
    net, _, _ = original()
    assert fnn.replace_norms(net) == [
        ("norm", originals.ConditionalInstanceNorm2dPlus, fnn.ConditionalInstanceNorm2dPlus),
        ("plus", originals.InstanceNorm2dPlus, fnn.InstanceNorm2dPlus),
        ("tail.0", nn.InstanceNorm2d, fnn.InstanceNorm2d),
        ("tail.2", nn.GroupNorm, fnn.GroupNormAct),
        ("tail.3", nn.SiLU, nn.Identity),
        ("tail.4", nn.InstanceNorm2d, fnn.InstanceNorm2d),
        ("alone", nn.GroupNorm, fnn.GroupNormAct),
    ]
    assert fnn.replace_norms(net) == []


@pytest.mark.parametrize("norm", CONDITIONAL)
def test_replaced_network_keeps_values_gradients_parameters_and_state_dict(norm):
    net, x, y = original(norm)
    net.norm.eval()  # a mode of its own is kept
    parameters, state, optimizer = (
        list(net.parameters()),
        net.state_dict(),
        torch.optim.SGD(net.parameters(), lr=1.0),
    )
    before = net(x, y)
    gradients = torch.autograd.grad(before.square().sum(), parameters)
    fnn.replace_norms(net)
    after = net(x, y)
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-11)
    for a, b in zip(torch.autograd.grad(after.square().sum(), parameters), gradients):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert list(map(id, net.parameters())) == list(map(id, parameters))
    assert {k: v.data_ptr() for k, v in net.state_dict().items()} == {
        k: v.data_ptr() for k, v in state.items()
    }
    assert not net.norm.training and net.plus.training
    net(x, y).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(net(x, y), before)


@pytest.mark.parametrize("norm", CONDITIONAL)
def test_replaced_network_has_the_right_gradient_through_forward_mode(norm):
    """Without replace_norms the error is 0.5 to 1.7 (torch 2.13).

    pytorch/pytorch#196699 and its like in instance_norm.
    """
    net, x, y = original(norm)
    expected = sliced_gradient(lambda x: net(x, y), x, list(net.parameters()), None)
    fnn.replace_norms(net)
    for mode in ("dual numbers", "torch.func"):
        assert (
            relative_error(
                sliced_gradient(lambda x: net(x, y), x, list(net.parameters()), mode), expected
            )
            < 1e-10
        )


class Modulated(nn.Module):
    """Calls the layers of its Sequential one by one, as guided-diffusion does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())

    def forward(self, x):
        return self.layers[1](2 * self.layers[0](x) - 1)


@pytest.mark.parametrize("affine", [True, False])
def test_replaced_group_norm_takes_features_without_pixels(affine):
    """nn.GroupNorm on (N, C), as MLPs have it: value, and the gradient of a sliced loss."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.GroupNorm(2, 6, affine=affine), nn.SiLU(), nn.Linear(6, 4)
    ).double()
    x, parameters = torch.randn(5, 4).double(), list(net.parameters())
    stock = net(x), losses.sliced(net, x, seed=0)
    expected = torch.autograd.grad(stock[1].sum(), parameters[:2])
    fnn.replace_norms(net)
    loss = losses.sliced(net, x, seed=0)
    assert torch.allclose(net(x), stock[0]) and torch.allclose(loss, stock[1])
    for found, right in zip(torch.autograd.grad(loss.sum(), parameters[:2]), expected):
        assert torch.allclose(found, right)
    adaptive = fnn.AdaGroupNorm(3, 4, 2).double()
    e = torch.randn(5, 3).double()
    assert torch.equal(adaptive(x, e), adaptive(x[..., None], e)[..., 0])


def test_silu_is_left_where_it_must_be():
    x = torch.randn(2, 4, 3, 3)
    net = Modulated()
    expected = net(x)
    assert [s.new for s in fnn.replace_norms(net, fuse_silu=False)] == [fnn.GroupNormAct]
    torch.testing.assert_close(net(x), expected)
    shared = nn.GroupNorm(2, 4)  # once with an activation, once without
    net = nn.Sequential(shared, nn.SiLU(), shared)
    expected = net(x)
    assert [s.new for s in fnn.replace_norms(net)] == [fnn.GroupNormAct] * 2 and net[0] is net[2]
    torch.testing.assert_close(net(x), expected)


class InstanceNorm2dPlus(nn.Module):
    """Of the known name, but something else."""

    def __init__(self):
        super().__init__()
        self.num_features, self.gain = 4, nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x


def test_layers_that_cannot_be_swapped_are_reported_and_left_alone():
    hooked = nn.GroupNorm(2, 4)
    hooked.register_forward_hook(lambda module, inputs, output: output)
    net = nn.Sequential(
        nn.InstanceNorm2d(4, track_running_stats=True),
        hooked,
        InstanceNorm2dPlus(),
        nn.BatchNorm2d(4),
    )
    layers = list(net)
    assert [(s.name, s.new) for s in fnn.replace_norms(net)] == [
        ("0", None),
        ("1", None),
        ("2", None),
    ]
    assert list(net) == layers
    with pytest.raises(ValueError, match="module is itself a GroupNorm"):
        fnn.replace_norms(nn.GroupNorm(2, 4))
