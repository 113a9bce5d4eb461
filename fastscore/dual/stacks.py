"""Stacks (1 + M, *): a value and its tangents along the first dimension.

(1 + 2M, *) with second derivatives.
"""

from typing import Any

import torch
from torch import Tensor


def is_dual(a: Any) -> bool:
    return hasattr(type(a), "stack")


def same_memory(a: Any, b: Any) -> bool:
    return a.layout == torch.strided and memory(a) is memory(b)


def shares_memory(a: Any, b: Any) -> bool:
    return memory(a).data_ptr() == memory(b).data_ptr() and a.numel() > 0


def memory(s: Tensor) -> Any:
    """The storage of a stack, inside a transform of torch.func, too."""
    while torch._C._functorch.is_functorch_wrapped_tensor(s):
        s = torch._C._functorch.get_unwrapped(s)
    return s.untyped_storage()


def shift(d: Any) -> Any:
    """A dimension of the value as one of the stack."""
    return d if d < 0 else d + 1


def shape_of(args: tuple[Any, ...]) -> Any:
    """Sizes given as one sequence or one by one."""
    return tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else tuple(args)


def aligned(s: Tensor, dims: Any) -> Any:
    """The stack of a value with at least `dims` dimensions."""
    missing = dims - (s.dim() - 1)
    return s.reshape(s.shape[0], *(1,) * missing, *s.shape[1:]) if missing > 0 else s


def both(a: Any, b: Any) -> Any:
    """Two stacks aligned to broadcast with each other."""
    if a.dtype != b.dtype:   # by the rules for the values, whose dimensions count
        dtype = torch.result_type(a[0], b[0])
        a, b = a.to(dtype), b.to(dtype)
    dims = max(a.dim(), b.dim()) - 1
    return aligned(a, dims), aligned(b, dims)


def beside(s: Tensor, c: Any) -> Any:
    """A stack and a constant, in the dtype that PyTorch gives to the value and the constant."""
    if not isinstance(c, torch.Tensor) or c.dtype == s.dtype:
        return s, c
    dtype = torch.result_type(s[0], c)
    return s.to(dtype), c.to(dtype)


def padded(s: Tensor, n: int) -> Tensor:
    """The stack with n coefficients, the last of them zero where there were fewer."""
    return s if len(s) == n else torch.cat([s, s.new_zeros(n - len(s), *s.shape[1:])])


def separated(index: Any, more: Any = 1) -> bool:
    """Whether an index holds arrays, more than `more` of them, that do not follow each other."""
    arrays = [
        i for i, part in enumerate(index) if not isinstance(part, int | slice | None | type(...))
    ]
    return len(arrays) > 1 and (
        not more or arrays != list(range(arrays[0], arrays[0] + len(arrays)))
    )
