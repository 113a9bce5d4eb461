"""How noisy the sliced estimators are on a given network, and how many projections are worth
their cost."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastscore import random
from fastscore.dual.once import Once
from fastscore.losses.projections import (
    DISTRIBUTIONS,
    check_data,
    check_score,
    derivatives,
    directions,
    reduce,
)
from fastscore.ops import checks


class Estimator(NamedTuple):
    """One row: the mean loss, the variance that one projection adds to a sample's loss, and the
    variance of the exact loss over samples."""

    distribution: str
    variance_reduced: bool
    mean: float
    projection_variance: float
    data_variance: float
    standard_errors: tuple[float, ...]


class VarianceReport(NamedTuple):
    samples: int
    draws: int
    projections: tuple[int, ...]
    rows: tuple[Estimator, ...]

    def __str__(self) -> str:
        numbers = "".join(f"{f'M = {m}':>11}" for m in self.projections)
        lines = [
            f"Variance of one sample's loss, from the direction and from the data ({self.draws} "
            "directions per distribution), and the",
            f"standard error of the mean over {self.samples} samples with M projections:",
            f"{'distribution':<12} {'form':<17}{'mean':>11}{'projection':>12}{'data':>11}{numbers}",
        ]
        for r in self.rows:
            errors = "".join(f"{e:>11.4g}" for e in r.standard_errors)
            form = "variance reduced" if r.variance_reduced else "plain"
            lines.append(
                f"{r.distribution:<12} {form:<17}{r.mean:>11.4g}"
                f"{r.projection_variance:>12.4g}{r.data_variance:>11.4g}{errors}"
            )

        return "\n".join(lines)


@torch.no_grad()
def variance_report(
    score: Callable[..., Tensor],
    x: Tensor,
    *,
    projections: Iterable[int] = (1, 2, 4, 8),
    draws: int = 64,
    seed: int | Tensor | None = None,
) -> VarianceReport:
    """Measure the variance of every sliced estimator on a network, and predict its standard error.

        w = mean_b var_m L_b(v_m),    u = var_b mean_m L_b(v_m) - w/draws,
        standard error(M) = √((u + w/M) / B)

    w comes from the directions and falls with M; u comes from the data and does not: an M beyond
    w/u buys little.

    Args:
        score: called score(x), or a `models.EnergyScore`. x: data, (B, *) with B >= 2.
        projections: the values of M to predict for. draws: directions measured per distribution, at
            least 2, one at a time.
        seed: of the directions.

    Returns:
        VarianceReport(samples, draws, projections, rows), six rows: three distributions, plain and
        variance reduced. print() it.

    Raises:
        ValueError: fewer than two samples or draws, or a projection number below 1.
    """
    op, given = "variance_report", projections
    draws = checks.integer(op, "draws", draws, 2, 65536)
    projections = (
        tuple(projections)
        if isinstance(projections, Iterable) and not isinstance(projections, torch.Tensor)
        else ()
    )
    if not projections or any(not checks.whole(m) or m < 1 for m in projections):
        raise ValueError(
            f"{op}: projections must be ints of at least 1; got {checks.shown(given)}."
        )

    projections = tuple(map(checks.plain_int, projections))
    check_data(op, x, score)
    if x.is_meta:
        raise ValueError(f"{op}: x must have values to measure; got a tensor on meta.")
    if len(x) < 2:
        raise ValueError(f"{op}: x must hold at least 2 samples.")

    seed = random.draw_seed() if seed is None else seed
    rows = []
    once = Once(x.device, score)
    for distribution in DISTRIBUTIONS:
        v = directions(op, x, draws, distribution, seed=seed)
        measured = []
        for d in v:
            with once:   # the directions alone differ
                measured.append(_both(op, score, x, d[None]))
        for form, variance_reduced in enumerate((False, True)):
            losses = torch.stack([m[form] for m in measured]).double()   # (draws, B)
            rows.append(_row(losses, distribution, variance_reduced, projections))

    return VarianceReport(len(x), draws, projections, tuple(rows))


def _both(op, score, x, v):
    s, js = derivatives(op, score, x, v)
    check_score(op, s, x)
    return [sum(reduce(s, js, v, variance_reduced=form))[0] for form in (False, True)]


def _row(losses, distribution, variance_reduced, projections):
    draws, samples = losses.shape
    w = float(losses.var(0).mean())
    u = max(0.0, float(losses.mean(0).var()) - w / draws)
    errors = tuple(math.sqrt((u + w / m) / samples) for m in projections)
    return Estimator(distribution, variance_reduced, float(losses.mean()), w, u, errors)
