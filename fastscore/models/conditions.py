"""The contexts that networks take beside x and σ, and which of them are dropped."""

import torch
from torch import Tensor

from fastscore.ops import checks
from fastscore.scalars import SIZE


def size(op: str, name: str, value: int | None) -> int | None:
    return None if value is None else checks.integer(op, name, value, 1, limit=SIZE)


def check_dropped(op: str, x: Tensor, dropped: Tensor | None) -> None:
    """Bool, one for each sample."""
    if dropped is None:
        return
    if (dropped.dtype, dropped.shape, dropped.device) != (torch.bool, x.shape[:1], x.device):
        raise ValueError(
            f"{op}: dropped must be bool ({len(x)},) on {x.device}; "
            f"got {dropped.dtype} {tuple(dropped.shape)} on {dropped.device}."
        )


def context(
    op: str, length: int | None, x: Tensor, given: Tensor | None, dropped: Tensor | None
) -> Tensor | None:
    """(B, C + 1), the last column 1 where there is a context, zeros (1, C + 1) where all are
    dropped.

    None for a network without contexts.
    """
    check_dropped(op, x, dropped)
    if length is None:
        if given is not None:
            raise ValueError(f"{op}: built without context, it takes none.")
        return None
    if given is None:
        return x.new_zeros(1, length + 1)

    checks.check_float(op, "context", given)
    if tuple(given.shape) != (len(x), length) or given.device != x.device:
        raise ValueError(
            f"{op}: context must be {(len(x), length)} on {x.device}; "
            f"got {tuple(given.shape)} on {given.device}."
        )
    found = torch.cat([given.to(x.dtype), x.new_ones(len(x), 1)], 1)
    return found if dropped is None else torch.where(dropped[:, None], 0, found)
