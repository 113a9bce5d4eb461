"""How values stand in messages, and objects where they are printed."""

import inspect
import math
from typing import TypeVar

import torch

C = TypeVar("C", bound=type)


def shown(value: object) -> str:
    """A value as it stands in a message: on one line, of at most 80 characters.

    >>> shown(0.5), shown(10**400)
    ('0.5', 'an int of 1329 bits')
    """
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an int of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception:   # of the value's own repr
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def shown_ladder(values: list[float]) -> str:
    """A ladder that does not descend: its values where they are few, and where it goes wrong.

    >>> shown_ladder([1.0, 0.5, 0.5])
    '[1.0, 0.5, 0.5]: level 2, 0.5, does not lie below level 1, 0.5'
    """
    for i, value in enumerate(values):
        if not 0 < value < math.inf:
            return f"{shown(values)}: level {i} is {value:g}"
        if i and not value < values[i - 1]:
            above = f"level {i - 1}, {values[i - 1]:g}"
            return f"{shown(values)}: level {i}, {value:g}, does not lie below {above}"
    return shown(values)


def brief(value: object) -> str:
    """A value as it stands inside a printed object.

    A tensor by dtype and shape, a module or a function by its name.

    >>> brief(torch.zeros(3, 2)), brief(torch.nn.Linear(2, 2)), brief(0.5)
    ('float32 (3, 2)', 'Linear', '0.5')
    """
    if isinstance(value, torch.Tensor):
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{place}"
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {brief(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(brief, value)) + ")"

    return getattr(value, "__qualname__", None) or shown(value)


def printed(cls: C) -> C:
    """A class decorator: objects print as their name and what they were made of, each in brief."""
    cls.__repr__ = _printed
    return cls


def _printed(self):
    names = inspect.signature(type(self)).parameters
    parts = (
        f"{name}={brief(getattr(self, name))}"
        for name in names
        if getattr(self, name, None) is not None
    )
    return f"{type(self).__name__.lstrip('_')}({', '.join(parts)})"
