"""Which samples each step takes, and how they are there when it comes."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastscore import random
from fastscore.datasets.source import Source

BATCHES = 1024   # the stream that picks each step's samples
_AHEAD = 2


def chosen(
    n: int, batch_size: int, *, seed: int, step: int, first: int = 0, count: int | None = None
) -> Tensor:
    """Numbers first .. first + count - 1 of the global batch of a step, from n samples: int64.

    They are a function of the seed and the step: a resumed run, and one of any number of processes,
    sees what the whole one would.
    """
    count = batch_size - first if count is None else count
    w = random.words(count, seed=seed, step=step, stream=BATCHES, offset=first)
    return (w * n) >> 32


def batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    steps: int,
    first_step: int = 0,
    first: int = 0,
    count: int | None = None,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(step, samples, labels or None) of each step, drawn from the source with replacement.

    first, count: the part of the global batch that is wanted; all of it unless given. Samples that
    do not lie in memory are read one step ahead, by a thread that ends with the generator; what it
    raises is raised here.
    """

    def all_steps():
        for step in range(first_step, steps):
            part = chosen(len(source), batch_size, seed=seed, step=step, first=first, count=count)
            labels = None if source.labels is None else source.labels[part]
            yield step, source.read(part), labels

    return all_steps() if source.in_memory else ahead(all_steps())


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, of which the next two are made by a thread while the last is used."""
    ready: queue.Queue = queue.Queue(_AHEAD)
    stop = threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work():
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((None, StopIteration()))
        # Raised again where the items are used.
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, name="fastscore: batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
