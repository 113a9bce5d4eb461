"""The ratio of two densities from a score alone: its line integral."""

import warnings
from collections.abc import Callable
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from fastscore.losses.projections import check_data, check_score
from fastscore.modes import evaluated
from fastscore.ops import checks
from fastscore.sampling.run import number
from fastscore.scalars import function
from fastscore.tensors import fake

_OP = "log_ratio"
NODES = 4096   # of a rule, which numpy builds in seconds
# Nodes of the first rule and of the last one, where their number is not given.
FIRST, CAP = 16, 256


@overload
def log_ratio(
    score: Callable[..., Tensor],
    x0: Tensor,
    x1: Tensor,
    *,
    sigma: float | Tensor | None = None,
    nodes: int | None = None,
    chunk: int = 16,
    atol: float = 0.01,
    return_error: Literal[False] = False,
) -> Tensor: ...


@overload
def log_ratio(
    score: Callable[..., Tensor],
    x0: Tensor,
    x1: Tensor,
    *,
    sigma: float | Tensor | None = None,
    nodes: int | None = None,
    chunk: int = 16,
    atol: float = 0.01,
    return_error: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def log_ratio(
    score: Callable[..., Tensor],
    x0: Tensor,
    x1: Tensor,
    *,
    sigma: float | Tensor | None = None,
    nodes: int | None = None,
    chunk: int = 16,
    atol: float = 0.01,
    return_error: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute log p(x1) - log p(x0), which needs no normalisation, by Gauss-Legendre quadrature
    along the straight line.

        log p(x1)/p(x0) = ∫₀¹ s(x0 + t (x1 - x0))ᵀ (x1 - x0) dt ≈ Σ_i w_i s(x0 + t_i (x1 - x0))ᵀ (x1
        - x0)

    Exact for a score whose every component along the line is a polynomial in t of degree below
    twice the nodes. A sample begins with 16 nodes, which double, up to 256, until its estimated
    error is at most atol.

    The estimate costs no call: it is the largest of the last quarter of the Legendre coefficients
    of the slopes sᵀ(x1 - x0) along the line. It is far above the error where the slopes are smooth,
    and of its size where they jump or bend.

    Args:
        score: called score(x), or score(x, sigma) with sigma (B,) where sigma is given; the ratio
            is then of p_σ.
        x0, x1: (B, *), any float dtype.
        sigma: a float, 0-d or (B,). nodes: n, for every sample and without a look at the error;
            None doubles them as above, for which the host reads the estimates, and score is called
            on those samples alone that need more.
        chunk: how many nodes go through the network together.
        atol: in nats; where the rounding of the scores, 4 eps ‖s‖ ‖x1 - x0‖, is more, that counts.
        return_error: also return the estimate, (B,).

    Returns:
        (B,) nats, float32 (float64 for float64), differentiable in x0, x1 and the parameters of
        score; with return_error a pair.

    Warns where 256 nodes were too few, unless return_error hands the estimates over or nodes are
    given.

    Raises:
        ValueError: x0 and x1 differ in shape, or an argument is out of range. TypeError: no float
            tensors.

    The networks that score holds run in evaluation mode, as in `log_density`.

    The ratio belongs to a density only if the score is a gradient. A network's is not quite (a
    `models.EnergyScore` is): then the value depends on the path, another path gives another value,
    and ratios along the sides of a triangle do not sum to zero. A line that crosses regions without
    data collects the errors of the score there; at a larger σ there are fewer.

    Source: the fundamental theorem of calculus along a line.

    >>> log_ratio(lambda x: -x, torch.zeros(1, 2), torch.ones(1, 2))
    tensor([-1.])
    """
    function(_OP, "score", score)
    check_data(_OP, x0)
    checks.check_like(_OP, "x1", x1, x0, of="x0")
    least = 2 if return_error else 1
    chunk = checks.integer(_OP, "chunk", chunk, 1)
    atol = number(_OP, "atol", atol)
    sigma = None if sigma is None else _each(sigma, x0)
    score = evaluated(score)
    if nodes is None:
        value, error = _adaptive(score, x0, x1, sigma, chunk, atol, told=return_error)
    else:
        value, error, _ = _quadrature(
            score, x0, x1, sigma, checks.integer(_OP, "nodes", nodes, least, limit=NODES), chunk
        )

    return (value, error) if return_error else value


def _adaptive(score, x0, x1, sigma, chunk, atol, told):
    """Double the nodes of those samples whose estimate is above the tolerance."""
    value, error, rounding = _quadrature(score, x0, x1, sigma, FIRST, chunk)
    if x0.is_meta or fake(x0):
        return value, error
    if torch._C._functorch.is_batchedtensor(error):
        raise ValueError(
            f"{_OP}: nodes must be given under torch.func.vmap, where no estimate can be read."
        )

    tolerance, nodes = rounding.clamp(min=atol), FIRST
    rest = (error > tolerance).nonzero()[:, 0]
    while len(rest) and nodes < CAP:
        nodes *= 2
        each = None if sigma is None else sigma[rest]
        finer, left, _ = _quadrature(score, x0[rest], x1[rest], each, nodes, chunk)
        value = value.index_copy(0, rest, finer)
        error = error.index_copy(0, rest, left)
        rest = rest[left > tolerance[rest]]

    lost = int(value.isfinite().logical_not().sum())
    if lost:
        warnings.warn(
            f"{_OP}: {lost} of {len(x0)} ratios are not finite; look at the score between their "
            "points.",
            stacklevel=3,
        )
    if len(rest) and not told:
        _warn(len(rest), len(x0), float(error.max()))

    return value, error


def _warn(rest, batch, error):
    warnings.warn(
        f"{_OP}: {rest} of {batch} ratios may be off, the worst by {error:.2g} nats, after {CAP} "
        "nodes; the points are far apart for this "
        "score: raise nodes, or sigma, or look at return_error=True.",
        stacklevel=4,
    )


def _quadrature(score, x0, x1, sigma, nodes, chunk):
    """The rule of so many nodes, the estimate of its error and the rounding of the scores, each
    (B,)."""
    points, weights = np.polynomial.legendre.leggauss(nodes)   # on [-1, 1]
    dtype = checks.compute_dtype(x0.dtype)
    direction = x1.to(dtype) - x0.to(dtype)
    slopes, norms, eps = [], 0, 0.0
    for first in range(0, nodes, chunk):
        t = _tensor(points[first : first + chunk] / 2 + 0.5, direction)
        # (n B, *).
        x = (x0.to(dtype) + t.reshape(-1, *[1] * x0.dim()) * direction).to(x0.dtype).flatten(0, 1)
        s = score(x) if sigma is None else score(x, sigma.repeat(len(t)))
        check_score(_OP, s, x)
        eps = max(torch.finfo(x.dtype).eps, torch.finfo(s.dtype).eps)
        s = s.to(dtype)
        along = checks.per_sample_sum(s * direction.repeat(len(t), *[1] * (x.dim() - 1)))
        slopes.append(along.view(len(t), len(x0)))
        norms = norms + _norm(s).view(len(t), len(x0)).sum(0)

    slopes = torch.cat(slopes)
    value = _tensor(weights / 2, direction) @ slopes
    return (
        value,
        _tail(slopes.detach(), points, weights),
        4 * eps * norms / nodes * _norm(direction),
    )


def _tail(slopes, points, weights):
    """The largest of the last quarter, at least two, of the slopes' Legendre coefficients c_k =
    (k + ½) Σ w g P_k, without c_0."""
    n = len(points)
    degrees = np.arange(max(1, n - max(2, n // 4)), n)
    if not len(degrees):
        return torch.full_like(slopes[0], torch.inf)

    polynomials = np.polynomial.legendre.legvander(points, n - 1)[:, degrees]
    return (
        (_tensor((polynomials * weights[:, None]).T * (degrees[:, None] + 0.5), slopes) @ slopes)
        .abs()
        .amax(0)
    )


def _norm(t):
    return torch.linalg.vector_norm(
        t.detach().flatten(1) if t.dim() > 1 else t.detach()[:, None], dim=1
    )


def _tensor(values, like):
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _each(sigma, x):
    """σ as (B,)."""
    sigma = checks.coefficient(_OP, "sigma", sigma, x, minimum=0)
    return torch.as_tensor(sigma, dtype=checks.compute_dtype(x.dtype), device=x.device).expand(
        len(x)
    )
