"""Ordinary tensors that dual numbers are written into.

They and their base become dual numbers until f has ended.
"""

import sys
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from fastscore.dual.call import NoRule, running
from fastscore.dual.number import Dual
from fastscore.dual.stacks import aligned


class Carriers:
    """What one jvp has turned into dual numbers, so that it can be turned back."""

    loose: dict[Any, Any]
    families: list[Any]

    def __init__(self, grad_mode: Any) -> None:
        self.grad_mode = grad_mode
        # Tensors without views: id -> a weak reference, and the tensor that it was.
        self.loose = {}
        self.families = []

    def note(self, t: Tensor, original: Any) -> None:
        key, loose = id(original), weakref.ref(self)
        self.loose[key] = (
            weakref.ref(t, lambda _: (here := loose()) and here.loose.pop(key, None)),
            original,
        )

    def references(self) -> Any:
        return [
            reference
            for reference, _ in [
                *self.loose.values(),
                *(m for family in self.families for m in family.members),
            ]
        ]

    def close(self, keep: Any) -> None:
        """Turn everything back.

        keep: with the values that it has now, as a buffer of a module has them after an ordinary
        pass.
        """
        try:
            self._close(keep)
        except BaseException:   # of autograd, where one cannot take its value
            self._close(keep=False)
            raise

    def _close(self, keep):
        with torch.set_grad_enabled(self.grad_mode):
            for family in self.families:
                family.close(keep)
            for reference, original in list(self.loose.values()):
                _turn_back(reference, original, keep)


class _Family:
    """One tensor that owns its memory, with its views.

    A stack of all of that memory, and who has become dual numbers.
    """

    def __init__(self, base: Any, n: Any) -> None:
        self.base = base
        self.members = []
        self.first = base.storage_offset()
        self.length = _span(base)
        flat = (
            base.reshape(-1)
            if base.is_contiguous()
            else base.as_strided((self.length,), (1,), self.first)
        )
        self.stack = torch.cat([flat[None], flat.new_zeros(n - 1, self.length)])

    def join(self, t: Tensor) -> None:
        """Make a view, or the base itself, dual numbers."""
        own = t is self.base or (t._is_view() and t._base is self.base)
        first = t.storage_offset() - self.first
        if not own or first < 0 or first + _span(t) > self.length:
            _refuse("a detached alias of what dual numbers were written into cannot be carried.")

        # a view made without gradients could not be written to with them.
        with torch.enable_grad():
            s = self.stack.as_strided(
                (len(self.stack), *t.shape), (self.length, *t.stride()), first
            )

        original = become(t, s)
        if t is self.base:
            self.base = original

        self.members.append((weakref.ref(t), original))

    def close(self, keep: Any) -> None:
        if keep and any(reference() is not None for reference, _ in self.members):
            value = self.stack[0].as_strided(self.base.shape, self.base.stride())
            self.base.copy_(value)
        for reference, original in self.members:
            _turn_back(reference, original, keep=False)


def _turn_back(reference, original, keep):
    t = reference()
    if t is None or not hasattr(type(t), "stack"):
        return
    value = t.stack[0]
    _swap(t, original)
    if keep:
        # An empty one that was given as out=
        t = t if t.shape == value.shape else t.resize_(value.shape)
        t.copy_(value)


def become(t: Tensor, s: Tensor) -> Any:
    """Make the very object t dual numbers with this stack; the tensor that it was."""
    other = Dual(s)
    _swap(t, other)
    return other


def _swap(a, b):
    """What torch.utils.swap_tensors does, which does not let views or autograd refer to what is
    swapped."""
    try:
        torch._C._swap_tensor_impl(a, b)
    except RuntimeError:
        _refuse(
            "dual numbers were written into an ordinary tensor that something refers to weakly."
        )
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__


def _span(t):
    """How many places of its memory t reaches over."""
    return (
        1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
        if t.numel()
        else 0
    )


def _storage(t):
    with torch._C.DisableTorchFunction():
        return t.untyped_storage()


def holders(t: Tensor) -> Any:
    """How many tensors lie in t's memory."""
    try:
        storage = _storage(t)
    except RuntimeError:   # inside a transform, whose tensors have none of their own
        return 2
    return torch._C._storage_Use_Count(storage._cdata) - 1   # the one that asks


def _named(t):
    """How many references Python has to t's memory itself, as t.untyped_storage() gives one."""
    storage = _storage(t)
    return sys.getrefcount(storage)


_UNNAMED = _named(torch.zeros(1, device="cpu"))


def _refuse(why):
    raise NoRule(f"fastscore.jvp: {why}")


def check(name: str, target: Any, views: Any = 0) -> None:
    """Whether an ordinary tensor, with so many views, may become dual numbers, as autograd would
    let it become part of its graph.

    To be asked before anything is computed from it, which may save it.
    """
    call = running()
    if call is not None and call.thread != threading.get_ident():
        # Another thread may hold the tensor while it is swapped, and autograd, on the slower path,
        # loses one of two simultaneous writes.
        raise NotImplementedError(
            f"fastscore.jvp: {name} writes what depends on x into an ordinary tensor in a thread "
            "that f has started, where PyTorch can lose its derivatives; return the parts and join "
            "them in f, or make the tensor by torch.zeros_like."
        )

    # The backward pass would call a checkpoint again when nothing turns this back.
    if call is None or call.hooks != torch._C._autograd._top_saved_tensors_default_hooks(True):
        _refuse(f"{name} would write dual numbers into an ordinary tensor inside a checkpoint.")

    leaf = target.requires_grad and (target.is_leaf or (target._is_view() and target._base.is_leaf))
    if target.is_inference() and not torch.is_inference_mode_enabled():
        _refuse(f"{name} would write into an inference tensor outside inference mode.")
    if (
        type(target) is not torch.Tensor
        or target.layout != torch.strided
        or (leaf and torch.is_grad_enabled())
    ):
        _refuse(
            f"{name} would write dual numbers into a {type(target).__name__} that cannot hold them."
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(target):
        _refuse(
            f"{name} would write dual numbers into an ordinary tensor inside a transform of "
            "torch.func."
        )
    if not _storage(target).resizable() or target.is_shared():
        _refuse(
            f"{name} would write dual numbers into memory that is shared with NumPy or another "
            "process."
        )

    # TorchScript, DLPack or a graph that saved it would not see the write.
    if target.__dict__ or _named(target) > _UNNAMED or target._use_count() > 1 + views:
        _refuse(
            f"{name} would write dual numbers into an ordinary tensor that is held elsewhere or "
            "has attributes."
        )


def fill(target: Any, s: Tensor) -> bool:
    """Make an ordinary tensor dual numbers with this fresh stack, (1 + M, *target.shape) up to
    dtype and strides.

    False where it has views or aliases: `carry` it then, and write. It has been checked.
    """
    if target._is_view() or holders(target) > 1:
        return False
    _note(target, become(target, fitted(s, target)))
    return True


def fitted(s: Tensor, target: Any) -> Any:
    """The stack in the dtype and the strides of target."""
    s = s.to(target.dtype)
    if any(n > 1 and a != b for n, a, b in zip(target.shape, s.stride()[1:], target.stride())):
        strides = (_span(target), *target.stride())
        s = torch.empty_strided(
            (len(s), *target.shape), strides, dtype=s.dtype, device=s.device
        ).copy_(s)
    return s


def replace(target: Any, s: Tensor, name: str) -> Any:
    """Give an empty tensor, which has been checked, other contents and another shape, as out=
    does."""
    if target._is_view() or holders(target) > 1:
        _refuse(f"{name} would change the shape of an ordinary tensor that has aliases.")
    _note(target, become(target, s))
    return target


def carry(target: Any, n: Any, name: str) -> None:
    """Make an ordinary tensor that has been checked, and the tensor that it is a view of, dual
    numbers with n - 1 tangents of zero."""
    base = target._base if target._is_view() else target
    own = holders(target)
    if base is target and own == 1:
        _note(target, become(target, _with_zeros(target, n)))
        return

    carriers = _carriers()
    # TorchScript, an autograd.Function or the backward pass would read them unseen.
    if own > 1 + (base is not target):
        _refuse(f"{name} would write dual numbers into an ordinary tensor that has aliases.")
    if base is not target:
        check(name, base, views=1)

    family = _Family(base, n)
    carriers.families.append(family)
    family.join(base)
    if base is not target:
        family.join(target)


def _with_zeros(t, n):
    """A stack of t and n - 1 tangents of zero, strided like t."""
    if t.is_contiguous():
        return torch.cat([t[None], t.new_zeros(n - 1, *t.shape)])
    s = torch.empty_strided(
        (n, *t.shape), (_span(t), *t.stride()), dtype=t.dtype, device=t.device
    ).zero_()
    s[0] = t
    return s


def _carriers():
    call = running()
    if call.carriers is None:
        call.carriers = Carriers(call.grad_mode)
    return call.carriers


def _note(t, original):
    _carriers().note(t, original)


def aligned_copy(s: Tensor, shape: Any) -> Any:
    """A fresh stack of values that broadcast to `shape`."""
    s = aligned(s, len(shape))
    return s.expand(len(s), *shape).clone(memory_format=torch.contiguous_format)
