"""Sums, products, powers, pointwise functions."""

from collections.abc import Callable
from typing import Any

import torch

from fastscore.dual.functions import add_to_value, softmax_stack
from fastscore.dual.number import joined, like, stack, value
from fastscore.dual.rules_shape import chunk, constant, most, neg
from fastscore.dual.samples import alone, along, anyhow, level
from fastscore.dual.slopes import SLOPES, function_of
from fastscore.dual.stacks import aligned, beside, both, is_dual, padded, shift
from fastscore.dual.table import RULES, rule


def _reduction(name):
    def apply(x, dim=None, keepdim=False, **kwargs):
        s = stack(x)
        if dim is None or dim in ((), []):
            dim = tuple(range(x.dim()))
        dims = shift(dim) if isinstance(dim, int) else tuple(map(shift, dim))
        return like(x, getattr(s, name)(dims, keepdim=keepdim, **kwargs))

    return apply


for _name in ("sum", "mean"):
    rule(_name, apart=along())(_reduction(_name))


@rule("cumsum", apart=along())
def cumsum(x: Any, dim: Any, **kwargs: Any) -> Any:
    return like(x, stack(x).cumsum(shift(dim), **kwargs))


def as_tensor(c: Any, place: Any, dtype: torch.dtype | None) -> Any:
    """A number as a tensor, made on the device: a copy from the host would be waited for."""
    return (
        c.to(dtype)
        if isinstance(c, torch.Tensor)
        else torch.full((), c, dtype=dtype, device=place.device)
    )


def _chosen(condition, *args):
    return not is_dual(condition) and level(condition, *args)


@rule("where", apart=_chosen)
def where(condition: Any, input: Any = None, other: Any = None) -> Any:
    if input is None or is_dual(condition):
        return NotImplemented

    x = input if is_dual(input) else other
    n = most(x, (input, other))
    dtype = torch.result_type(value(input), value(other))
    dims = max(c.dim() for c in (condition, input, other) if isinstance(c, torch.Tensor))

    def whole(c):
        if is_dual(c):
            return aligned(padded(stack(c).to(dtype), n), dims)
        return aligned(constant(as_tensor(c, condition, dtype), n), dims)

    return like(x, torch.where(condition, whole(input), whole(other)))


@rule(torch.Tensor.where, apart=lambda x, condition, other: _chosen(condition, x, other))
def where_of(x: Any, condition: Any, other: Any) -> Any:
    return where(condition, x, other)


@rule("masked_fill", apart=alone(lambda rank, mask, value: mask.dim() <= rank))
def masked_fill(x: Any, mask: Any, value: Any) -> Any:
    if not is_dual(x) or is_dual(value):
        return where(mask, value, x)
    s = aligned(stack(x), mask.dim())
    s = s.expand(len(s), *torch.broadcast_shapes(s.shape[1:], mask.shape)).masked_fill(mask, 0)
    return like(x, add_to_value(s, torch.zeros_like(s[0]).masked_fill(mask, value)))


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


@rule("add", "__add__", "__radd__", apart=level)
def add(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    b = _summand(b, a) * alpha if alpha != 1 else b
    if is_dual(a) and is_dual(b):
        s, t = both(stack(a), stack(b))
        return like(a, s + t if a.order == 1 else _sum(s, t))

    x, c = (a, b) if is_dual(a) else (b, a)
    s = stack(x)
    if not isinstance(c, torch.Tensor):
        return like(x, add_to_value(s, c))

    s, c = beside(s, c)
    value, rest = aligned(s, c.dim()).split_with_sizes((1, len(s) - 1))
    value = value + c
    return like(x, torch.cat([value, rest.expand(len(rest), *value.shape[1:])]))


def _sum(s, t):
    """Second derivatives that only one of them has are those of the sum."""
    if len(s) == len(t):
        return s + t
    longer, shorter = (s, t) if len(s) > len(t) else (t, s)
    head, rest = longer.split_with_sizes((len(shorter), len(longer) - len(shorter)))
    head = head + shorter
    return torch.cat([head, rest.expand(len(rest), *head.shape[1:])])


@rule("sub", "subtract", "__sub__", apart=level)
def sub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    b = _summand(b, a)
    b = b * alpha if alpha != 1 else b
    return add(a, neg(b) if is_dual(b) else -b)


@rule("rsub", "__rsub__", apart=level)
def rsub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return sub(b, a, alpha=alpha)


def leibniz(times: Callable[..., Any], x: Any, y: Any) -> Any:
    """Leibniz: (a b)' = a' b + a b' and (a b)'' = a'' b + 2 a' b' + a b''."""
    s, t = both(stack(x), stack(y))
    (a, da, dda), (b, db, ddb) = x.coefficients(s), y.coefficients(t)
    parts = [times(a, b), times(da, b) + times(a, db)]
    if x.order == 2:
        second = 2 * times(da, db)
        second = second if dda is None else second + times(dda, b)
        parts.append(second if ddb is None else second + times(a, ddb))
    return like(x, torch.cat(parts))


@rule("mul", "multiply", "__mul__", "__rmul__", apart=level)
def mul(a: Any, b: Any) -> Any:
    if is_dual(a) and is_dual(b):
        return leibniz(torch.mul, a, b)
    x, c = (a, b) if is_dual(a) else (b, a)
    s, c = beside(stack(x), c)
    return like(x, aligned(s, c.dim() if isinstance(c, torch.Tensor) else 0) * c)


@rule("div", "divide", "true_divide", "__truediv__", apart=level)
def div(a: Any, b: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    if not is_dual(b):
        s, b = beside(stack(a), b)
        return like(a, aligned(s, b.dim() if isinstance(b, torch.Tensor) else 0) / b)
    return mul(a, reciprocal(b))


@rule("__rdiv__", "__rtruediv__", apart=level)
def rdiv(a: Any, b: Any) -> Any:
    return div(b, a)


@rule("addcmul", apart=level)
def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    product = mul(tensor1, tensor2) if is_dual(tensor1) or is_dual(tensor2) else tensor1 * tensor2
    return add(input, product, alpha=value)


@rule("lerp", apart=level)
def lerp(input: Any, end: Any, weight: Any) -> Any:
    difference = sub(end, input) if is_dual(input) or is_dual(end) else end - input
    return add(input, mul(difference, weight))


def elementwise(x: Any, function: Callable[..., Any], slope: Any, curvature: Any) -> Any:
    """Faà di Bruno: f(u)' = f' u' and f(u)'' = f'' u'² + f' u''.

    f' from slope(u, f(u)), f'' from curvature(u, f(u), f'), or 0.
    """
    s = stack(x)
    u, du, ddu = x.coefficients(s)
    y = function(u)
    d = slope(u, y)
    if x.order == 1:
        return like(x, torch.cat([y, d * du]))

    second = torch.zeros_like(du) if curvature is None else curvature(u, y, d) * du.square()
    second = second if ddu is None else second + d * ddu
    return like(x, torch.cat([y, d * du, second]))


def _elementwise(name):
    function = function_of(name)
    slope, curvature = SLOPES[name]
    return lambda x: elementwise(x, function, slope, curvature)


for _name in SLOPES:
    rule(_name, apart=anyhow)(_elementwise(_name))
reciprocal: Any = RULES[torch.reciprocal]
square: Any = RULES[torch.square]
exponential: Any = RULES[torch.exp]
rule(torch.Tensor.__abs__, apart=anyhow)(RULES[torch.abs])


@rule("pow", "__pow__", apart=alone(lambda rank, exponent: is_number(exponent)))
def power(x: Any, exponent: Any) -> Any:
    if is_dual(exponent) and not is_dual(x):
        return _power_of_constant(x, exponent)
    if not is_dual(x) or not is_number(exponent):
        return NotImplemented
    if exponent == 2:
        return square(x)

    n = exponent
    # 0 · x⁻¹ is no number at x = 0.
    first = (lambda u, y: n * u ** (n - 1)) if n else (lambda u, y: torch.zeros_like(u))
    second = None if n in (0, 1) else lambda u, y, d: n * (n - 1) * u ** (n - 2)
    return elementwise(x, lambda u: u**n, first, second)


def _power_of_constant(x, exponent):
    if isinstance(x, complex) or (isinstance(x, torch.Tensor) and x.is_complex()):
        return NotImplemented
    s = stack(exponent)
    x = as_tensor(x, exponent, exponent.dtype)
    y = x ** s[0]
    # 0 to a positive power is flat in the exponent; PyTorch's slope, 0 · log 0, has no gradient.
    return joined(y, y * torch.where(x == 0, 1.0, x).log() * aligned(s, x.dim())[1:])


@rule("glu", apart=along(dim=-1))
def glu(input: Any, dim: Any = -1) -> Any:
    a, b = chunk(input, 2, dim)
    return mul(a, RULES[torch.sigmoid](b))


@rule("softmax", apart=along())
def softmax(
    input: Any, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    if dim is None:
        return NotImplemented
    if input.order == 2:
        return exponential(log_softmax(input, dim, dtype=dtype))
    s = stack(input) if dtype is None else stack(input).to(dtype)
    return like(input, softmax_stack(s, dim))


@rule("log_softmax", apart=along())
def log_softmax(
    input: Any, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    """y' = u' - Σ p u' and y'' = u'' - Σ p (u'' + y'²), with p = exp(y)."""
    if dim is None:
        return NotImplemented
    s = stack(input) if dtype is None else stack(input).to(dtype)
    u, du, ddu = input.coefficients(s)
    across = shift(dim)
    y = u.log_softmax(across)
    p = y.exp()
    first = du - (p * du).sum(across, keepdim=True)
    if input.order == 1:
        return like(input, torch.cat([y, first]))

    bend = first.square() if ddu is None else first.square() + ddu
    second = -(p * bend).sum(across, keepdim=True)
    second = second.expand_as(first) if ddu is None else ddu + second
    return like(input, torch.cat([y, first, second]))


@rule("logsumexp", apart=along())
def logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Any:
    """y' = Σ p u' and y'' = Σ p (u'' + (u' - y')²), with p = exp(u - y)."""
    dims = shift(dim) if isinstance(dim, int) else tuple(map(shift, dim))
    u, du, ddu = input.coefficients(stack(input))
    y = u.logsumexp(dims, keepdim=True)
    p = (u - torch.where(y.isfinite(), y, 0.0)).exp()   # all at -∞: weights of zero
    first = (p * du).sum(dims, keepdim=True)
    parts = [y, first]
    if input.order == 2:
        bend = (du - first).square()
        parts.append((p * (bend if ddu is None else bend + ddu)).sum(dims, keepdim=True))

    s = torch.cat(parts)
    return like(input, s if keepdim else s.squeeze(dims))
