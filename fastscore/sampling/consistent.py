"""Consistent annealed sampling: one network call per level, and the noise that makes the next
level's variance exact."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastscore.sampling.run import (
    Ladder,
    State,
    begin,
    check_count,
    epsilon,
    noiseless_update,
    per_sample,
    without_gradients,
)
from fastscore.schedules import step_size_from_lr
from fastscore.schedules.ladders import check_ladder


def consistent_annealed(
    score: Callable[..., Tensor],
    x: Tensor,
    *,
    sigmas: Ladder,
    step_size: float | Tensor | None = None,
    step_lr: float | Tensor | None = None,
    denoise: bool = True,
    temperature: float = 1.0,
    project: Callable[..., Tensor] | None = None,
    diagnostics: bool = False,
    start: int = 0,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
) -> Iterator[State]:
    """Run consistent annealed sampling; yields a `State` after each level.

        x ← x + η σ_i² s(x, σ_i) + √T σ_{i+1} β_i z
            η = ε/(2 σ_L²),    γ_i = σ_{i+1}/σ_i,    β_i = √(1 - ((1 - η)/γ_i)²)
        last level: x ← x + σ_L² s(x, σ_L) if denoise, else x + η σ_L² s(x, σ_L); no noise

    Wherever the data are a point, the variance after level i is σ_{i+1}² exactly, not only as ε
    vanishes.

    Args:
        score: called score(x, sigma) with sigma (B,). x: start, (B, *), not modified.
        sigmas: descending ladder, (L,); n steps per level are a ladder
            geometric(σ_1, σ_L, (L - 1) n + 1).
        step_size: ε at the smallest level, a float, 0-d or (B,); or step_lr: η σ_L² of the authors'
            code; or neither: η = 1.5 (1 - γ), at most 1, with the smallest γ, which is close to
            what they publish.
        temperature: T, scales the noise by √T and nothing else. For data N(μ, s²), with
            t = s² + σ_i², a level takes the variance V to (1 - η σ_i²/t)² V + T σ_{i+1}² β_i².
        denoise, project, diagnostics, start, seed, first_sample: as in `annealed_langevin`.

    Raises:
        ValueError: ε does not lie between 2 σ_L² (1 - γ) and 2 σ_L² (1 + γ) for the smallest γ (the
            ladder is too coarse for it), the ladder does not descend, or start is beyond the end.

    Source: Jolicoeur-Martineau et al. 2020, Algorithm 2 (arXiv:2009.05475).
    """
    op = "consistent_annealed"
    run = begin(
        op,
        score,
        x,
        temperature=temperature,
        project=project,
        diagnostics=diagnostics,
        seed=seed,
        first_sample=first_sample,
    )
    sigmas = check_ladder(op, sigmas).tolist()
    start = check_count(op, "start", start, len(sigmas))
    return _consistent(run, x, sigmas, _eta(op, sigmas, step_size, step_lr, x), denoise, start)


def _eta(op, sigmas, step_size, step_lr, x):
    """η, a float or a tensor, inside the interval where every β is real."""
    gamma = min((b / a for a, b in zip(sigmas, sigmas[1:])), default=1.0)
    scale = step_size_from_lr(sigmas[-1] ** 2)
    if step_size is None and step_lr is None:
        return min(1.0, 1.5 * (1 - gamma))
    e = epsilon(op, step_size, step_lr, x)
    ends = (e,)
    if isinstance(e, Tensor) and e.numel():
        ends = (e.min().item(), e.max().item())
    for value in ends:
        if len(sigmas) > 1 and not 1 - gamma < value / scale < 1 + gamma:
            name, unit = ("step_size", 1) if step_lr is None else ("step_lr", 2)
            low, high, value = scale * (1 - gamma) / unit, scale * (1 + gamma) / unit, value / unit
            raise ValueError(
                f"{op}: {name} must lie between {low:.4g} and {high:.4g} on this ladder, whose "
                f"smallest ratio of levels is {gamma:.4g}; "
                f"got {value:.4g}. Take more levels for a smaller step."
            )
    return e / scale


def beta(eta: float | Tensor, gamma: float) -> float | Tensor:
    """β = √(1 - ((1 - η)/γ)²)."""
    rest = 1 - ((1 - eta) / gamma) ** 2
    return rest.sqrt() if isinstance(rest, torch.Tensor) else math.sqrt(rest)


@without_gradients
def _consistent(run, x, sigmas, eta, denoise, start):
    last = len(sigmas) - 1
    for level in range(start, len(sigmas)):
        sigma = sigmas[level]
        x = run.projected(x, sigma, level)
        s = run.score(x, per_sample(sigma, x))
        if level < last:
            to = sigmas[level + 1]
            a = eta * sigma**2
            b = beta(eta, to / sigma) * (to * run.root_temperature)
            told = run.diagnose(x, s, a, b)
            x = run.noisy_update(x, s, a, b, level)
        else:
            to = 0.0
            a = (1.0 if denoise else eta) * sigma**2
            told = run.diagnose(x, s, a, 0.0)
            x = run.projected(noiseless_update(x, s, a), 0.0, level + 1)
        yield State(level, to, x, level + 1, told)
