"""Langevin samplers: short generators that hand every level or step to the caller."""

import math
from typing import NamedTuple

import torch

from fastscore import random
from fastscore.ops import checks, langevin_step
from fastscore.schedules import check_ladder


class Level(NamedTuple):
    """What `annealed_langevin` yields: the level's number, its σ and the samples after it (σ = 0 after the final denoise)."""

    level: int
    sigma: float
    x: torch.Tensor


def initial(shape, *, seed, first_sample=0, dtype=None, device=None):
    """The initial draw of a sampler, uniform in [0, 1], stream INIT: sample n is the same in every batch that holds it."""
    offset = first_sample * math.prod(shape[1:])
    return random.uniform(shape, seed=seed, stream=random.INIT, offset=offset, dtype=dtype, device=device)


def langevin(score, x, *, steps, step_size, seed=None, first_sample=0):
    """Run unadjusted Langevin dynamics; yields x after each step.

        x ← x + (ε/2) s(x) + √ε z

    Args:
        score: called score(x). x: start, (B, *), not modified. steps: how many; step_size: ε > 0, a float, 0-d or (B,).
        seed: of the run; first_sample: global number of x[0], so that splits of a batch agree.

    Raises:
        ValueError: steps is negative, or ε is negative or not finite.

    Source: Song & Ermon 2019, equation 4 (arXiv:1907.05600).
    """
    _check_run("langevin", steps, first_sample)
    checks.check_float("langevin", "x", x)
    checks.coefficient("langevin", "step_size", step_size, x, minimum=0)
    return _langevin(score, x, steps, step_size, random.draw_seed() if seed is None else seed, first_sample)


@torch.no_grad()
def _langevin(score, x, steps, step_size, seed, first_sample):
    offset = first_sample * math.prod(x.shape[1:])
    for step in range(steps):
        x = langevin_step(x, score(x), step_size, seed=seed, step=step, offset=offset)
        yield x


def annealed_langevin(score, x, *, sigmas, steps_per_level, step_size, denoise=True, seed=None, first_sample=0):
    """Run annealed Langevin dynamics; yields a `Level` after each noise level.

        ε_i = ε σ_i² / σ_L²;    T times: x ← x + (ε_i/2) s(x, σ_i) + √ε_i z;    last, if asked: x ← x + σ_L² s(x, σ_L)

    Args:
        score: called score(x, sigma) with sigma (B,). x: start, (B, *), not modified.
        sigmas: descending ladder, (L,). steps_per_level: T. step_size: ε, at the smallest level.
        denoise: take the final noise-free step. seed: of the run; first_sample: global number of x[0].

    Raises:
        ValueError: the ladder does not descend, steps_per_level is negative, or ε is negative or not finite.

    Source: Song & Ermon 2019, Algorithm 1 (arXiv:1907.05600); final step: Jolicoeur-Martineau et al. 2020.
    """
    op = "annealed_langevin"
    _check_run(op, steps_per_level, first_sample)
    checks.check_float(op, "x", x)
    sigmas = check_ladder(op, sigmas).tolist()
    step_size = checks.coefficient(op, "step_size", step_size, x, minimum=0)
    seed = random.draw_seed() if seed is None else seed
    return _annealed(score, x, sigmas, steps_per_level, step_size, denoise, seed, first_sample)


@torch.no_grad()
def _annealed(score, x, sigmas, steps_per_level, step_size, denoise, seed, first_sample):
    offset, step = first_sample * math.prod(x.shape[1:]), 0
    for level, sigma in enumerate(sigmas):
        each = torch.full((x.shape[0],), sigma, device=x.device)
        epsilon = step_size * (sigma / sigmas[-1]) ** 2
        for _ in range(steps_per_level):
            x = langevin_step(x, score(x, each), epsilon, seed=seed, step=step, offset=offset)
            step += 1
        yield Level(level, sigma, x)
    if denoise:
        yield Level(len(sigmas), 0.0, (x + sigmas[-1] ** 2 * score(x, each)).to(x.dtype))


def sample(
    score, *, sampler="annealed_langevin", x=None, shape=None, seed=None, first_sample=0, dtype=None, device=None, **options
):
    """Run a sampler to its end and return the samples.

    Args:
        score: as the sampler calls it. sampler: "annealed_langevin" or "langevin"; options: its other arguments.
        x: start, (B, *); or shape: its shape, then x is uniform in [0, 1] (stream INIT).
        seed, first_sample: sample(n=64) equals two calls of 32 with first_sample 0 and 32, noise bit for bit.

    Raises:
        ValueError: the sampler is unknown, or not exactly one of x and shape is given.
    """
    samplers = {"annealed_langevin": annealed_langevin, "langevin": langevin}
    if sampler not in samplers:
        raise ValueError(f"sample: sampler must be one of {', '.join(samplers)}; got {sampler!r}.")
    if (x is None) == (shape is None):
        raise ValueError("sample: give either x or shape.")
    seed = random.draw_seed() if seed is None else seed
    if x is None:
        x = initial(tuple(shape), seed=seed, first_sample=first_sample, dtype=dtype, device=device)
    for state in samplers[sampler](score, x, seed=seed, first_sample=first_sample, **options):
        x = state.x if isinstance(state, Level) else state
    return x


def _check_run(op, steps, first_sample):
    for name, value in (("steps", steps), ("first_sample", first_sample)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{op}: {name} must be a non-negative int; got {value!r}.")
