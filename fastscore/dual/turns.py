"""Threads that compute with the same numbers take turns.

Autograd keeps one history for all slices of a tensor, and of two threads that write into slices of
one at the same time it loses one, in silence.
"""

import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

_OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class Turns:
    """The lock under which threads compute, one operation after another, once f has workers.

    Until then the thread that f runs in takes no lock: it costs more than the smallest operations
    may.
    """

    lock: Any
    thread: int
    shared: bool

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.thread = threading.get_ident()
        self.shared = False
        self._opening = threading.Lock()

    def share(self) -> None:
        """For a worker: all threads take turns from now on."""
        with self._opening:
            if not self.shared:
                self.shared = True
                self.announce()
                while _computes_alone(sys._current_frames().get(self.thread)):
                    time.sleep(0)   # an operation that began without the lock

    def announce(self) -> None:
        """What f's thread is to see as soon as there are turns."""

    def turn(self) -> Any:
        return self.lock if self.shared else contextlib.nullcontext()


def _computes_alone(frame):
    """Whether a thread stands in an operation that it began without a turn, and not in what f gave
    to one."""
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        name, frame = frame.f_code.co_name, frame.f_back
        if name.startswith("carried") and frame.f_code.co_name == "__torch_function__":
            return True
    return False
