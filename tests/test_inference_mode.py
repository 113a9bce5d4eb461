"""What differentiates inside works in inference mode and on its tensors, with the values that it
has elsewhere."""

import copy

import pytest
import torch
from torch import nn

from fastscore import guidance, jvp, losses, models, sampling

SIGMA = torch.full((4,), 0.7)

torch.manual_seed(0)
NETWORK = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))


def _energy():
    return models.EnergyScore(NETWORK)


def _conditional(x, sigma):
    return _energy()(x)


def _prior(x, sigma):
    return -x.sin() / (1 + sigma[:, None] ** 2)


def _last(states):
    return list(states)[-1].x


def _linear(method):
    def call(x, sigma):
        observation = x[:, :2].clone()  # an inference tensor where x is one
        return guidance.linear_inverse(
            _prior, guidance.Matrix(torch.eye(2, 3)), observation, 0.1, method=method
        )(x, sigma)

    return call


DOORS = {
    "mala": lambda x, sigma: _last(
        sampling.mala(lambda x: -0.5 * x.square().sum(1), x, steps=3, step_size=0.1, seed=0)
    ),
    "mala-energy": lambda x, sigma: _last(
        sampling.mala(_energy(), x, steps=3, step_size=0.1, seed=0)
    ),
    "langevin-energy": lambda x, sigma: _last(
        sampling.langevin(_energy(), x, steps=3, step_size=0.1, seed=0)
    ),
    "annealed-energy": lambda x, sigma: _last(
        sampling.annealed_langevin(
            _conditional, x, sigmas=[1.0, 0.1], steps_per_level=2, step_size=0.01, seed=0
        )
    ),
    "predictor-corrector-energy": lambda x, sigma: _last(
        sampling.predictor_corrector(_conditional, x, sigmas=[1.0, 0.5, 0.1], seed=0)
    ),
    "flow-energy": lambda x, sigma: _last(
        sampling.probability_flow(_conditional, x, sigmas=[1.0, 0.5, 0.1])
    ),
    "energy": lambda x, sigma: _energy()(x),
    "energy-of-sigma": lambda x, sigma: models.EnergyScore(
        lambda x, s: -(x.sin() * s[:, None]).sum(1)
    )(x, sigma),
    "energy-jvp": lambda x, sigma: _energy().jvp(x, torch.ones(1, 4, 3))[1],
    "energy-along": lambda x, sigma: _energy().along(x, torch.ones(1, 4, 3))[1],
    "sliced": lambda x, sigma: losses.sliced(_energy(), x, seed=0),
    "sliced-plain": lambda x, sigma: losses.sliced(_energy(), x, seed=0, variance_reduced=False),
    "exact": lambda x, sigma: losses.exact(_energy(), x),
    "posterior": lambda x, sigma: guidance.posterior(
        _prior, lambda x, s: -(x.cos() * s[:, None]).sum(1)
    )(x, sigma),
    **{f"linear-{method}": _linear(method) for method in ("flat", "denoiser", "moments")},
}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("made", [True, False], ids=["inference-tensors", "ordinary-tensors"])
@pytest.mark.parametrize("name", DOORS)
def test_values_are_those_of_no_grad(name, made, inside):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        right = DOORS[name](x, SIGMA)
    with torch.inference_mode(made):
        x, sigma = x.clone(), SIGMA.clone()
    with torch.inference_mode(inside):
        found = DOORS[name](x, sigma)
        assert not (inside and found.requires_grad)
        assert torch.is_inference_mode_enabled() == inside   # as it was

    torch.testing.assert_close(found.detach(), right, rtol=1e-5, atol=1e-6)


class Forward(torch.autograd.Function):
    """x², with a forward mode alone."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return 2 * x * t


@pytest.mark.filterwarnings("ignore::fastscore.FallbackWarning")
@pytest.mark.parametrize("made", [True, False], ids=["inference-tensors", "ordinary-tensors"])
def test_the_last_fallback_has_tangents(made):
    """Stock forward mode, which inference mode switches off: they were zero."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(made):
        given = x.clone()
    with torch.inference_mode():
        y, ty = jvp(
            lambda x: Forward.apply(x.as_strided(x.shape, x.stride())), given, torch.ones(2, 4, 3)
        )
        assert torch.is_inference_mode_enabled() and not ty.requires_grad
    torch.testing.assert_close(y, x.square())
    torch.testing.assert_close(ty, (2 * x).expand(2, 4, 3))


with torch.inference_mode():
    MADE_INSIDE = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 3))
    ENERGY_MADE_INSIDE = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))
MADE = {
    "jvp": lambda f, e, x: jvp(f, x, torch.ones_like(x)),
    "sliced": lambda f, e, x: losses.sliced(f, x, seed=0),
    "exact": lambda f, e, x: losses.exact(f, x),
    "explicit": lambda f, e, x: losses.exact(f, x, target=-x),
    "denoising": lambda f, e, x: losses.denoising(lambda x, sigma: f(x), x, 0.1, seed=0),
    "noise-conditional": lambda f, e, x: losses.noise_conditional(
        lambda x, sigma: f(x), x, [1.0, 0.1], method="sliced", seed=0
    ),
    "finite-difference": lambda f, e, x: losses.finite_difference_sliced(f, x, seed=0),
    "energy": lambda f, e, x: models.EnergyScore(e)(x),
    "energy-sliced": lambda f, e, x: losses.sliced(models.EnergyScore(e), x, seed=0),
    "posterior": lambda f, e, x: guidance.posterior(_prior, lambda x, s: e(x)[:, 0])(x, SIGMA),
    "linear-inverse": lambda f, e, x: guidance.linear_inverse(
        lambda x, s: f(x), guidance.Matrix(torch.eye(2, 3)), x[:, :2], 0.1
    )(x, SIGMA),
}


@pytest.mark.parametrize("name", MADE)
def test_a_network_made_in_inference_mode_is_refused_with_the_way_out(name):
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"fastscore: the network .* copy\.deepcopy"):
        MADE[name](MADE_INSIDE, ENERGY_MADE_INSIDE, x)
    MADE[name](copy.deepcopy(MADE_INSIDE), copy.deepcopy(ENERGY_MADE_INSIDE), x)   # the way out
