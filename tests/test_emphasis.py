"""Which noise levels a run trains on, how much each counts, and that a sampler keeps to them."""

import math

import pytest
import torch

from fastscore import sampling, schedules
from fastscore.cli import emphasis, networks
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import objective
from fastscore.cli.sampler_options import SamplerOptions
from fastscore.losses.noise_conditional import draw_labels

D = 0.3
SIGMAS = schedules.geometric(8 * D, 0.04 * D, 50)


def config(**options):
    given = {"network": "unet", "batch_size": 32, "data_mean": 0.1, "data_std": D, "classes": 0}
    given |= {"sigma_max": 8 * D, "sigma_min": 0.04 * D, "width": 8, "multipliers": (1,)}
    return TrainConfig(**given | options)


def test_levels_are_as_frequent_as_a_lognormal_says():
    """Between two levels the share falls as the density of N(-0.7, 1.3²) at ln(σ/d) does."""
    shares = emphasis.shares(config(), SIGMAS)
    assert float(shares.sum()) == pytest.approx(1)
    law = torch.distributions.Normal(-0.7, 1.3)
    log_density = law.log_prob((SIGMAS.double() / D).log())
    assert torch.allclose(shares.log().diff(), log_density.diff(), atol=1e-5)


@pytest.mark.parametrize("weighting", ["even", "edm"])
def test_the_levels_of_a_part_are_those_of_the_whole_batch(weighting):
    options = config(weighting=weighting)
    whole = emphasis.draw_levels(options, SIGMAS, 32, step=7)
    parts = [emphasis.draw_levels(options, SIGMAS, 8, step=7, first_sample=k) for k in (0, 8, 24)]
    assert torch.equal(torch.cat(parts), torch.cat([whole[:16], whole[24:]]))
    assert not torch.equal(whole, emphasis.draw_levels(options, SIGMAS, 32, step=8))
    if weighting == "even":
        assert torch.equal(whole, draw_labels(50, 32, seed=0, step=7))


def test_each_step_sees_levels_of_all_sizes_in_their_shares():
    """Of each step: so many levels up to k as B times their share, give or take one. Of all steps:
    within 6 standard deviations of a binomial, which are too many."""
    options, steps = config(), 400
    ends = emphasis.shares(options, SIGMAS).cumsum(0)
    counts = torch.zeros(50)
    for step in range(steps):
        level = emphasis.draw_levels(options, SIGMAS, 32, step=step)
        up_to = torch.bincount(level, minlength=50).cumsum(0)
        assert (up_to - 32 * ends).abs().max() <= 1
        counts += torch.bincount(level, minlength=50)
    n, p = 32 * steps, emphasis.shares(options, SIGMAS)
    assert ((counts - n * p).abs() <= 6 * (n * p * (1 - p)).sqrt()).all()


def test_weighted_a_network_starts_with_the_same_loss_at_each_level():
    """On data whose law is the Gaussian that an untrained UNet takes for it: ½ per dimension; 6
    standard errors of a mean of squares, n = 2·10⁵."""
    images = 0.1 + D * torch.randn(4, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    net, _ = networks.build(config(), (1, 224, 224))
    found = {"even": [], "edm": []}
    for weighting, values in found.items():
        for k in (0, 24, 49):
            level = torch.full((4,), k)
            loss = objective(config(weighting=weighting), net, SIGMAS, images, None, level, 0)
            values.append(float(loss.detach().mean()) / 224**2)

    bound = 6 * 0.5 * math.sqrt(2 / images.numel())
    assert found["edm"] == pytest.approx([0.5] * 3, abs=bound)
    even = [0.5 / (1 + float(SIGMAS[k] / D) ** 2) for k in (0, 24, 49)]
    assert found["even"] == pytest.approx(even, abs=bound)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_at_the_temperature_of_a_unet_the_noise_is_what_sigma_says(steps):
    """Of a point, after 50 levels: variance σ_L² within 6 standard errors, n = 10⁵; at
    temperature 1 it is more than 10 % above."""
    n, net = 100_000, networks.build(config(), (1, 4, 4))[0]
    variances = {}
    for given in (None, 1.0):
        options = SamplerOptions(steps_per_level=steps, temperature=given, denoise=False)
        arguments = options.arguments(SIGMAS, net)
        assert arguments.pop("sampler") == "annealed_langevin"
        assert arguments.pop("initial_law") == "data"
        start = sampling.initial((n,), law="gaussian", sigma=float(SIGMAS[0]), seed=1)
        *_, last = sampling.annealed_langevin(_of_a_point, start, seed=2, **arguments)
        variances[given] = float(last.x.double().square().mean() / SIGMAS[-1].double() ** 2)
    assert variances[None] == pytest.approx(1, abs=6 * math.sqrt(2 / n))
    assert variances[1.0] > 1.1


def _of_a_point(x, sigma):
    return -x / sigma**2


def test_a_temperature_that_is_given_is_taken_and_other_networks_have_none():
    net = networks.build(config(), (1, 4, 4))[0]
    mlp = networks.build(TrainConfig(width=8), (1, 4, 4))[0]
    assert SamplerOptions(temperature=0.9).arguments(SIGMAS, net)["temperature"] == 0.9
    assert "temperature" not in SamplerOptions().arguments(SIGMAS, mlp)
    assert "temperature" not in SamplerOptions(step_lr=1e-5).arguments(SIGMAS, net)
    assert "temperature" not in SamplerOptions(sampler="probability_flow").arguments(SIGMAS, net)


def test_a_weighting_is_of_the_unet():
    with pytest.raises(ValueError, match="weighting must be even or edm"):
        config(weighting="min-snr")
    with pytest.raises(ValueError, match="weighting belongs to network unet"):
        TrainConfig(weighting="edm")
