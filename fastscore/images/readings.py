"""The words behind a file's name."""

import math
from pathlib import Path
from typing import NamedTuple

_WORDS = {
    "grey": ("channels", 1),
    "rgb": ("channels", 3),
    "channels-first": ("first", True),
    "channels-last": ("first", False),
    "on-white": ("background", 1.0),
    "on-black": ("background", 0.0),
}


class Reading(NamedTuple):
    """What the words behind a file's name say; None where nothing is said."""

    channels: int | None = None
    first: bool | None = None
    white: float | None = None
    background: float | None = None


def parse(source: str | Path) -> tuple[Path, Reading]:
    """The file, and how to read it.

    >>> parse("x.npz:channels-last:max=16")[1]
    Reading(channels=None, first=False, white=16.0, background=None)
    """
    path, said = str(source), {}
    while True:
        rest, _, word = path.rpartition(":")
        if not rest or not (word in _WORDS or word.startswith("max=")):
            return Path(path), Reading(**said)
        name, value = _WORDS[word] if word in _WORDS else ("white", _white(source, word))
        if name in said:
            raise ValueError(f"{source} says two things about one, {word} among them.")
        path, said[name] = rest, value


def _white(source, word):
    try:
        white = float(word.removeprefix("max="))
    except ValueError:
        white = math.nan
    if not (white > 0 and math.isfinite(white)):
        raise ValueError(f"{source}: max=N must be a positive number; got {word!r}.")
    return white
