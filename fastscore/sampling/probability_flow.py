"""The probability-flow ODE: the deterministic path with the same marginals as the noisy ones."""

import importlib.util
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastscore.ops import checks
from fastscore.sampling.run import (
    Ladder,
    State,
    begin,
    check_count,
    noiseless_update,
    number,
    per_sample,
    without_gradients,
)
from fastscore.scalars import choice
from fastscore.schedules.ladders import check_ladder

METHODS = ("heun", "euler", "adaptive")


def probability_flow(
    score: Callable[..., Tensor],
    x: Tensor,
    *,
    sigmas: Ladder,
    method: str = "heun",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    denoise: bool = True,
    project: Callable[..., Tensor] | None = None,
    diagnostics: bool = False,
    start: int = 0,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
) -> Iterator[State]:
    """Solve the probability-flow ODE down the ladder; yields a `State` after each level.

        dx/dσ = -σ s(x, σ) from σ_1 to σ_L;    last, if asked: x ← x + σ_L² s(x, σ_L)

    For data N(μ, s²) the exact end is μ + (x - μ) √((s² + σ_L²)/(s² + σ_1²)). Deterministic.

    Args:
        score: called score(x, sigma) with sigma (B,). x: start, (B, *), such as N(0, σ_1² I); not
            modified.
        sigmas: descending ladder, (L,): the steps of "heun" (second order, two calls) and "euler"
            (first order, one call), the points at which "adaptive" (Dormand-Prince 5(4) of
            torchdiffeq) reports.
        rtol, atol: of "adaptive", whose step sizes look at the whole batch: a sample depends on its
            batch mates within them.
        denoise: take the last step. project: project(x, sigma, step) -> x, called before each call
            of the score ("adaptive": before each level) and, with sigma 0, at the end; `step`
            counts levels.
        diagnostics: fill `State.diagnostics` with x_norm and score_norm, (B,). start: levels done
            already, `State.step`.
        seed, first_sample: for the same call as the other samplers; nothing is drawn here.

    Raises:
        ValueError: an unknown method, "adaptive" without torchdiffeq, tolerances negative, or start
            beyond the end.
        FloatingPointError: "adaptive" finds no step small enough.

    Source: Song et al. 2021, equation 13 (arXiv:2011.13456); Heun's method in σ: Karras et al. 2022
    (arXiv:2206.00364).
    """
    op = "probability_flow"
    seed = 0 if seed is None else seed  # of nothing that is drawn
    run = begin(
        op,
        score,
        x,
        temperature=1.0,
        project=project,
        diagnostics=diagnostics,
        seed=seed,
        first_sample=first_sample,
    )
    choice(op, "method", method, METHODS)
    if method == "adaptive" and importlib.util.find_spec("torchdiffeq") is None:
        raise ValueError(f"{op}: method adaptive needs torchdiffeq: pip install 'fastscore[ode]'.")
    sigmas = check_ladder(op, sigmas).tolist()
    start = check_count(op, "start", start, len(sigmas) - 1 + bool(denoise))
    solve = {
        "heun": _heun,
        "euler": _euler,
        "adaptive": _adaptive(number(op, "rtol", rtol), number(op, "atol", atol)),
    }[method]
    return _flow(run, x, sigmas, solve, denoise, start)


@without_gradients
def _flow(run, x, sigmas, solve, denoise, start):
    last = len(sigmas) - 1
    end = last + bool(denoise)
    for level in range(start, end):
        sigma = sigmas[level]
        to = sigmas[level + 1] if level < last else 0.0
        if level < last:
            x, s = solve(run, x, sigma, to, level)
        else:
            x = run.projected(x, sigma, level)
            s = run.score(x, per_sample(sigma, x))
            x = noiseless_update(x, s, sigma**2)
        if level + 1 == end:
            x = run.projected(x, 0.0, end)
        yield State(level, to, x, level + 1, None if s is None else run.norms(x, s))


def _euler(run, x, sigma, to, level):
    x = run.projected(x, sigma, level)
    s = run.score(x, per_sample(sigma, x))
    return noiseless_update(x, s, (sigma - to) * sigma), s


def _heun(run, x, sigma, to, level):
    h = sigma - to
    x = run.projected(x, sigma, level)
    s = run.score(x, per_sample(sigma, x))

    ahead = run.projected(noiseless_update(x, s, h * sigma), to, level)
    s2 = run.score(ahead, per_sample(to, x))

    x = noiseless_update(x, s, 0.5 * h * sigma)
    return noiseless_update(x, s2, 0.5 * h * to), s


def _adaptive(rtol, atol):
    def solve(run, x, sigma, to, level):
        from torchdiffeq import odeint

        # dx/d(log σ) = -σ² s. The solver's first guess may reach beyond the end, where σ itself
        # would be negative.
        def slope(t, x):
            each = t.exp().clamp(min=to).to(checks.compute_dtype(x.dtype)).expand(x.shape[0])
            s = run.score(x, each)
            return s * -checks.expand(each.square(), x).to(s.dtype)

        x = run.projected(x, sigma, level)
        if not x.numel():  # there is no error to control
            return x, None
        ends = torch.tensor([math.log(sigma), math.log(to)], dtype=torch.float64, device=x.device)
        options = {"step_t": ends[1:]}  # step onto the end instead of over it
        try:
            return odeint(slope, x, ends, rtol=rtol, atol=atol, method="dopri5", options=options)[
                1
            ], None
        except AssertionError as error:  # torchdiffeq's word for steps that shrink to nothing
            raise FloatingPointError(
                f"{run.op}: no step is small enough below σ = {sigma:g} ({error})."
            ) from None

    return solve
