"""Losses in unusual places: inside an autograd.Function or checkpoint, under other modes of PyTorch, and numbers that leave f."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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


SCORES = {"rules": torch.neg, "forward mode": torch.ops.aten.sinh, "double backward": Cube.apply, "energy": energy()}
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
