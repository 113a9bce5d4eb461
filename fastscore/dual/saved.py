"""What an autograd.Function saves beside its arguments and results.

Its backward computes with it, and where that is differentiated again PyTorch takes it for a
constant: what ctx.t = 2 * x contributes is missing, in silence. Here it depends on the arguments as
the forward's own operations say, which are carried out once more for it.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._library.utils import fill_defaults, has_kwarg_only_args
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx, _SingleLevelFunction
from torch.utils._pytree import tree_flatten

from fastscore.dual.once import Once

running: list[Any] = []   # evaluations, of all threads, in which backwards will be differentiated
# What no change of the arguments moved the first time, by Function and place: looked at once, for
# it takes longer than the Function.
_still: Any = weakref.WeakKeyDictionary()
# Functions that saved arguments and results alone; another time they are taken by surprise, and
# what they drew then would differ, which is refused.
_plain: Any = weakref.WeakSet()
_stock = torch._C._FunctionBase.saved_tensors.__get__
_LIBRARY = torch._library.autograd.__name__
_SUBSTITUTES = "_fastscore_saved"
_STEP = 2.0**-10   # of an argument, relative
_SMOOTH = 2.0**-5   # a change of that size: no jump, as of a mask where the argument crosses zero
_FEW = 0.1   # of the elements may jump


@contextlib.contextmanager
def derived() -> Iterator[None]:
    """Where Functions are applied whose backward will be differentiated."""
    running.append(None)
    try:
        yield
    finally:
        running.pop()


def applied(cls: Any, apply: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """apply(*args), whose node finds what it has saved as functions of the arguments."""
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    if (
        not inputs
        or not torch.is_grad_enabled()
        or torch._C._functorch.maybe_current_level() is not None
        or (cls.__module__.startswith(("fastscore.", "torch."))
        and not _of_operator(cls))
    ):
        return apply(*args, **kwargs)

    versions = [a._version if isinstance(a, Tensor) else 0 for a in args]
    once = None if cls in _plain else _once(cls, inputs)
    with once or contextlib.nullcontext():
        outputs = apply(*args, **kwargs)

    nodes = (o.grad_fn for o in tree_flatten(outputs)[0] if isinstance(o, Tensor))
    node = next((n for n in nodes if isinstance(n, cls._backward_cls)), None)
    if node is None:
        return outputs

    attributes = dict(vars(node))
    computed = [
        (place, t) for place, t in _places(attributes, _stock(node)) if _computed(t, args)
    ]
    if computed:
        _plain.discard(cls)
        written = [
            a for a, n in zip(args, versions) if isinstance(a, Tensor) and a._version != n
        ]
        if once is None:
            once = _once(cls, inputs)
            with once:
                pass   # what is drawn and remembered stays as it is now
        forward = _Forward(cls, args, kwargs, inputs, outputs, node, once, written)
        _connect(node, attributes, {place: forward.of(t, place) for place, t in computed})
    else:
        _plain.add(cls)
    return outputs


def _once(cls, inputs):
    own = _registered(cls)[1:] if _of_operator(cls) else (cls.forward, cls.setup_context)
    return Once(inputs[0].device, *own)


def _of_operator(cls):
    """Whether torch.library has made this Function, for an operator of the user's."""
    return cls.__module__ == _LIBRARY


def _registered(cls):
    """The operator, and the user's setup_context for it, or two None.

    Those where lists of tensors lie between, or nothing was registered.
    """
    forward = cls.forward
    held = dict(zip(forward.__code__.co_freevars, forward.__closure__ or ()))
    if "info" not in held or "op" not in held:
        return None, None
    return held["op"].cell_contents, held["info"].cell_contents._setup_context_fn


class _Forward:
    """The forward of a Function, carried out again with a graph, at most once."""

    def __init__(self, cls, args, kwargs, inputs, outputs, node, once, written):
        self.cls, self.args, self.kwargs, self.outputs = cls, args, kwargs, outputs
        self.inputs, self.needed, self.once = inputs, node.needs_input_grad, once
        self.written = written
        self.found = None

    def of(self, t: Tensor, place: Any) -> Tensor:
        """What stood in this place, with its graph; t itself where it is a constant."""
        if any(a is b for a in self.written for b in self.inputs):
            self._refuse("overwrites its argument")
        if self.found is None:
            try:
                with torch.enable_grad():
                    self.found = self._with_graph()
            except (RuntimeError, TypeError):   # as of out=, which no graph takes
                self.found = {}

        again = self.found.get(place)
        if not isinstance(again, Tensor) or again.shape != t.shape:
            again = t
        still = _still.setdefault(self.cls, set())
        if not again.requires_grad and place not in still:
            if self._moves(t, place):
                self._refuse("hides from autograd how")
            still.add(place)
        if not _close(again, t):
            self._refuse("has another result when it is carried out again")
        if again.requires_grad and forward_ad._current_level >= 0:
            self._refuse("has a forward mode of its own, which has used it already")
        return again

    def _with_graph(self):
        """{place: tensor} of all that is saved, by arguments and results that have a graph."""
        cls, ctx = self.cls, self._context()
        if _of_operator(cls):
            op, setup = _registered(cls)
            if setup is not None:
                named = self._named(op)
                with self.once:
                    setup(ctx=ctx, **named)
        elif _sets_up(cls):
            with self.once:
                cls.setup_context(ctx, self.args, self.outputs)
        else:
            return self._at(lambda a: a)
        return _found(ctx)

    def _named(self, op):
        """What torch.library gives to a setup_context."""
        *args, metadata = self.args
        args, more = fill_defaults(op._schema, args, metadata.keyword_only_args)
        named = {"inputs": args, "output": self.outputs}
        return named | {"keyword_only_inputs": more} if has_kwarg_only_args(op._schema) else named

    def _at(self, change):
        """The same of changed arguments."""
        cls, ctx = self.cls, self._context()
        args = tuple(self._again(a, change) for a in self.args)
        with self.once:
            if _sets_up(cls):
                cls.setup_context(ctx, args, cls.forward(*args, **self.kwargs))
            else:
                cls.forward(ctx, *args, **self.kwargs)
        return _found(ctx)

    def _again(self, a, change):
        if any(a is i for i in self.inputs):
            return change(a.view_as(a))
        # What it remembers, as running statistics, has been updated already.
        return a.clone() if any(a is w for w in self.written) else a

    def _context(self):
        ctx = FunctionCtx()
        ctx.needs_input_grad = self.needed
        return ctx

    def _moves(self, t, place):
        with torch.no_grad():
            try:
                other = self._at(_stepped).get(place)
            except (RuntimeError, TypeError):
                return True
        if not isinstance(other, Tensor) or other.shape != t.shape:
            return True
        moved, change = other != t, (other - t).abs()
        smooth = moved & (change <= _SMOOTH * torch.maximum(other.abs(), t.abs()))
        return bool(smooth.any()) or bool(moved.sum() > _FEW * t.numel())

    def _refuse(self, why):
        raise NotImplementedError(
            f"fastscore: the forward of the autograd.Function {self.cls.__name__} saves what it "
            f"has computed and {why}; a second derivative would be wrong. Save arguments and "
            "results alone."
        )


def _close(a, b):
    """Up to the order of sums."""
    rounding = torch.finfo(b.dtype).eps ** 0.5
    return torch.allclose(a.detach(), b, rtol=rounding, atol=rounding, equal_nan=True)


def _stepped(a):
    signs = 1 - 2 * (torch.arange(a.numel(), device=a.device) % 2).view(a.shape).to(a.dtype)
    return a + _STEP * signs * (a.abs() + _STEP)


def _sets_up(cls):
    return cls.setup_context is not _SingleLevelFunction.setup_context


def _found(ctx):
    return dict(_places(vars(ctx), getattr(ctx, "to_save", None) or ()))


_OWN = ("to_save", "saved_for_forward", "dirty_tensors", "non_differentiable", "needs_input_grad")


def _places(attributes, saved):
    """((name, k), tensor) of a node's attributes and (None, k) of what it saved."""
    for name, value in attributes.items():
        if name not in _OWN:
            for k, t in enumerate(tree_flatten(value)[0]):
                yield (name, k), t
    for k, t in enumerate(saved):
        yield (None, k), t


def _connect(node, attributes, found):
    for name in {name for name, _ in found if name is not None}:
        leaves, spec = tree_flatten(attributes[name])
        leaves = [found.get((name, k), t) for k, t in enumerate(leaves)]
        setattr(node, name, spec.unflatten(leaves))

    saved = {k: t for (name, k), t in found.items() if name is None}
    if saved:
        setattr(node, _SUBSTITUTES, saved)
        type(node).saved_tensors = property(_saved_tensors)


def _saved_tensors(node):
    substitutes = vars(node).get(_SUBSTITUTES, {})
    return tuple(substitutes.get(k, t) for k, t in enumerate(_stock(node)))


def _computed(t, args):
    """Whether a saved tensor may be one that the forward has computed from its arguments."""
    return (
        isinstance(t, Tensor)
        and t.grad_fn is None
        and (not t.requires_grad or t._is_view())   # of an argument, without gradients
        and (t.is_floating_point() or t.is_complex())
        and t.layout == torch.strided
        and not any(
            isinstance(a, Tensor) and a.requires_grad == t.requires_grad and a.is_set_to(t)
            for a in args
        )
    )
