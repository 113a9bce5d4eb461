"""Sliced score matching by finite differences."""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastscore import scalars
from fastscore.compiling import eagerly
from fastscore.dual.once import Once, moves
from fastscore.losses.projections import called, check_data, check_score, directions, observed
from fastscore.ops import checks


def finite_difference_sliced(
    score: Callable[..., Tensor],
    x: Tensor,
    *,
    projections: int = 1,
    variance_reduced: bool = True,
    distribution: str = "rademacher",
    v: Tensor | None = None,
    mask: Tensor | None = None,
    radius: float = 0.1,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    first_sample: int = 0,
) -> Tensor:
    """Sliced score matching from the score at x ± h v.

    Two evaluations, and no derivative of the network but the backward pass.

        L_b = 1/M Σ_m v_mᵀ(s₊ - s₋)/(2h) + ½ ‖(s₊ + s₋)/2‖²             variance reduced
        L_b = 1/M Σ_m v_mᵀ(s₊ - s₋)/(2h) + ½ (v_mᵀ(s₊ + s₋)/2)²         plain
        s± = s(x_b ± h v_m),    h = r/√d

    Central differences: s₊ - s₋ = 2h J v + O(h³) and s₊ + s₋ = 2 s + O(h²), so L is `sliced` at the
    same v up to O(h²). The plain form is d/r² times the paper's v'ᵀ(s₊ - s₋)/2 + (v'ᵀ(s₊ + s₋))²/8,
    v' = h v of length r. The factor makes the loss that of `sliced` instead of one that shrinks
    with d. Rounding grows as 1/h: below r ~ 1e-2 float32 loses more than the smaller step gains.

    Args:
        radius: r, the length of h v (exactly for signs and the sphere, on average for normals); at
            least the rounding of x's dtype, and no more than its square can bear. Everything else
            as in `sliced`; 2M evaluations of the score, which draw the same random numbers, and of
            which the first moves its state (running statistics, buffers, counters, what hooks
            note). Hooks run each time.

    Returns:
        (B,), float32 (float64 for float64), differentiable in x and the parameters of score.

    Raises:
        ValueError: a shape or value that does not fit. TypeError: x is no float tensor.

    Source: Pang et al. 2020 (arXiv:2007.03317). Its code differs: plain, it squares (s₊ + s₋) ⊙ v
        element by element, which is not (vᵀs)² but a sum without the cross terms; variance reduced,
        it fixes d = 3072 whatever the data.

    >>> finite_difference_sliced(lambda x: -x, torch.zeros(1, 3), seed=0)
    tensor([-3.])
    """
    op = "finite_difference_sliced"
    check_data(op, x, score)
    offset = scalars.offset(op, first_sample, x[:1].numel())
    v = directions(op, x, projections, distribution, v, mask, seed, step, offset)
    variance_reduced = checks.flag(op, "variance_reduced", variance_reduced)
    radius = checks.coefficient(op, "radius", radius, x, minimum=0)
    if not isinstance(radius, float) or radius == 0:
        raise ValueError(f"{op}: radius must be a number > 0; got {checks.shown(radius)}.")
    if radius < (least := torch.finfo(x.dtype).eps):  # x ± h v would be x
        raise ValueError(
            f"{op}: radius must be at least {least:.3g}, the rounding of {x.dtype}; got {radius}."
        )

    wide = torch.finfo(checks.compute_dtype(x.dtype)).max
    if radius > (most := min(torch.finfo(x.dtype).max / 2, math.sqrt(wide))):
        raise ValueError(
            f"{op}: radius must be at most {most:.3g}, or x ± h v or its square overflows; "
            f"got {radius}."
        )

    h = radius / math.sqrt(max(1, x[:1].numel()))
    if not torch.compiler.is_compiling():
        return _mean(op, score, x, v, mask, h, variance_reduced, Once(x.device, score))

    h = checks.in_graph(h, x)
    if moves(score):   # a graph cannot set the generators back
        return _eagerly(op, score, x, v, mask, h, variance_reduced)

    return _mean(op, score, x, v, mask, h, variance_reduced, contextlib.nullcontext())


@eagerly("the evaluations of a network that draws or remembers count as one, eagerly")
def _eagerly(op, score, x, *rest):
    return _mean(op, score, x, *rest, Once(x.device, score))


def _mean(op, score, x, v, mask, h, variance_reduced, once):
    if len(v) == 1:
        return _one(op, score, x, v[0], mask, h, variance_reduced, once)
    return torch.stack([_one(op, score, x, d, mask, h, variance_reduced, once) for d in v]).mean(0)


def _one(op, score, x, v, mask, h, variance_reduced, once):
    # The two differ in x alone: one draw, one state.
    step = h * v
    with once:
        plus = called(op, score, (x + step).to(x.dtype))
    with once:
        minus = called(op, score, (x - step).to(x.dtype))

    check_score(op, plus, x)

    dtype = checks.compute_dtype(x.dtype)
    plus, minus, v = (t if t.dtype == dtype else t.to(dtype) for t in (plus, minus, v))
    if mask is not None:
        plus = observed(plus, mask)
        minus = observed(minus, mask)

    trace = _dot(v, plus - minus) / (2 * h)
    middle = 0.5 * (plus + minus)
    if variance_reduced:
        return torch.add(trace, checks.per_sample_sum(middle.square()), alpha=0.5)

    return torch.add(trace, _dot(v, middle).square(), alpha=0.5)


def _dot(v, t):
    """(B, *) with (B, *) -> (B,)."""
    return checks.per_sample_sum(v * t)
