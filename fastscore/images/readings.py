"""The words behind a file's name."""

import importlib.util
import math
import re
from pathlib import Path
from typing import NamedTuple

_WORDS = {
    "grey": ("channels", 1),
    "rgb": ("channels", 3),
    "channels-first": ("first", True),
    "channels-last": ("first", False),
    "on-white": ("background", 1.0),
    "on-black": ("background", 0.0),
    "by-folder": ("by_folder", True),
}


def need(module: str, package: str, what: str) -> None:
    """Refuse unless the module can be imported."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{what} {package}, which is not installed: pip install {package}.")


class Reading(NamedTuple):
    """What the words behind a file's name say; None where nothing is said."""

    channels: int | None = None
    first: bool | None = None
    white: float | None = None
    background: float | None = None
    size: tuple[int, int] | None = None
    by_folder: bool | None = None


def parse(source: str | Path) -> tuple[Path, Reading]:
    """The file, and how to read it.

    >>> parse("x.npz:channels-last:max=16")[1]
    Reading(channels=None, first=False, white=16.0, background=None, size=None, by_folder=None)
    """
    path, said = str(source), {}
    while True:
        rest, _, word = path.rpartition(":")
        if not rest or not (word in _WORDS or word.startswith(("max=", "size="))):
            return Path(path), Reading(**said)
        if word in _WORDS:
            name, value = _WORDS[word]
        elif word.startswith("max="):
            name, value = "white", _white(source, word)
        else:
            name, value = "size", _size(source, word)
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


def _size(source, word):
    found = re.fullmatch(r"size=(\d{1,4})(?:x(\d{1,4}))?", word, re.ASCII)
    sides = () if found is None else (int(found[1]), int(found[2] or found[1]))
    if not sides or 0 in sides:
        raise ValueError(f"{source}: size=N or size=HxW must be sides in pixels; got {word!r}.")
    return sides
