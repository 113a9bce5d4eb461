"""Which samples each step takes, and how they are there when it comes."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastscore import random
from fastscore.datasets.source import Source
from fastscore.messages import shown
from fastscore.scalars import RUN, integer

BATCHES = 1024   # the stream that picks each step's samples
_AHEAD = 2


def chosen(
    n: int,
    batch_size: int,
    *,
    seed: int | Tensor,
    step: int,
    first_sample: int = 0,
    count: int | None = None,
) -> Tensor:
    """Numbers first_sample .. first_sample + count - 1 of the batch of a step, drawn from n samples
    with replacement: int64 (count,).

        i_b = (w_b n) >> 32,    w of stream 1024
    """
    count = batch_size - first_sample if count is None else count
    w = random.words(count, seed=seed, step=step, stream=BATCHES, offset=first_sample)
    return (w * n) >> 32


def batches(
    source: Source,
    batch_size: int,
    *,
    steps: int,
    seed: int | Tensor | None = None,
    first_step: int = 0,
    first_sample: int = 0,
    count: int | None = None,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """The batches of a run, drawn from a source with replacement: yields (step, samples, labels).

    Which samples they are is a function of the seed and the step: a run that goes on, and one of
    any number of processes, sees what the whole one would. Samples that do not lie in memory are
    read ahead by a thread, which ends with the generator; what it raises is raised here.

    Args:
        source: see `open`.
        batch_size: samples of a step, of all processes together.
        steps: number of the last step + 1. first_step: to resume.
        seed: of the order; one draw from torch's default generator unless given.
        first_sample, count: the part of each batch that is wanted, see `distributed.share`; all of
            it unless given.

    Raises:
        ValueError: a number is out of range. TypeError: source is no `Source`.
    """
    op = "batches"
    if not isinstance(source, Source):
        raise TypeError(f"{op}: source must be a Source (datasets.open); got {shown(source)}.")
    batch_size = integer(op, "batch_size", batch_size, 1, limit=2**32)
    first_sample = integer(op, "first_sample", first_sample, 0, batch_size)
    left = batch_size - first_sample
    steps = integer(op, "steps", steps, 0, limit=RUN)
    plan = range(integer(op, "first_step", first_step, 0, limit=RUN), steps)
    random.check_seed(op, seed, torch.device("cpu"))
    seed = random.draw_seed() if seed is None else seed
    part = {"first_sample": first_sample, "seed": seed}
    part["count"] = left if count is None else integer(op, "count", count, 0, left)

    def made():
        for step in plan:
            rows = chosen(len(source), batch_size, step=step, **part)
            yield step, source.read(rows), None if source.labels is None else source.labels[rows]

    return made() if source.in_memory else ahead(made())


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
