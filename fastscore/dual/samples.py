"""Whether an operation keeps samples apart, as second derivatives ask.

Along a joint direction of the batch they are those of each sample alone only while none is mixed
with another: the first dimension of a value is that of the samples, and stays it.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastscore.dual.call import NoRule
from fastscore.dual.stacks import is_dual, shape_of


def guarded(rule: Callable[..., Any], apart: Callable[..., bool]) -> Callable[..., Any]:
    """The rule of numbers with second derivatives: that of first ones, where apart(*args) holds."""

    def apply(*args, **kwargs):
        if not args:   # the first one by its name
            name = next((n for n in ("input", "x", "tensor", "tensors") if n in kwargs), None)
            args = () if name is None else (kwargs.pop(name),)
        if not apart(*args, **kwargs):
            return NotImplemented

        made = rule(*args, **kwargs)
        if made is not NotImplemented:
            _check(made, _batch(args) or _batch(kwargs.values()))
        return made

    return apply


def _batch(args):
    """How many samples the first number among the arguments has."""
    for a in args:
        if is_dual(a):
            return a.stack.shape[1]
        if type(a) in (list, tuple) and (found := _batch(a)):   # of cat and stack
            return found


def _check(made, batch):
    if isinstance(made, tuple):
        for m in made:
            _check(m, batch)
    elif is_dual(made):
        s = made.stack
        if s.dim() < 2 or s.shape[1] != batch:
            raise NoRule("second_order: the samples would not stay the first dimension.")


# ---- of one number, with whatever constants


def alone(keeps: Callable[..., bool]) -> Callable[..., bool]:
    """x alone is a number, and keeps(dimensions of x, ...) holds."""

    def apart(x, *args, **kwargs):
        if not is_dual(x) or any(map(is_dual, args)) or any(map(is_dual, kwargs.values())):
            return False
        return keeps(x.stack.dim() - 1, *args, **kwargs)

    return apart


def inner(rank: int, dims: Any) -> bool:
    """Dimensions other than the samples'."""
    dims = (dims,) if isinstance(dims, int) else dims
    return dims is not None and len(dims) > 0 and all(d % rank for d in dims)


def at_least(n: int) -> Callable[..., bool]:
    return alone(lambda rank, *args, **kwargs: rank >= n)


def exactly(n: int) -> Callable[..., bool]:
    return alone(lambda rank, *args, **kwargs: rank == n)


def along(before: int = 0, dim: int | None = None) -> Callable[..., bool]:
    """The dimension that the argument after x and `before` others names is not the samples'."""

    @alone
    def apart(rank, *args, **kwargs):
        given = args[before] if len(args) > before else dim
        return inner(rank, kwargs.get("dim", kwargs.get("dims", given)))

    return apart


# In C order a first dimension of B is that of the samples.
anyhow = at_least(1)
along_these = alone(lambda rank, *dims: inner(rank, shape_of(dims)))
along_both = alone(lambda rank, one, other: inner(rank, one) and inner(rank, other))
of_rank = alone(lambda rank, *shape: len(shape_of(shape)) == rank)


@alone
def indexed(rank: int, index: Any) -> bool:
    """An index leaves the samples alone."""
    index = index if isinstance(index, tuple) else (index,)
    if index[0] is Ellipsis:
        used = sum(
            i.dim() if isinstance(i, torch.Tensor) and i.dtype == torch.bool else i is not None
            for i in index[1:]
        )
        return used < rank
    return isinstance(index[0], slice) and index[0] == slice(None)


# ---- of several


def level(*args: Any, **kwargs: Any) -> bool:
    """Broadcasting leaves the samples the first dimension.

    Numbers have as many dimensions as each other, constants no more.
    """
    rank = most = 0
    for a in (*args, *kwargs.values()) if kwargs else args:
        if is_dual(a):
            own = a.stack.dim() - 1
            if rank not in (0, own):
                return False
            rank = own
        elif isinstance(a, torch.Tensor):
            most = max(most, a.dim())
    return 0 < rank >= most


def several(new: int) -> Callable[..., bool]:
    """Of a list, joined along another dimension than the samples', one of `new` new ones."""

    def apart(tensors, dim=0):
        ranks = {a.stack.dim() - 1 if is_dual(a) else a.dim() for a in tensors}
        return len(ranks) == 1 and dim % (max(ranks) + new) != 0

    return apart


def by_parts(*args: Any, **kwargs: Any) -> bool:
    """A composition, whose parts are asked one by one."""
    return True
