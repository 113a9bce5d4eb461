"""A sampler's own work per step, with a network that costs nothing.

What NCSNv2's and Score-SDE's loops do around theirs.

An annealed Langevin step moves three times the element size per element; a level of
predictor-corrector sampling nine (its corrector also reads the score for the norms of the score and
of the noise).
"""

import functools
import math

import pytest
import torch

import fastscore
from fastscore import sampling

SHAPE = (64, 3, 32, 32)
# The first level never ends: each call is one of its steps.
SIGMAS, EPSILON, MANY = [1.0, 0.99], 1e-5, 10**9


@pytest.fixture
def shape(request):
    return (4, 3, 8, 8) if request.config.option.smoke else SHAPE


def norm(t):
    return t.flatten(1).norm(dim=1).mean()


def ncsnv2_step(x, s, alpha, sigma):
    """One step as NCSNv2's sampler takes it, which computes its diagnostics whether they are
    printed or not."""
    z = torch.randn_like(x)
    score_norm, noise_norm = norm(s), norm(z)
    x = x + alpha * s + (2 * alpha).sqrt() * z
    snr = (alpha / 2).sqrt() * score_norm / noise_norm
    return x, norm(x), snr, s.mean(0).norm() ** 2 * sigma**2


def plain_step(x, s, alpha, sigma):
    return x + alpha * s + math.sqrt(2 * alpha) * torch.randn_like(x)


def score_sde_level(x, s, g, r):
    """Corrector with batch-mean norms, then the reverse-diffusion predictor, as Score-SDE takes
    them."""
    z = torch.randn_like(x)
    e = 2 * (r * norm(z) / norm(s)) ** 2
    x = x + e * s + (2 * e).sqrt() * z
    mean = x + g * s
    return mean + math.sqrt(g) * torch.randn_like(x), mean


def steps_of(sampler, backend, x, s, **options):
    """next() takes one step, or one level."""
    with fastscore.use_backend(backend):  # asked when the generator is made
        return functools.partial(
            next, getattr(sampling, sampler)(lambda *_: s, x, seed=1, **options)
        )


def bench_annealed_langevin_step(compare, device, ours, shape):
    x, s = (torch.randn(shape, device=device) for _ in range(2))
    options = {"sigmas": SIGMAS, "steps_per_level": MANY, "step_size": EPSILON, "every_step": True}
    calls = {name: steps_of("annealed_langevin", name, x, s, **options) for name in ours}
    e = EPSILON * (SIGMAS[0] / SIGMAS[1]) ** 2
    for call in calls.values():
        exact = fastscore.langevin_step(x.double(), s.double(), e, seed=1, backend="reference")
        assert float((call().x - exact).abs().max()) < 3e-6
    alpha, sigma = (torch.tensor(c, device=device) for c in (e / 2, SIGMAS[0]))
    plain = {"eager": plain_step, "torch.compile": torch.compile(plain_step)}
    peers = {"eager NCSNv2": (ncsnv2_step, alpha, sigma)} | {
        name: (f, e / 2, None) for name, f in plain.items()
    }
    with torch.no_grad():
        compare(
            "annealed_langevin, a step",
            x,
            3 * x.nbytes,
            calls | {n: functools.partial(f, x, s, *c) for n, (f, *c) in peers.items()},
        )


def bench_predictor_corrector_level(compare, device, ours, shape):
    """Norms of each sample, not of the batch: the peers' cheaper question."""
    x, s = (torch.randn(shape, device=device) for _ in range(2))
    r, sigmas = 0.16, [1 - 1e-5 * i for i in range(40000)]
    options = {"sigmas": sigmas, "snr": r, "corrector": "langevin"}
    calls = {name: steps_of("predictor_corrector", name, x, s, **options) for name in ours}
    first, second = torch.tensor(sigmas[:2]).tolist()   # as the ladder stores them, in float32
    g = first**2 - second**2
    for call in calls.values():
        z, z2 = (
            fastscore.random.normal(shape, seed=1, stream=k, step=i, device=device).double()
            for k, i in ((7, 0), (1, 1))
        )
        e = (
            2
            * (r * z.flatten(1).norm(dim=1) / s.double().flatten(1).norm(dim=1)).reshape(
                -1, 1, 1, 1
            )
            ** 2
        )
        exact = x + e * s.double() + (2 * e).sqrt() * z + g * s + math.sqrt(g) * z2
        assert float((call().x - exact).abs().max()) < 1e-5
    with torch.no_grad():
        compare(
            "predictor_corrector, a level",
            x,
            9 * x.nbytes,
            calls | {"eager": functools.partial(score_sde_level, x, s, g, r)},
        )
