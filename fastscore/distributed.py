"""Sampling on several processes: which samples are whose, and how they come together.

Noise is a function of the global number of a sample, so a rank needs no message from any other
before the samples are gathered.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor

from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.tensors import check_tensor

__all__ = ["gather", "share"]

# How long a rank that is done waits for the others; where one dies torchrun ends them all.
_LONGEST_WAIT = timedelta(days=7)


_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within: this process draws by itself, whatever torchrun has started beside it."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def environment() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them in RANK and WORLD_SIZE; (0, 1) without them.

    Raises:
        ValueError: one of them is missing, is no integer, or the rank is not below the world size.
    """
    if _alone:
        return 0, 1
    values = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if values == (None, None):
        return 0, 1
    try:
        rank, world_size = map(int, values)
    except (TypeError, ValueError):
        raise ValueError(
            "distributed: RANK and WORLD_SIZE must both be integers; "
            f"got {values[0]!r} and {values[1]!r}."
        ) from None
    return _checked_rank("distributed", rank, world_size)


def share(n: int, rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """The contiguous share of one rank in n samples: (first_sample, count).

    The first n mod W of the W ranks take one sample more. Pass first_sample on to any sampler or to
    `models.Gaussian.sample`, and the shares of all ranks, one after another, are the n samples of a
    single process.

    Args:
        n: number of samples.
        rank, world_size: those of the environment (torchrun) unless given.

    Raises:
        ValueError: n is negative, or the rank is not in 0..world_size - 1.

    >>> [share(10, rank, 4) for rank in range(4)]
    [(0, 3), (3, 3), (6, 2), (8, 2)]
    """
    n = checks.integer("share", "n", n, 0, limit=2**53)
    if (rank is None) != (world_size is None):
        raise ValueError("share: give rank and world_size together, or neither.")
    if rank is None:
        rank, world_size = environment()
    rank, world_size = _checked_rank("share", rank, world_size)
    each, more = divmod(n, world_size)
    return rank * each + min(rank, more), each + (rank < more)


def gather(samples: Tensor, n: int) -> Tensor | None:
    """Bring the shares of all ranks together, on the CPU: (n, *) on rank 0, None on the others.

    Without a process group one is set up (gloo, from torchrun's environment) and taken down again.

    Args:
        samples: this rank's share, (count, *), as `share` counts; every rank must call.
        n: number of samples of all ranks.

    Raises:
        ValueError: the share has another count, or there is no torchrun environment to meet in.
    """
    check_tensor("gather", "samples", samples)
    if not samples.dim() or samples.is_meta:
        raise ValueError(
            "gather: samples must be (count, *) with values; "
            f"got {tuple(samples.shape)} on {samples.device}."
        )
    n = checks.integer("gather", "n", n, 0, limit=2**53)
    rank, world_size = environment()
    count = share(n, rank, world_size)[1]
    if len(samples) != count:
        raise ValueError(
            f"gather: rank {rank} of {world_size} must hold {count} of the {n} samples; "
            f"got {len(samples)}."
        )
    if world_size == 1:
        return samples.cpu()
    with process_group() as group:
        return _gathered(samples.cpu(), n, rank, world_size, group)


@contextlib.contextmanager
def process_group() -> Iterator:
    """A group for tensors on the CPU: one beside the caller's, or (None) the default group.

    The latter is made from torchrun's environment and there as long as the block runs, for several
    calls of `gather`.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        # The caller's may know nothing of CPU tensors.
        yield dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        return
    if "MASTER_ADDR" not in os.environ:
        raise ValueError(
            "gather: the ranks meet at MASTER_ADDR and MASTER_PORT, which are not set; "
            "start them with torchrun."
        )
    rank, world_size = environment()
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=_LONGEST_WAIT)
    try:
        # Not the group itself: the last to hold it joins gloo's thread, so it must go by `destroy`.
        yield None
    finally:
        dist.destroy_process_group()


def _gathered(samples, n, rank, world_size, group):
    import torch.distributed as dist

    # Of equal length for all.
    padded = samples.new_zeros((share(n, 0, world_size)[1], *samples.shape[1:]))
    padded[: len(samples)] = samples
    parts = [torch.empty_like(padded) for _ in range(world_size)] if rank == 0 else None
    dist.gather(padded, parts, dst=0, group=group)
    if parts is None:
        return None
    return torch.cat([part[: share(n, r, world_size)[1]] for r, part in enumerate(parts)])


def _checked_rank(op, rank, world_size):
    ints = checks.whole(rank) and checks.whole(world_size)
    if not ints or not 0 <= rank < world_size:
        raise ValueError(
            f"{op}: 0 <= rank < world_size must hold; got {shown(rank)} and {shown(world_size)}."
        )
    return checks.plain_int(rank), checks.plain_int(world_size)
