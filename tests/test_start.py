"""Where samplers start: the law from data, and the warning of a start far outside."""

import math
import warnings

import pytest
import torch

import fastscore
from fastscore import datasets, models, random, sampling, schedules
from fastscore.sampling.start import limit

SIGMAS = schedules.geometric(1.0, 0.1, 4)
SAMPLERS = {
    "annealed_langevin": {"sigmas": SIGMAS, "steps_per_level": 1, "step_size": 1e-3},
    "consistent_annealed": {"sigmas": schedules.geometric(1.0, 0.1, 30)},
    "predictor_corrector": {"sigmas": SIGMAS},
    "probability_flow": {"sigmas": SIGMAS},
    "probability_flow, adaptive": {"sigmas": SIGMAS, "method": "adaptive", "rtol": 1e-2, "atol": 1e-2},
    "langevin": {"steps": 2, "step_size": 1e-3, "sigma": 1.0},
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
TOLD = "sample: the first score says that the start lies far outside the data with noise σ = 1: "


def score(x, sigma):
    """Data of the mean 20 and the variance 0.25."""
    return (20 - x) / (0.25 + sigma[:, None] ** 2)


def run(sampler, f=score, **options):
    return fastscore.sample(f, sampler=sampler.split(",")[0], seed=0, **SAMPLERS[sampler], **options)


@pytest.fixture
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@every_sampler
def test_a_start_far_outside_is_warned_about_once(sampler):
    """Uniform in [0, 1]: q = 19.5²/1.25² = 243."""
    with pytest.warns(UserWarning, match=TOLD + r".* is 24\d, ") as told:
        run(sampler, shape=(64, 8), initial_law="uniform")
    assert len(told) == 1


@every_sampler
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (64, 8)])
def test_a_start_like_the_data_is_not(sampler, shape, strict):
    data = 20 + 0.5 * random.normal((500, shape[1]), seed=1, stream=1024)
    run(sampler, x=sampling.start_like(data, shape[0], sigma=1.0, seed=0))
    run(sampler, x=torch.zeros(shape), check_finite=False)   # who asks for no look gets none


def test_a_run_that_goes_on_is_not_looked_at(strict):
    run("annealed_langevin", x=torch.zeros(4, 8), start=1)


def test_a_network_in_half_precision_is_looked_at_too():
    torch.manual_seed(0)
    net = models.ScoreMLP(3, width=8, depth=1, sigmas=SIGMAS).bfloat16()
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 3.0)
    with pytest.warns(UserWarning, match=TOLD):
        run("annealed_langevin", net, shape=(8, 3))


def test_the_limit_is_that_of_chernoff():
    """And holds for points, the worst case: χ² has its 1 - 1e-6 quantile below (1 element: 23.93; 30: 2.69)."""
    for n in (1, 2, 10, 24):
        c = limit(n)
        assert c == 4 or (c * math.exp(1 - c)) ** (n / 2) == pytest.approx(1e-6, rel=1e-9)
    assert limit(1) > 23.93 and limit(10**6) == 4


def test_starts_have_the_moments_of_noisy_data_in_any_split():
    """Five standard errors; each element has a mean and a variance of its own."""
    data = torch.tensor([[0.0, 10.0], [2.0, 10.0], [4.0, 16.0]])
    mean, variance = torch.tensor([2.0, 12.0]), torch.tensor([8 / 3, 8.0]) + 0.25
    n = 2**16
    x = sampling.start_like(data, n, sigma=0.5, seed=3)
    assert bool(((x.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all())
    assert bool(((x.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / n)).all())
    assert torch.equal(x[5:7], sampling.start_like(data, 2, sigma=0.5, seed=3, first_sample=5))


def test_digits_from_the_unit_cube_are_silent(strict):
    """The usual call: 8 by 8 digits, a ladder from 1, a uniform start; here with the exact score of the data."""
    data = datasets.load("digits")[0].flatten(1)[:300]
    exact = models.GaussianMixture(torch.ones(len(data)) / len(data), data, torch.full((len(data),), 1e-4))
    fastscore.sample(exact, shape=(8, 64), sigmas=schedules.geometric(1.0, 0.01, 10), steps_per_level=1, step_lr=2e-5, seed=1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sampling.start_like(torch.ones(0, 2), 3, sigma=1.0, seed=0), r"data must hold samples, \(N, \*\); got shape \(0, 2\)"),
        (lambda: sampling.start_like(torch.ones(3, 2), 3, sigma=-1.0, seed=0), "sigma must be a finite number >= 0; got -1.0"),
        (lambda: sampling.start_like(torch.ones(3, 2), -1, sigma=1.0, seed=0), "n must be an int of at least 0; got -1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=f"start_like: {message}"):
        call()
