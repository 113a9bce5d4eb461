"""PyTorch's operations whose own derivatives are wrong, missing or NaN somewhere.

The table of their compositions.

Dual numbers flow through them, and stock forward mode takes them in their stead (`RightForward`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from fastscore.dual import norms

FORMULAS: dict[Any, Any] = {}
HOLDERS = (torch.Tensor, torch, F, torch._C._nn, torch.special, torch.linalg)


def formula(*names: Any, holders: Any = HOLDERS) -> Any:
    """Register a composition under every function of that name."""

    def register(function):
        parameters = list(inspect.signature(function).parameters)
        spellings = _SPELLINGS | {
            other: parameters[0] for other in ("input", "A") if other not in parameters
        }

        @functools.wraps(function)
        def spelled(*args, **kwargs):
            return function(
                *args, **{spellings.get(key, key): argument for key, argument in kwargs.items()}
            )

        for name in names:
            for holder in holders:
                if hasattr(holder, name):
                    FORMULAS.setdefault(getattr(holder, name), spelled)

        return function

    return register


_SPELLINGS = {"axis": "dim", "keepdims": "keepdim"}   # numpy's, which torch takes


def refused(sentence: str) -> Any:
    def refuse(*args, **kwargs):
        raise NotImplementedError(f"fastscore.jvp: {sentence}.")

    return refuse


_BESSEL = """
    airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 modified_bessel_i0 modified_bessel_i1
    modified_bessel_k0 modified_bessel_k1 scaled_modified_bessel_k0 scaled_modified_bessel_k1
    spherical_bessel_j0
""".split()
_POLYNOMIALS = [
    *(f"{shifted}chebyshev_polynomial_{kind}" for shifted in ("", "shifted_") for kind in "tuvw"),
    *(
        "hermite_polynomial_h",
        "hermite_polynomial_he",
        "laguerre_polynomial_l",
        "legendre_polynomial_p",
    ),
]
WITHOUT_DERIVATIVE = {
    getattr(
        torch.special, name
    ): f"PyTorch counts torch.special.{name} as a constant; write it with its derivative"
    for name in (*_BESSEL, *_POLYNOMIALS)
    if hasattr(torch.special, name)
}
WITHOUT_DERIVATIVE |= {
    holder.as_strided_scatter: "PyTorch's gradient of as_strided_scatter is wrong; "
                               "write into a clone"
    for holder in (torch, torch.Tensor)
}


class RightForward(norms.RightNorms):
    """Inside, PyTorch's own derivatives are right through all of these, too."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in WITHOUT_DERIVATIVE and any(
            isinstance(a, torch.Tensor) and varies(a) for a in args
        ):
            refused(WITHOUT_DERIVATIVE[func])()
        if func in FORMULAS and kwargs.get("out") is None:
            result = FORMULAS[func](*args, **kwargs)
            if result is not NotImplemented:
                return result

        return super().__torch_function__(func, types, args, kwargs)


def varies(a: Any) -> Any:
    """Whether autograd, of either mode, follows this tensor."""
    return a.requires_grad or (
        forward_ad._current_level >= 0 and forward_ad.unpack_dual(a).tangent is not None
    )
