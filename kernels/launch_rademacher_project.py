"""Launchers of the Rademacher projections."""

import torch

from fastscore.kernels.launch import cdiv, launch, power_of_two
from fastscore.kernels.rademacher_project import project_kernel, spread_kernel
from fastscore.kernels.sum_splits import sum_splits

# Programs that a sample must fill for them to take several tiles each: two, or four of a 16-bit
# type.
LONG = 16
# Of 128 signs per program: one for each lane of a warp, 4096 elements; half of them in float64,
# which would spill.
BLOCKS = 32


def _grid(like, samples, offset, projections, *tensors):
    """(grid, numbers of the kernel, its constants, programs per sample).

    A program takes several short samples or a part of a long one.

    Nothing here depends on how many samples there are, for the order of their sums may not.
    """
    per_sample = like.numel() // samples
    opened = per_sample % 128 == 0 and offset % 128 == 0   # every sample opens a block
    # Blocks that a sample may lie in.
    needed = per_sample // 128 if opened else (per_sample + 254) // 128
    most = BLOCKS // 2 if like.dtype == torch.float64 else BLOCKS
    blocks = min(most, power_of_two(needed))
    rows = most // blocks
    aligned = (
        per_sample % 16 == 0
        and offset % 16 == 0
        and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    )
    several = 4 if like.dtype.itemsize == 2 else 2
    long = needed % (several * blocks) == 0 and needed >= LONG * several * blocks
    steps = several if long and aligned and opened and projections == 1 else 1
    full = aligned and opened and rows == 1 and needed % blocks == 0
    splits = cdiv(needed, blocks * steps)
    constants = {
        "WIDE": like.dtype == torch.float64,
        "ALIGNED": aligned,
        "FULL": full,
        "ROWS": rows,
        "BLOCKS": blocks,
        "STEPS": steps,
    }
    return (cdiv(samples, rows), splits), (samples, per_sample), constants, splits


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
    js, s = _dense(js), _dense(s)
    grid, sizes, constants, splits = _grid(like, samples, offset, projections, js, s)
    partial = [vjv, vs, ss]   # of one split: the sums themselves
    if splits > 1:
        partial = [
            None if o is None else torch.empty((*o.shape, splits), dtype=o.dtype, device=o.device)
            for o in partial
        ]
    with torch.cuda.device_of(like):
        launch(
            project_kernel, grid, *partial, js, s, key, projections, *sizes, seed, step, stream,
            offset // 128, offset % 128, HAS_J=js is not None, HAS_S=s is not None,
            HAS_KEY=key is not None, **constants,
        )
        if splits > 1:
            sum_splits(outputs, [p for p in partial if p is not None], splits)


def spread(gjs, gs, g_vjv, g_vs, g_ss, s, projections, key, seed, step, stream, offset):
    like, samples = (gjs[0], gjs.shape[1]) if gs is None else (gs, gs.shape[0])
    if like.numel() == 0:
        return
    targets = [
        g
        if g is None or g.is_contiguous()
        else torch.empty(g.shape, dtype=g.dtype, device=g.device)
        for g in (gjs, gs)
    ]
    s = _dense(s)
    # a loop over tiles of a 16-bit type would spill on sm_80
    several = projections if like.dtype.itemsize != 2 else 0
    grid, sizes, constants, _ = _grid(like, samples, offset, several, *targets, s)
    with torch.cuda.device_of(like):
        launch(
            spread_kernel, grid, *targets, g_vjv, g_vs, g_ss, s, key, projections, *sizes, seed,
            step, stream, offset // 128, offset % 128, HAS_GJS=gjs is not None,
            HAS_GVS=g_vs is not None, HAS_GSS=g_ss is not None, HAS_KEY=key is not None,
            **constants,
        )
    for g, target in zip((gjs, gs), targets):
        if target is not g:
            g.copy_(target)
