"""A network of one dtype and data of another: PyTorch's complaint in one sentence of ours."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastscore.modes import networks

HALF = (torch.bfloat16, torch.float16)

_OF_DTYPES = re.compile("same dtype|scalar type|should be the same|data type")


def dtypes(modules: Iterable[nn.Module]) -> set[torch.dtype]:
    return {p.dtype for m in modules for p in m.parameters() if p.is_floating_point()}


def explain(
    op: str,
    score: Callable[..., Any],
    x: torch.Tensor,
    error: Exception,
    sampling: bool = False,
) -> None:
    """Raise it where an error that the score raised is PyTorch's complaint about two dtypes."""
    if not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError):
        return
    if not _OF_DTYPES.search(str(error)):
        return

    found = dtypes(networks(score))
    if len(found) != 1 or x.dtype in found:
        return

    theirs, ours = (str(d).removeprefix("torch.") for d in (*found, x.dtype))
    remedy = "convert one of them (net.to, or x.to)"
    if sampling:
        remedy = "convert one of them (net.to, or dtype=)"
        if theirs in ("bfloat16", "float16"):   # whose networks samplers convert by themselves
            remedy = f"hand over the network itself, or {remedy}"
    raise TypeError(f"{op}: the network is {theirs} and x {ours}; {remedy}.") from error
