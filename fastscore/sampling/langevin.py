"""Langevin dynamics, plain and annealed."""

from collections.abc import Callable, Iterator

from torch import Tensor

from fastscore.sampling.run import (
    LARGEST,
    Ladder,
    State,
    begin,
    check_count,
    check_updates,
    epsilon,
    noiseless_update,
    number,
    per_sample,
    without_gradients,
)
from fastscore.schedules.ladders import check_ladder


def langevin(
    score: Callable[..., Tensor],
    x: Tensor,
    *,
    steps: int,
    step_size: float | Tensor | None = None,
    step_lr: float | Tensor | None = None,
    sigma: float | None = None,
    temperature: float = 1.0,
    project: Callable[..., Tensor] | None = None,
    diagnostics: bool = False,
    start: int = 0,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
) -> Iterator[State]:
    """Run unadjusted Langevin dynamics; yields a `State` after each step.

        x ← x + (ε/2) s(x) + √(T ε) z

    Args:
        score: called score(x), or score(x, sigma) with sigma (B,) if sigma is given. x: start, (B,
            *), not modified.
        steps: how many. step_size: ε > 0, a float, 0-d or (B,); or step_lr: NCSN's η = ε/2.
        sigma: the noise level at which a noise-conditional score is followed.
        temperature: T; with small ε the samples follow p^(1/T). On N(μ, v) the stationary variance
            is T v / (1 - ε/(4 v)).
        project: project(x, sigma, step) -> x, called before each call of the score and, with sigma
            0, after the last step.
        diagnostics: fill `State.diagnostics`: x_norm, score_norm and snr = √ε ‖s‖ / (2 √(T d)),
            each (B,).
        start: steps done already; x is the state after them.
        seed: of the run; first_sample: global number of x[0], so that splits of a batch agree.

    Raises:
        ValueError: steps is negative, start is not in 0..steps, ε is negative or not finite, or
            temperature is negative.

    Source: Song & Ermon 2019, equation 4 (arXiv:1907.05600).
    """
    op = "langevin"
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
    steps = check_updates(op, "steps", steps)
    start = check_count(op, "start", start, steps)
    each = ()
    if sigma is not None:
        sigma = number(op, "sigma", sigma, LARGEST)
        each = (per_sample(sigma, x),)
    e = epsilon(op, step_size, step_lr, x)
    return _langevin(run, x, start, steps, e, sigma or 0.0, each)


@without_gradients
def _langevin(run, x, start, steps, e, sigma, each):
    half, root = run.langevin_coefficients(e)
    for step in range(start, steps):
        x = run.projected(x, sigma, step)
        s = run.score(x, *each)
        told = run.diagnose(x, s, half, root)
        x = run.noisy_update(x, s, half, root, step)
        if step + 1 == steps:
            x = run.projected(x, 0.0, steps)
        yield State(0, sigma, x, step + 1, told)


def annealed_langevin(
    score: Callable[..., Tensor],
    x: Tensor,
    *,
    sigmas: Ladder,
    steps_per_level: int,
    step_size: float | Tensor | None = None,
    step_lr: float | Tensor | None = None,
    denoise: bool = True,
    temperature: float = 1.0,
    project: Callable[..., Tensor] | None = None,
    diagnostics: bool = False,
    every_step: bool = False,
    start: int = 0,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
) -> Iterator[State]:
    """Run annealed Langevin dynamics; yields a `State` after each noise level, and after the last
    denoise.

        ε_i = ε σ_i² / σ_L²
        n times: x ← x + (ε_i/2) s(x, σ_i) + √(T ε_i) z
        last, if asked: x ← x + σ_L² s(x, σ_L)

    Args:
        score: called score(x, sigma) with sigma (B,). x: start, (B, *), not modified.
        sigmas: descending ladder, (L,). steps_per_level: n.
        step_size: ε at the smallest level, a float, 0-d or (B,); or step_lr: NCSN's η = ε/2.
        denoise: take the last, noise-free step (NCSNv2 does, NCSN did not).
        temperature: T, scales the noise by √T and nothing else. For data N(μ, s²), with
            t = s² + σ_i² and a = 1 - ε_i/(2t), a level takes the variance V to
            a²ⁿ V + (1 - a²ⁿ) T t / (1 - ε_i/(4t)).
        project: project(x, sigma, step) -> x, called before each call of the score and, with sigma
            0, after the last update.
        diagnostics: fill `State.diagnostics`: x_norm, score_norm and snr = √ε_i ‖s‖ / (2 √(T d)) of
            the last step, each (B,).
        every_step: yield after each step, not only after each level.
        start: updates done already, `State.step`; x is the state after them.
        seed: of the run; first_sample: global number of x[0].

    Raises:
        ValueError: the ladder does not descend, a count is negative, start is beyond the end, ε is
            negative or not finite.

    Source: Song & Ermon 2019, Algorithm 1 (arXiv:1907.05600); last step: Jolicoeur-Martineau et al.
    2020 (arXiv:2009.05475).
    """
    op = "annealed_langevin"
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
    steps_per_level = check_updates(op, "steps_per_level", steps_per_level, len(sigmas))
    start = check_count(op, "start", start, len(sigmas) * steps_per_level + bool(denoise))
    return _annealed(
        run,
        x,
        sigmas,
        steps_per_level,
        epsilon(op, step_size, step_lr, x),
        denoise,
        every_step,
        start,
    )


@without_gradients
def _annealed(run, x, sigmas, n, e, denoise, every_step, start):
    end = len(sigmas) * n
    smallest = sigmas[-1]
    for level in range(start // n if n else len(sigmas), len(sigmas)):
        sigma = sigmas[level]
        each = per_sample(sigma, x)
        half, root = run.langevin_coefficients(e * (sigma / smallest) ** 2)
        for step in range(max(start, level * n), (level + 1) * n):
            shown = every_step or step + 1 == (level + 1) * n

            x = run.projected(x, sigma, step)
            s = run.score(x, each)
            told = run.diagnose(x, s, half, root) if shown else None
            x = run.noisy_update(x, s, half, root, step)

            if step + 1 == end and not denoise:
                x = run.projected(x, 0.0, end)
            if shown:
                yield State(level, sigma, x, step + 1, told)

    if denoise and start <= end:
        x = run.projected(x, smallest, end)
        s = run.score(x, per_sample(smallest, x))
        x = noiseless_update(x, s, smallest**2)
        yield State(len(sigmas), 0.0, run.projected(x, 0.0, end + 1), end + 1)
