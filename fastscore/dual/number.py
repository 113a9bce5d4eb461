"""Numbers: a tensor subclass that flows through unmodified modules with its derivatives beside
it, first ones or first and second ones."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._ops import HigherOrderOperator

from fastscore.compiling import skip
from fastscore.dual import kept
from fastscore.dual.call import NoRule, calls, of_its_call, of_several, thread
from fastscore.dual.compiled import undisturbed
from fastscore.dual.stacks import is_dual
from fastscore.dual.table import METADATA, RULES, SECOND, metadata

_shell = torch.Tensor._make_wrapper_subclass
# What PyTorch takes for sparse no ordinary tensor's .data or .grad can be set to: C++ asks nobody,
# and would find no memory.
_UNLIKE_DENSE = torch.sparse_coo


class Dual(torch.Tensor):
    """A value with M tangents.

    Looks like the value, holds `stack` (1 + M, *shape), which may be computed when it is asked for.
    """

    computed: Any
    pending: Any

    order: int = 1
    rules: Any = RULES

    @staticmethod
    def __new__(cls, stack: Any) -> Any:
        cls = ComplexDual if stack.is_complex() else cls
        return _shell(
            cls, stack.shape[1:], stack.stride()[1:], None, None, stack.dtype, _UNLIKE_DENSE,
            stack.device,
        )

    def __init__(self, stack: Any) -> None:
        self.computed = stack
        self.pending = None
        call = self.call = getattr(thread, "call", None)
        (kept.outside if call is None else call.made).append(weakref.ref(self))

    @property
    def stack(self) -> None:
        if self.computed is None:
            with self.call.lock:   # a second result would lose what was written to the first
                if self.computed is None:
                    self.computed = self.pending.stack()
                    self.pending = None
        return self.computed

    @stack.setter
    def stack(self, stack: Any) -> None:
        self.computed = stack
        self.pending = None

    @classmethod
    def later(cls, pending: Any) -> Any:
        """Dual numbers that wait in a chain (of `dual.chains`)."""
        call = getattr(thread, "call", None)
        if call is None or not call.waits:
            return cls(pending.stack())

        result = _shell(
            cls, pending.shape[1:], None, None, None, pending.dtype, _UNLIKE_DENSE, pending.device
        )
        result.computed = None
        result.pending = pending
        result.call = call
        pending.holder = weakref.ref(result)
        with call.lock:   # no list that another thread has just taken away
            call.waiting.append(pending.holder)

        call.made.append(pending.holder)
        return result

    def coefficients(self, s: Tensor) -> Any:
        """A stack of this kind, in parts: the value (1, *), its tangents (M, *) and, if it has any,
        their derivatives (M, *).

        One split, whose gradient is one copy, where slices' are written into zeros of the whole
        size and added.
        """
        return *s.split_with_sizes((1, len(s) - 1)), None

    @property
    def room(self) -> int:
        """How many coefficients it may come to have."""
        return len(self.stack)

    def scalar(self) -> Any:
        """Whether its value has no dimensions, asked without the way through
        `__torch_function__`."""
        pending = self.pending   # which another thread may compute meanwhile
        return self.stack.dim() == 1 if pending is None else not pending.shape[1:]

    @classmethod
    @skip  # by Dynamo; torch.compiler.disable(recursive=False) is a call more for each operation
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
        if (len(calls) != 1 or not hasattr(thread, "call")) and of_several():
            in_turn = not isinstance(func, HigherOrderOperator)   # which calls what f gives it
            return of_its_call(lambda: cls.carried(func, args, kwargs), args, kwargs, in_turn)
        return cls.carried(func, args, kwargs)

    @classmethod
    def carried(
        cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """What becomes of an operation.

        `dual.dispatch`, which stands on the rules, which stand on this class, puts its own here.
        """
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        raise NoRule(f"fastscore.jvp: {func} cannot be carried through with its tangents.")

    def __repr__(self) -> str:
        return f"Dual({len(self.stack) - 1} tangents of {self.stack[0]!r})"


class ComplexDual(Dual):
    """Complex values take stock forward mode for everything.

    The rules are those of real numbers.
    """

    rules: dict[Any, Any] = {}


class Jet(Dual):
    """A value whose first dimension is the batch, with M first and M second derivatives.

    `stack` (1 + 2M, B, *). A straight one, of second derivative zero, holds (1 + M, B, *).
    """

    directions: int

    order: int = 2
    rules: Any = SECOND

    @staticmethod
    def __new__(cls, stack: Any, directions: int) -> Any:
        if stack.is_complex():
            raise NoRule("second_order: no rule carries complex numbers.")
        return Dual.__new__(cls, stack)

    def __init__(self, stack: Any, directions: int) -> None:
        super().__init__(stack)
        self.directions = directions

    def coefficients(self, s: Tensor) -> Any:
        M = self.directions
        if len(s) == 1 + M:
            return *s.split_with_sizes((1, M)), None
        return s.split_with_sizes((1, M, M))

    @property
    def room(self) -> int:
        return 1 + 2 * self.directions

    def __repr__(self) -> str:
        return f"Jet({self.directions} directions at {self.stack[0]!r})"


class NoDual(Exception):
    """A rule's first argument is an ordinary tensor; stock forward mode takes the operation."""


def stack(a: Any) -> Any:
    try:
        return a.stack
    except AttributeError:
        raise NoDual from None


def dual(s: Tensor) -> Any:
    return Dual(s)


def like(x: Any, s: Tensor) -> Any:
    """Another number of the order of x."""
    return Dual(s) if x.order == 1 else Jet(s, x.directions)


def value(a: Any) -> Any:
    return a.stack[0] if is_dual(a) else a


def joined(y: Any, ty: Any) -> Any:
    return dual(torch.cat([y[None], ty]))
