"""Projections of a Jacobian onto random signs: vᵀJv, vᵀs and ‖s‖² in one pass, the signs
regenerated in both directions."""

import math

import torch
from torch import Tensor

from fastscore import backend as _backend
from fastscore import direct, random
from fastscore.compiling import allow_in_graph
from fastscore.ops import checks
from fastscore.ops.functions import contiguous, plain, quick, save, saved
from fastscore.ops.noisy_update_functions import refuse_mapped_key


@quick
class _Project(torch.autograd.Function):
    """Outputs: vᵀJv where js is given, vᵀs and ‖s‖² where s is. Linear in js, quadratic in s; the
    transpose is _Spread.

    Tangent: vᵀ(Jv)˙, vᵀṡ and 2 s·ṡ, the first two of which are the op again.
    """

    @staticmethod
    def forward(js, s, projections, key, numbers, backend):
        return run_project(js, s, projections, key, numbers, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        js, s, ctx.projections, key, ctx.numbers, ctx.backend = inputs
        ctx.layout = None if js is None else _layout(js)  # js itself is not kept
        ctx.set_materialize_grads(False)
        save(ctx, s, key)

    @staticmethod
    def backward(ctx, *cotangents):
        s, key = saved(ctx)
        g_vjv = None if ctx.layout is None else cotangents[0]
        g_vs, g_ss = (None, None) if s is None else cotangents[-2:]
        layouts = ctx.layout, None if s is None else _layout(s)
        gjs, gs = _spread(
            g_vjv, g_vs, g_ss, s, layouts, ctx.projections, key, ctx.numbers, ctx.backend
        )
        return gjs, gs, None, None, None, None

    @staticmethod
    def jvp(ctx, tjs, ts, *_):
        s, key = saved(ctx)
        vjv, vs, _ = project(ts, tjs, key, ctx.numbers, ctx.backend, ctx.projections)
        outputs = []
        if ctx.layout is not None:
            outputs.append(torch.zeros_like(vs) if vjv is None else vjv)
        if s is not None:
            outputs += (
                [torch.zeros_like(vjv), torch.zeros_like(vjv[0])]
                if ts is None
                else [vs, plain(_twice_inner, s, ts)]
            )
        return tuple(outputs)

    @staticmethod
    def vmap(info, in_dims, js, s, projections, key, numbers, backend):
        refuse_mapped_key(in_dims[3])
        js, s = (
            None if t is None else checks.batch_first(t, dim, info.batch_size)
            for t, dim in zip((js, s), in_dims)
        )
        v = signs(js[0, 0] if s is None else s[0], projections, key, numbers, backend)
        outputs = [project_ref(a, b, v) for a, b in zip(_each(s, info), _each(js, info))]
        outputs = tuple(torch.stack(o) for o in zip(*outputs) if o[0] is not None)
        return outputs, (0,) * len(outputs)


@quick
class _Spread(torch.autograd.Function):
    """Outputs: gjs_m = g_vjv[m] v_m where g_vjv is given, gs = Σ_m g_vs[m] v_m + 2 g_ss s where one
    of those is.

    Linear in the three and in s; its transpose is _Project and an inner product, its tangent the op
    again.
    """

    @staticmethod
    def forward(g_vjv, g_vs, g_ss, s, layouts, projections, key, numbers, backend):
        return tuple(
            g
            for g in run_spread(g_vjv, g_vs, g_ss, s, layouts, projections, key, numbers, backend)
            if g is not None
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        g_vjv, g_vs, g_ss, s, ctx.layouts, ctx.projections, key, ctx.numbers, ctx.backend = inputs
        ctx.has_gjs, ctx.has_gs, ctx.has_vs = (
            g_vjv is not None,
            g_vs is not None or g_ss is not None,
            g_vs is not None,
        )
        ctx.set_materialize_grads(False)
        save(ctx, g_ss, s if g_ss is not None else None, key)

    @staticmethod
    def backward(ctx, *cotangents):
        g_ss, s, key = saved(ctx)
        hjs = cotangents[0] if ctx.has_gjs else None
        hs = cotangents[-1] if ctx.has_gs else None
        gg_vjv, gg_vs, _ = project(
            hs if ctx.has_vs else None, hjs, key, ctx.numbers, ctx.backend, ctx.projections
        )
        gg_ss = gs = None
        if hs is not None and s is not None:
            gg_ss, gs = _twice_inner(s, hs), _scaled(hs, g_ss)
        return gg_vjv, gg_vs, gg_ss, gs, None, None, None, None, None

    @staticmethod
    def jvp(ctx, tg_vjv, tg_vs, tg_ss, ts, *_):
        g_ss, s, key = saved(ctx)
        gjs, gs = _spread(
            tg_vjv, tg_vs, tg_ss, s, ctx.layouts, ctx.projections, key, ctx.numbers, ctx.backend
        )
        if ts is not None and g_ss is not None:
            more = plain(_scaled, ts, g_ss)
            gs = more if gs is None else plain(torch.add, gs, more)
        outputs = []
        for has, g, layout in zip((ctx.has_gjs, ctx.has_gs), (gjs, gs), ctx.layouts):
            if has:
                outputs.append(_empty(layout).zero_() if g is None else g)
        return tuple(outputs)

    @staticmethod
    def vmap(info, in_dims, g_vjv, g_vs, g_ss, s, layouts, projections, key, numbers, backend):
        refuse_mapped_key(in_dims[6])
        mapped = (
            None if t is None else checks.batch_first(t, dim, info.batch_size)
            for t, dim in zip((g_vjv, g_vs, g_ss, s), in_dims)
        )
        shape, dtype, device, _ = layouts[1] or (layouts[0][0][1:], *layouts[0][1:])
        v = _signs(shape, checks.compute_dtype(dtype), device, projections, key, *numbers, backend)
        each = [_spread_ref(*args, v, dtype) for args in zip(*(_each(t, info) for t in mapped))]
        outputs = tuple(torch.stack(o) for o in zip(*each) if o[0] is not None)
        return outputs, (0,) * len(outputs)


def _spread_ref(g_vjv, g_vs, g_ss, s, v, dtype):
    gjs = None if g_vjv is None else checks.expand(g_vjv, v) * v
    gs = None if g_vs is None else (checks.expand(g_vs, v) * v).sum(0)
    if g_ss is not None:
        more = 2 * checks.expand(g_ss, s) * s.to(v.dtype)
        gs = more if gs is None else gs + more
    return tuple(None if g is None else g.to(dtype) for g in (gjs, gs))


def _scaled(t, g):
    """2 g t, one g per sample."""
    return (2 * checks.expand(g, t) * t.to(g.dtype)).to(t.dtype)


def _twice_inner(a, b):
    dtype = checks.compute_dtype(a.dtype)
    return 2 * checks.per_sample_sum(a.to(dtype) * b.to(dtype))


def _each(t, info):
    return [None] * info.batch_size if t is None else t.unbind()


def _layout(t):
    """What `_empty` needs to make a dense tensor with t's order of dimensions."""
    dims = range(t.dim())
    expanded = any(t.stride(d) == 0 and t.shape[d] > 1 for d in dims)
    return (
        t.shape,
        t.dtype,
        t.device,
        tuple(dims if expanded else sorted(dims, key=lambda d: -t.stride(d))),
    )


def _empty(layout):
    shape, dtype, device, order = layout
    return torch.empty([shape[d] for d in order], dtype=dtype, device=device).permute(
        [order.index(d) for d in range(len(order))]
    )


def _place(layout):
    """Memory for a result: given, or made."""
    return layout if isinstance(layout, torch.Tensor) else _empty(layout)


def run_project(
    js: Tensor | None,
    s: Tensor | None,
    projections: int,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
) -> tuple[Tensor, ...]:
    """The projections that there are inputs for, with no derivative."""
    like = js[0] if s is None else s
    if backend == "reference":
        return tuple(
            o
            for o in project_ref(s, js, signs(like, projections, key, numbers, backend))
            if o is not None
        )
    dtype, (B, *_) = checks.compute_dtype(like.dtype), like.shape
    vjv = None if js is None else torch.empty((projections, B), dtype=dtype, device=like.device)
    vs = None if s is None else torch.empty((projections, B), dtype=dtype, device=like.device)
    ss = None if s is None else torch.empty((B,), dtype=dtype, device=like.device)
    _backend.call(backend, "rademacher_project", vjv, vs, ss, js, s, projections, key, *numbers)
    if vjv is None:
        return vs, ss
    return (vjv,) if vs is None else (vjv, vs, ss)


def run_spread(
    g_vjv: Tensor | None,
    g_vs: Tensor | None,
    g_ss: Tensor | None,
    s: Tensor | None,
    layouts: tuple,
    projections: int,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    """(gjs or None, gs or None), with no derivative."""
    gjs = None if g_vjv is None else _place(layouts[0])
    gs = None if g_vs is None and g_ss is None else _place(layouts[1])
    like = gs if gjs is None else gjs[0]
    if backend == "reference":
        v = signs(like, projections, key, numbers, backend, checks.compute_dtype(like.dtype))
        results = _spread_ref(g_vjv, g_vs, g_ss, s, v, like.dtype)
        return tuple(
            None if g is None else g.copy_(result) for g, result in zip((gjs, gs), results)
        )
    g_vjv, g_vs, g_ss = map(contiguous, (g_vjv, g_vs, g_ss))
    _backend.call(
        backend, "rademacher_spread", gjs, gs, g_vjv, g_vs, g_ss, s, projections, key, *numbers
    )
    return gjs, gs


@allow_in_graph
def _project_function(js, s, projections, key, seed, step, stream, offset, backend):
    return _Project.apply(js, s, projections, key, (seed, step, stream, offset), backend)


def project(
    s: Tensor | None,
    js: Tensor | None,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
    projections: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(vᵀJv (M, B), vᵀs (M, B), ‖s‖² (B,)) under a checked key of stream PROJECTION; differentiable
    where anything asks for it.

    s (B, *) and js (M, B, *) have one dtype; either may be None, and what needs it is None then.
    Without js, M is `projections`.
    """
    if js is None and s is None:
        return None, None, None
    projections = projections if js is None else len(js)
    if _backend.derivative_possible(js, s):
        outputs = _project_function(js, s, projections, key, *numbers, backend)
    else:
        outputs = run_project(js, s, projections, key, numbers, backend)
    return (None if js is None else outputs[0]), *((None, None) if s is None else outputs[-2:])


def project_ref(
    s: Tensor | None, js: Tensor | None, v: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The equations, in the compute dtype: vᵀJv and vᵀs (M, B), ‖s‖² (B,).

    Jv is js (M, B, *), s (B, *), v (M, B, *). None without their input.
    """
    dtype = checks.compute_dtype((js if s is None else s).dtype)
    v = v.to(dtype)
    vjv = None if js is None else _sum(v * js.to(dtype), 2)
    if s is None:
        return vjv, None, None

    s = s.to(dtype)
    return vjv, _sum(v * s, 2), _sum(s.square(), 1)


def _sum(t, dims):
    """Over all but the first `dims` dimensions."""
    return t.flatten(dims).sum(-1) if t.dim() > dims else t


def project_stack(
    stack: Tensor,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
) -> tuple[Tensor, ...]:
    """`project` on a stack (1 + M, B, *) of s and Jv, with no derivative."""
    if key is None and (door := _direct(backend)) is not None:
        sums = door.project_stack(stack, *numbers)
        if sums is not None:
            return sums
    return run_project(stack[1:], stack[0], len(stack) - 1, key, numbers, backend)


def spread_stack(
    stack: Tensor,
    g_vjv: Tensor,
    g_vs: Tensor | None,
    g_ss: Tensor | None,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
) -> Tensor:
    """The cotangent of that stack, with no derivative; of g_vs and g_ss one is given."""
    if key is None and (door := _direct(backend)) is not None:
        g = door.spread_stack(stack, g_vjv, g_vs, g_ss, *numbers)
        if g is not None:
            return g
    g = torch.empty_like(stack)
    run_spread(g_vjv, g_vs, g_ss, stack[0], (g[1:], g[0]), len(stack) - 1, key, numbers, backend)
    return g


def signed_stack(
    x: Tensor,
    projections: int,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
) -> Tensor | None:
    """x and its signs side by side, (1 + M, *x.shape), where both are plain; else None."""
    door = None if key is not None else _direct(backend)
    return None if door is None else door.signed_stack(x, projections, *numbers)


def _direct(backend):
    return direct.door if backend == "cpp" else None


def _spread(g_vjv, g_vs, g_ss, s, layouts, projections, key, numbers, backend):
    """(gjs or None, gs or None), differentiable."""
    if g_vjv is None and g_vs is None and g_ss is None:
        return None, None
    s = None if g_ss is None else s
    if not _backend.derivative_possible(g_vjv, g_vs, g_ss, s):
        return run_spread(g_vjv, g_vs, g_ss, s, layouts, projections, key, numbers, backend)
    outputs = _Spread.apply(g_vjv, g_vs, g_ss, s, layouts, projections, key, numbers, backend)
    return (None if g_vjv is None else outputs[0]), (
        outputs[-1] if g_vs is not None or g_ss is not None else None
    )


def signs(
    x: Tensor,
    projections: int,
    key: Tensor | None,
    numbers: tuple[int, int, int, int],
    backend: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """v (M, B, *) under a checked key, in x's dtype: the directions of `project`, as numbers."""
    return _signs(x.shape, dtype or x.dtype, x.device, projections, key, *numbers, backend)


@allow_in_graph
def _signs(shape, dtype, device, projections, key, seed, step, stream, offset, backend):
    if backend == "reference":
        keys = [(key, seed, step, stream | m << 16, offset) for m in range(projections)]
        return torch.stack(
            [random.fill_ref(random.RADEMACHER, tuple(shape), k, dtype, device) for k in keys]
        )
    v = torch.empty((projections, *shape), dtype=dtype, device=device)
    ones = torch.ones((projections, 1), dtype=checks.compute_dtype(dtype), device=device)
    rows = v.view(projections, 1, math.prod(shape))  # signs know nothing of samples
    _backend.call(
        backend,
        "rademacher_spread",
        rows,
        None,
        ones,
        None,
        None,
        None,
        projections,
        key,
        seed,
        step,
        stream,
        offset,
    )
    return v
