"""Sampling on several processes: which samples are whose, and how they come together.

Noise is a function of the global number of a sample, so a rank needs no message from any other
before the samples are gathered.
"""

import os
from datetime import timedelta

import torch
from torch import Tensor

from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.tensors import check_tensor

__all__ = ["gather", "share"]

# Of a rank that is done, for the others; where one dies torchrun ends them all.
PATIENCE = timedelta(days=7)


def environment() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them in RANK and WORLD_SIZE; (0, 1) without them.

    Raises:
        ValueError: one of them is missing, is no integer, or the rank is not below the world size.
    """
    values = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if values == (None, None):
        return 0, 1
    try:
        rank, world_size = map(int, values)
    except (TypeError, ValueError):
        raise ValueError(
            f"distributed: RANK and WORLD_SIZE must both be integers; got {values[0]!r} and "
            f"{values[1]!r}."
        ) from None
    _check_rank("distributed", rank, world_size)
    return rank, world_size


def share(n: int, rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """The contiguous share of one rank in n samples: (first_sample, count).

    The first n mod W of the W ranks take one sample more. Pass first_sample on to any sampler or to
    `models.Gaussian.sample`, and the shares of all ranks, one after another, are the n samples of a
    single process.

    Args:
        n: number of samples. rank, world_size: those of the environment (torchrun) unless given.

    Raises:
        ValueError: n is negative, or the rank is not in 0..world_size - 1.

    >>> [share(10, rank, 4) for rank in range(4)]
    [(0, 3), (3, 3), (6, 2), (8, 2)]
    """
    n = checks.integer("share", "n", n, 0, limit=2**53)
    if (rank is None) != (world_size is None):
        raise ValueError("share: give rank and world_size together, or neither.")
    rank, world_size = environment() if rank is None else (rank, world_size)
    rank, world_size = _check_rank("share", rank, world_size)
    each, more = divmod(n, world_size)
    return rank * each + min(rank, more), each + (rank < more)


def gather(samples: Tensor, n: int) -> Tensor | None:
    """Bring the shares of all ranks together, on the CPU: (n, *) on rank 0, None on the others.

    Args:
        samples: this rank's share, (count, *), as `share` counts; every rank must call. n: number
            of samples of all ranks.

    Without a process group one is set up (gloo, from torchrun's environment) and taken down again.

    Raises:
        ValueError: the share has another count, or there is no torchrun environment to meet in.
    """
    check_tensor("gather", "samples", samples)
    if not samples.dim() or samples.is_meta:
        raise ValueError(
            f"gather: samples must be (count, *) with values; got {tuple(samples.shape)} on "
            f"{samples.device}."
        )
    n = checks.integer("gather", "n", n, 0, limit=2**53)
    rank, world_size = environment()
    count = share(n, rank, world_size)[1]
    if len(samples) != count:
        raise ValueError(
            f"gather: rank {rank} of {world_size} must hold {count} of the {n} samples; got "
            f"{len(samples)}."
        )
    return samples.cpu() if world_size == 1 else _gathered(samples.cpu(), n, rank, world_size)


def _gathered(samples, n, rank, world_size):
    import torch.distributed as dist

    own = not dist.is_initialized()
    if own and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            "gather: the ranks meet at MASTER_ADDR and MASTER_PORT, which are not set; start them "
            "with torchrun."
        )
    if own:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=PATIENCE)
    try:
        # The caller's may know nothing of CPU tensors.
        group = None if own else dist.new_group(backend="gloo", timeout=PATIENCE)
        # Of equal length for all.
        padded = samples.new_zeros((share(n, 0, world_size)[1], *samples.shape[1:]))
        padded[: len(samples)] = samples
        parts = [torch.empty_like(padded) for _ in range(world_size)] if rank == 0 else None
        dist.gather(padded, parts, dst=0, group=group)
    finally:
        if own:
            dist.destroy_process_group()
    return (
        None
        if parts is None
        else torch.cat([part[: share(n, r, world_size)[1]] for r, part in enumerate(parts)])
    )


def _check_rank(op, rank, world_size):
    ints = checks.whole(rank) and checks.whole(world_size)
    if not ints or not 0 <= rank < world_size:
        raise ValueError(
            f"{op}: 0 <= rank < world_size must hold; got {shown(rank)} and {shown(world_size)}."
        )
    return checks.plain_int(rank), checks.plain_int(world_size)
