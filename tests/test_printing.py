"""Objects print as what they are: no addresses, no whole models, no images."""

import re

import pytest
import torch

from fastscore import guidance, losses, models, sampling, training

NET = models.ScoreMLP(64, width=16, depth=1, sigmas=[1.0, 0.1])
ENERGY = models.EnergyScore(models.EnergyMLP(2, width=4, depth=1))
IMAGE, MASK = torch.zeros(1, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool)


def step():
    def loss(net, x, step):
        return losses.noise_conditional(net, x, torch.tensor([1.0, 0.1]), seed=0, step=step)

    return next(iter(training.training_loop(NET, [torch.rand(4, 1, 8, 8)], loss, steps=1)))


def log_density(x):
    return -x.square().sum((1, 2, 3))


OBJECTS = {
    "GaussianMixture(2 components, d=2)": lambda: models.GaussianMixture(
        [1, 2], [[0.0, 0.0], [1.0, 1.0]], 1.0
    ),
    "Gaussian(d=3)": lambda: models.Gaussian(torch.zeros(3), torch.eye(3)),
    "EnergyScore(f=log_density)": lambda: models.EnergyScore(log_density),
    "Downsample(factor=2)": lambda: guidance.Downsample(2),
    "Mask(mask=bool (1, 8, 8))": lambda: guidance.Mask(MASK),
    "Matrix(matrix=float64 (3, 64), shape=(64))": lambda: guidance.Matrix(torch.eye(3, 64)),
    "LinearInverse(score=ScoreMLP, operator=Downsample(factor=2), observation=float32 (1, 4, 4), "
    "noise=0.05, ...": lambda: (
        guidance.linear_inverse(NET, guidance.Downsample(2), torch.zeros(1, 4, 4), noise=0.05)
    ),
    "Posterior(score=ScoreMLP, likelihood_score=Gradient(log_likelihood=log_density), "
    "scale=0.1)": lambda: (
        guidance.posterior(NET, log_density, scale=0.1)
    ),
    "Inpainting(observation=float32 (1, 8, 8), mask=bool (1, 8, 8), noise=...": lambda: (
        guidance.inpainting(IMAGE, MASK, seed=0)
    ),
    "State(level=0, sigma=0.0, x=float32 (3, 2), step=1)": lambda: next(
        iter(sampling.mala(ENERGY, torch.zeros(3, 2), step_size=0.1, steps=1, seed=1))
    ),
    "Step(step=0, loss=...": step,
}


@pytest.mark.parametrize("expected", OBJECTS)
def test_an_object_prints_as_what_it_is(expected):
    text = repr(OBJECTS[expected]())
    assert " at 0x" not in text and "tensor(" not in text and "\n" not in text
    assert re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".*"), text), text
