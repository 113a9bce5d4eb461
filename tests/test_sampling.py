"""Samplers and ladders against closed forms."""

import math

import pytest
import torch

import fastscore
from fastscore import random, sampling, schedules


def gaussian(x, sigma):
    return -(x - 0.7) / (0.04 + sigma.reshape(-1, *[1] * (x.dim() - 1)) ** 2)


def test_annealed_chain_follows_its_recursion():
    """m ← μ + a^T (m - μ), V ← a^{2T} V + (1 - a^{2T}) t / (1 - α/(4t)) at every level; then the final denoise."""
    n, steps, epsilon, mu, s0 = 2**20, 3, 2e-3, 0.7, 0.04
    sigmas, m, v = schedules.geometric(1.0, 0.1, 4), 0.5, 1 / 12
    levels = fastscore.sampling.annealed_langevin(
        gaussian, sampling.initial((n, 1), seed=1), sigmas=sigmas, steps_per_level=steps, step_size=epsilon, seed=1
    )
    for level in levels:
        if level.sigma:
            t, alpha = s0 + level.sigma**2, epsilon * level.sigma**2 / float(sigmas[-1]) ** 2
            a = (1 - alpha / (2 * t)) ** steps
            m, v = mu + a * (m - mu), a**2 * v + (1 - a**2) * t / (1 - alpha / (4 * t))
        else:
            shrink = s0 / (s0 + float(sigmas[-1]) ** 2)
            m, v = mu + shrink * (m - mu), shrink**2 * v
        x = level.x.double()
        assert abs(float(x.mean()) - m) < 5 * math.sqrt(v / n)
        # The start is uniform, so the kurtosis is at most normal and 2 v²/n bounds the variance of the variance.
        assert abs(float(x.var()) - v) < 5 * v * math.sqrt(2 / n)


def test_samples_are_the_same_for_any_split():
    options = {"sigmas": schedules.geometric(1.0, 0.1, 4), "steps_per_level": 3, "step_size": 2e-3, "seed": 8}
    whole = fastscore.sample(gaussian, shape=(64, 3, 5), **options)
    halves = [fastscore.sample(gaussian, shape=(32, 3, 5), first_sample=k, **options) for k in (0, 32)]
    assert torch.equal(whole, torch.cat(halves))


def test_langevin_does_not_touch_its_start():
    x = torch.ones(4, 2)
    *_, last = sampling.langevin(lambda x: -x, x, steps=3, step_size=0.1, seed=0)
    assert torch.equal(x, torch.ones(4, 2)) and last.x.shape == x.shape


def test_geometric_ladder_and_step_conventions():
    ladder = schedules.geometric(50.0, 0.01, 7)
    assert float(ladder[0]) == 50 and torch.allclose(ladder[1:] / ladder[:-1], torch.full((6,), (0.01 / 50) ** (1 / 6)))
    assert schedules.to_step_lr(schedules.to_epsilon(2e-5)) == 2e-5 and schedules.to_epsilon(1.0) == 2.0


def test_noise_conditional_loss_reaches_its_floor():
    """The exact score of N(μ, s²) leaves ½ s²/(s² + σ²) per dimension under the weight σ²."""
    n, sigma = 2**20, 0.5
    x = 0.7 + 0.2 * random.normal((n, 1), seed=3, stream=1024)
    losses = fastscore.losses.noise_conditional(gaussian, x, [sigma], seed=4).double()
    assert abs(float(losses.mean()) - 0.5 * 0.04 / (0.04 + sigma**2)) < 5 * float(losses.std()) / math.sqrt(n)


X, ONE = torch.zeros(2, 2), {"steps_per_level": 1, "step_size": 0.1, "seed": 0}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: schedules.geometric(0.1, 1.0, 5), "sigma_max > sigma_min > 0 must hold"),
        (lambda: schedules.geometric(1.0, 0.1, 1), "n must be an int of at least 2"),
        (lambda: sampling.annealed_langevin(gaussian, X, sigmas=[0.1, 1.0], **ONE), "strictly descending"),
        (lambda: sampling.annealed_langevin(gaussian, X, sigmas=[1.0, math.nan], **ONE), "positive, finite"),
        (lambda: sampling.annealed_langevin(gaussian, X, sigmas=[1.0], **{**ONE, "step_size": -1.0}), "step_size must be"),
        (lambda: sampling.langevin(gaussian, X, steps=-1, step_size=0.1), "steps must be a non-negative int"),
        (lambda: fastscore.sample(gaussian, sampler="magic", x=X), "sampler must be one of"),
        (lambda: fastscore.sample(gaussian, sigmas=[1.0], **ONE), "give either x or shape"),
        (lambda: fastscore.losses.noise_conditional(gaussian, X, [1.0], method="magic", seed=0), "method must be"),
        (lambda: fastscore.losses.noise_conditional(lambda x, s: x[:1], X, [1.0], seed=0), "must have the shape of x"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_hook_sees_every_network_call_and_the_end():
    seen, sigmas = [], [0.5, 0.25]

    def project(x, sigma, step):
        seen.append((sigma, step))
        return x.clamp(0, 1)

    options = {"sigmas": sigmas, "steps_per_level": 2, "step_size": 0.02, "seed": 0, "project": project}
    for denoise, calls in ((True, [(0.5, 0), (0.5, 1), (0.25, 2), (0.25, 3), (0.25, 4), (0.0, 5)]),
                           (False, [(0.5, 0), (0.5, 1), (0.25, 2), (0.25, 3), (0.0, 4)])):  # fmt: skip
        seen.clear()
        x = fastscore.sample(gaussian, shape=(8, 2), denoise=denoise, **options)
        assert seen == calls and 0 <= float(x.min()) and float(x.max()) <= 1
    seen.clear()
    fastscore.sample(lambda x: -x, sampler="langevin", x=X, steps=2, step_size=0.1, seed=0, project=project)
    assert seen == [(0.0, 0), (0.0, 1), (0.0, 2)]
