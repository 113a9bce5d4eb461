"""Launchers of the Rademacher projections."""

import torch

from fastscore.kernels.launch import cdiv, launch, power_of_two
from fastscore.kernels.rademacher_jvp import project_kernel, spread_kernel

PROJECT = (
    "rademacher_project(Tensor(a!)? vjv, Tensor(b!)? vs, Tensor(c!)? ss, Tensor? js, Tensor? s, int projections, Tensor? key, "
    "int seed, int step, int stream, int offset) -> ()"
)
SPREAD = (
    "rademacher_spread(Tensor(a!)? gjs, Tensor(b!)? gs, Tensor? g_vjv, Tensor? g_vs, Tensor? g_ss, Tensor? s, int projections, "
    "Tensor? key, int seed, int step, int stream, int offset) -> ()"
)
WORDS = 128   # per program: one of each thread of four warps, 4096 elements; half of them in float64, which would spill


def _grid(like, samples):
    """(samples, elements of each, programs per sample, samples per program, words of each)."""

    per_sample = like.numel() // samples
    needed = (per_sample + 62) // 32   # words of a sample that may start inside one
    most = WORDS // 2 if like.dtype == torch.float64 else WORDS
    words = min(most, power_of_two(needed))
    return samples, per_sample, (needed + words - 1) // words, most // words, words


def _dense(t):
    """In C order; zeros that autograd passes without memory get some."""
    if t is None:
        return None
    return t.clone() if t._is_zerotensor() else t.contiguous()


def project(vjv, vs, ss, js, s, projections, key, seed, step, stream, offset):
    outputs = [o for o in (vjv, vs, ss) if o is not None]
    like, samples = (js[0], js.shape[1]) if s is None else (s, s.shape[0])
    if like.numel() == 0:
        for o in outputs:
            o.zero_()
        return
    samples, per_sample, splits, rows, words = _grid(like, samples)
    partial = [vjv, vs, ss]   # of one split: the sums themselves
    if splits > 1:
        partial = [None if o is None else torch.empty((*o.shape, splits), dtype=o.dtype, device=o.device) for o in partial]
    with torch.cuda.device_of(like):
        launch(
            project_kernel, (cdiv(samples, rows) * splits,),
            *partial, _dense(js), _dense(s), key, projections, samples, per_sample, splits, seed, step, stream, offset,
            HAS_J=js is not None, HAS_S=s is not None, HAS_KEY=key is not None, WIDE=like.dtype == torch.float64, ROWS=rows, WORDS=words,
        )  # fmt: skip
    if splits > 1:
        for o, p in zip(outputs, (p for p in partial if p is not None)):
            torch.sum(p, -1, out=o)


def spread(gjs, gs, g_vjv, g_vs, g_ss, s, projections, key, seed, step, stream, offset):
    like, samples = (gjs[0], gjs.shape[1]) if gs is None else (gs, gs.shape[0])
    if like.numel() == 0:
        return
    samples, per_sample, splits, rows, words = _grid(like, samples)
    targets = [g if g is None or g.is_contiguous() else torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in (gjs, gs)]
    with torch.cuda.device_of(like):
        launch(
            spread_kernel, (cdiv(samples, rows) * splits,),
            *targets, g_vjv, g_vs, g_ss, _dense(s), key, projections, samples, per_sample, splits, seed, step, stream, offset,
            HAS_GJS=gjs is not None, HAS_GVS=g_vs is not None, HAS_GSS=g_ss is not None, HAS_KEY=key is not None,
            WIDE=like.dtype == torch.float64, ROWS=rows, WORDS=words,
        )  # fmt: skip
    for g, target in zip((gjs, gs), targets):
        if target is not g:
            g.copy_(target)
