"""What counts as a number: Python's, numpy's and, in a compiled graph, PyTorch's symbols; never True and False."""

import numbers
from typing import Any

import torch

from fastscore.messages import shown


def integer(op: str, name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as an int, checked to be one from least to most."""
    if not whole(value) or value < least or (most is not None and value > most):
        bound = f"of at least {least}" if most is None else f"in {least}..{most}"
        raise ValueError(f"{op}: {name} must be an int {bound}; got {shown(value)}.")
    return plain_int(value)


def whole(value: Any) -> bool:
    """Whether value is an integer."""
    # The first question is the quick one: every draw of noise asks.
    return type(value) is int or (isinstance(value, torch.SymInt | numbers.Integral) and not isinstance(value, bool))


def plain_int(value: Any) -> int:
    """Python's int of what is `whole`: a numpy scalar wraps round and is no JSON; a compiled graph's symbol stays one."""
    return value if type(value) is int or isinstance(value, torch.SymInt) else int(value)


def real(value: Any) -> bool:
    """Whether value is a real number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
