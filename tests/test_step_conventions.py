"""step_lr (η = ε/2) wherever step_size (ε) is taken; what mala says of chains that do not move."""

import warnings

import pytest
import torch

import fastscore
from fastscore import sampling

X = torch.linspace(-1, 1, 12).view(4, 3)
SIZES = [0.25, torch.tensor(0.25), torch.tensor([0.0, 0.125, 0.25, 0.5])]


def log_prob(x):
    return -0.5 * x.square().sum(1)


def quartic(x):
    return -0.25 * x.pow(4).sum(1)


def step(**options):
    return fastscore.langevin_step(X, -X, seed=3, **options)


def mala(**options):
    return fastscore.sample(log_prob, sampler="mala", x=X, steps=3, seed=3, **options)


@pytest.mark.parametrize("f", [step, mala])
@pytest.mark.parametrize("size", SIZES, ids=["float", "0-d", "per-sample"])
def test_step_lr_is_half_of_step_size(f, size):
    assert torch.equal(f(step_lr=size), f(step_size=2 * size))


@pytest.mark.parametrize("f", [step, mala])
def test_exactly_one_of_the_two_is_given(f):
    name = "langevin_step" if f is step else "mala"
    for given, found in (({"step_size": 0.1, "step_lr": 0.1}, "both"), ({}, "neither")):
        with pytest.raises(
            ValueError, match=rf"{name}: give either step_size \(ε\) or step_lr .*; got {found}"
        ):
            f(**given)
    with pytest.raises(ValueError, match=f"{name}: step_lr must be finite and >= 0; got -1"):
        f(step_lr=-1.0)


def test_mala_says_how_many_chains_never_move():
    """A quartic from x = 6: a step of 0.8 overshoots to -80, which is refused for ever.

    Chains at 0 do move.
    """
    x = torch.tensor([[6.0], [0.0], [0.1], [-6.0]])
    with pytest.warns(UserWarning, match="mala: 2 of 4 chains never moved in 30 steps"):
        *_, last = sampling.mala(quartic, x, steps=30, step_size=0.8, seed=1, diagnostics=True)
    assert torch.equal(last.x[[0, 3]], x[[0, 3]])
    rate = last.diagnostics["acceptance_rate"]
    assert rate[0] == rate[3] == 0 and bool((rate[1:3] > 0.3).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastscore.sample(quartic, sampler="mala", x=x[1:3], steps=30, step_size=0.8, seed=1)
        # Too few to tell.
        fastscore.sample(quartic, sampler="mala", x=x, steps=3, step_size=0.8, seed=1)


def test_the_acceptance_rate_is_the_mean_of_what_was_accepted():
    states = list(sampling.mala(log_prob, X, steps=10, step_size=2.0, seed=2, diagnostics=True))
    accepted = torch.stack([s.diagnostics["accepted"] for s in states])
    assert 0 < float(accepted.mean()) < 1
    torch.testing.assert_close(states[-1].diagnostics["acceptance_rate"], accepted.mean(0))
