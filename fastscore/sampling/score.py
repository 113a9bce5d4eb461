"""How samplers call a score: its networks in evaluation mode and in their own dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastscore import precision
from fastscore.modes import evaluated


def prepared(score: Callable, x: torch.Tensor) -> Callable:
    """The score as samplers call it.

    A network whose parameters are all bfloat16, or all float16, is handed x in that dtype: the
    state keeps its own, in which small steps are not lost. Its answer is converted back where it
    is checked.
    """
    call = evaluated(score)
    dtype = _half_precision(score, x)
    if dtype is None:
        return call

    def converted(x, *arguments):
        return call(x.to(dtype), *arguments)

    return converted


def explain(op: str, score: Callable, x: torch.Tensor, error: Exception) -> None:
    """Raise what can be said in one sentence about an error that a score raised; else return."""
    precision.explain(op, score, x, error, sampling=True)
    if x.dim() == 1:
        raise ValueError(f"{op}: score failed on x{single_values(x)}") from error


def single_values(x: torch.Tensor) -> str:
    """What the end of a sentence says of an x without a dimension of its own for samples; "." for
    others."""
    if x.dim() != 1:
        return "."
    return (
        f" of shape {tuple(x.shape)}, a batch of {len(x)} single values; "
        f"one sample of {len(x)} values has shape (1, {len(x)})."
    )


def _half_precision(score: Any, x: torch.Tensor) -> torch.dtype | None:
    """That of a network, where x has another dtype; None for other scores."""
    if not isinstance(score, nn.Module):
        return None

    # As nearly always, the first parameter says that there is no need to ask the others.
    first = next((p.dtype for p in score.parameters() if p.is_floating_point()), None)
    if first not in precision.HALF:
        return None

    found = precision.dtypes([score])
    if len(found) == 1 and found <= {*precision.HALF} - {x.dtype}:
        return found.pop()
    return None
