"""Numbers that f leaves behind, on a module or in a list.

After the call they are their values, constants of every other call.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map


class Kept(torch.Tensor):
    """A number whose call is over: to whoever uses it, its value with the value's gradients.

    Only a checkpoint takes numbers up again as they were, when it calls f during the backward pass.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch._C._current_graph_task_id() != -1:
            tree_map(take_up, (args, kwargs or {}))
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(value_of, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        raise RuntimeError(
            f"fastscore: what f kept of a jvp or loss cannot enter {func} as it is; "
            "pass kept.clone()."
        )

    def __repr__(self) -> str:
        return repr(value_of(self))


def value_of(a: Any) -> Any:
    """What a kept number stands for; anything else as it is."""
    if not isinstance(a, Kept):
        return a

    value = a.kind.stack.fget(a)[0]
    # The forward of an autograd.Function: the graph would begin at the number, which has none.
    if (
        value.requires_grad
        and not torch._C._is_fwd_grad_enabled()
        and not torch.is_inference_mode_enabled()
    ):
        raise RuntimeError(
            "fastscore: what f kept of a jvp or loss cannot enter an autograd.Function as it is; "
            "pass kept.clone()."
        )

    return value


def take_up(a: Any) -> None:
    if isinstance(a, Kept):
        a.kind.stack.fget(a)   # no longer a number of its call
        a.__class__ = a.kind
        a.call = None
        outside.append(weakref.ref(a))


outside: list[Any] = []   # numbers made while no call runs


def keep(references: Any) -> None:
    """End the lives of numbers as numbers."""
    for reference in references:
        number = reference()
        if number is not None and not isinstance(number, Kept):
            number.kind = type(number)
            number.__class__ = Kept
    references.clear()
