# pyright: strict
"""What a user's editor sees: checked by `make types`, not run."""

from collections.abc import Iterator
from typing import assert_type

import torch
from torch import Tensor, nn

import fastscore
from fastscore import conversions, guidance, likelihood, losses, models, random, sampling, schedules
from fastscore.training import Step, training_loop

x = torch.zeros(4, 2)
sigmas = schedules.geometric(1.0, 0.01, 10)
assert_type(sigmas, Tensor)
assert_type(schedules.step_size_from_lr(2e-5), float)
assert_type(schedules.step_size_from_lr(sigmas), Tensor)

net = models.ScoreMLP(2, sigmas=sigmas)
assert_type(net.forward(x, torch.ones(4)), Tensor)
assert_type(models.Gaussian([0.0, 0.0], 1.0).sample(3, seed=0), Tensor)


def score(x: Tensor, sigma: Tensor) -> Tensor:
    return -x / (1 + sigma[:, None] ** 2)


def loss(net: nn.Module, batch: Tensor, step: int) -> Tensor:
    return losses.noise_conditional(net, batch, sigmas, seed=0, step=step)


assert_type(losses.denoising(score, x, 0.5), Tensor)
assert_type(losses.sliced(torch.sin, x, projections=2), Tensor)
assert_type(fastscore.langevin_step(x, -x, 0.1, seed=0), Tensor)
assert_type(fastscore.perturb(x, 0.5), Tensor)
assert_type(fastscore.instance_norm_plus(x[:, :, None], torch.ones(2)), Tensor)
assert_type(fastscore.jvp(torch.sin, x, x), tuple[Tensor, Tensor])
assert_type(random.normal((2, 3), seed=0, stream=1024), Tensor)

states = sampling.annealed_langevin(score, x, sigmas=sigmas, steps_per_level=2, step_size=1e-3)
assert_type(states, Iterator[sampling.State])
for state in states:
    assert_type(state.x, Tensor)
    assert_type(state.sigma, float)
    assert_type(state.level, int)
assert_type(
    fastscore.sample(score, shape=(4, 2), sigmas=sigmas, steps_per_level=1, step_size=1e-3), Tensor
)

steps = training_loop(net, [x], loss, steps=2)
assert_type(steps, Iterator[Step])
for step in steps:
    assert_type(step.losses, Tensor)

plan = schedules.recipe(x, 20, sigma_max=1.0)
assert_type(plan.step_size, float)
guided = guidance.posterior(score, guidance.class_likelihood(net, 1))
assert_type(guided(x, torch.ones(4)), Tensor)
assert_type(likelihood.log_density(score, x, sigma_min=0.1, sigma_max=1.0, steps=4), Tensor)
assert_type(likelihood.log_ratio(torch.neg, x, x), Tensor)
assert_type(likelihood.log_ratio(torch.neg, x, x, return_error=True), tuple[Tensor, Tensor])
assert_type(conversions.convert(x, x, 1.0, kind="score", to="noise"), Tensor)
