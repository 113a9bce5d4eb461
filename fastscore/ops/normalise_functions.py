"""Derivatives of the normalisations, of every order and in every mode."""

import torch

from fastscore import backend as _backend
from fastscore.compiling import allow_in_graph
from fastscore.ops import checks
from fastscore.ops.functions import along, plain, quick, save, saved
from fastscore.ops.normalise_core import (
    Form,
    _dual_ref,
    _from_zero,
    _gradient_ref,
    _scatter,
    normalise_ref,
    run_backward,
    run_forward,
)


@quick
class _Normalise(torch.autograd.Function):
    """Outputs: y where `primal`, ẏ (M, B, C, *) where t is given, and always the statistics (no
    derivative: a cache of x).

    With u the normalised value, y = f(u) and ẏ = f'(u) u̇. The statistics are functions of x in
    every rule below: a saved mean that counts as a constant is what makes stock PyTorch's forward
    mode wrong through its norms.

    Value -> tangent (this Function again) and cotangent (_Gradient); their derivatives are each
    other's kernels once more, and from the third order on plain PyTorch.
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
        if gty is None:  # nothing asks for ẏ: the value's own gradient
            gx, gcoef = _gradient(
                x, None, stats, coef, None, labels, gy, None, ctx.form, ctx.backend
            )
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
            outputs.append(
                _normalise(
                    x, direction[None], coef, directions, labels, ctx.form, ctx.backend, False
                )[0][0]
            )
        if t is not None:
            primals = (x, t, coef) if tcoef is None else (x, t, coef, tcoef)
            given = (tx, tt, tcoef_x) if tcoef is None else (tx, tt, tcoef_x, ttcoef)
            tangents = tuple(
                torch.zeros_like(p) if d is None else d for p, d in zip(primals, given)
            )

            def tangent(x, t, coef, tcoef=None):
                return _dual_ref(x, t, coef, tcoef, labels, ctx.form)

            outputs.append(
                plain(
                    lambda *a: along(tangent, a[: len(primals)], a[len(primals) :]),
                    *primals,
                    *tangents,
                )
            )
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

    Without tangents it is the transpose Jᵀ gy, whose own transpose is the tangent J v; its other
    derivatives are those of ⟨gy, J v⟩, that is this Function with gy in the place of gty.
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
            v, w = (
                torch.zeros_like(x)[None] if v is None else v[None],
                None if w is None else w[None],
            )
            ggy = _normalise(x, v, coef, w, labels, ctx.form, ctx.backend, False)[0][0]
            gx, _, gcoef, _ = _gradient(
                x, v, stats, coef, w, labels, None, gy[None], ctx.form, ctx.backend
            )
            return gx, None, None, gcoef, None, None, ggy, None, None, None
        primals, function = _plain_gradient(x, t, coef, tcoef, labels, gy, gty, ctx.form)
        shapes = (x, t, coef, coef.expand(len(t), *coef.shape) if tcoef is None else tcoef)
        cotangents = [torch.zeros_like(o) if c is None else c for o, c in zip(shapes, cotangents)]
        found = iter(
            plain(
                lambda *a: torch.func.vjp(function, *a[: len(primals)])[1](a[len(primals) :]),
                *primals,
                *cotangents,
            )
        )
        gx, gt, gcoef, ggty = (next(found) for _ in range(4))
        gtcoef, ggy = (
            next(found) if tcoef is not None else None,
            next(found) if gy is not None else None,
        )
        return gx, gt, None, gcoef, gtcoef, None, ggy, ggty, None, None

    @staticmethod
    def jvp(ctx, tx, tt, tstats, tcoef_x, ttcoef, tlabels, tgy, tgty, *_):
        x, t, stats, coef, tcoef, labels, gy, gty = saved(ctx)
        if t is None:
            if tx is None and tcoef_x is None:
                return _gradient(
                    x, None, stats, coef, None, labels, tgy, None, ctx.form, ctx.backend
                )
            v, w = (
                (torch.zeros_like(x) if tx is None else tx)[None],
                None if tcoef_x is None else tcoef_x[None],
            )
            # One call for both terms: a sum of two would lose the tangents of the levels around
            # this rule.
            gx, _, gcoef, _ = _gradient(
                x, v, stats, coef, w, labels, tgy, gy[None], ctx.form, ctx.backend
            )
            return gx, gcoef
        primals, function = _plain_gradient(x, t, coef, tcoef, labels, gy, gty, ctx.form)
        given = [tx, tt, tcoef_x, tgty] + [ttcoef] * (tcoef is not None) + [tgy] * (gy is not None)
        tangents = tuple(torch.zeros_like(p) if d is None else d for p, d in zip(primals, given))
        return plain(
            lambda *a: along(function, a[: len(primals)], a[len(primals) :]), *primals, *tangents
        )

    @staticmethod
    def vmap(info, in_dims, x, t, stats, coef, tcoef, labels, gy, gty, form, backend):
        fold = _Fold(info.batch_size, in_dims[0], x, coef, labels, in_dims[3], in_dims[5])
        t, stats, gty = (
            fold.stacked(a, dim)
            for a, dim in zip((t, stats, gty), (in_dims[1], in_dims[2], in_dims[7]))
        )
        gy = (
            None
            if gy is None
            else checks.batch_first(gy, in_dims[6], info.batch_size).flatten(0, 1)
        )
        grads = _gradient(
            fold.x,
            t,
            stats,
            fold.coef,
            fold.stacked_coefficients(tcoef, in_dims[4]),
            None,
            gy,
            gty,
            form,
            backend,
        )
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
        return _gradient_ref(
            x, t, coef, tc, labels, rest.pop(0) if gy is not None else None, gty, form
        )

    return tuple(primals), function


class _Fold:
    """vmap: the mapped dimension becomes part of the batch, and every sample gets its own row of
    coefficients."""

    def __init__(self, size, x_dim, x, coef, labels, coef_dim, labels_dim):
        x = checks.batch_first(x, x_dim, size)
        self.size, self.batch = size, x.shape[1]
        self.x = x.flatten(0, 1)
        # (V, B)
        self.labels = None if labels is None else checks.batch_first(labels, labels_dim, size)
        coef = checks.batch_first(coef, coef_dim, size)  # (V, R, KC)
        self.levels, self.coef = coef.shape[1], self._per_sample(coef)

    def _per_sample(self, coef):
        """(V, R, KC) -> (V B, KC)."""
        if self.labels is not None:
            coef = coef[
                torch.arange(self.size, device=coef.device)[:, None],
                _from_zero(self.labels, coef.shape[1]),
            ]
        # memory of its own: it may be made a dual number
        return coef.expand(self.size, self.batch, -1).clone().flatten(0, 1)

    def reduce(self, g):
        """The transpose: (V B, KC) -> (V, R, KC)."""
        g = g.unflatten(0, (self.size, self.batch))
        if self.labels is not None:
            return torch.stack(
                [_scatter(g_v, labels, self.levels) for g_v, labels in zip(g, self.labels)]
            )
        return g if self.levels == self.batch else g.sum(1, keepdim=True)

    def stacked(self, t, dim):
        """(M, B, C, *) mapped -> (M, V B, C, *); statistics likewise."""
        return (
            None
            if t is None
            else checks.batch_first(t, dim, self.size).transpose(0, 1).flatten(1, 2)
        )

    def stacked_coefficients(self, tcoef, dim):
        if tcoef is None:
            return None
        tcoef = checks.batch_first(tcoef, dim, self.size)  # (V, M, R, KC)
        return torch.stack([self._per_sample(c) for c in tcoef.unbind(1)])

    def unfold(self, y, dim):
        return y.unflatten(dim, (self.size, self.batch))


@allow_in_graph
def _normalise_function(
    x, t, coef, tcoef, labels, groups, alpha, beta, eps, activation, backend, primal
):
    if isinstance(
        eps, torch.SymFloat
    ):  # of a graph that is kept when eps changes, to which the kernels' eps is a constant
        form = Form(groups, alpha, beta, checks.as_tensor(eps, x), activation)
        dual = () if t is None else (_dual_ref(x, t, coef, tcoef, labels, form),)
        return *((normalise_ref(x, coef, labels, form),) if primal else ()), *dual, None
    return _Normalise.apply(
        x, t, coef, tcoef, labels, Form(groups, alpha, beta, eps, activation), backend, primal
    )


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
