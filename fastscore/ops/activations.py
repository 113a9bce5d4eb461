"""The activations that kernels know, in one table: for norms, networks and dual numbers."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """An activation f.

    code: its number in csrc/activation_cpu.h and kernels/activation.py.
    slopes: (f'(u), f''(u)) of u.
    """

    code: int
    function: Callable[[Tensor], Tensor]
    slopes: Callable[[Tensor], tuple[Tensor, Tensor]]


def _identity(u):
    return torch.ones_like(u), torch.zeros_like(u)


def _elu(u):
    e = u.clamp(max=0).exp()
    # At 0, where the second slope jumps, it is PyTorch's: that of u > 0.
    return torch.where(u >= 0, torch.ones_like(u), e), torch.where(u >= 0, torch.zeros_like(u), e)


def _silu(u):
    s = u.sigmoid()
    return s * (1 + u * (1 - s)), s * (1 - s) * (2 + u * (1 - 2 * s))


def _relu(u):
    # PyTorch's mask: 1 for NaN.
    return (~(u <= 0)).to(u.dtype), torch.zeros_like(u)


def _softplus(u):
    s = u.sigmoid()
    return s, s * (1 - s)


def _tanh(u):
    first = 1 - u.tanh().square()
    return first, -2 * u.tanh() * first


def _sigmoid(u):
    s = u.sigmoid()
    return s * (1 - s), s * (1 - s) * (1 - 2 * s)


def _gelu(u):
    # The density of ±8 is 5e-15, which float16 rounds to 0.
    v = _within(u, 40)
    density = (v.square() * -0.5).exp() / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(u * -math.sqrt(0.5)) + v * density, density * (2 - v.square())


def _gelu_tanh(u):
    """Of u s(z) with the sigmoid of z = A (u + B u³), u kept to where s is neither 0 nor 1."""
    a, b = math.sqrt(8 / math.pi), 0.044715
    u = _within(u, 30)
    z = a * (u + b * u**3)
    z1 = a * (1 + 3 * b * u.square())
    z2 = 6 * a * b * u

    s = z.sigmoid()
    below = (-z).sigmoid()  # 1 - s would cancel
    w = s * below
    return s + u * w * z1, 2 * w * z1 + u * w * (z2 + (1 - 2 * s) * z1.square())


def _within(u, end):
    """u within ±end, beyond which the slopes of a gelu are flat; a power of u overflows float16
    long before."""
    end = 8 if u.dtype == torch.float16 else end
    return u.clamp(-end, end)


ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation(0, lambda u: u, _identity),
    "elu": Activation(1, F.elu, _elu),
    "silu": Activation(2, F.silu, _silu),
    "relu": Activation(3, F.relu, _relu),
    "gelu": Activation(4, F.gelu, _gelu),
    "softplus": Activation(5, F.softplus, _softplus),
    "tanh": Activation(6, torch.tanh, _tanh),
    "sigmoid": Activation(7, torch.sigmoid, _sigmoid),
    "gelu_tanh": Activation(8, partial(F.gelu, approximate="tanh"), _gelu_tanh),
}

# Those that a norm may end with.
OF_NORMS = (None, "elu", "silu", "relu", "gelu", "softplus")


def times_slope(name: str | None, slope: Tensor, g: Tensor) -> Tensor:
    """f' g. A mask, as of ReLU, takes nothing from what it hides, even if that is not finite."""
    return torch.where(slope > 0, g, g.new_zeros(())) if name == "relu" else slope * g


def code_of(activation: str | None) -> int | None:
    """Its number where a norm may end with it; None for everything else."""
    named = activation is None or type(activation) is str
    return ACTIVATIONS[activation].code if named and activation in OF_NORMS else None
