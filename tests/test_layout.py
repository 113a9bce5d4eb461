"""Image networks compute channels last on a CPU, and what they return does not show it."""

import pytest
import torch
from torch import nn

from fastscore import losses
from fastscore.models import NCSN, NCSNv2, UNet, layout, refinenet, unet

LADDER = torch.tensor([1.0, 0.5, 0.1])
NETWORKS = {
    "UNet": lambda channels: UNet(2, channels, 8, multipliers=(1, 2), blocks=1),
    "UNet, patches, attention": lambda channels: UNet.small(2, channels, width=8, attention=(1,)),
    "NCSN": lambda channels: NCSN(channels, 4, LADDER),
    "NCSNv2": lambda channels: NCSNv2(channels, 4, LADDER),
}


@pytest.fixture(params=NETWORKS)
def make(request):
    def made(channels):
        torch.manual_seed(0)
        net = NETWORKS[request.param](channels).double()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.05 * torch.randn_like(p))
        return net

    return made


def batch(channels):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, channels, 12, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_convolution_sees_its_channels_side_by_side(make, channels):
    net, seen = make(channels), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, given, y: seen.extend([given[0], y]))
    s = net(batch(channels), 0.5)
    wide = [h for h in seen if h.shape[1] > 1 and h.shape[2:].numel() > 1]
    assert len(wide) > 10 and all(h.stride(1) == 1 for h in wide)
    assert s.is_contiguous()


@pytest.mark.parametrize("channels", [1, 3])
def test_scores_and_gradients_are_those_of_the_plain_order(make, channels, monkeypatch):
    """float64: sums of other orders, through some sixty layers."""
    net, x = make(channels), batch(channels)
    sigma = torch.tensor([1.0, 0.1], dtype=torch.float64)

    def found():
        loss = losses.denoising(net, x, sigma, seed=0).mean()
        sliced = losses.sliced(lambda z: net(z, sigma), x, seed=1).mean()
        return [net(x, sigma), *torch.autograd.grad(loss + sliced, [*net.parameters()])]

    results = found()
    for module in (unet, refinenet):
        monkeypatch.setattr(module, "channels_last", lambda x: x)
    for a, b in zip(results, found(), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm() + 1e-12


def test_gradients_of_each_sample_are_found_by_vmap(make):
    net, x = make(3), batch(3)
    parameters = dict(net.named_parameters())

    def loss(parameters, one):
        return torch.func.functional_call(net, parameters, (one[None], 0.5)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for k, one in enumerate(x):
        for name, g in torch.func.grad(loss)(parameters, one).items():
            torch.testing.assert_close(each[name][k].detach(), g.detach(), rtol=1e-9, atol=1e-9)


def test_other_tensors_and_channels_last_ones_stay_as_they_are():
    elsewhere = torch.rand(2, 3, 5, 4, device="meta")
    for x in (torch.rand(2, 3, 5), torch.rand(2, 3, 5, 4, 2), elsewhere):
        assert layout.channels_last(x) is x
    x = torch.rand(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    assert layout.channels_last(x).data_ptr() == x.data_ptr()
    assert layout.laid_out_as(x, x) is x


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x[..., 2:10],
        lambda x: x[..., ::2],
        lambda x: x[:1, ..., :8].expand(2, -1, -1, -1),
        lambda x: x[..., :8].transpose(2, 3),
    ],
    ids=["crop", "every other", "expanded", "transposed"],
)
def test_scores_of_images_in_neither_order_are_in_the_plain_one(make, cut):
    """A view of them, as (B, d), has always been possible."""
    x = cut(torch.rand(2, 3, 8, 16, dtype=torch.float64))
    s = make(3)(x, torch.tensor([1.0, 0.1], dtype=torch.float64))
    assert s.is_contiguous()
