"""Integrate the probability flow from σ_min to σ_max, in log σ.

Own Runge-Kutta steps on a grid, or torchdiffeq's adaptive ones.

A right-hand side is rhs(x, sigma) -> (dx/d log σ like x, dℓ/d log σ (B,)), with sigma a float or a
0-d tensor. The density flow is smooth in log σ: for Gaussian data the speed is σ²/(s² + σ²) x, a
sigmoid, where dx/dσ spans the whole range of σ.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# rhs(x, sigma), with sigma a float or a 0-d tensor: dx/d log σ like x, and dℓ/d log σ (B,).
RightHandSide = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


def heun(rhs: RightHandSide, x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """One step of order 2 from σ = a to b; calls rhs at the two ends only.

    Returns x(b) and the change of ℓ.
    """
    h = math.log(b / a)
    k1, l1 = rhs(x, a)
    k2, l2 = rhs(x + h * k1, b)
    return x + h / 2 * (k1 + k2), h / 2 * (l1 + l2)


def rk4(rhs: RightHandSide, x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """One step of the classical method of order 4.

    Calls rhs at the ends and at their geometric mean.
    """
    h, middle = math.log(b / a), math.sqrt(a * b)
    k1, l1 = rhs(x, a)
    k2, l2 = rhs(x + h / 2 * k1, middle)
    k3, l3 = rhs(x + h / 2 * k2, middle)
    k4, l4 = rhs(x + h * k3, b)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), h / 6 * (l1 + 2 * l2 + 2 * l3 + l4)


FIXED = {"heun": heun, "rk4": rk4}


def fixed(
    rhs: RightHandSide, x: Tensor, sigmas: Sequence[float], method: str
) -> tuple[Tensor, Tensor]:
    """x at the last of the ascending σ, and the change of ℓ on the way, (B,)."""
    total = 0
    for a, b in zip(sigmas, sigmas[1:]):
        x, change = FIXED[method](rhs, x, a, b)
        total = total + change
    return x, total


def adaptive(
    op: str,
    rhs: RightHandSide,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    method: str,
    atol: float,
    rtol: float,
) -> tuple[Tensor, Tensor]:
    """The same with error control.

    Every sample's x, in the root mean square, and ℓ within atol + rtol |.|.
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise ImportError(
            f"{op}: adaptive steps need torchdiffeq, which is not installed: pip install "
            "'fastscore[ode]', or give steps=64."
        ) from None

    def worst_sample(state):
        dx, dl = state
        return torch.maximum(dx.reshape(len(dx), -1).square().mean(1).sqrt(), dl.abs()).max()

    times = torch.tensor(
        [math.log(sigma_min), math.log(sigma_max)], dtype=torch.float64, device=x.device
    )
    start = x, x.new_zeros(len(x))
    options = {
        "method": method,
        "atol": atol,
        "rtol": rtol,
        "options": {"norm": worst_sample, "step_t": times[1:]},
    }
    try:
        xs, totals = odeint(lambda u, state: rhs(state[0], u.exp()), start, times, **options)
    except AssertionError as error:  # torchdiffeq's way to say that a step became NaN or too small
        raise FloatingPointError(
            f"{op}: the adaptive solver stopped ({error}); look at the score, or give steps=64."
        ) from error

    return xs[-1], totals[-1]
