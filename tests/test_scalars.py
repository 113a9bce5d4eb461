"""A number of numpy's is a number: seeds, steps, counts, sizes and step sizes, everywhere."""

import json

import numpy as np
import pytest
import torch

import fastscore
from fastscore import (
    guidance,
    interop,
    likelihood,
    losses,
    models,
    random,
    sampling,
    schedules,
    training,
)
from fastscore.losses.noise_conditional import draw_labels

INTEGERS = (np.int64, np.int32, np.uint8)
X = torch.linspace(-1, 1, 12).reshape(2, 1, 2, 3)
SIGMAS = schedules.geometric(1.0, 0.1, 3)


def energy(x):
    return -x.square().flatten(1).sum(1)


def states(sampler, i, **options):
    score = energy if sampler == "mala" else lambda x, *sigma: -x
    run = getattr(sampling, sampler)(score, X, seed=i(3), first_sample=i(2), start=i(1), **options)
    return torch.cat([s.x for s in run]), [
        s.step for s in getattr(sampling, sampler)(score, X, seed=i(3), **options)
    ]


def trained(i):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3)
    loop = training.training_loop(
        net,
        [X.view(-1, 3)],
        lambda net, x, step: net(x).square().sum(1),
        steps=i(3),
        first_step=i(1),
    )
    return [(s.step, s.losses) for s in loop]


def scheduled(i):
    scheduler = interop.AnnealedLangevinScheduler(
        sigma_max=1.0, sigma_min=0.1, steps_per_level=i(2), seed=i(3), first_sample=i(1)
    )
    scheduler.set_timesteps(i(5))
    return json.dumps(scheduler.config)


def built(i):
    torch.manual_seed(0)
    net = models.ScoreMLP(i(6), width=i(8), depth=i(1), sigmas=SIGMAS)
    return net(X, 0.5), models.NCSN(channels=i(1), ngf=i(4), image_size=i(8)).sample_shape


CALLS = {
    "words": lambda i: random.words(
        i(5), seed=i(3), step=i(1), stream=i(5), substream=i(1), offset=i(2)
    ),
    "normal": lambda i: random.normal((i(2), 3), seed=i(3), step=i(1), stream=5, offset=i(2)),
    "rademacher": lambda i: random.rademacher(i(5), seed=i(3), stream=5),
    "large offset": lambda i: random.normal(
        (4,), seed=3, stream=5, offset=np.int64(2**62) if i is not int else 2**62
    ),
    "langevin_step": lambda i: fastscore.langevin_step(
        X, -X, 0.1, seed=i(3), step=i(1), offset=i(2)
    ),
    "perturb": lambda i: fastscore.perturb(X, 0.1, seed=i(3), step=i(1), offset=i(2)),
    "rademacher_jvp": lambda i: fastscore.rademacher_jvp(
        torch.sin, X, projections=i(2), seed=i(3), step=i(1)
    ),
    "group_norm": lambda i: fastscore.group_norm_modulate(X.expand(2, 4, 2, 3), i(2)),
    "denoising": lambda i: losses.denoising(
        lambda x, s: -x, X, 0.5, seed=i(3), step=i(1), first_sample=i(2)
    ),
    "sliced": lambda i: losses.sliced(
        torch.sin, X, projections=i(2), seed=i(3), step=i(1), first_sample=i(2)
    ),
    "finite differences": lambda i: losses.finite_difference_sliced(
        torch.sin, X, projections=i(2), seed=i(3)
    ),
    "exact": lambda i: losses.exact(torch.sin, X, chunk=i(2)),
    "noise_conditional": lambda i: losses.noise_conditional(
        lambda x, s: -x, X, SIGMAS, seed=i(3), step=i(1), first_sample=i(6)
    ),
    "draw_labels": lambda i: draw_labels(i(4), i(9), seed=i(3), step=i(1), first_sample=i(2)),
    "variance_report": lambda i: losses.variance_report(
        torch.sin, X, draws=i(3), projections=(i(1), i(2)), seed=i(3)
    ),
    "langevin": lambda i: states("langevin", i, steps=i(3), step_size=0.1),
    "mala": lambda i: states("mala", i, steps=i(3), step_size=0.1),
    "annealed_langevin": lambda i: states(
        "annealed_langevin", i, sigmas=SIGMAS, steps_per_level=i(2), step_size=0.01
    ),
    "consistent_annealed": lambda i: states(
        "consistent_annealed", i, sigmas=schedules.geometric(1.0, 0.1, 30)
    ),
    "predictor_corrector": lambda i: states(
        "predictor_corrector", i, sigmas=SIGMAS, corrector_steps=i(2)
    ),
    "sample": lambda i: fastscore.sample(
        lambda x, s: -x,
        shape=(i(2), i(3)),
        sigmas=SIGMAS,
        steps_per_level=i(2),
        step_size=0.01,
        seed=i(3),
        first_sample=i(2),
    ),
    "gaussian": lambda i: models.Gaussian([0.0], 1.0).sample(
        i(3), seed=i(3), step=i(1), first_sample=i(2)
    ),
    "log_density": lambda i: likelihood.log_density(
        lambda x, s: -x, X, sigma_min=0.1, sigma_max=1.0, steps=i(2), chunk=i(2)
    ),
    "log_density by signs": lambda i: likelihood.log_density(
        lambda x, s: -x,
        X,
        sigma_min=0.1,
        sigma_max=1.0,
        steps=2,
        trace="rademacher",
        projections=i(2),
        seed=i(3),
        first_sample=i(2),
    ),
    "log_ratio": lambda i: likelihood.log_ratio(torch.sin, X, 2 * X, nodes=i(4), chunk=i(3)),
    "dequantize": lambda i: likelihood.dequantize(
        X.sign().clamp(min=0), i(2), seed=i(3), step=i(1), first_sample=i(2)
    ),
    "bits_per_dim": lambda i: likelihood.bits_per_dim(X[0, 0, 0], i(6), levels=i(4)),
    "ladders": lambda i: (
        [f(1.0, 0.1, i(5)) for f in (schedules.geometric, schedules.karras, schedules.linear)]
        + [schedules.vp(i(5))]
    ),
    "number_of_levels": lambda i: schedules.number_of_levels(i(60), i(50), 0.01),
    "technique4": lambda i: schedules.technique4_step_size(SIGMAS, i(3)),
    "recipe": lambda i: schedules.recipe(X.flatten(1), i(30), seed=i(3)).sigmas,
    "distance_bounds": lambda i: schedules.distance_bounds(X, samples=i(2), seed=i(3), chunk=i(1)),
    "share": lambda i: fastscore.distributed.share(i(10), i(1), i(4)),
    "class_likelihood": lambda i: guidance.class_likelihood(lambda x, s: x.flatten(1), i(3))(
        X, torch.ones(2)
    ),
    "inpainting": lambda i: guidance.inpainting(X[1], X[1] > 0.5, seed=i(3), first_sample=i(2))(
        X, 0.5, 1
    ),
    "downsample": lambda i: guidance.Downsample(i(1)).forward(X),
    "scheduler": scheduled,
    "training_loop": trained,
    "networks": built,
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name", CALLS)
def test_an_integer_of_numpy_is_an_integer(name, kind):
    """The same values of the same types: nothing of numpy's comes out again."""
    assert same(CALLS[name](kind), CALLS[name](int))


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_a_float_of_numpy_is_a_number(kind):
    c = kind(0.25)  # the same in both
    assert torch.equal(
        fastscore.langevin_step(X, -X, c, seed=0), fastscore.langevin_step(X, -X, 0.25, seed=0)
    )
    assert torch.equal(
        fastscore.group_norm_modulate(X, 1, eps=c), fastscore.group_norm_modulate(X, 1, eps=0.25)
    )

    run = {"shape": (2, 3), "sigmas": SIGMAS, "seed": 0, "steps_per_level": 2}
    options = [{"step_size": c, "temperature": c}, {"step_size": 0.25, "temperature": 0.25}]
    found, wanted = (fastscore.sample(lambda x, s: -x, **run, **o) for o in options)
    assert torch.equal(found, wanted)

    density = {"sigma_min": c, "sigma_max": kind(1.0), "atol": c, "rtol": c}
    found, wanted = (
        likelihood.log_density(lambda x, s: -x, X, **o)
        for o in (density, {k: float(v) for k, v in density.items()})
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("value", [True, np.True_, 1.5, np.float64(1.0), "1"])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(ValueError, match="steps must be"):
        sampling.langevin(lambda x: -x, X, steps=value, step_size=0.1)
    with pytest.raises(TypeError, match="seed must be an int or an int64 tensor"):
        random.normal((2,), seed=value, stream=5)
    with pytest.raises(ValueError, match="n must be an int of at least 2"):
        schedules.geometric(1.0, 0.1, value)


def test_a_seed_of_numpy_reaches_a_compiled_step():
    step = torch.compile(
        lambda x, seed: fastscore.langevin_step(x, -x, 0.1, seed=seed), backend="eager"
    )
    assert torch.equal(step(X, np.int64(3)), fastscore.langevin_step(X, -X, 0.1, seed=3))
