"""Signals that end a job as a wish, which a loop reads between its steps."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# What ends a job: Ctrl-C, a scheduler, a terminal that goes.
ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_HANGUP = getattr(signal, "SIGHUP", None)


class Stopped(KeyboardInterrupt):
    """A job was left between two of its steps because a signal asked for it."""


class Stop:
    """False until a signal has come; `status` is what to exit with then, 128 + its number."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def status(self) -> int:
        return 0 if self.signal is None else 128 + self.signal

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self:
            raise Stopped


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Within: SIGINT, SIGTERM and SIGHUP set the flag that is yielded, and do nothing else.

    A second one ends the process at once, as the system does it; under torchrun it does nothing,
    for torchrun passes on what a terminal or a scheduler has sent to all already, and ends who is
    not gone after 30 seconds. Signals that the parent ignores are heeded, for a script ignores
    SIGINT for what it starts in its background; only a SIGHUP that is ignored stays so, which is
    what `nohup` is for. Outside the main thread nothing is changed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    heeded = [s for s in ENDING if not (s == _HANGUP and signal.getsignal(s) == signal.SIG_IGN)]

    def handle(number, frame):
        if stop:
            return
        stop.signal = number
        for other in [] if "TORCHELASTIC_RUN_ID" in os.environ else heeded:
            signal.signal(other, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
