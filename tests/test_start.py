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
    "probability_flow, adaptive": {
        "sigmas": SIGMAS,
        "method": "adaptive",
        "rtol": 1e-2,
        "atol": 1e-2,
    },
    "langevin": {"steps": 2, "step_size": 1e-3, "sigma": 1.0},
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
TOLD = "sample: the first score says that the start lies far outside the data with noise σ = 1: "


def score(x, sigma):
    """Data of the mean 20 and the variance 0.25."""
    return (20 - x) / (0.25 + sigma[:, None] ** 2)


def run(sampler, f=score, **options):
    return fastscore.sample(
        f, sampler=sampler.split(",")[0], seed=0, **SAMPLERS[sampler], **options
    )


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
    """And holds for points, the worst case.

    χ² has its 1 - 1e-6 quantile below (1 element: 23.93; 30: 2.69).
    """
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
    """The usual call: 8 by 8 digits, a ladder from 1, a uniform start.

    Here with the exact score of the data.
    """
    data = datasets.load("digits")[0].flatten(1)[:300]
    exact = models.GaussianMixture(
        torch.ones(len(data)) / len(data), data, torch.full((len(data),), 1e-4)
    )
    fastscore.sample(
        exact,
        shape=(8, 64),
        sigmas=schedules.geometric(1.0, 0.01, 10),
        steps_per_level=1,
        step_lr=2e-5,
        seed=1,
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: sampling.start_like(torch.ones(0, 2), 3, sigma=1.0, seed=0),
            r"data must hold samples, \(N, \*\); got shape \(0, 2\)",
        ),
        (
            lambda: sampling.start_like(torch.ones(3, 2), 3, sigma=-1.0, seed=0),
            "sigma must be a finite number >= 0; got -1.0",
        ),
        (
            lambda: sampling.start_like(torch.ones(3, 2), -1, sigma=1.0, seed=0),
            "n must be an int of at least 0; got -1",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=f"start_like: {message}"):
        call()


def distance(quantiles, mean, sigma):
    """W₂ of two laws of numbers, one given by its quantiles at (k + ½)/n, the other N(mean, σ²)."""
    z = torch.special.ndtri(
        (torch.arange(len(quantiles), dtype=torch.float64) + 0.5) / len(quantiles)
    )
    return float((quantiles - mean - sigma * z).square().mean().sqrt())


def test_beyond_the_bound_and_only_there_the_normal_start_is_the_nearer_one_at_worst():
    """Whatever the data in [0, 1].

    The worst are points at an end, W₂ being convex in the law of the data.
    """
    unit = (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6
    for sigma, law in (
        (0.5, "uniform"),
        (1.0, "uniform"),
        (1.145, "uniform"),
        (1.147, "gaussian"),
        (3.0, "gaussian"),
    ):
        uniform = max(distance(unit, point, sigma) for point in (0.0, 0.3, 0.5, 1.0))
        gaussian = max(
            distance(sigma * torch.special.ndtri(unit), point, sigma)
            for point in (0.0, 0.3, 0.5, 1.0)
        )
        assert uniform == pytest.approx(
            math.sqrt(1 / 3 + sigma**2 - sigma / math.sqrt(math.pi)), abs=1e-4
        )
        assert gaussian == pytest.approx(1, abs=1e-4)
        assert (
            sampling.start_law(sigma) == law == min((uniform, "uniform"), (gaussian, "gaussian"))[1]
        )
    assert sampling.start_law(None) == "uniform"   # of log p itself, for one


@every_sampler
@pytest.mark.parametrize(
    "sigma, law", [(1.0, "uniform"), (1.14, "uniform"), (1.15, "gaussian"), (50.0, "gaussian")]
)
def test_the_start_follows_from_the_ladder(sampler, sigma, law):
    name = sampler.split(",")[0]
    options = dict(SAMPLERS[sampler])
    if "sigmas" in options:
        options["sigmas"] = schedules.geometric(sigma, 0.9 * sigma, len(options["sigmas"]))
    else:
        options["sigma"] = sigma
    if "step_size" in options:
        options["step_size"] = 0.1 * sigma**2
    law = "gaussian" if name in ("predictor_corrector", "probability_flow") else law
    first, seen = sampling.initial((4, 3), law=law, sigma=sigma, seed=7), []

    def watched(x, each):
        seen.append(x.clone())
        return -x / (1 + each[:, None] ** 2)

    fastscore.sample(watched, sampler=name, shape=(4, 3), seed=7, **options)
    assert torch.equal(seen[0], first)
    if name not in ("predictor_corrector", "probability_flow"):
        assert torch.equal(sampling.initial((4, 3), sigma=sigma, seed=7), first)
    asked = {
        "uniform": sampling.initial((4, 3), seed=7),
        "gaussian": sigma * random.normal((4, 3), seed=7, stream=random.INIT),
    }
    for other in asked:   # what is asked for is what is done
        seen.clear()
        fastscore.sample(watched, sampler=name, shape=(4, 3), seed=7, initial_law=other, **options)
        assert torch.equal(seen[0], asked[other])


@pytest.mark.parametrize("law", [None, "uniform"])
def test_the_law_after_the_first_level_is_that_of_the_start(law):
    """A point of data at 0.3, NCSNv2's ladder for CIFAR-10.

    The first level takes the variance V to a²ⁿ V + (1 - a²ⁿ) σ² / (1 - ε/(4σ²)).

    From N(0, σ_1²) it is the stationary one at once, from the unit interval half of it; 5 standard
    errors of 2^16 normal values.
    """
    preset = sampling.PRESETS["ncsnv2-cifar10"]
    n, steps, sigma = 2**16, preset.steps_per_level, preset.ladder[0]
    options = {"shape": (n, 1), "initial_law": law, "sigmas": schedules.geometric(*preset.ladder)}
    states = sampling.states(
        lambda x, each: (0.3 - x) / each[:, None] ** 2,
        step_lr=preset.step_lr,
        steps_per_level=steps,
        seed=11,
        **options,
    )
    x = next(states).x
    a = 1 - preset.step_lr / 0.01**2
    mean, variance = (0.5, 1 / 12) if law else (0.0, sigma**2)
    mean, variance = (
        0.3 + a**steps * (mean - 0.3),
        a ** (2 * steps) * variance + (1 - a ** (2 * steps)) * 2 * sigma**2 / (1 + a),
    )
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(variance / n)
    assert abs(float(x.var()) / variance - 1) < 5 * math.sqrt(2 / n)
    assert (variance / sigma**2 > 1) is (law is None)


def test_published_configurations_start_as_published():
    assert all(preset.options["initial_law"] == "uniform" for preset in sampling.PRESETS.values())


@pytest.mark.parametrize("call", [fastscore.sample, sampling.states])
def test_a_run_that_goes_on_needs_its_state(call):
    """A fresh draw at a later level has the noise of the first: it went through in silence."""
    with pytest.raises(
        ValueError, match="sample: start needs the state after that many updates as x; got a shape"
    ):
        call(score, shape=(2, 3), seed=0, start=2, **SAMPLERS["annealed_langevin"])
    call(score, shape=(2, 3), seed=0, start=0, check_finite=False, **SAMPLERS["annealed_langevin"])
