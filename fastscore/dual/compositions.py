"""Operations, some of whose own derivatives are wrong, missing or NaN, as plain ones that are
right at every order."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from fastscore.dual.formulas import FORMULAS, formula, varies


def _scan(x, dim, join):
    """y_i = x_0 ∘ ... ∘ x_i, in log n steps."""
    n, k = x.shape[dim], 1
    while k < n:
        x = torch.cat(
            [x.narrow(dim, 0, k), join(x.narrow(dim, k, n - k), x.narrow(dim, 0, n - k))], dim
        )
        k *= 2
    return x


@formula("cumprod")
def cumprod(input: Any, dim: Any, *, dtype: torch.dtype | None = None) -> Any:
    if not input.dim():
        return NotImplemented
    return _scan(input if dtype is None else input.to(dtype), dim, torch.mul)


@formula("logaddexp")
def logaddexp(input: Any, other: Any) -> Any:
    if input.is_complex() or other.is_complex():
        return NotImplemented
    larger = input.detach() >= other.detach()
    high = torch.where(larger, input, other)
    low = torch.where(larger, other, input)
    alone = low.detach() == -torch.inf   # then the difference is no number, or has no slope
    difference = torch.where(alone, 0.0, high) - torch.where(alone, 0.0, low)
    return torch.where(alone, high, high - F.logsigmoid(difference))


@formula("logcumsumexp")
def logcumsumexp(input: Any, dim: Any) -> Any:
    if not input.dim() or input.is_complex():
        return NotImplemented
    return _scan(input, dim, logaddexp)


@formula("scatter_reduce")
def scatter_reduce(
    input: Any, dim: Any, index: Any, src: Any, reduce: Any, *, include_self: bool = True
) -> Any:
    """Products: the k-th factor of every place in the k-th round."""
    if reduce != "prod":
        return NotImplemented
    if not input.dim():
        row = scatter_reduce(
            input.reshape(1),
            0,
            index.reshape(-1),
            src.reshape(-1),
            reduce,
            include_self=include_self,
        )
        return row.reshape(())
    if not index.numel():
        return input.clone()

    src = src[tuple(slice(n) for n in index.shape)]
    dim = dim % input.dim()
    rank = _ranks(index, dim)
    room = list(input.shape)
    room[dim] += 1   # the last place takes what is not this round's

    def placed(kept):
        places = torch.where(kept, index, input.shape[dim])
        ones = torch.ones(room, dtype=input.dtype, device=input.device)
        return torch.scatter(ones, dim, places, src).narrow(dim, 0, input.shape[dim])

    if not include_self:
        met = torch.zeros(input.shape, dtype=torch.bool, device=input.device).scatter(
            dim, index, True
        )
        input = torch.where(met, 1.0, input)
    for k in range(int(rank.max()) + 1):
        input = input * placed(rank == k)

    return input


def _ranks(index, dim):
    """How often each index has come before along dim."""
    ordered, order = index.sort(dim=dim, stable=True)
    position = (
        torch.arange(index.shape[dim], device=index.device)
        .reshape(-1, *(1,) * (index.dim() - 1 - dim))
        .expand(index.shape)
    )
    new = torch.ones_like(index, dtype=torch.bool)
    new.narrow(dim, 1, index.shape[dim] - 1).copy_(ordered.diff(dim=dim) != 0)
    first = torch.where(new, position, 0).cummax(dim).values
    return torch.empty_like(index).scatter_(dim, order, position - first)


@formula("index_reduce")
def index_reduce(
    input: Any, dim: Any, index: Any, source: Any, reduce: Any, *, include_self: bool = True
) -> Any:
    if reduce != "prod":
        return NotImplemented
    if not input.dim():
        return scatter_reduce(input, 0, index, source, reduce, include_self=include_self)
    index = index.reshape(-1, *(1,) * (source.dim() - 1 - dim % source.dim())).expand(source.shape)
    return scatter_reduce(input, dim, index, source, reduce, include_self=include_self)


@formula("glu")
def glu(input: Any, dim: Any = -1) -> Any:
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


@formula("hardsigmoid")
def hardsigmoid(input: Any, inplace: bool = False) -> Any:
    return NotImplemented if inplace else (input / 6 + 0.5).clamp(0, 1)


@formula("heaviside")
def heaviside(input: Any, values: Any) -> Any:
    return torch.where(input == 0, values, (input > 0).to(values.dtype))


@formula("pow", "__pow__")
def power(input: Any, exponent: Any) -> Any:
    """PyTorch's slope of 0 to a power, 0 · log 0, has no gradient.

    Its forward mode takes the real part of a complex power's tangent.
    """
    dtype = torch.result_type(input, exponent)
    if dtype.is_complex:
        pair = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in (input, exponent)]
        real = any(isinstance(a, torch.Tensor) and not a.is_complex() for a in (input, exponent))
        return pair[0] ** pair[1] if real else NotImplemented
    if not isinstance(exponent, torch.Tensor) or (
        isinstance(input, torch.Tensor) and (varies(input) or hasattr(type(input), "stack"))
    ):
        return NotImplemented

    if not isinstance(input, torch.Tensor):
        input = torch.full(
            (), input, dtype=torch.result_type(exponent, input), device=exponent.device
        )

    zero = input == 0
    return torch.where(zero, input ** exponent.detach(), torch.where(zero, 1.0, input) ** exponent)


@formula("__rpow__")
def power_of(exponent: Any, input: Any) -> Any:
    return power(input, exponent)


@formula("cdist")
def cdist(x1: Any, x2: Any, p: Any = 2.0, compute_mode: Any = None) -> Any:
    return _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


@formula("pdist")
def pdist(input: Any, p: Any = 2.0) -> Any:
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _length(input[i] - input[j], p)


def _length(d, p):
    return _two_norm(d, -1) if p == 2 else torch.linalg.vector_norm(d, p, -1)


def _two_norm(x, dim=None, keepdim=False, dtype=None):
    """Its slope at zero is zero, as PyTorch's, whose tangent has a gradient of NaN there."""
    if x.is_complex() or not x.dim():
        return NotImplemented
    x = x if dtype is None else x.to(dtype)
    dim = tuple(range(x.dim())) if dim is None else dim
    wide = x if x.dtype == torch.float64 else x.float()
    square = wide.square().sum(dim, keepdim=keepdim)
    apart = square.detach() != 0
    return torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0).to(x.dtype)


def _norm(x, p, dim, keepdim, dtype):
    """Of vectors, 1 < p < ∞; the others have no slope at zero that could be lost."""
    if p == 2:
        return _two_norm(x, dim, keepdim, dtype)
    if (
        not isinstance(p, int | float)
        or not 1 < p < math.inf
        or not x.dim()
        or x.dtype not in (torch.float32, torch.float64)
    ):
        return NotImplemented

    x = x if dtype is None else x.to(dtype)
    dim = tuple(range(x.dim())) if dim is None else dim
    zero = x.detach() == 0
    powers = torch.where(zero, 0.0, torch.where(zero, 1.0, x).abs() ** p).sum(dim, keepdim=keepdim)
    apart = powers.detach() != 0
    return torch.where(apart, torch.where(apart, powers, 1.0) ** (1 / p), 0.0)


@formula("vector_norm", holders=(torch.linalg,))
def vector_norm(
    x: Any,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    return _norm(x, ord, dim, keepdim, dtype)


@formula("norm", holders=(torch, torch.Tensor))
def norm(
    input: Any,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    out: Any = None,
    dtype: torch.dtype | None = None,
) -> Any:
    return (
        _norm(input, 2 if p in ("fro", None) else p, dim, keepdim, dtype)
        if out is None
        else NotImplemented
    )


@formula("norm", holders=(torch.linalg,))
def matrix_or_vector_norm(
    A: Any,
    ord: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    of_vectors = isinstance(dim, int) or (dim is None and A.dim() == 1)
    return (
        _norm(A, 2 if ord is None else ord, dim, keepdim, dtype)
        if ord is None or of_vectors
        else NotImplemented
    )


@formula("normalize", holders=(F,))
def normalize(input: Any, p: Any = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    size = _two_norm(input, dim, True) if p == 2 and out is None else NotImplemented
    return size if size is NotImplemented else input / size.clamp_min(eps)


@formula("binary_cross_entropy")
def binary_cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    if size_average is not None or reduce is not None or reduction not in ("none", "sum", "mean"):
        return NotImplemented

    def log(t):
        inside = t.detach() > 0
        return torch.where(inside, torch.where(inside, t, 1.0).log(), -torch.inf).clamp(min=-100)

    loss = -(target * log(input) + (1 - target) * log(1 - input))
    loss = loss if weight is None else loss * weight
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


def linear_cross_entropy(
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any = None,
    options: Any = None,
    **kwargs: Any,
) -> Any:
    """Not in chunks, whose autograd.Function has a tangent of zero."""
    if linear_weight.dim() != 2:
        return NotImplemented
    kwargs["ignore_index"] = -100 if kwargs.get("ignore_index") is None else kwargs["ignore_index"]
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **kwargs)


if hasattr(F, "linear_cross_entropy"):
    FORMULAS[F.linear_cross_entropy] = linear_cross_entropy


@formula("normal", holders=(torch,))
def normal(
    mean: Any, std: Any = 1.0, size: Any = None, *, generator: Any = None, **kwargs: Any
) -> Any:
    """The numbers of torch.normal, which counts as a constant for autograd."""
    if size is not None or kwargs:
        return NotImplemented
    like = mean if isinstance(mean, torch.Tensor) else std
    shape = torch.broadcast_shapes(*(c.shape for c in (mean, std) if isinstance(c, torch.Tensor)))
    return mean + std * torch.empty(shape, dtype=like.dtype, device=like.device).normal_(
        generator=generator
    )
