"""How the values of users stand in messages."""

import math


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
            return f"{shown(values)}: level {i}, {value:g}, does not lie below level {i - 1}, {values[i - 1]:g}"
    return shown(values)
