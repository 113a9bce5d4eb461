"""The command line on several processes: torchrun starts one for each rank."""

import os

import torch

from fastscore import distributed
from fastscore.cli import drawing


def device():
    """This rank's GPU (LOCAL_RANK, modulo their number), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def draw(net, sigmas, shape, n, *, first_sample=0, **options):
    """`drawing.draw_from` with the samples split over the ranks: its result on rank 0, (None, None) on the others."""
    first, count = distributed.share(n)
    samples, path = torch.empty((0, *shape)), None
    if count:
        samples, path = drawing.draw_from(net, sigmas, shape, count, first_sample=first_sample + first, **options)
    samples = distributed.gather(samples, n)
    return samples, None if samples is None else path


def own(path):
    """A path for this rank alone: itself where there is one process, with the rank in its name where there are more."""
    rank, world_size = distributed.environment()
    return path if world_size == 1 else path.with_name(f"{path.name}.{rank}-of-{world_size}")


def one_process(op):
    """Refuse several ranks where each would do the same work and write the same files."""
    world_size = distributed.environment()[1]
    if world_size > 1:
        raise ValueError(f"{op}: runs as one process; got WORLD_SIZE {world_size} (only `sample` is split over processes).")
