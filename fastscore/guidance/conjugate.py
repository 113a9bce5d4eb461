"""Conjugate gradients for a batch.

Each sample stops on its own, so that its result does not depend on the others.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ITERATIONS = 200


def conjugate_gradient(
    multiply: Callable[[Tensor], Tensor],
    r: Tensor,
    *,
    iterations: int = ITERATIONS,
    tolerance: float | None = None,
) -> Tensor:
    """Solve M v = r for each sample.

    Args:
        multiply: v -> M v, symmetric positive (semi-)definite, samples apart; constant: no
            derivative is taken with respect to it.
        r: (B, *). tolerance: on ‖M v - r‖ / ‖r‖; 10 rounding units of r's dtype unless given.

    Returns:
        v like r. Reverse mode of any order is exact (the derivative solves the same system);
        forward mode is refused by PyTorch.

    Source: Hestenes & Stiefel 1952.
    """
    tolerance = 10 * torch.finfo(r.dtype).eps if tolerance is None else tolerance
    return _Solve.apply(lambda r: _iterate(multiply, r, iterations, tolerance), r)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(solve, r):
        return solve(r)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.solve = inputs[0]

    @staticmethod
    def backward(ctx, g):
        return None, _Solve.apply(ctx.solve, g)   # M is symmetric


def _dot(a, b):
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.dim() - 1))


@torch.no_grad()
def _iterate(multiply, r, iterations, tolerance):
    v, p, rr = torch.zeros_like(r), r, _dot(r, r)
    goal = tolerance**2 * rr
    for count in range(iterations):
        running = rr > goal
        # seldom: the host waits for the device here.
        if count % 8 == 7 and not bool(running.any()):
            break
        q = multiply(p)
        curvature = _dot(p, q)
        running = running & (curvature > 0)   # a direction that M does not see, or rounding
        alpha = torch.where(running, rr / curvature, 0)
        v, r = v + alpha * p, r - alpha * q
        previous, rr = rr, torch.where(running, _dot(r, r), 0)   # 0: done
        p = r + torch.where(running, rr / previous, 0) * p

    return v
