"""The C++ functions that go past PyTorch's dispatcher (csrc/door.cpp): they run a call that is
plain, and return None for any other.

`door` is there once the extension is loaded, for calls whose back end is already chosen as 'cpp';
`automatic` is the same, but None while anything asks for a back end. On a GPU they launch CUDA C++
or call Triton's launchers, once the automatic choice has said which; `served` has the door for a
back end that was chosen so.
"""

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

door: ModuleType | None = None
automatic: ModuleType | None = None
served: dict[str, Any] = {}

# The kinds of update, as in csrc/door.cpp.
UPDATE, LANGEVIN, PERTURB, TERMS = range(4)

# Devices, as DLPack numbers them.
CPU, CUDA = 1, 2

_lock = threading.Lock()
_allowed = False
_requests = 0  # of all threads: while one asks for a back end, all go the way that chooses


def opened(allowed: bool) -> None:
    """The extension is loaded; allowed says whether the environment leaves the choice open, or asks
    for 'cpp' anyway."""
    global door, _allowed
    try:
        module = importlib.import_module("fastscore._C")
        found = module if module.draw_seed and module.open(torch) else None
    except (ImportError, AttributeError):  # of an older build
        found = None
    with _lock:
        door, _allowed = found, allowed
        _update()


def serve_gpu(launchers: tuple[Callable, ...] | None, cuda: bool) -> None:
    """The automatic choice for a GPU has been made: CUDA C++ where it is built, with Triton's
    launchers for what it has not."""
    global served
    if door is None or not _allowed:
        return
    launches = door.launches() if cuda else 0
    door.serve(CUDA, launches, launchers)
    served = {"cuda": door} if launches else {"triton": door} if launchers else {}


@contextlib.contextmanager
def requested() -> Iterator[None]:
    """While somebody asks for a back end."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change):
    global _requests
    with _lock:
        _requests += change
        _update()


def _update():
    global automatic
    automatic = door if _allowed and not _requests else None
