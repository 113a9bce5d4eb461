"""Operations on the values alone."""

import contextlib
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastscore.dual.call import NoRule, running, settle
from fastscore.dual.number import Dual, like
from fastscore.dual.stacks import memory, padded, same_memory
from fastscore.dual.table import STEPS


def on_values(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    args, kwargs = tree_unflatten([a.stack[0] if isinstance(a, Dual) else a for a in leaves], spec)
    with torch.no_grad() if func in STEPS else contextlib.nullcontext():
        result = func(*args, **kwargs)
    _show(result, leaves)
    return result


def graph_of(func: Callable[..., Any], x: Any) -> Any:
    """requires_grad, grad_fn or is_leaf: those of the stack."""
    if func == torch.Tensor.grad_fn.__get__:
        frame = sys._getframe()
        while frame is not None and frame.f_globals["__name__"].startswith("fastscore."):
            frame = frame.f_back
        # It would be called with the gradients of the stack.
        if frame is not None and frame.f_globals["__name__"] == torch.nn.Module.__module__:
            raise NoRule(
                "fastscore.jvp: a module with a backward hook cannot be carried through with its "
                "tangents."
            )
    return func(x.stack)


def on_constants(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In a block without gradients: an operation on the values.

    What hands back its argument, hands back the number.
    """
    settle()   # it may be written to
    leaves, spec = tree_flatten((args, kwargs))
    with torch.enable_grad():   # views that may be written to as the numbers themselves
        values = [a.stack[0] if isinstance(a, Dual) else a for a in leaves]

    args, kwargs = tree_unflatten(values, spec)
    result = func(*args, **kwargs)
    numbers = {id(value): a for a, value in zip(leaves, values) if isinstance(a, Dual)}
    result = tree_map(lambda t: numbers.get(id(t), t), result)
    _show(result, leaves)
    return result


def _show(result, leaves):
    """Note the memory that f sees from now on in ordinary tensors, or in arrays."""
    call = running()
    if (
        call is None
        or result is None
        or isinstance(result, bool | int | float | torch.Size | torch.dtype)
    ):
        return

    results = [t for t in tree_flatten(result)[0] if not isinstance(t, bool | int | float | Dual)]
    for a in leaves:
        if isinstance(a, Dual) and any(
            not isinstance(t, torch.Tensor) or same_memory(t, a.stack) for t in results
        ):
            call.shown.append(weakref.ref(memory(a.stack)))


def sets_attribute(func: Callable[..., Any]) -> bool:
    """Whether it assigns to an attribute, as t.data = x does."""
    return getattr(func, "__name__", "") == "__set__"


def new_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A place to write dual numbers into."""
    value = func(args[0].stack[0], *args[1:], **kwargs)
    if not value.is_floating_point():
        return value
    return like(args[0], padded(value[None], args[0].room))
