"""Second-order forward propagation.

a value with its first and second derivatives along M directions, carried through any function.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.utils._pytree import tree_leaves

from fastscore.compiling import skip
from fastscore.dual import (
    jet_rules_functions,  # noqa: F401
    kept,
)
from fastscore.dual.call import NoRule
from fastscore.dual.compiled import undisturbed
from fastscore.dual.jet_rules import RULES, VALUES, bent, is_jet
from fastscore.dual.number import Dual
from fastscore.dual.sharded import of_fsdp
from fastscore.dual.table import BASE, GRAPH, LIKE, METADATA, metadata
from fastscore.dual.turns import Turns
from fastscore.dual.values import graph_of, new_place, on_values
from fastscore.dual.writes import copy_of, in_place, write


def second_order(
    f: Callable[..., Any], x: Tensor, v: Tensor, straight: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """f of samples that do not mix, and its first and second derivatives along v, in one forward
    pass.

        f(x + t v_m) = f(x) + t f'_m + ½ t² f''_m + ...,    f'_m = v_mᵀ∇f,    f''_m = v_mᵀ∇²f v_m

    The 1 + 2M coefficients go through each linear layer or convolution as one batch, and through
    activations by Faà di Bruno's formula; until the first bend f'' = 0 and only 1 + M of them
    exist.

    Args:
        f: called f(x); (B,) or (B, 1). x: (B, *). v: (M, B, *).
        straight: begin without f''. An in-place activation right after a linear layer then finds no
            room for it.

    Returns:
        f(x) (B,), f' and f'' (M, B), differentiable in x, v and the parameters of f. Gradients must
        be enabled.

    Raises:
        NoRule: f holds an operation that no rule covers, or one that mixes samples. What else f
            raises comes through.

    Source: Griewank & Walther 2008, chapter 13; Bettencourt, Johnson & Duvenaud 2019 (Taylor-mode
        automatic differentiation).

    >>> x, v = torch.tensor([[3.0]]), torch.ones(1, 1, 1)
    >>> value, first, second = second_order(lambda x: x.square().sum(1), x, v)
    >>> value.item(), first.item(), second.item()
    (9.0, 6.0, 2.0)
    """
    if (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or not x.numel()
    ):
        raise NoRule("second_order: transforms, forward mode and empty tensors take another way.")

    parts = [x[None], v] if straight else [x[None], v, torch.zeros_like(v)]
    with _inside():
        y = f(Jet(torch.cat(parts), len(v)))
        if not isinstance(y, Jet) or y.shape not in ((len(x),), (len(x), 1)):
            raise NoRule("second_order: f(x) is no function of x, or not one value per sample.")
        value, first, second = y.parts()

    second = torch.zeros_like(first) if second is None else second
    return tuple(c.reshape(-1, len(x)) for c in (value, first, second))


_local = threading.local()


class _Run(Turns):
    """One second_order that runs, and the numbers that it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.made = []


@contextlib.contextmanager
def _inside():
    """What f keeps is its value afterwards."""
    kept.keep(kept.outside)
    before = getattr(_local, "run", None)
    run = _local.run = _Run()
    try:
        yield
    finally:
        _local.run = before
        kept.keep(run.made)


def _of_its_call(function, args, kwargs):
    """function() of a worker that f has started, or beside one."""
    before = getattr(_local, "run", None)
    run = before
    if before is None:
        run = next((a.call for a in tree_leaves((args, kwargs)) if is_jet(a)), None)
        if run is None:
            return function()
        run.share()

    _local.run = run
    try:
        with run.turn():
            return function()
    finally:
        _local.run = before


class Jet(Dual):
    """A value whose first dimension is the batch, with M first and M second derivatives.

    `stack` (1 + 2M, B, *).

    A straight one, of second derivative zero, holds (1 + M, B, *).
    """

    call: Any

    @staticmethod
    def __new__(cls, stack: Any, directions: Any) -> Any:
        return Dual.__new__(cls, stack)

    def __init__(self, stack: Any, directions: Any) -> None:
        self.stack = stack
        self.directions = directions
        run = self.call = getattr(_local, "run", None)
        (kept.outside if run is None else run.made).append(weakref.ref(self))

    @property
    def straight(self) -> bool:
        return len(self.stack) == 1 + self.directions

    def like(self, stack: Any) -> Any:
        return Jet(stack, self.directions)

    def parts(self) -> Any:
        """Value (1, B, *), first and second derivatives (M, B, *), the second None for a
        straight one."""
        M = self.directions
        return (*self.stack.split([1, M]), None) if self.straight else self.stack.split([1, M, M])

    @classmethod
    @skip  # by Dynamo
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return metadata(func, args, kwargs)
        # a checkpoint in f calls a compiled part again during the backward pass.
        if get_eval_frame_callback() is not None:
            return undisturbed(cls.__torch_function__, func, types, args, kwargs)
        run = getattr(_local, "run", None)
        if run is None or run.shared:
            return _of_its_call(lambda: cls.carried(func, args, kwargs), args, kwargs)
        return cls.carried(func, args, kwargs)

    @classmethod
    def carried(
        cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func == torch.Tensor.requires_grad.__get__:
            return True
        if func in GRAPH:
            return graph_of(func, args[0])
        if func == BASE:
            return None

        name = getattr(func, "__name__", str(func))
        # Without gradients we may stand inside an autograd.Function, whose result would look like a
        # constant.
        if not torch.is_grad_enabled() or kwargs.get("out") is not None:
            raise NoRule(f"second_order: {name} without gradients, or with out=.")
        if func in VALUES:
            return on_values(func, args, kwargs)
        if func in LIKE:
            return new_place(func, (bent(args[0]), *args[1:]), kwargs)
        if kwargs.get("inplace"):
            return write(args[0], func(copy_of(args[0]), *args[1:], **{**kwargs, "inplace": False}))
        if func in RULES:
            result = RULES[func](*args, **kwargs)
            return _refuse(name) if result is NotImplemented else result
        if name == "register_hook" and of_fsdp(args[1]):
            return func(args[0].stack, args[1])
        if name == "__setitem__" and is_jet(args[0]) and is_jet(args[2]) and not args[0].straight:
            return in_place(func, name, (*args[:2], bent(args[2])), kwargs)
        if name == "__setitem__" or (
            name.endswith("_") and name not in _OTHERS and is_jet(args[0])
        ):
            return in_place(func, name, args, kwargs)

        return _refuse(name)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        _refuse(func)

    def __repr__(self) -> str:
        return f"Jet({self.directions} directions at {self.stack[0]!r})"


_OTHERS = ("requires_grad_", "set_", "resize_", "share_memory_")


def _refuse(name):
    raise NoRule(f"second_order: no rule carries {name} with its derivatives, sample by sample.")
