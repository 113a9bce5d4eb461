"""The jvp or second_order that runs: whose numbers they are, what waits to be computed, and which
block counts as constant."""

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from fastscore.dual import kept
from fastscore.dual.stacks import is_dual, memory
from fastscore.dual.turns import Turns


class NoRule(NotImplementedError):
    """An operation that dual numbers cannot be carried through."""


class Call(Turns):
    """One jvp that runs, and the context in which it does.

    It holds the caller's grad mode, and references to whose stack is not computed yet and to memory
    not to be written to.

    `shown`: memory that ordinary tensors share, as of a detached value.
    `lock`: what waits is computed by one thread, once; who writes, waits until it is. `waits`:
    nothing does where weights come and go. `hooks`: on what autograd saves, when it began.
    `carriers`: of `dual.carriers`, once something was written into an ordinary tensor.
    """

    waiting: list[Any]
    copied: list[Any]
    made: list[Any]
    shown: list[Any]
    carriers: Any
    hooks: Any

    order: int = 1
    outer: Any = None   # of second derivatives, or on constants

    def __init__(self, grad_mode: Any, waits: Any) -> None:
        super().__init__()
        self.grad_mode = grad_mode
        self.waits = waits
        self.waiting = []
        self.copied = []
        self.made = []
        self.shown = []
        self.carriers = None
        self.hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def __enter__(self) -> None:
        if kept.outside:
            kept.keep(kept.outside)
        if calls:   # perhaps of this thread
            self.outer = getattr(thread, "call", None)
        thread.call = self
        calls.append(self)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if self.carriers is not None:
                self.carriers.close(keep=kind is None)
        finally:
            if self.outer is None:
                del thread.call
            else:
                thread.call = self.outer
            while self in calls:
                calls.remove(self)
            kept.keep(self.made)

    def announce(self) -> None:
        calls.append(self)   # once more: `of_several` in every thread

    def numbers(self) -> Any:
        """All that are alive."""
        references = self.made if self.carriers is None else self.made + self.carriers.references()
        found = [reference() for reference in references]
        return [n for n in found if n is not None and is_dual(n)]


class SecondCall(Call):
    """One second_order, which is differentiated at once, from its end."""

    order: int = 2

    def __init__(self) -> None:
        super().__init__(True, waits=False)


thread: Any = threading.local()
calls: list[Any] = []   # of all threads


def running() -> Any:
    """This thread's, or, in a worker that f has started, that of the numbers at hand.

    None outside, where nothing waits.
    """
    return getattr(thread, "call", None)


def of_its_call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    in_turn: bool = True,
) -> Any:
    """function() in the call to which the numbers among the arguments belong, which no other
    running call may share.

    in_turn: one thread after another. Not for what may start threads and wait for them.
    """
    numbers = [a for a in tree_flatten((args, kwargs))[0] if is_dual(a)]
    owners = {a.call for a in numbers if a.call is not None}
    here = running()
    if len(owners | {here} - {None}) > 1:
        raise NoRule(
            "fastscore.jvp: f computes with the numbers of another jvp that runs at the same time."
        )
    if not owners:
        return function()

    (call,) = owners
    if here is None:
        call.share()
        thread.call = call
    try:
        with call.turn() if in_turn else contextlib.nullcontext():
            return function()
    finally:
        if here is None:
            del thread.call


def of_several() -> bool:
    """Whether numbers may belong to another call than this thread's."""
    return bool(calls) and (len(calls) > 1 or not hasattr(thread, "call"))


def constant_block() -> Any:
    """Whether grad mode was switched off inside f.

    An autograd.Function's forward is no such block: its backward carries gradients.
    """
    return not torch.is_grad_enabled() and switched_off()


def switched_off() -> Any:
    if not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled():
        raise NoRule(
            "fastscore.jvp: an autograd.Function cannot be carried through with its tangents."
        )
    call = running()
    return call is None or call.grad_mode


def settle() -> None:
    """Before a write: compute what waits, for it may read what is written."""
    call = running()
    if call is None:
        return
    with call.lock:   # until all is computed: another thread may have begun
        references = call.waiting
        call.waiting = []
        for reference in references:
            waiting = reference()
            if waiting is not None:
                waiting.stack   # noqa: B018


def note_copy(*stacks: Any) -> None:
    """What should share memory and does not: from now on neither may be written to."""
    call = running()
    if call:
        call.copied += [weakref.ref(memory(s)) for s in stacks]
