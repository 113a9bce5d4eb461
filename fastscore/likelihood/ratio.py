"""The ratio of two densities from a score alone: its line integral."""

import numpy as np
import torch

from fastscore.losses.projections import check_data, check_score
from fastscore.modes import evaluated
from fastscore.ops import checks

_OP = "log_ratio"


def log_ratio(score, x0, x1, *, sigma=None, nodes=16, chunk=16, return_error=False):
    """Compute log p(x1) - log p(x0), which needs no normalisation, by Gauss-Legendre quadrature along the straight line.

        log p(x1)/p(x0) = ∫₀¹ s(x0 + t (x1 - x0))ᵀ (x1 - x0) dt ≈ Σ_i w_i s(x0 + t_i (x1 - x0))ᵀ (x1 - x0)

    Exact for a score whose every component along the line is a polynomial in t of degree below twice the nodes.

    Args:
        score: called score(x), or score(x, sigma) with sigma (B,) where sigma is given; the ratio is then of p_σ.
        x0, x1: (B, *), any float dtype.
        sigma: a float, 0-d or (B,). nodes: n. chunk: how many nodes go through the network together.
        return_error: also estimate the error, (B,): the distance to the rule of ⌈n/2⌉ nodes, which takes half as many calls more.

    Returns:
        (B,) nats, float32 (float64 for float64), differentiable in x0, x1 and the parameters of score; with return_error a pair.

    Raises:
        ValueError: x0 and x1 differ in shape, or an argument is out of range. TypeError: no float tensors.

    The networks that score holds run in evaluation mode, as in `log_density`.

    The ratio belongs to a density only if the score is a gradient. A network's is not quite (a `models.EnergyScore` is): then the value
    depends on the path, another path gives another value, and ratios along the sides of a triangle do not sum to zero. A line that crosses
    regions without data collects the errors of the score there; at a larger σ there are fewer.

    Source: the fundamental theorem of calculus along a line.

    >>> log_ratio(lambda x: -x, torch.zeros(1, 2), torch.ones(1, 2))
    tensor([-1.])
    """
    check_data(_OP, x0)
    checks.check_like(_OP, "x1", x1, x0, of="x0")
    nodes = checks.integer(_OP, "nodes", nodes, 2 if return_error else 1)
    chunk = checks.integer(_OP, "chunk", chunk, 1)
    arguments = () if sigma is None else (_each(sigma, x0),)
    score = evaluated(score)
    value = _quadrature(score, x0, x1, arguments, nodes, chunk)
    if not return_error:
        return value
    coarse = _quadrature(score, x0, x1, arguments, (nodes + 1) // 2, chunk)
    return value, (value - coarse).abs()


def _quadrature(score, x0, x1, arguments, nodes, chunk):
    points, weights = np.polynomial.legendre.leggauss(nodes)   # on [-1, 1]
    dtype, total = checks.compute_dtype(x0.dtype), 0
    direction = x1.to(dtype) - x0.to(dtype)
    for first in range(0, nodes, chunk):
        t, w = (torch.tensor(a[first : first + chunk] / 2, dtype=dtype, device=x0.device) for a in (points + 1, weights))
        x = (x0.to(dtype) + t.reshape(-1, *[1] * x0.dim()) * direction).to(x0.dtype).flatten(0, 1)   # (n B, *)
        s = score(x, *(a.repeat(len(t)) for a in arguments))
        check_score(_OP, s, x)
        slopes = checks.per_sample_sum(s.to(dtype) * direction.repeat(len(t), *[1] * (x.dim() - 1)))
        total = total + w @ slopes.view(len(t), len(x0))
    return total


def _each(sigma, x):
    """σ as (B,)."""
    sigma = checks.coefficient(_OP, "sigma", sigma, x, minimum=0)
    return torch.as_tensor(sigma, dtype=checks.compute_dtype(x.dtype), device=x.device).expand(len(x))
