"""What counts as a number: Python's, numpy's and, in a compiled graph, PyTorch's symbols.

Never True and False.
"""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch

from fastscore.messages import shown

RUN = 2**32   # updates of a run: beyond it the step of a noise key begins again
LEVELS = 2**24   # of a ladder
SIZE = 2**24   # channels, widths and classes; the dimensions of a sample may be more
DEPTH = 2**16
SQUARE = 1e18   # numbers up to here have a finite square in float32


def integer(
    op: str, name: str, value: Any, least: int, most: int | None = None, *, limit: int | None = None
) -> int:
    """The value as an int, checked to be one from least to most.

    Limit is what can be carried out.
    """
    if limit is not None and whole(value) and value > limit:
        raise ValueError(f"{op}: {name} must be an int of at most {limit}; got {shown(value)}.")
    if not whole(value) or value < least or (most is not None and value > most):
        bound = f"of at least {least}" if most is None else f"in {least}..{most}"
        raise ValueError(f"{op}: {name} must be an int {bound}; got {shown(value)}.")
    return plain_int(value)


def number(
    op: str,
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """The value as a float, checked to be finite with least <= value <= most and above < value <
    below.

    A tensor of one element that has a value is a number, too, unless it asks for a gradient, which
    would be lost.
    """
    if type(value) is float and least <= value <= most and above < value < below:
        return value   # infinities are not between above and below
    found = _plain(value)
    if found is None or not (least <= found <= most and above < found < below):
        raise ValueError(
            f"{op}: {name} must be a finite number{_bounds(found, least, most, above, below)}; got "
            f"{shown(value)}."
        )
    return found


def _plain(value):
    """Python's float of a number; None of anything else, and of what no float can hold."""
    if isinstance(value, torch.Tensor):
        strange = (
            value.numel() != 1 or value.is_meta or value.dtype == torch.bool or value.is_complex()
        )
        strange = strange or (value.requires_grad and torch.is_grad_enabled())
        value = None if strange else value.item()
    if not real(value):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _bounds(found, least, most, above, below):
    """What the number must be.

    Most, which is often a limit of what can be computed, where it is more.
    """
    closed = least > above
    if below < math.inf:
        return f" in {'[' if closed else '('}{max(least, above):g}, {below:g})"

    lower = (
        ""
        if max(least, above) == -math.inf
        else f" {'>=' if closed else '>'} {max(least, above):g}"
    )
    upper = (
        ""
        if found is None or not most < found < math.inf
        else f"{' and' if lower else ''} <= {most:g}"
    )
    return lower + upper


def offset(op: str, first_sample: Any, size: int) -> int:
    """first_sample · size, the element of the noise at which a part of a batch begins."""
    return integer(op, "first_sample", first_sample, 0, limit=(2**63 - 1) // max(size, 1)) * size


def choice(op: str, name: str, value: Any, known: Iterable[str]) -> None:
    """One of the words that are known."""
    if not named(value, known):
        raise ValueError(f"{op}: {name} must be one of {', '.join(known)}; got {shown(value)}.")


def named(value: Any, known: Iterable[str]) -> bool:
    """Whether value is one of the words, whatever it is.

    An array or a list could not even be compared.
    """
    return isinstance(value, str) and value in known


def function(op: str, name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{op}: {name} must be callable; got {shown(value)}.")


def whole(value: Any) -> bool:
    """Whether value is an integer."""
    # The first question is the quick one: every draw of noise asks.
    return type(value) is int or (
        isinstance(value, torch.SymInt | numbers.Integral) and not isinstance(value, bool)
    )


def plain_int(value: Any) -> int:
    """Python's int of what is `whole`: a numpy scalar wraps round and is no JSON.

    A compiled graph's symbol stays one.
    """
    return value if type(value) is int or isinstance(value, torch.SymInt) else int(value)


def real(value: Any) -> bool:
    """Whether value is a real number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
