"""seed=None is one seed drawn from PyTorch's default generator, wherever a seed is taken."""

import contextlib

import pytest
import torch
from test_direct import Mode

import fastscore
from fastscore import datasets, guidance, likelihood, losses, models, random, sampling, schedules
from fastscore.guidance.linear import adjoint_gap

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
SIGMAS = schedules.geometric(1.0, 0.1, 3)
MIXTURE = models.GaussianMixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[0.0] * 3, [1.0] * 3]), torch.ones(2)
)


def score(x, sigma):
    return -x / (1 + sigma[:, None] ** 2)


def sampled(name, **options):
    return lambda **seed: list(getattr(sampling, name)(score, X, **options, **seed))[-1].x


def painted(**seed):
    hook = guidance.inpainting(X[0], torch.tensor([True, False, True]), **seed)
    return torch.cat([hook(X, 1.0, 0), hook(X, 0.5, 1)])


# Not denoising_loss: the noise that it makes again has a seed, which is refused where it is None.
CALLS = {
    "random.words": lambda **seed: random.words(5, stream=1024, **seed),
    "random.uniform": lambda **seed: random.uniform((3, 2), stream=1024, **seed),
    "random.normal": lambda **seed: random.normal((3, 2), stream=1024, **seed),
    "random.rademacher": lambda **seed: random.rademacher((3, 2), stream=1024, **seed),
    "langevin_step": lambda **seed: fastscore.langevin_step(X, -X, 0.1, **seed),
    "perturb": lambda **seed: fastscore.perturb(X, 0.1, **seed),
    "noisy_update": lambda **seed: fastscore.noisy_update(X, X, 0.1, 0.2, **seed),
    "rademacher_jvp": lambda **seed: fastscore.rademacher_jvp(torch.sin, X, projections=2, **seed)[
        1
    ],
    "denoising": lambda **seed: losses.denoising(score, X, 0.5, **seed),
    "sliced": lambda **seed: losses.sliced(torch.sin, X, projections=2, **seed),
    "sliced gaussian": lambda **seed: losses.sliced(
        torch.sin, X, projections=2, distribution="gaussian", **seed
    ),
    "finite_difference_sliced": lambda **seed: losses.finite_difference_sliced(
        torch.sin, X, projections=2, **seed
    ),
    "noise_conditional": lambda **seed: losses.noise_conditional(score, X, SIGMAS, **seed),
    "noise_conditional sliced": lambda **seed: losses.noise_conditional(
        score, X, SIGMAS, method="sliced", **seed
    ),
    "noise_conditional exact": lambda **seed: losses.noise_conditional(
        score, X, SIGMAS, method="exact", **seed
    ),
    "variance_report": lambda **seed: torch.tensor(
        [row.mean for row in losses.variance_report(torch.sin, X, draws=2, **seed).rows]
    ),
    "GaussianMixture.sample": lambda **seed: MIXTURE.sample(5, 0.5, **seed),
    "dequantize": lambda **seed: likelihood.dequantize(torch.zeros(2, 3), 4, **seed),
    "log_density": lambda **seed: likelihood.log_density(
        score, X, sigma_min=0.1, sigma_max=1.0, steps=2, trace="rademacher", **seed
    ),
    "distance_bounds": lambda **seed: torch.tensor(
        schedules.distance_bounds(X, samples=2, **seed).lower
    ),
    "inpainting": painted,
    "adjoint_gap": lambda **seed: torch.tensor(
        adjoint_gap(guidance.Mask(torch.tensor([True, False, True])), (3,), **seed)
    ),
    "batches": lambda **seed: (
        next(datasets.batches(datasets.open(X), 9, steps=1, **seed))[1]
    ),
    "augment": lambda **seed: datasets.augment(X[:, None, None], shift=0, flip=True, **seed),
    "split": lambda **seed: datasets.split(20, 5, **seed)[1],
    "start_like": lambda **seed: sampling.start_like(X, 5, sigma=1.0, **seed),
    "initial": lambda **seed: sampling.initial((3, 2), law="gaussian", sigma=2.0, **seed),
    "sample": lambda **seed: fastscore.sample(
        score, shape=(4, 3), sigmas=SIGMAS, steps_per_level=2, step_size=0.01, **seed
    ),
    "langevin": sampled("langevin", steps=3, step_size=0.1, sigma=0.5),
    "annealed_langevin": sampled(
        "annealed_langevin", sigmas=SIGMAS, steps_per_level=2, step_size=0.01
    ),
    "consistent_annealed": sampled("consistent_annealed", sigmas=SIGMAS),
    "predictor_corrector": sampled("predictor_corrector", sigmas=SIGMAS, snr=0.16),
    "mala": lambda **seed: (
        list(sampling.mala(MIXTURE.log_prob, X, steps=3, step_size=0.1, **seed))[-1].x
    ),
}


@pytest.mark.parametrize("way", ["direct", "under a mode", "in inference mode"])
def test_a_seed_is_the_next_number_of_the_default_generator(way):
    around = {
        "direct": contextlib.nullcontext,
        "under a mode": Mode,
        "in inference mode": torch.inference_mode,
    }[way]
    torch.manual_seed(7)
    wanted = [int(torch.randint(0, 2**63 - 1, ()).item()) for _ in range(3)]
    after = torch.get_rng_state()

    torch.manual_seed(7)
    with around():
        assert [random.draw_seed() for _ in range(3)] == wanted
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", CALLS)
def test_no_seed_is_one_seed_of_the_default_generator(name):
    torch.manual_seed(5)
    seed = random.draw_seed()
    after = torch.get_rng_state()
    expected = CALLS[name](seed=seed)
    assert torch.equal(torch.get_rng_state(), after), "a seed that is given draws nothing"

    torch.manual_seed(5)
    found = CALLS[name](seed=None)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), after), "one draw, and no more"


@pytest.mark.parametrize(
    "name", [name for name in CALLS if not name.startswith(("random.", "adjoint_gap", "split"))]
)
def test_a_seed_may_be_left_out(name):
    """Of random.* it may not, where it is all that a call is about.

    A check and a split are the same unless told otherwise.
    """
    torch.manual_seed(5)
    expected = CALLS[name](seed=random.draw_seed())
    torch.manual_seed(5)
    assert torch.equal(CALLS[name](), expected)
