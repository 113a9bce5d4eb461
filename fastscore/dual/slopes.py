"""Pointwise functions by their first and second derivatives.

One table for dual numbers and for jets.
"""

import math
from collections.abc import Callable

import torch

# {name: (f'(x), f''(x))}, each from x, y = f(x) and, for the second, f'; None stands for 0.
SLOPES: dict[str, tuple[Callable, Callable | None]] = {
    "exp": (lambda x, y: y, lambda x, y, d: y),
    "expm1": (lambda x, y: y + 1, lambda x, y, d: d),
    "log": (lambda x, y: 1 / x, lambda x, y, d: -1 / x.square()),
    "log1p": (lambda x, y: 1 / (x + 1), lambda x, y, d: -1 / (x + 1).square()),
    "sqrt": (lambda x, y: 0.5 / y, lambda x, y, d: -0.25 / (x * y)),
    "rsqrt": (lambda x, y: -0.5 * y / x, lambda x, y, d: 0.75 * y / x.square()),
    "square": (lambda x, y: 2 * x, lambda x, y, d: 2),
    "reciprocal": (lambda x, y: -y.square(), lambda x, y, d: 2 * y**3),
    "sin": (lambda x, y: x.cos(), lambda x, y, d: -y),
    "cos": (lambda x, y: -x.sin(), lambda x, y, d: -y),
    "sinh": (lambda x, y: x.cosh(), lambda x, y, d: y),
    "cosh": (lambda x, y: x.sinh(), lambda x, y, d: y),
    "abs": (lambda x, y: x.sgn(), None),
    "erf": (
        lambda x, y: (2 / math.sqrt(math.pi)) * (-x.square()).exp(),
        lambda x, y, d: -2 * x * d,
    ),
    "logsigmoid": (lambda x, y: (-x).sigmoid(), lambda x, y, d: -x.sigmoid() * d),
}


def function_of(name: str) -> Callable:
    return getattr(torch, name, None) or getattr(torch.nn.functional, name)
