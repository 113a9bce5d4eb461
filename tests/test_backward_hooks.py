"""Hooks on the backward pass of modules and tensors inside f: they see, and change, what they would
in two backward passes."""

import warnings

import pytest
import torch
from torch import nn

import fastscore
from fastscore import jvp, losses, models, random


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


HOOKS = {
    "full": lambda net, note: net[2].register_full_backward_hook(
        lambda m, gi, go: (note(go[0]), tuple(2 * g for g in gi))[1]
    ),
    "full, before": lambda net, note: net[2].register_full_backward_pre_hook(
        lambda m, go: (note(go[0]), tuple(2 * g for g in go))[1]
    ),
    "of old": lambda net, note: net[1].register_backward_hook(
        lambda m, gi, go: (note(go[0]), tuple(2 * g for g in gi))[1]
    ),
    "of a tensor": lambda net, note: net[1].register_forward_hook(
        lambda m, i, o: (o.register_hook(lambda g: (note(g), 2 * g)[1]), None)[1]
    ),
}


@pytest.mark.filterwarnings("ignore:Full backward hook|Using a non-full backward hook")
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_is_called_as_in_two_backward_passes(kind):
    x = torch.randn(4, 3, dtype=torch.float64)
    results = {}
    for name in ("ours", "stock"):
        net, seen = network(), []
        HOOKS[kind](net, lambda g, seen=seen: seen.append(tuple(g.shape)))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            v = random.rademacher(x.shape, seed=1, stream=random.PROJECTION, dtype=x.dtype)
            if name == "ours":
                y, jv = jvp(net, x, v)
            else:
                leaf = x.clone().requires_grad_()
                y = net(leaf)
                u = torch.zeros_like(y, requires_grad=True)
                (g,) = torch.autograd.grad(y, leaf, u, create_graph=True)
                (jv,) = torch.autograd.grad(g, u, v, create_graph=True)
        gradients = torch.autograd.grad(jv.square().sum() + y.sum(), list(net.parameters()),
                                        allow_unused=True)
        results[name] = jv.detach(), gradients
        assert seen and set(seen) <= {(4, 3), (4, 5)}
        fell = [w for w in told if w.category is fastscore.FallbackWarning]
        assert bool(fell) == (name == "ours")

    torch.testing.assert_close(results["ours"], results["stock"])


@pytest.mark.parametrize("kind", ["full", "of old"])
@pytest.mark.filterwarnings("ignore:Full backward hook|Using a non-full backward hook")
def test_the_losses_of_an_energy_take_hooks(kind):
    x = torch.randn(4, 3, dtype=torch.float64)
    seen = []

    def loss(hooked):
        net = network()
        if hooked:
            hook = net[2].register_full_backward_hook if kind == "full" else (
                net[1].register_backward_hook
            )
            hook(lambda m, gi, go: seen.append(tuple(go[0].shape)))
        score = models.EnergyScore(lambda x: net(x).square().sum(1))
        value = losses.sliced(score, x, seed=1).sum()
        return value, torch.autograd.grad(value, [p for p in net.parameters()])

    torch.testing.assert_close(loss(True), loss(False))
    assert seen and set(seen) <= {(4, 3), (4, 5)}


def test_a_hook_that_clips_is_refused():
    """J v is no derivative of it."""
    net, x = network(), torch.randn(4, 3, dtype=torch.float64)
    net[2].register_full_backward_hook(lambda m, gi, go: tuple(g.clamp(-0.1, 0.1) for g in gi))
    with (
        pytest.warns(fastscore.FallbackWarning, match="a module with a full backward hook"),
        pytest.raises(NotImplementedError, match="no linear function of its cotangent"),
    ):
        jvp(net, x, x)
