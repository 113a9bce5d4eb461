"""Sliced score matching."""

from collections.abc import Callable

from torch import Tensor
from torch.compiler import is_compiling

from fastscore import scalars
from fastscore.losses.projections import check_data, sliced_estimate


def sliced(
    score: Callable[..., Tensor],
    x: Tensor,
    *,
    projections: int = 1,
    variance_reduced: bool = True,
    distribution: str = "rademacher",
    v: Tensor | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    first_sample: int = 0,
) -> Tensor:
    """Sliced score matching.

    The implicit Fisher divergence with its trace estimated along random directions.

        L_b = 1/M Σ_m v_mᵀ J v_m + ½ ‖s‖²                       variance reduced
        L_b = 1/M Σ_m v_mᵀ J v_m + ½ (v_mᵀ s)²                  plain
        s = s(x_b),    J = ∂s/∂x,    E[v vᵀ] = I

    Both have the expectation of `exact`. A Rademacher trace has variance 2(‖A‖² - Σ A_ii²), A = (J
    + Jᵀ)/2, which no distribution with independent entries undercuts; `variance_report` measures it
    on your network.

    Args:
        score: called score(x), or a `models.EnergyScore`. x: data, (B, *), any float dtype.
        projections: M. Cost: (1 + M) forward passes' worth of work, and their activations while
            gradients are wanted.
        distribution: of v, "rademacher" (signs), "gaussian" (standard normal) or "sphere" (of
            radius √d).
        v: directions (B, *) or (M, B, *) instead; the call is then deterministic and takes no seed.
        mask: like x, 1 where a coordinate was observed; the others are left out of v and s, and
            reach the score as they are.
        seed, step: of the directions, stream PROJECTION, substream m.
        first_sample: global number of x[0], so that splits of a batch agree.

    Returns:
        (B,), float32 (float64 for float64), differentiable in x and the parameters of score.

    Raises:
        ValueError: a shape or value that does not fit. TypeError: x is no float tensor.

    Source: Song et al. 2019, equations 7 and 8 (arXiv:1905.07088). Its code scales `sphere` to
        radius 1, which divides the loss by d.

    >>> import torch
    >>> sliced(lambda x: -x, torch.ones(1, 3), seed=0)
    tensor([-1.5000])
    """
    check_data("sliced", x, score)
    offset = 0
    if is_compiling() or type(first_sample) is not int or first_sample:
        offset = scalars.offset("sliced", first_sample, x[:1].numel())
    key = {"seed": seed, "step": step, "offset": offset}
    return sliced_estimate(
        "sliced", score, x, projections, variance_reduced, distribution, v, mask, **key
    )
