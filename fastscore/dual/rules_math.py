"""Sums, products, powers, pointwise functions."""

from typing import Any

import torch

from fastscore.dual.functions import add_to_value, softmax_stack
from fastscore.dual.number import dual, is_dual, joined, stack, value
from fastscore.dual.rules_shape import chunk, constant
from fastscore.dual.slopes import SLOPES, function_of
from fastscore.dual.stacks import aligned, beside, both, parts, shift
from fastscore.dual.table import RULES, rule


def _reduction(name):
    def apply(x, dim=None, keepdim=False, **kwargs):
        s = stack(x)
        if dim is None or dim in ((), []):
            dim = tuple(range(x.dim()))
        dims = shift(dim) if isinstance(dim, int) else tuple(map(shift, dim))
        return dual(getattr(s, name)(dims, keepdim=keepdim, **kwargs))

    return apply


for _name in ("sum", "mean"):
    rule(_name)(_reduction(_name))


@rule("cumsum")
def cumsum(x: Any, dim: Any, **kwargs: Any) -> Any:
    return dual(stack(x).cumsum(shift(dim), **kwargs))


def as_tensor(c: Any, like: Any, dtype: torch.dtype | None) -> Any:
    """A number as a tensor, made on the device: a copy from the host would be waited for."""
    return (
        c.to(dtype)
        if isinstance(c, torch.Tensor)
        else torch.full((), c, dtype=dtype, device=like.device)
    )


@rule("where")
def where(condition: Any, input: Any = None, other: Any = None) -> Any:
    if input is None or is_dual(condition):
        return NotImplemented

    n = len(stack(input if is_dual(input) else other))
    dtype = torch.result_type(value(input), value(other))
    dims = max(c.dim() for c in (condition, input, other) if isinstance(c, torch.Tensor))

    def whole(c):
        s = stack(c).to(dtype) if is_dual(c) else constant(as_tensor(c, condition, dtype), n)
        return aligned(s, dims)

    return dual(torch.where(condition, whole(input), whole(other)))


RULES[torch.Tensor.where] = lambda x, condition, other: where(condition, x, other)


@rule("masked_fill")
def masked_fill(x: Any, mask: Any, value: Any) -> Any:
    if not is_dual(x) or is_dual(value):
        return where(mask, value, x)
    s = aligned(stack(x), mask.dim())
    s = s.expand(len(s), *torch.broadcast_shapes(s.shape[1:], mask.shape)).masked_fill(mask, 0)
    return dual(add_to_value(s, torch.zeros_like(s[0]).masked_fill(mask, value)))


def is_number(a: Any) -> bool:
    return isinstance(a, int | float)


def _summand(b, a):
    """Integers in a's dtype: unsigned ones would wrap when negated or multiplied."""
    whole = (
        isinstance(b, torch.Tensor)
        and not b.is_floating_point()
        and not b.is_complex()
        and b.dtype != torch.bool
    )
    return b.to(a.dtype) if whole and isinstance(a, torch.Tensor) else b


@rule("add", "__add__", "__radd__")
def add(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    b = _summand(b, a) * alpha if alpha != 1 else b
    if is_dual(a) and is_dual(b):
        a, b = both(stack(a), stack(b))
        return dual(a + b)

    a, c = (a, b) if is_dual(a) else (b, a)
    s = stack(a)
    if isinstance(c, torch.Tensor):
        s, c = beside(s, c)
        s = aligned(s, c.dim())
        shape = torch.broadcast_shapes(s.shape[1:], c.shape)
        s = s.expand(len(s), *shape)

    return dual(add_to_value(s, c))


@rule("sub", "subtract", "__sub__")
def sub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    b = _summand(b, a)
    b = b * alpha if alpha != 1 else b
    return add(a, -b)


@rule("rsub", "__rsub__")
def rsub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return sub(b, a, alpha=alpha)


@rule("mul", "multiply", "__mul__", "__rmul__")
def mul(a: Any, b: Any) -> Any:
    if is_dual(a) and is_dual(b):
        (a, da), (b, db) = map(parts, both(stack(a), stack(b)))
        return joined(a * b, da * b + a * db)
    a, c = (a, b) if is_dual(a) else (b, a)
    s, c = beside(stack(a), c)
    return dual(aligned(s, c.dim() if isinstance(c, torch.Tensor) else 0) * c)


@rule("div", "divide", "true_divide", "__truediv__")
def div(a: Any, b: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    if not is_dual(b):
        s, b = beside(stack(a), b)
        return dual(aligned(s, b.dim() if isinstance(b, torch.Tensor) else 0) / b)
    return mul(a, reciprocal(b))


@rule("__rdiv__", "__rtruediv__")
def rdiv(a: Any, b: Any) -> Any:
    return div(b, a)


@rule("addcmul")
def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    product = mul(tensor1, tensor2) if is_dual(tensor1) or is_dual(tensor2) else tensor1 * tensor2
    return add(input, product, alpha=value)


@rule("lerp")
def lerp(input: Any, end: Any, weight: Any) -> Any:
    difference = sub(end, input) if is_dual(input) or is_dual(end) else end - input
    return add(input, mul(difference, weight))


def _elementwise(slope):
    """slope(x, y): f'(x), given y = f(x)."""

    def rule_for(function):
        def apply(x, *args, **kwargs):
            x, dx = parts(stack(x))
            y = function(x, *args, **kwargs)
            return joined(y, slope(x, y) * dx)

        return apply

    return rule_for


for _name, (_slope, _) in SLOPES.items():
    rule(_name)(_elementwise(_slope)(function_of(_name)))
reciprocal: Any = RULES[torch.reciprocal]
RULES[torch.Tensor.__abs__] = RULES[torch.abs]


@rule("pow", "__pow__")
def power(x: Any, exponent: Any) -> Any:
    if is_dual(exponent) and not is_dual(x):
        if isinstance(x, complex) or (isinstance(x, torch.Tensor) and x.is_complex()):
            return NotImplemented
        s = stack(exponent)
        x = as_tensor(x, exponent, exponent.dtype)
        y = x ** s[0]
        # 0 to a positive power is flat in the exponent; PyTorch's slope, 0 · log 0, has no
        # gradient.
        return joined(y, y * torch.where(x == 0, 1.0, x).log() * aligned(s, x.dim())[1:])
    if not is_dual(x) or not is_number(exponent):
        return NotImplemented

    s = stack(x)
    if exponent == 0:   # 0 · x⁻¹ is no number at x = 0
        return joined(s[0] ** 0, torch.zeros_like(s[1:]))

    x, dx = parts(s)
    return joined(x**exponent, exponent * x ** (exponent - 1) * dx)


@rule("glu")
def glu(input: Any, dim: Any = -1) -> Any:
    a, b = chunk(input, 2, dim)
    return mul(a, RULES[torch.sigmoid](b))


@rule("softmax")
def softmax(
    input: Any, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    if dim is None:
        return NotImplemented
    s = stack(input) if dtype is None else stack(input).to(dtype)
    return dual(softmax_stack(s, dim))


@rule("log_softmax")
def log_softmax(
    input: Any, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    if dim is None:
        return NotImplemented
    s = stack(input) if dtype is None else stack(input).to(dtype)
    x, dx = parts(s)
    y = x.log_softmax(dim)
    return joined(y, dx - (y.exp() * dx).sum(shift(dim), keepdim=True))
