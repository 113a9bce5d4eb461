"""Progress: a bar in a terminal, elsewhere a line now and then, so that no log is silent."""

import sys
import time
from types import TracebackType

from torch import Tensor

FIRST = 1.0   # seconds until the first line, or until the first step is done
EVERY = 10.0   # seconds between two lines
EVERY_IN_BAR = 0.2   # between two looks at the loss


class Progress:
    """Of a job of so many steps, on stderr.

    Args:
        name: of the job.
        total: number of its steps.
        unit: what a step is called.
        images: how many a step is worth, or None.
        shown: False on all processes but one.
    """

    def __init__(
        self, name: str, total: int, unit: str, *, images: float | None = None, shown: bool = True
    ) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.images = images
        self.done = 0
        self._bar = None
        self._shown = shown
        self._printed = 0
        self._first = None
        self._next = time.perf_counter() + FIRST

        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, desc=name)
            self._next = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, steps: int = 1) -> None:
        """So many steps are done since."""
        self.reach(self.done + steps)

    def reach(self, done: int, loss: float | Tensor | None = None) -> None:
        """So many steps are done in all; the last had this loss, which is read where it is told."""
        now = time.perf_counter()
        self.done = done
        if self._first is None:
            self._first = now, done
        if self._bar is not None:
            self._in_bar(loss, now)
        elif self._shown and (now >= self._next or (done == self.total and self._printed)):
            self._next = now + EVERY
            if self._printed != done:
                print(self._line(loss, now), file=sys.stderr, flush=True)
            self._printed = done

    def _in_bar(self, loss, now):
        self._bar.n = self.done
        # Nobody reads faster, and reading a loss waits for the GPU.
        if now < self._next and self.done < self.total:
            self._bar.update(0)
            return

        self._next = now + EVERY_IN_BAR
        told = {} if loss is None else {"loss": f"{loss:.3f}"}
        rate = self._rate(now)
        if rate and self.images is not None:
            told["images_per_s"] = _short(rate * self.images)
        if told:
            self._bar.set_postfix(told, refresh=False)
        self._bar.update(0)

    def _line(self, loss, now):
        told = [f"{self.name}: {self.unit} {self.done} of {self.total}"]
        if loss is not None:
            told.append(f"loss {loss:.3f}")
        rate = self._rate(now)
        if rate and self.images is not None:
            told.append(f"{_short(rate * self.images)} images/s")
        if rate:
            told.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join(told)

    def _rate(self, now):
        """Steps a second since the first, which may take longer than others; 0 until then."""
        begin, done = self._first
        return (self.done - done) / (now - begin) if now > begin else 0


def _short(rate):
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """A time in words: 8 s, 1 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
