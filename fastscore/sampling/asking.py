"""How samplers ask a score: its networks in evaluation mode, in their own dtype; what goes wrong there in one sentence."""

from collections.abc import Callable

import torch
from torch import nn

from fastscore.modes import evaluated, networks

_HALF = (torch.bfloat16, torch.float16)


def asked(op: str, score: Callable, x: torch.Tensor) -> Callable:
    """score as samplers call it.

    A network whose parameters are all bfloat16, or all float16, is handed x in that dtype: the state keeps its own, in which small steps
    are not lost. Its answer is converted back where it is checked.
    """
    call = evaluated(score)
    dtype = _half(score, x)

    def answer(x, *arguments):
        try:
            return call(x if dtype is None else x.to(dtype), *arguments)
        except (RuntimeError, IndexError, ValueError) as error:
            _explain_dtypes(op, score, x, error)
            if x.dim() == 1:
                raise ValueError(f"{op}: score failed on x{single(x)}") from error
            raise

    return answer


def single(x: torch.Tensor) -> str:
    """What the end of a sentence says of an x without a dimension of its own for samples; "." for others."""
    if x.dim() != 1:
        return "."
    return f" of shape {tuple(x.shape)}, a batch of {len(x)} single values; one sample of {len(x)} values is x[None]."


def _half(score, x):
    """The half precision of a network that x does not have; None for other scores."""
    if not isinstance(score, nn.Module):
        return None
    first = next((p.dtype for p in score.parameters() if p.is_floating_point()), None)
    if first not in _HALF:   # as nearly always: no need to ask the others
        return None
    found = _dtypes([score])
    if len(found) == 1 and found <= {*_HALF} - {x.dtype}:
        return found.pop()
    return None


def _dtypes(modules):
    return {p.dtype for m in modules for p in m.parameters() if p.is_floating_point()}


def _explain_dtypes(op, score, x, error):
    """PyTorch's complaint about two dtypes, as ours about those of the network and of x."""
    if not isinstance(error, RuntimeError) or ("dtype" not in str(error) and "type" not in str(error)):
        return
    found = _dtypes(networks(score))
    if len(found) == 1 and x.dtype not in found:
        theirs, ours = (str(d).removeprefix("torch.") for d in (found.pop(), x.dtype))
        raise TypeError(
            f"{op}: the network is {theirs} and x {ours}; hand over the network itself, or convert one of them (net.to, or dtype=)."
        ) from error
