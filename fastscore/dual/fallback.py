"""What is said when a function leaves the stacked path."""

import sys
import traceback
import warnings
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parents[1]
_OWN = (
    *(str(_LIBRARY / part) for part in ("dual", "losses", "likelihood", "ops")),
    str(Path(torch.__file__).parent),
    "<frozen",
)


class FallbackWarning(UserWarning):
    """A function could not be carried through with its tangents.

    It was called again on a slower path.

    The message names the operation and its line. `warnings.filterwarnings("error",
    category=fastscore.FallbackWarning)` makes it an error.
    """


def warn(error: Exception) -> None:
    """Say once for each line of the user's what made a function fall back."""
    frame, line = _place(error)
    what = str(error).rstrip(".")
    message = (
        f"{what} ({frame.f_code.co_filename}:{line}). "
        "f is called again on a slower path: double backprop, or stock forward mode."
    )
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    name = frame.f_globals.get("__name__", "")
    warnings.warn_explicit(message, FallbackWarning, frame.f_code.co_filename, line, name, registry)


def _place(error):
    """The innermost frame that is neither ours nor torch's.

    Where the operation stands, or else where we were called.
    """
    inside = [
        (frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _theirs(frame)
    ]
    if inside:
        return inside[-1]
    frame = sys._getframe()
    while frame.f_back is not None and not _theirs(frame):
        frame = frame.f_back
    return frame, frame.f_lineno


def _theirs(frame):
    return not frame.f_code.co_filename.startswith(_OWN)
