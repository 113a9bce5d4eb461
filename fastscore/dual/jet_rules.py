"""What each torch function does to jets, on the stack (1 + 2M, B, *) of values, first and second
derivatives.

Linear maps do not know which coefficient they carry, so their rules are those of the dual numbers.
Every rule refuses what would mix samples (their coefficients along a joint direction are not those
of each sample alone) and is made of differentiable operations.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F

from fastscore.dual import rules, rules_math, rules_shape, table
from fastscore.dual.call import NoRule
from fastscore.dual.stacks import shape_of
from fastscore.dual.table import rule

RULES: dict[Any, Any] = {}
# Which a variable refuses, or whose writes nobody sees.
VALUES: Any = table.VALUES - {torch.Tensor.numpy, table.DATA}
jet_rule: Any = functools.partial(rule, table=RULES)


def is_jet(a: Any) -> bool:
    return hasattr(a, "stack")


def kept(x: Any, made: Any) -> Any:
    """Jets from what a rule of the dual numbers made, where the samples are still the first
    dimension."""
    if made is NotImplemented or made is x:
        return made
    if isinstance(made, tuple):
        return tuple(kept(x, m) for m in made)

    s = made.stack if is_jet(made) else made
    if s.is_complex():
        raise NoRule("second_order: no rule carries complex numbers.")
    if not s.is_floating_point():   # integers, a plain value already
        return s
    if s.dim() < 2 or s.shape[1] != x.stack.shape[1]:
        raise NoRule("second_order: the samples would not stay the first dimension.")

    return x.like(s)


def bent(x: Any) -> Any:
    """x with room for second derivatives."""
    return x.like(torch.cat([x.stack, torch.zeros_like(x.stack[1:])])) if x.straight else x


def joined(x: Any, y: Any, first: Any, second: Any) -> Any:
    return kept(x, torch.cat([y, first, second]))


# ---- linear maps, by the rules of dual numbers; a predicate says whether the samples stay apart


def _linear(predicate, *names, holders=table.HOLDERS):
    for holder in holders:
        for function in (getattr(holder, name) for name in names if hasattr(holder, name)):
            if function in rules.RULES:
                RULES[function] = _guarded(rules.RULES[function], predicate)


def _guarded(linear, predicate):
    def apply(*args, **kwargs):
        x = (
            args[0]
            if args
            else next(kwargs.pop(name) for name in ("input", "x", "tensor") if name in kwargs)
        )
        if (
            not is_jet(x)
            or any(map(is_jet, args[1:]))
            or any(map(is_jet, kwargs.values()))
            or not predicate(x, *args[1:], **kwargs)
        ):
            return NotImplemented
        return kept(x, linear(x, *args[1:], **kwargs))

    return apply


def _inner(x, dims):
    """Dimensions other than the samples'."""
    dims = (dims,) if isinstance(dims, int) else dims
    return dims is not None and len(dims) > 0 and all(d % x.dim() for d in dims)


def _along(x, dim=None, *args, dims=None, **kwargs):
    return _inner(x, dim if dims is None else dims)


def _at_least(n):
    return lambda x, *args, **kwargs: x.dim() >= n


def _exactly(n):
    return lambda x, *args, **kwargs: x.dim() == n


def _whole(index, x):
    """Whether an index leaves the samples alone."""
    index = index if isinstance(index, tuple) else (index,)
    if index[0] is Ellipsis:
        used = sum(
            i.dim() if isinstance(i, torch.Tensor) and i.dtype == torch.bool else i is not None
            for i in index[1:]
        )
        return used < x.dim()
    return isinstance(index[0], slice) and index[0] == slice(None)


# In C order a first dimension of B is that of the samples.
_linear(
    _at_least(1), "reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous",
    "clone", "neg", "negative", "__neg__", "to", "type", "float", "double", "half", "bfloat16",
    "cuda", "cpu",
)
_linear(lambda x, *shape: len(shape_of(shape)) == x.dim(), "expand", "repeat", "tile")
_linear(_along, "sum", "mean", "select", "narrow", "index_select", "gather", "cumsum")
_linear(lambda x, *dims: _inner(x, shape_of(dims)), "flip")
_linear(lambda x, shifts, dims=None: _inner(x, dims), "roll")
_linear(lambda x, repeats, dim=None, **kwargs: _inner(x, dim), "repeat_interleave")
_linear(lambda x, dim=0: _inner(x, dim), "unbind")
_linear(lambda x, n, dim=0: _inner(x, dim), "chunk", "split")
_linear(lambda x, dim0, dim1: _inner(x, (dim0, dim1)), "transpose", "swapaxes", "swapdims")
_linear(
    lambda x, source, destination: _inner(x, source) and _inner(x, destination),
    "movedim",
    "moveaxis",
)
_linear(lambda x, *dims: shape_of(dims)[0] % x.dim() == 0, "permute")
_linear(lambda x, index: _whole(index, x), "__getitem__", holders=(torch.Tensor,))
_linear(lambda x, mask, value: mask.dim() <= x.dim(), "masked_fill")
_linear(lambda x, weight, bias=None: x.dim() > 1, "linear")
_linear(
    lambda x, weight, *args, **kwargs: x.dim() == weight.dim(),
    *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)),
)
for _n in (1, 2, 3):
    _linear(_exactly(_n + 2), f"avg_pool{_n}d", f"adaptive_avg_pool{_n}d")
_linear(_exactly(4), "pixel_shuffle", "pixel_unshuffle")
_linear(_exactly(4), "unfold", holders=(F,))
_linear(_exactly(3), "fold", holders=(F,))
_linear(_at_least(3), "interpolate", holders=(F,))
_linear(lambda x, pad, *args, **kwargs: len(pad) // 2 < x.dim(), "pad", holders=(F,))
RULES[torch.Tensor.mT.__get__] = _guarded(rules.RULES[torch.Tensor.mT.__get__], _at_least(3))


def _dropout(function):
    masked = _guarded(rules.RULES[function], _at_least(1))
    return lambda input, p=0.5, training=True, inplace=False: (
        masked(input, p, training) if training and p else input
    )


for _name in ("dropout", "dropout1d", "dropout2d", "dropout3d"):
    RULES[getattr(F, _name)] = _dropout(getattr(F, _name))


def _shaped_like(name):
    def apply(x, other):
        return getattr(x, name)(tuple(other.shape))

    return apply


for _name in ("view", "reshape", "expand"):
    jet_rule(f"{_name}_as")(_shaped_like(_name))


def _several(linear):
    """cat and stack: all of them bent if one is."""

    def apply(tensors, dim=0):
        x = next(filter(is_jet, tensors))
        rank = x.dim() + (linear is rules_shape.stack_of)
        if dim % rank == 0 or any(a.dim() != x.dim() for a in tensors):
            return NotImplemented
        if not all(a.straight for a in tensors if is_jet(a)):
            tensors = [bent(a) if is_jet(a) else a for a in tensors]
        return kept(x, linear(tensors, dim))

    return apply


jet_rule("cat", "concat", "concatenate")(_several(rules_shape.cat))
jet_rule("stack")(_several(rules_shape.stack_of))


@jet_rule("where")
def where(condition: Any, input: Any = None, other: Any = None) -> Any:
    jets = [a for a in (input, other) if is_jet(a)]
    if (
        input is None
        or is_jet(condition)
        or not jets
        or not _aligned(jets[0], condition, input, other)
    ):
        return NotImplemented

    if not all(a.straight for a in jets):
        input, other = (bent(a) if is_jet(a) else a for a in (input, other))

    return kept(jets[0], rules_math.where(condition, input, other))


def _aligned(x, *others):
    """Whether broadcasting leaves the samples the first dimension.

    Other jets have as many dimensions, constants no more.
    """
    return all(
        a.dim() == x.dim() if is_jet(a) else a.dim() <= x.dim()
        for a in others
        if isinstance(a, torch.Tensor)
    )


# ---- arithmetic


@jet_rule("add", "__add__", "__radd__")
def add(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    b = b * alpha if alpha != 1 else b
    x, c = (a, b) if is_jet(a) else (b, a)
    if not _aligned(x, c):
        return NotImplemented
    if not is_jet(c):
        value, rest = x.stack.split([1, len(x.stack) - 1])
        value = value + c
        return kept(x, torch.cat([value, rest.expand(len(rest), *value.shape[1:])]))
    if x.straight == c.straight:
        return kept(x, x.stack + c.stack)

    full, straight = (c, x) if x.straight else (x, c)
    M = x.directions
    head, second = full.stack.split([1 + M, M])
    head = head + straight.stack
    return kept(x, torch.cat([head, second.expand(M, *head.shape[1:])]))


@jet_rule("sub", "subtract", "__sub__")
def sub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return add(a, -b if alpha == 1 else b * -alpha)


@jet_rule("rsub", "__rsub__")
def rsub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return sub(b, a, alpha=alpha)


@jet_rule("mul", "multiply", "__mul__", "__rmul__")
def mul(a: Any, b: Any) -> Any:
    x, c = (a, b) if is_jet(a) else (b, a)
    if not _aligned(x, c):
        return NotImplemented
    if not is_jet(c):
        return kept(x, x.stack * c)
    return _product(torch.mul, x, c)


def _product(times, a, b):
    """Leibniz: (a b)'' = a'' b + 2 a' b' + a b''."""
    (a0, a1, a2), (b0, b1, b2) = a.parts(), b.parts()
    second = 2 * times(a1, b1)
    second = second if a2 is None else second + times(a2, b0)
    second = second if b2 is None else second + times(a0, b2)
    return joined(a, times(a0, b0), times(a1, b0) + times(a0, b1), second)


@jet_rule("div", "divide", "true_divide", "__truediv__")
def div(a: Any, b: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    if is_jet(b):
        return mul(a, b.reciprocal())
    return kept(a, a.stack / b) if _aligned(a, b) else NotImplemented


@jet_rule("__rdiv__", "__rtruediv__")
def rdiv(a: Any, b: Any) -> Any:
    return div(b, a)


@jet_rule("addcmul")
def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    return input + value * (tensor1 * tensor2)


@jet_rule("lerp")
def lerp(input: Any, end: Any, weight: Any) -> Any:
    return input + weight * (end - input)


@jet_rule("matmul", "__matmul__", "bmm", "mm")
def matmul(a: Any, b: Any) -> Any:
    if is_jet(a) and is_jet(b):
        return _product(torch.matmul, a, b) if a.dim() == b.dim() > 2 else NotImplemented
    if is_jet(a):
        return kept(a, a.stack @ b) if 1 < a.dim() >= b.dim() else NotImplemented
    return kept(b, a @ b.stack) if 2 < b.dim() >= a.dim() > 1 else NotImplemented


RULES[torch.Tensor.__rmatmul__] = lambda a, b: matmul(b, a)
