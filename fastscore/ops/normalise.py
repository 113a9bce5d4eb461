"""The normalisations' common core: values and tangents of statistics, affine map and activation in one op.

instance_norm_plus and group_norm_modulate are doors to it; its kernels are csrc/normalise.cpp and kernels/normalise.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastscore import backend as _backend
from fastscore.compiling import allow_in_graph
from fastscore.ops import checks
from fastscore.ops.functions import along, contiguous, plain, quick, save, saved, without_memory

ACTIVATIONS = {None: lambda u: u, "elu": F.elu, "silu": F.silu, "relu": F.relu, "gelu": F.gelu, "softplus": F.softplus}
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}   # as in csrc/activation_cpu.h and kernels/activation.py


class Form(NamedTuple):
    """What a normalisation is, beyond its tensors: 0 groups stand for one per channel; then alpha says whether m̂ is added."""

    groups: int
    alpha: bool
    beta: bool
    eps: float
    activation: str | None


def normalise_ref(x, coef, labels, form):
    """y = f(γ (h + α m̂) + β) in the compute dtype, rounded once; h over channels or groups, m̂ as in instance_norm_plus.

    coef: (R, KC), rows of γ, α, β; R = 1, B, or L with labels (B,).
    """
    B, C = x.shape[:2]
    G, S = form.groups or C, x[0, 0].numel() if B else 0
    u = x.to(coef.dtype).reshape(B, G, C // G * S)
    centred = u - u.mean(-1, keepdim=True)
    h = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + form.eps)  # biased over pixels
    gamma, alpha, beta = (None if c is None else c[..., None] for c in _columns(rows(coef, labels), C, form))   # (1 or B, C, 1)
    # One that is not finite makes its channel NaN, on every back end: what ∞ makes of it depends on the order of the products.
    gamma = gamma + sum(0 * c.detach() for c in (gamma, alpha, beta) if c is not None)
    h = h.reshape(B, C, S)
    if alpha is not None:
        mean = u.mean(-1, keepdim=True)  # (B, C, 1); alpha comes with one group per channel
        deviation = mean - mean.mean(1, keepdim=True)
        variance = deviation.square().sum(1, keepdim=True) / max(C - 1, 1)  # unbiased; with one channel 0 / √eps
        h = h + alpha * (deviation * torch.rsqrt(variance + form.eps))
    y = ACTIVATIONS[form.activation](gamma * h if beta is None else gamma * h + beta)
    return _in_layout_of(y.to(x.dtype).reshape(x.shape), x)


def rows(coef, labels):
    return coef if labels is None else coef[_from_zero(labels, len(coef))]


def _from_zero(labels, count):
    """Labels whose negative ones are out of range too, where indexing would count them from the end."""
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
    return torch.stack([along(f, (x, coef), pair) for pair in zip(t, tcoef)]) if len(t) else torch.zeros_like(t)


def _spread_nan(t, domains):
    """t (M, B, C, *), NaN all over a domain of channels where any of it is not finite: what it reaches, as a coefficient would."""
    if not t.numel():
        return t
    each = t.flatten(2).unflatten(2, (domains, -1))
    return (each + (0 * each.detach()).sum(-1, keepdim=True)).reshape(t.shape)


def _gradient_ref(x, t, coef, tcoef, labels, gy, gty, form):
    """Cotangents of (x, t, coef, tcoef) for those of (y, ẏ), by plain reverse mode through the reference."""
    gy = torch.zeros_like(x) if gy is None else gy
    tcoef = torch.zeros_like(coef).expand(len(t), *coef.shape) if tcoef is None else tcoef

    def values(x, t, coef, tcoef):
        return normalise_ref(x, coef, labels, form), _dual_ref(x, t, coef, tcoef, labels, form)

    return torch.func.vjp(values, x, t, coef, tcoef)[1]((gy, gty))


@quick
class _Normalise(torch.autograd.Function):
    """Outputs: y where `primal`, ẏ (M, B, C, *) where t is given, and always the statistics (no derivative: a cache of x).

    With u the normalised value, y = f(u) and ẏ = f'(u) u̇. The statistics are functions of x in every rule below: a saved mean
    that counts as a constant is what makes stock PyTorch's forward mode wrong through its norms.

    Value -> tangent (this Function again) and cotangent (_Gradient); their derivatives are each other's kernels once more, and
    from the third order on plain PyTorch.
    """

    @staticmethod
    def forward(x, t, coef, tcoef, labels, form, backend, primal):
        return run_forward(x, t, coef, tcoef, labels, form, backend, primal)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, t, coef, tcoef, labels, ctx.form, ctx.backend, ctx.primal = inputs
        stats = output[-1]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        save(ctx, x, t, coef, tcoef, labels, stats)

    @staticmethod
    def backward(ctx, *cotangents):
        x, t, coef, tcoef, labels, stats = saved(ctx)
        gy = cotangents[0] if ctx.primal else None
        gty = cotangents[int(ctx.primal)] if t is not None else None
        if gy is None and gty is None:
            return (None,) * 8
        if gty is None:   # nothing asks for ẏ: the value's own gradient
            gx, gcoef = _gradient(x, None, stats, coef, None, labels, gy, None, ctx.form, ctx.backend)
            return gx, None, gcoef, None, None, None, None, None
        grads = _gradient(x, t, stats, coef, tcoef, labels, gy, gty, ctx.form, ctx.backend)
        return *grads[:3], grads[3] if tcoef is not None else None, None, None, None, None

    @staticmethod
    def jvp(ctx, tx, tt, tcoef_x, ttcoef, *_):
        x, t, coef, tcoef, labels, stats = saved(ctx)
        outputs = []
        if ctx.primal:
            direction = torch.zeros_like(x) if tx is None else tx
            directions = None if tcoef_x is None else tcoef_x[None]
            outputs.append(_normalise(x, direction[None], coef, directions, labels, ctx.form, ctx.backend, False)[0][0])
        if t is not None:
            primals = (x, t, coef) if tcoef is None else (x, t, coef, tcoef)
            given = (tx, tt, tcoef_x) if tcoef is None else (tx, tt, tcoef_x, ttcoef)
            tangents = tuple(torch.zeros_like(p) if d is None else d for p, d in zip(primals, given))

            def tangent(x, t, coef, tcoef=None):
                return _dual_ref(x, t, coef, tcoef, labels, ctx.form)

            outputs.append(plain(lambda *a: along(tangent, a[: len(primals)], a[len(primals) :]), *primals, *tangents))
        return *outputs, None

    @staticmethod
    def vmap(info, in_dims, x, t, coef, tcoef, labels, form, backend, primal):
        fold = _Fold(info.batch_size, in_dims[0], x, coef, labels, in_dims[2], in_dims[4])
        t, tcoef = fold.stacked(t, in_dims[1]), fold.stacked_coefficients(tcoef, in_dims[3])
        outputs = _normalise(fold.x, t, fold.coef, tcoef, None, form, backend, primal)
        *values, stats = outputs
        dims = [0] * primal + [1] * (t is not None) + [1]
        return tuple(fold.unfold(o, d) for o, d in zip((*values, stats), dims)), tuple(dims)


@quick
class _Gradient(torch.autograd.Function):
    """Cotangents (x, coef), or with tangents (x, t, coef, tcoef), for cotangents of y and ẏ.

    Without tangents it is the transpose Jᵀ gy, whose own transpose is the tangent J v; its other derivatives are those of
    ⟨gy, J v⟩, that is this Function with gy in the place of gty.
    """

    @staticmethod
    def forward(x, t, stats, coef, tcoef, labels, gy, gty, form, backend):
        return run_backward(x, t, stats, coef, tcoef, labels, gy, gty, form, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, t, stats, coef, tcoef, labels, gy, gty, ctx.form, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        save(ctx, x, t, stats, coef, tcoef, labels, gy, gty)

    @staticmethod
    def backward(ctx, *cotangents):
        x, t, stats, coef, tcoef, labels, gy, gty = saved(ctx)
        if all(c is None for c in cotangents):
            return (None,) * 10
        if t is None:
            v, w = cotangents
            v, w = torch.zeros_like(x)[None] if v is None else v[None], None if w is None else w[None]
            ggy = _normalise(x, v, coef, w, labels, ctx.form, ctx.backend, False)[0][0]
            gx, _, gcoef, _ = _gradient(x, v, stats, coef, w, labels, None, gy[None], ctx.form, ctx.backend)
            return gx, None, None, gcoef, None, None, ggy, None, None, None
        primals, function = _plain_gradient(x, t, coef, tcoef, labels, gy, gty, ctx.form)
        shapes = (x, t, coef, coef.expand(len(t), *coef.shape) if tcoef is None else tcoef)
        cotangents = [torch.zeros_like(o) if c is None else c for o, c in zip(shapes, cotangents)]
        found = iter(plain(lambda *a: torch.func.vjp(function, *a[: len(primals)])[1](a[len(primals) :]), *primals, *cotangents))
        gx, gt, gcoef, ggty = (next(found) for _ in range(4))
        gtcoef, ggy = next(found) if tcoef is not None else None, next(found) if gy is not None else None
        return gx, gt, None, gcoef, gtcoef, None, ggy, ggty, None, None

    @staticmethod
    def jvp(ctx, tx, tt, tstats, tcoef_x, ttcoef, tlabels, tgy, tgty, *_):
        x, t, stats, coef, tcoef, labels, gy, gty = saved(ctx)
        if t is None:
            if tx is None and tcoef_x is None:
                return _gradient(x, None, stats, coef, None, labels, tgy, None, ctx.form, ctx.backend)
            v, w = (torch.zeros_like(x) if tx is None else tx)[None], None if tcoef_x is None else tcoef_x[None]
            # One call for both terms: a sum of two would lose the tangents of the levels around this rule.
            gx, _, gcoef, _ = _gradient(x, v, stats, coef, w, labels, tgy, gy[None], ctx.form, ctx.backend)
            return gx, gcoef
        primals, function = _plain_gradient(x, t, coef, tcoef, labels, gy, gty, ctx.form)
        given = [tx, tt, tcoef_x, tgty] + [ttcoef] * (tcoef is not None) + [tgy] * (gy is not None)
        tangents = tuple(torch.zeros_like(p) if d is None else d for p, d in zip(primals, given))
        return plain(lambda *a: along(function, a[: len(primals)], a[len(primals) :]), *primals, *tangents)

    @staticmethod
    def vmap(info, in_dims, x, t, stats, coef, tcoef, labels, gy, gty, form, backend):
        fold = _Fold(info.batch_size, in_dims[0], x, coef, labels, in_dims[3], in_dims[5])
        t, stats, gty = (fold.stacked(a, dim) for a, dim in zip((t, stats, gty), (in_dims[1], in_dims[2], in_dims[7])))
        gy = None if gy is None else checks.batch_first(gy, in_dims[6], info.batch_size).flatten(0, 1)
        grads = _gradient(fold.x, t, stats, fold.coef, fold.stacked_coefficients(tcoef, in_dims[4]), None, gy, gty, form, backend)
        if t is None:
            return (fold.unfold(grads[0], 0), fold.reduce(grads[1])), (0, 0)
        gx, gt, gcoef, gtcoef = grads
        gtcoef = torch.stack([fold.reduce(g) for g in gtcoef], 1)
        return (fold.unfold(gx, 0), fold.unfold(gt, 1), fold.reduce(gcoef), gtcoef), (0, 1, 0, 0)


def _plain_gradient(x, t, coef, tcoef, labels, gy, gty, form):
    """(primals, function) of the third order: _gradient_ref in those arguments that are there."""
    primals = [x, t, coef, gty] + [tcoef] * (tcoef is not None) + [gy] * (gy is not None)

    def function(x, t, coef, gty, *rest):
        rest = list(rest)
        tc = rest.pop(0) if tcoef is not None else None
        return _gradient_ref(x, t, coef, tc, labels, rest.pop(0) if gy is not None else None, gty, form)

    return tuple(primals), function


class _Fold:
    """vmap: the mapped dimension becomes part of the batch, and every sample gets its own row of coefficients."""

    def __init__(self, size, x_dim, x, coef, labels, coef_dim, labels_dim):
        x = checks.batch_first(x, x_dim, size)
        self.size, self.batch = size, x.shape[1]
        self.x = x.flatten(0, 1)
        self.labels = None if labels is None else checks.batch_first(labels, labels_dim, size)   # (V, B)
        coef = checks.batch_first(coef, coef_dim, size)   # (V, R, KC)
        self.levels, self.coef = coef.shape[1], self._per_sample(coef)

    def _per_sample(self, coef):
        """(V, R, KC) -> (V B, KC)."""
        if self.labels is not None:
            coef = coef[torch.arange(self.size, device=coef.device)[:, None], _from_zero(self.labels, coef.shape[1])]
        return coef.expand(self.size, self.batch, -1).clone().flatten(0, 1)   # memory of its own: it may be made a dual number

    def reduce(self, g):
        """The transpose: (V B, KC) -> (V, R, KC)."""
        g = g.unflatten(0, (self.size, self.batch))
        if self.labels is not None:
            return torch.stack([_scatter(g_v, labels, self.levels) for g_v, labels in zip(g, self.labels)])
        return g if self.levels == self.batch else g.sum(1, keepdim=True)

    def stacked(self, t, dim):
        """(M, B, C, *) mapped -> (M, V B, C, *); statistics likewise."""
        return None if t is None else checks.batch_first(t, dim, self.size).transpose(0, 1).flatten(1, 2)

    def stacked_coefficients(self, tcoef, dim):
        if tcoef is None:
            return None
        tcoef = checks.batch_first(tcoef, dim, self.size)   # (V, M, R, KC)
        return torch.stack([self._per_sample(c) for c in tcoef.unbind(1)])

    def unfold(self, y, dim):
        return y.unflatten(dim, (self.size, self.batch))


@allow_in_graph
def _normalise_function(x, t, coef, tcoef, labels, groups, alpha, beta, eps, activation, backend, primal):
    if isinstance(eps, torch.SymFloat):   # of a graph that is kept when eps changes, to which the kernels' eps is a constant
        form = Form(groups, alpha, beta, checks.as_tensor(eps, x), activation)
        dual = () if t is None else (_dual_ref(x, t, coef, tcoef, labels, form),)
        return *((normalise_ref(x, coef, labels, form),) if primal else ()), *dual, None
    return _Normalise.apply(x, t, coef, tcoef, labels, Form(groups, alpha, beta, eps, activation), backend, primal)


def _normalise(x, t, coef, tcoef, labels, form, backend, primal):
    """(y if primal, ẏ if t is given, statistics), differentiable where anything asks for it."""
    if _backend.derivative_possible(x, t, coef, tcoef) or torch.compiler.is_compiling():
        return _normalise_function(x, t, coef, tcoef, labels, *form, backend, primal)
    return run_forward(x, t, coef, tcoef, labels, form, backend, primal)


def _gradient(x, t, stats, coef, tcoef, labels, gy, gty, form, backend):
    """(gx, gcoef) without tangents, else (gx, gt, gcoef, gtcoef)."""
    if _backend.derivative_possible(x, t, coef, tcoef, gy, gty):
        return _Gradient.apply(x, t, stats, coef, tcoef, labels, gy, gty, form, backend)
    return run_backward(x, t, stats, coef, tcoef, labels, gy, gty, form, backend)


def normalise(x, coef, labels, form, backend):
    if torch.overrides.has_torch_function_unary(x):   # dual numbers and the like
        return torch.overrides.handle_torch_function(normalise, (x,), x, coef, labels, form, backend)
    chosen = _backend.choose(x.device, backend, cuda=False)
    if chosen == "reference":
        return normalise_ref(x, coef, labels, form)
    return _normalise(x, None, coef, None, labels, form, chosen, True)[0]


def normalise_dual(x, t, coef, labels, form, backend):
    chosen = _backend.choose(x.device, backend, cuda=False)
    if chosen == "reference":
        return normalise_ref(x, coef, labels, form), _dual_ref(x, t, coef, None, labels, form)
    return _normalise(x, t, coef, None, labels, form, chosen, True)[:2]


def run_forward(x, t, coef, tcoef, labels, form, backend, primal, only_statistics=False, into=None):
    """The op itself, with no derivative. Statistics (1 + M, B, C, 2): mean and variance of x, mean of t and of t (x - mean)."""
    x = _dense(x)
    stats = torch.empty((1 if t is None else 1 + len(t), *x.shape[:2], 2), dtype=coef.dtype, device=x.device)
    t = None if t is None else _in_layout_of(t, x)
    if into is None:
        outputs = [torch.empty_like(a) for a, wanted in ((x, primal), (t, t is not None and not only_statistics)) if wanted]
    else:
        outputs = list(into)
    _backend.call(
        backend, "normalise", outputs[0] if primal else None, None if t is None or only_statistics else outputs[-1], stats, x, t,
        contiguous(coef), contiguous(tcoef), contiguous(labels), *_numbers(form),
    )  # fmt: skip
    return *outputs, stats


def run_backward(x, t, stats, coef, tcoef, labels, gy, gty, form, backend, into=None):
    """Its transpose, with no derivative."""
    x = _dense(x)
    if t is not None and len(stats) == 1:   # saved by a call that had no tangents
        stats = run_forward(x, t, coef, tcoef, labels, form, backend, False, True)[-1]
    t, gy, gty = (None if g is None else _in_layout_of(g, x) for g in (t, gy, gty))
    gx, gt = into or (torch.empty_like(x), None if t is None else torch.empty_like(t))
    make = torch.empty if x.numel() else torch.zeros
    gcoef = make((len(x), coef.shape[1]), dtype=coef.dtype, device=x.device)
    gtcoef = None if t is None else make((len(t), *gcoef.shape), dtype=coef.dtype, device=x.device)
    _backend.call(
        backend, "normalise_backward", gx, gt, gcoef, gtcoef, x, t, contiguous(stats), contiguous(coef),
        contiguous(tcoef), contiguous(labels), gy, gty, *_numbers(form),
    )  # fmt: skip
    gcoef = _to_rows(gcoef, labels, len(coef))
    if t is None:
        return gx, gcoef
    gtcoef = [_to_rows(g, labels, len(coef)) for g in gtcoef]
    return gx, gt, gcoef, torch.stack(gtcoef) if gtcoef else coef.new_zeros(0, *coef.shape)


def _numbers(form):
    return form.groups, form.alpha, form.beta, form.eps, _CODES[form.activation]


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
    return x if (x.is_contiguous() or _channels_last(x)) and not without_memory(x) else contiguous(x)


def _channels_last(x):
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _in_layout_of(t, x):
    """t (B, C, *) or (M, B, C, *), laid out as x is."""
    channel = t.dim() - x.dim() + 1
    return contiguous(t.movedim(channel, -1)).movedim(-1, channel) if _channels_last(x) else contiguous(t)


def pack(columns):
    """Coefficients (C,) or (B, C) side by side: (1, KC), or (B, KC) where any differs between samples."""
    if all(c.dim() == 1 for c in columns):
        return torch.cat(columns)[None]
    batch = next(c.shape[0] for c in columns if c.dim() == 2)   # len() would make it a constant of an exported graph
    return torch.cat([c.expand(batch, -1) for c in columns], -1)


def check_image(op, x):
    if x.dim() < 3 or x.shape[1] == 0:
        raise ValueError(f"{op}: x must be (B, C, *) with at least one channel and one spatial dimension; got {tuple(x.shape)}.")


def check_tangents(op, t, x):
    checks.check_float(op, "t", t)
    if t.dim() != x.dim() + 1 or t.shape[1:] != x.shape:
        raise ValueError(f"{op}: t must be (M, {', '.join(map(str, x.shape))}); got {tuple(t.shape)}.")
    if t.dtype != x.dtype or t.device != x.device:
        raise ValueError(f"{op}: t must be {x.dtype} on {x.device} like x; got {t.dtype} on {t.device}.")
    checks.check_as_real(op, "t", t, x)


def _least_eps(dtype):
    """Below it a derivative of a constant channel overflows: that of (σ² + ε)^(-1/2) is of the size of ε^(-3/2)."""
    return torch.finfo(dtype).max ** (-2 / 3)


_LEAST, _LARGEST = _least_eps(torch.float32), torch.finfo(torch.float32).max   # within every compute dtype


def check_form(op, x, groups, alpha, beta, eps, activation):
    if not isinstance(activation, (str, type(None))) or activation not in ACTIVATIONS:
        named = ", ".join(repr(a) for a in ACTIVATIONS if a)
        raise ValueError(f"{op}: activation must be one of None, {named}; got {checks.shown(activation)}.")
    if type(eps) is float and _LEAST <= eps <= _LARGEST:
        return Form(groups, alpha, beta, eps, activation)
    eps = checks.number(op, "eps", eps, above=0)
    if eps < (least := _least_eps(checks.compute_dtype(x.dtype))):
        raise ValueError(f"{op}: eps must be at least {least:.3g}, or derivatives of constant channels overflow; got {eps}.")
    return Form(groups, alpha, beta, float(eps), activation)
