"""Exact score matching: the Fisher divergence, explicit or implicit."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastscore.compiling import eagerly
from fastscore.dual.once import Once
from fastscore.losses.projections import called, check_data, check_score, derivatives
from fastscore.ops import checks


def exact(
    score: Callable[..., Tensor],
    x: Tensor,
    *,
    target: Tensor | Callable[[Tensor], Tensor] | None = None,
    chunk: int = 16,
) -> Tensor:
    """The Fisher divergence of one score from another, or from the unknown score of the data.

        L_b = ½ ‖s(x_b) - t(x_b)‖²                explicit: t is known
        L_b = ½ ‖s(x_b)‖² + tr ∂s/∂x(x_b)
        implicit: differs in expectation by a constant, ½ E‖∇ log p‖²

    Args:
        score: called score(x), or a `models.EnergyScore`. x: data, (B, *), any float dtype.
        target: t, a score called target(x) or a tensor like x; None is the implicit form.
        chunk: how many of the d unit tangents go through the network together. The value alone
            takes the memory of 1 + chunk forward passes; a gradient keeps the activations of all d
            tangents, whatever the chunk.

    Returns:
        (B,), float32 (float64 for float64), differentiable in x and the parameters of score.

    Raises:
        ValueError: a shape that does not fit, or chunk < 1. TypeError: x is no float tensor.

    Source: Hyvärinen 2005, equations 2 and 4.

    >>> exact(lambda x: -x, torch.ones(1, 3))
    tensor([-1.5000])
    >>> exact(lambda x: -x, torch.ones(1, 3), target=torch.zeros(1, 3))
    tensor([1.5000])
    """
    check_data("exact", x, score)
    if target is not None:
        return _explicit(score, x, target)
    return implicit(score, x, checks.integer("exact", "chunk", chunk, 1))


def _explicit(score, x, target):
    s = called("exact", score, x)
    t = target(x) if callable(target) else target
    check_score("exact", s, x)
    checks.check_like("exact", "target", t, x)
    dtype = checks.compute_dtype(x.dtype)
    return 0.5 * checks.per_sample_sum((s.to(dtype) - t.to(dtype)).square())


def implicit(
    score: Callable[..., Tensor], x: Tensor, chunk: int = 16, arguments: tuple[Any, ...] = ()
) -> Tensor:
    s, trace = divergence("exact", score, x, chunk, arguments)
    return trace + 0.5 * checks.per_sample_sum(s.to(trace.dtype).square())


def divergence(
    op: str,
    score: Callable[..., Tensor],
    x: Tensor,
    chunk: int = 16,
    arguments: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor]:
    """s(x) and the trace of its Jacobian, (B,) in the compute dtype.

    d unit tangents, `chunk` at a time.
    """
    dtype, d = checks.compute_dtype(x.dtype), x[:1].numel()
    if d == 0:   # no samples, or samples of no coordinates
        return x, checks.per_sample_sum(x.to(dtype))
    if d > chunk:
        return _in_parts(op, score, x, chunk, arguments)
    return _part(op, score, x, torch.eye(d, dtype=x.dtype, device=x.device), 0, arguments)


@eagerly("the parts of an exact trace count as one evaluation of the network, eagerly")
def _in_parts(op, score, x, chunk, arguments):
    """Of one draw and one state of the network: its first evaluation moves them."""
    d = x[:1].numel()
    trace = 0
    value = None
    once = Once(x.device, score)
    units = torch.eye(d, dtype=x.dtype, device=x.device)
    for first in range(0, d, chunk):
        with once:
            s, part = _part(op, score, x, units[first : first + chunk], first, arguments)
        value = s if value is None else value
        trace = trace + part

    return value, trace


def _part(op, score, x, e, first, arguments):
    """s(x), and the entries of the trace that the units e select."""
    d = x[:1].numel()
    s, js = derivatives(op, score, x, e.view(-1, 1, *x.shape[1:]).expand(-1, *x.shape), arguments)
    # (B, len(e)).
    diagonal = js.reshape(len(e), len(x), d)[:, :, first : first + len(e)].diagonal(dim1=0, dim2=2)
    return s, diagonal.to(checks.compute_dtype(x.dtype)).sum(1)
