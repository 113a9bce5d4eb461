"""How the values of users stand in messages."""


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
