"""UNet: its score at the start, its conditions, its derivatives, in one to three dimensions."""

import itertools
import math
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastscore
from fastscore import losses
from fastscore.models import upsample
from fastscore.models.layout import to_channels, to_places
from fastscore.models.unet import UNet
from fastscore.models.upsample import Upsample

SIDES = {1: (13,), 2: (7, 10), 3: (3, 5, 4)}
OPTIONS = {"multipliers": (1, 2), "blocks": 1}


def net_of(dim=2, channels=2, width=8, **options):
    """In float64, with every coefficient moved off its initial value."""
    torch.manual_seed(0)
    net = UNet(dim, channels, width, **(OPTIONS | options)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def batch(dim=2, channels=2, n=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, channels, *SIDES[dim], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dim", SIDES)
def test_untrained_the_score_is_that_of_a_gaussian(dim):
    net = UNet(dim, 2, 8, **OPTIONS, data_mean=0.3, data_std=0.2).double()
    x, sigma = batch(dim), torch.tensor([0.01, 0.5, 7.0], dtype=torch.float64)
    variance = (sigma**2 + 0.04).reshape(-1, *[1] * (dim + 1))
    torch.testing.assert_close(net(x, sigma), -(x - 0.3) / variance)
    assert not UNet(dim, 2, 8, **OPTIONS, preconditioning="noise").double()(x, sigma).any()


@pytest.mark.parametrize("sigma", [0.02, 1.5])
def test_edm_preconditioning_is_that_of_the_paper(sigma):
    """D = c_skip x + c_out F(c_in x), in the paper's terms, of data about m."""
    net, x = net_of(data_mean=0.3, data_std=0.2), batch()
    s2, d2 = sigma**2, 0.04
    e = net._embedding(x, torch.tensor([sigma], dtype=torch.float64), None, None, None)
    f = net._network((x - 0.3) / (s2 + d2) ** 0.5, e)
    denoised = 0.3 + d2 / (s2 + d2) * (x - 0.3) + sigma * d2**0.5 / (s2 + d2) ** 0.5 * f
    torch.testing.assert_close(x + s2 * net(x, sigma), denoised)


@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("dim", SIDES)
def test_patches_become_channels_and_places_again(dim, patch):
    x = torch.rand(2, 3, *(side * patch for side in SIDES[dim]))
    h = to_channels(x, patch)
    assert h.shape == (2, 3 * patch**dim, *SIDES[dim])
    assert torch.equal(to_places(h, patch), x)
    if dim == 2:
        assert torch.equal(h, torch.nn.functional.pixel_unshuffle(x, patch))


@pytest.mark.parametrize(("dim", "patch"), [*itertools.product(SIDES, (1, 2))])
def test_sides_of_any_length_and_samples_alone(dim, patch):
    net = net_of(dim, patch=patch, attention=(1,))
    x, sigma = batch(dim), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    s = net(x, sigma)
    assert s.shape == x.shape
    for b in range(3):
        torch.testing.assert_close(net(x[b : b + 1], sigma[b : b + 1]), s[b : b + 1])
    torch.testing.assert_close(net(x[:1], 0.1), s[:1])


@pytest.mark.parametrize("dim", SIDES)
def test_upsampled_convolutions_are_those_of_the_doubled_image(dim, monkeypatch):
    """Values and gradients, of either path; float64."""
    net, x = net_of(dim), batch(dim)
    part = next(p for p in net.up if isinstance(p, Upsample))
    h = torch.rand(2, part.conv.in_channels, *SIDES[dim], dtype=torch.float64, requires_grad=True)
    inputs = h, part.conv.weight, part.conv.bias
    doubled = part.conv(F.interpolate(h, scale_factor=2, mode="nearest"))
    g = torch.rand_like(doubled)
    expected = [doubled, *torch.autograd.grad(doubled, inputs, g)]
    score = net(x, 0.5)

    for many in (1, 2**60):
        monkeypatch.setattr(upsample, "_MANY", many)
        taken = part(h)
        found = [taken, *torch.autograd.grad(taken, inputs, g)]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(net(x, 0.5), score, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(upsample, "_MANY", 1)
    with FlopCounterMode(display=False) as counter:
        part(h)
    spared = 2 * len(h) * part.conv.weight.numel() * math.prod(2 * n for n in SIDES[dim])
    assert counter.get_total_flops() * 3**dim == spared * 2**dim


def counted(forward, calls):
    def call(*inputs):
        calls.append(inputs)
        return forward(*inputs)

    return call


def replaced(part):
    part.conv = torch.nn.Sequential(part.conv, torch.nn.Identity())


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.conv.register_forward_hook(lambda _, inputs, y: 3 * y),
        lambda part: part.conv.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],)),
        lambda part: torch.nn.utils.parametrizations.weight_norm(part.conv),
        replaced,
        lambda part: vars(part.conv).update(
            padding_mode="circular", _reversed_padding_repeated_twice=[1] * 4
        ),
        lambda part: vars(part.conv).update(dilation=(2, 2), padding=(2, 2)),
        lambda part: vars(part.conv).update(forward=tripled(part.conv.forward)),
        lambda part: setattr(part.conv, "bias", None),
    ],
    ids=[
        "hook", "hook before", "parametrization", "another module", "circular", "dilation",
        "forward", "no bias",
    ],
)
def test_upsampling_calls_a_convolution_that_does_more_than_convolve(change, monkeypatch):
    monkeypatch.setattr(upsample, "_MANY", 1)
    part = next(p for p in net_of().up if isinstance(p, Upsample))
    change(part)
    h = torch.rand(2, 8 * 2, 5, 4, dtype=torch.float64)
    expected = part.conv(F.interpolate(h, scale_factor=2, mode="nearest"))
    calls = []
    monkeypatch.setattr(part.conv, "forward", counted(part.conv.forward, calls))
    torch.testing.assert_close(part(h), expected)
    assert len(calls) == 1


def tripled(forward):
    return lambda x: 3 * forward(x)


def test_upsampling_calls_the_hooks_of_all_modules(monkeypatch):
    monkeypatch.setattr(upsample, "_MANY", 1)
    part = next(p for p in net_of().up if isinstance(p, Upsample))
    h = torch.rand(2, 8 * 2, 5, 4, dtype=torch.float64)
    plain = part(h)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, y: 3 * y if module is part.conv else None
    )
    try:
        torch.testing.assert_close(part(h), 3 * plain)
    finally:
        handle.remove()


def test_upsampling_has_the_dtype_of_autocast(monkeypatch):
    part = next(p for p in net_of().float().up if isinstance(p, Upsample))
    h = torch.rand(2, 8 * 2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        few = part(h)
        monkeypatch.setattr(upsample, "_MANY", 1)
        many = part(h)
    assert few.dtype == many.dtype == torch.bfloat16


def test_labels_and_contexts_are_told_apart_and_dropped():
    net, x = net_of(num_classes=4, context=3), batch()
    context = torch.rand(3, 3, dtype=torch.float64)
    label = torch.tensor([0, 3, 1])
    s = net(x, 0.5, label, context)
    unconditional = net(x, 0.5)

    assert not torch.allclose(s, net(x, 0.5, label.roll(1), context))
    assert not torch.allclose(s, net(x, 0.5, label, context.roll(1, 0)))
    torch.testing.assert_close(net(x, 0.5, 2, context), net(x, 0.5, torch.full((3,), 2), context))
    torch.testing.assert_close(net(x, 0.5, -1), unconditional)
    torch.testing.assert_close(net(x, 0.5, torch.full((3,), -1)), unconditional)
    # A context of zeros is no dropped one.
    assert not torch.allclose(net(x, 0.5, -1, torch.zeros_like(context)), unconditional)

    dropped = torch.tensor([True, False, True])
    some = net(x, 0.5, label, context, dropped=dropped)
    torch.testing.assert_close(some[~dropped], s[~dropped])
    torch.testing.assert_close(some[dropped], unconditional[dropped])


KINDS = {
    "plain": ({}, ()),
    "attention": ({"attention": (0, 1)}, ()),
    "patches": ({"patch": 2}, ()),
    "classes": ({"num_classes": 3}, (torch.tensor([0, 2, -1]),)),
    "noise": ({"preconditioning": "noise"}, ()),
}


@pytest.mark.parametrize("dim", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_sliced_score_matching_goes_through_by_rules_alone(kind, dim):
    options, given = KINDS[kind]
    net, x, v = net_of(dim, **options), batch(dim), batch(dim).round() * 2 - 1
    parameters = [p for p in net.parameters()]

    with warnings.catch_warnings():
        warnings.simplefilter("error", fastscore.FallbackWarning)
        loss = losses.sliced(lambda x: net(x, 0.7, *given), x, v=v)
    found = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)

    leaf = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):   # the only one that PyTorch can differentiate twice
        s = net(leaf, 0.7, *given)
    (jv,) = torch.autograd.grad((s * v).sum(), leaf, create_graph=True)
    wanted = ((jv * v) + 0.5 * s.square()).flatten(1).sum(1)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
    for a, b in zip(found, torch.autograd.grad(wanted.sum(), parameters, allow_unused=True)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: UNet.small(), 0.69e6),
        (lambda: UNet.small(num_classes=10), 0.69e6),
        (lambda: UNet.large(), 50.4e6),
    ],
)
def test_presets_have_the_parameters_that_they_state(make, count):
    with torch.device("meta"):
        found = sum(p.numel() for p in make().parameters())
    assert abs(found / count - 1) < 0.01


def test_a_network_in_half_precision_and_one_that_was_loaded():
    net = UNet.small(num_classes=10)
    x = torch.rand(2, 1, 28, 28)
    torch.nn.init.normal_(net.last.weight, std=0.02)
    half = net(x, 0.5, 3)
    low = UNet.small(num_classes=10)
    low.load_state_dict(net.state_dict())
    found = low.bfloat16()(x.bfloat16(), 0.5, 3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), half, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x, 0.5, 3).dtype == torch.float32


BAD = {
    "dim": ({"dim": 4}, "dim must be an int in 1..3"),
    "width": ({"width": 6}, "width must be a multiple of 4"),
    "no levels": ({"multipliers": ()}, "multipliers must name one level"),
    "a number of levels": ({"multipliers": 2}, "multipliers must be integers"),
    "a level that is not there": ({"attention": (2,)}, "attention must be an int in 0..1"),
    "patch": ({"patch": 0}, "patch must be an int"),
    "classes": ({"num_classes": 0}, "num_classes must be an int"),
    "spread": ({"data_std": 0.0}, "data_std"),
    "preconditioning": ({"preconditioning": "vp"}, "preconditioning must be one of edm, noise"),
    "dropout": ({"dropout": 1.5}, "dropout"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_in_one_sentence(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        UNet(**(OPTIONS | {"width": 8} | options))


CALLS = {
    "channels": (lambda net, x: net(x[:, :1], 0.5), r"x must be \(B, 2, \*, \*\)"),
    "sides": (lambda net, x: net(x[..., 0], 0.5), r"x must be \(B, 2, \*, \*\)"),
    "sigma": (lambda net, x: net(x, 0.0), "sigma must be finite"),
    "a label beyond": (lambda net, x: net(x, 0.5, 4), r"label must be an int in -1\.\.3"),
    "labels beyond": (
        lambda net, x: net(x, 0.5, torch.tensor([0, 1, 4])), r"label must be in -1\.\.3; got 4"
    ),
    "labels as floats": (lambda net, x: net(x, 0.5, torch.rand(3)), "label must be int64"),
    "too few labels": (
        lambda net, x: net(x, 0.5, torch.tensor([1])), r"label must be int64 \(3,\)"
    ),
    "context": (lambda net, x: net(x, 0.5, 1, torch.rand(3, 2)), r"context must be \(3, 3\)"),
    "dropped": (
        lambda net, x: net(x, 0.5, 1, dropped=torch.tensor([True])), r"dropped must be bool \(3,\)"
    ),
    "dropped as numbers": (
        lambda net, x: net(x, 0.5, 1, dropped=torch.tensor([1, 0, 1])), "dropped must be bool"
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_calls_are_refused_in_one_sentence(case):
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        call(net_of(num_classes=4, context=3), batch())


def test_conditions_of_a_network_that_takes_none_are_refused():
    with pytest.raises(ValueError, match="built without num_classes"):
        net_of()(batch(), 0.5, 1)
    with pytest.raises(ValueError, match="built without context"):
        net_of()(batch(), 0.5, context=torch.rand(3, 3))
