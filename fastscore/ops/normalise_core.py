"""A normalisation without derivatives: its form, its reference, and the calls of its kernels."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastscore import backend as _backend
from fastscore import direct
from fastscore.ops.activations import ACTIVATIONS
from fastscore.ops.functions import along, contiguous, without_memory


class Form(NamedTuple):
    """What a normalisation is, beyond its tensors: 0 groups stand for one per channel; then alpha
    says whether m̂ is added."""

    groups: int
    alpha: bool
    beta: bool
    eps: float
    activation: str | None


def normalise_ref(x: Tensor, coef: Tensor, labels: Tensor | None, form: Form) -> Tensor:
    """y = f(γ (h + α m̂) + β) in the compute dtype, rounded once; h over channels or groups, m̂ as
    in instance_norm_plus.

    coef: (R, KC), rows of γ, α, β; R = 1, B, or L with labels (B,).
    """
    B, C = x.shape[:2]
    G, S = form.groups or C, x[0, 0].numel() if B else 0
    u = x.to(coef.dtype).reshape(B, G, C // G * S)
    centred = u - u.mean(-1, keepdim=True)
    # biased over pixels
    h = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + form.eps)
    # (1 or B, C, 1)
    gamma, alpha, beta = (
        None if c is None else c[..., None] for c in _columns(rows(coef, labels), C, form)
    )
    # One that is not finite makes its channel NaN, on every back end: what ∞ makes of it depends on
    # the order of the products.
    gamma = gamma + sum(0 * c.detach() for c in (gamma, alpha, beta) if c is not None)
    h = h.reshape(B, C, S)
    if alpha is not None:
        mean = u.mean(-1, keepdim=True)  # (B, C, 1); alpha comes with one group per channel
        deviation = mean - mean.mean(1, keepdim=True)
        # unbiased; with one channel 0 / √eps
        variance = deviation.square().sum(1, keepdim=True) / max(C - 1, 1)
        h = h + alpha * (deviation * torch.rsqrt(variance + form.eps))
    y = ACTIVATIONS[form.activation].function(gamma * h if beta is None else gamma * h + beta)
    return _in_layout_of(y.to(x.dtype).reshape(x.shape), x)


def rows(coef: Tensor, labels: Tensor | None) -> Tensor:
    return coef if labels is None else coef[_from_zero(labels, len(coef))]


def _from_zero(labels, count):
    """Labels whose negative ones are out of range too, where indexing would count them from the
    end."""
    return torch.where(labels < 0, count, labels)


def _columns(coef, C, form):
    """γ, α or None, β or None."""
    parts = iter(coef.split(C, -1))
    return next(parts), next(parts) if form.alpha else None, next(parts) if form.beta else None


def _dual_ref(x, t, coef, tcoef, labels, form):
    """ẏ (M, B, C, *) through the reference; tcoef (M, R, KC) or None."""
    tcoef = torch.zeros_like(coef).expand(len(t), *coef.shape) if tcoef is None else tcoef

    def f(x, coef):
        return normalise_ref(x, coef, labels, form)

    t = _spread_nan(t, 1 if form.alpha else form.groups or x.shape[1])
    return (
        torch.stack([along(f, (x, coef), pair) for pair in zip(t, tcoef)])
        if len(t)
        else torch.zeros_like(t)
    )


def _spread_nan(t, domains):
    """t (M, B, C, *), NaN all over a domain of channels where any of it is not finite: what it
    reaches, as a coefficient would."""
    if not t.numel():
        return t
    each = t.flatten(2).unflatten(2, (domains, -1))
    return (each + (0 * each.detach()).sum(-1, keepdim=True)).reshape(t.shape)


def _gradient_ref(x, t, coef, tcoef, labels, gy, gty, form):
    """Cotangents of (x, t, coef, tcoef) for those of (y, ẏ), by plain reverse mode through the
    reference."""
    gy = torch.zeros_like(x) if gy is None else gy
    tcoef = torch.zeros_like(coef).expand(len(t), *coef.shape) if tcoef is None else tcoef

    def values(x, t, coef, tcoef):
        return normalise_ref(x, coef, labels, form), _dual_ref(x, t, coef, tcoef, labels, form)

    return torch.func.vjp(values, x, t, coef, tcoef)[1]((gy, gty))


def in_clusters(x: Tensor, form: Form) -> bool:
    """Whether CUDA C++ computes the values of such samples by clusters of blocks, which read x once
    (csrc/normalise.cu), instead of Triton's two passes.

    That depends on the device and on one sample, never on the batch, for their sums differ in the
    last bit.
    """
    if torch.compiler.is_compiling() or not _backend.there("cuda", x.device.type):
        return False
    if x.dtype == torch.float64 or _channels_last(x):
        return False

    _, channels, *pixels = x.shape
    if 0 in x.shape or not all(type(n) is int for n in (channels, *pixels)):
        return False
    sizes = channels, math.prod(pixels)
    return _clusters(x.device, *sizes, form.groups, form.alpha, x.dtype.itemsize) > 0


@functools.lru_cache(1024)
def _clusters(device, channels, pixels, groups, alpha, itemsize):
    """How many the device runs at once; 0 where Triton's kernels serve."""
    if _backend.why_not("triton", device.type) is not None:   # of the gradients
        return 0
    ask = _backend.raw("cuda", "norm_clusters")
    return ask(device.index or 0, channels, pixels, groups, alpha, itemsize)


def run_forward(
    x: Tensor,
    t: Tensor | None,
    coef: Tensor,
    tcoef: Tensor | None,
    labels: Tensor | None,
    form: Form,
    backend: str,
    primal: bool,
    only_statistics: bool = False,
    into: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """The op itself, with no derivative. Statistics (1 + M, B, C, 2): mean and variance of x, mean
    of t and of t (x - mean)."""
    x = _dense(x)
    if backend == "cuda" and not (primal and t is None and in_clusters(x, form)):
        backend = "triton"
    stats = torch.empty(
        (1 if t is None else 1 + len(t), *x.shape[:2], 2), dtype=coef.dtype, device=x.device
    )
    t = None if t is None else _in_layout_of(t, x)
    if into is None:
        outputs = [
            torch.empty_like(a)
            for a, wanted in ((x, primal), (t, t is not None and not only_statistics))
            if wanted
        ]
    else:
        outputs = list(into)
    _backend.call(
        backend,
        "normalise",
        outputs[0] if primal else None,
        None if t is None or only_statistics else outputs[-1],
        stats,
        x,
        t,
        contiguous(coef),
        contiguous(tcoef),
        contiguous(labels),
        *_numbers(form),
    )
    return *outputs, stats


def run_stack_directly(
    s: Tensor,
    coef: Tensor,
    labels: Tensor | None,
    form: Form,
    backend: str,
    keep: bool = False,
) -> Any:
    """run_forward on a stack (1 + M, B, C, *) of x and t, past PyTorch's dispatcher: y and ẏ as one
    stack, beside the statistics with `keep`. None where the call is not plain."""
    door = direct.door if backend == "cpp" else None
    return door and door.normalise_stack(s, coef, labels, *_numbers(form), keep)


def run_backward(
    x: Tensor,
    t: Tensor | None,
    stats: Tensor,
    coef: Tensor,
    tcoef: Tensor | None,
    labels: Tensor | None,
    gy: Tensor | None,
    gty: Tensor | None,
    form: Form,
    backend: str,
    into: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Its transpose, with no derivative."""
    x = _dense(x)
    backend = "triton" if backend == "cuda" else backend
    if t is not None and len(stats) == 1:  # saved by a call that had no tangents
        stats = run_forward(x, t, coef, tcoef, labels, form, backend, False, True)[-1]
    t, gy, gty = (None if g is None else _in_layout_of(g, x) for g in (t, gy, gty))
    gx, gt = into or (torch.empty_like(x), None if t is None else torch.empty_like(t))
    make = torch.empty if x.numel() else torch.zeros
    gcoef = make((len(x), coef.shape[1]), dtype=coef.dtype, device=x.device)
    gtcoef = None if t is None else make((len(t), *gcoef.shape), dtype=coef.dtype, device=x.device)
    _backend.call(
        backend,
        "normalise_backward",
        gx,
        gt,
        gcoef,
        gtcoef,
        x,
        t,
        contiguous(stats),
        contiguous(coef),
        contiguous(tcoef),
        contiguous(labels),
        gy,
        gty,
        *_numbers(form),
    )
    gcoef = _to_rows(gcoef, labels, len(coef))
    if t is None:
        return gx, gcoef
    gtcoef = [_to_rows(g, labels, len(coef)) for g in gtcoef]
    return gx, gt, gcoef, torch.stack(gtcoef) if gtcoef else coef.new_zeros(0, *coef.shape)


def _numbers(form):
    return form.groups, form.alpha, form.beta, form.eps, ACTIVATIONS[form.activation].code


def _to_rows(g, labels, count):
    """Per-sample gradients (B, KC) summed to the rows (R, KC) that the samples used."""
    if labels is not None:
        return _scatter(g, labels, count)
    return g if count == len(g) else g.sum(0, keepdim=True)


def _scatter(g, labels, count):
    """Rows added up by label, in a fixed order, which index_add has on a CPU alone."""
    if g.device.type == "cpu":
        return g.new_zeros(count, g.shape[1]).index_add(0, labels, g)
    return _scatter_by_product(g, labels, count)


def _scatter_by_product(g, labels, count):
    """By the one-hot matrix, in float64: neither autocast nor TensorFloat-32 touches that."""
    hot = labels == torch.arange(count, device=labels.device)[:, None]
    return (hot.double() @ g.double()).to(g.dtype)


def _dense(x):
    """x itself where it is contiguous or channels-last, else a contiguous copy."""
    return (
        x if (x.is_contiguous() or _channels_last(x)) and not without_memory(x) else contiguous(x)
    )


def _channels_last(x):
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _in_layout_of(t, x):
    """t (B, C, *) or (M, B, C, *), laid out as x is."""
    channel = t.dim() - x.dim() + 1
    return (
        contiguous(t.movedim(channel, -1)).movedim(-1, channel)
        if _channels_last(x)
        else contiguous(t)
    )


def pack(columns: list[Tensor]) -> Tensor:
    """Coefficients (C,) or (B, C) side by side: (1, KC), or (B, KC) where any differs between
    samples."""
    if all(c.dim() == 1 for c in columns):
        return torch.cat(columns)[None]
    # len() would make it a constant of an exported graph
    batch = next(c.shape[0] for c in columns if c.dim() == 2)
    return torch.cat([c.expand(batch, -1) for c in columns], -1)
