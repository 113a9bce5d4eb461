"""Triton kernels. Importing registers nothing.

`register(ops)` makes them the ops of torch.ops.fastscore_triton.
"""

import functools

import torch

from fastscore.kernels import launch_normalise, launch_rademacher_project, sum_splits
from fastscore.kernels.activate import (
    activate_dual_gradient_kernel,
    activate_dual_kernel,
    activate_jet_gradient_kernel,
    activate_jet_kernel,
)
from fastscore.kernels.denoising_loss import noise_reduce_kernel
from fastscore.kernels.launch import cdiv, launch, power_of_two
from fastscore.kernels.noisy_update import noisy_update_kernel
from fastscore.kernels.random import fill_kernel, sign_kernel
from fastscore.kernels.tiles import tile

MANY_SIGNS = 2**22   # that fill the GPU with programs as large as they are quickest
_library = None


def register(ops) -> None:
    """Define and implement the launchers of `ops`, {name: RawOp}, once per process."""
    global _library
    if _library is None:
        _library = torch.library.Library("fastscore_triton", "DEF")
        for name, op in ops.items():
            _library.define(f"{name}({op.schema}) -> ()")
            for key in ("CPU", "CUDA"):
                _library.impl(name, LAUNCHERS[name], key)


def _programs(elements, block):
    return ((elements + 4 * block - 1) // (4 * block),)


def _crosses(first, n, block):
    """Whether a program's Philox blocks, from `first` on, may hold a multiple of 2^32 inside."""
    return first % block != 0 and first >> 32 != (first + n // 4 + block) >> 32


def _crosses_rows(offset, n, block):
    """Whether a row of Philox blocks that opens anywhere in n elements may hold a multiple of
    2^32 inside."""
    return offset // 4 >> 32 != (offset // 4 + n // 4 + block) >> 32


def _kind(each):
    return 0 if each is None else 1 if each.numel() == 1 else 2


def _dense(t):
    """In C order; zeros that autograd passes without memory get some."""
    if t is None:
        return None
    return t.clone() if t._is_zerotensor() else t.contiguous()


@functools.lru_cache(1024)
def _divisor(d):
    """(magic, bits): x // d = (high half of x magic) >> bits for x below 2^31 and d of 2 and more,
    as csrc/noisy_update.cu has it."""
    bits = max((d - 1).bit_length(), 1)
    return ((1 << 31 + bits) // d + 1) & 0xFFFFFFFF, bits - 1


def _in_memory(number, like):
    """A coefficient as a tensor (1,) where a launch would not bring it.

    A Python float travels as a normal float32.
    """
    if like.dtype == torch.float64:
        return torch.full((1,), number, dtype=torch.float64, device=like.device)
    return torch.full((1,), number, device=like.device) if 0 < abs(number) < 2**-126 else None


def _fill(out, kind, key, seed, step, stream, offset):
    if out.numel() == 0:
        return
    if kind == 3:
        return _fill_signs(out, key, seed, step, stream, offset)
    shift, cut = offset % 4, tile("fill", out.device)
    with torch.cuda.device_of(out):
        launch(
            fill_kernel, _programs(out.numel() + shift, cut["BLOCK"]), out, key, out.numel(), seed,
            step, stream, offset // 4, shift, KIND=kind, HAS_KEY=key is not None,
            CROSSES=_crosses(offset // 4, out.numel(), cut["BLOCK"]), **cut,
        )


def _fill_signs(out, key, seed, step, stream, offset):
    shift = offset % 128
    cut = tile("signs" if out.numel() >= MANY_SIGNS else "signs small", out.device)
    with torch.cuda.device_of(out):
        launch(
            sign_kernel, (cdiv(out.numel() + shift, 128 * cut["BLOCKS"]),),
            out, key, out.numel(), seed, step, stream, offset // 128, shift,
            HAS_KEY=key is not None, **cut,
        )  # fmt: skip


def _noisy_update(
    out, x, direction, drift_each, drift, diffusion_each, diffusion, key, seed, step, stream, offset
):
    n = out.numel()
    if n == 0:
        return
    wide = out.dtype == torch.float64
    target = (
        out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    )
    drift_each = _in_memory(drift, out) if drift_each is None else drift_each
    diffusion_each = _in_memory(diffusion, out) if diffusion_each is None else diffusion_each
    per_sample = n // out.shape[0] if out.dim() else 1
    each = not wide and 2 in (_kind(drift_each), _kind(diffusion_each))
    # A tile's end included.
    each = (
        each
        and offset % 4 == 0
        and per_sample % (16 // out.element_size()) == 0
        and n < 2**31 - 2**16
    )
    cut = tile("noisy_update", out.device)
    block = cut["BLOCK"] * (2 if out.dtype.itemsize == 2 else 1)
    with torch.cuda.device_of(out):
        launch(
            noisy_update_kernel, _programs(n + offset % 4, block), target, _dense(x),
            _dense(direction), drift_each, drift, diffusion_each, diffusion, key, n, per_sample,
            seed, step, stream, offset // 4, offset % 4, *_divisor(per_sample), HAS_X=x is not None,
            HAS_D=direction is not None, A_KIND=_kind(drift_each), B_KIND=_kind(diffusion_each),
            EACH=each, HAS_KEY=key is not None, CROSSES=_crosses(offset // 4, n, block), WIDE=wide,
            BLOCK=block, num_warps=cut["num_warps"],
        )
    if target is not out:
        out.copy_(target)


def _noise_reduce(out, score, sigma_each, sigma, key, seed, step, stream, offset, reduction):
    if score.numel() == 0:
        out.zero_()
        return
    per_sample = score.numel() // out.numel()
    wide = score.dtype == torch.float64
    sigma_each = _in_memory(sigma, score) if sigma_each is None else sigma_each
    vector = 16 // score.element_size()   # elements of a 128-bit access
    score = _dense(score)
    aligned = offset % 4 == 0 and per_sample % max(vector, 4) == 0
    aligned = aligned and score.data_ptr() % 16 == 0
    # Philox blocks that a sample lies in, at most.
    needed = (per_sample + 6) // 4 if per_sample % 4 or offset % 4 else per_sample // 4
    cut = tile("noise_reduce", score.device)
    most = cut["BLOCK"]
    block = max(2, min(most, power_of_two(needed)))   # two, for a thread takes two of a 16-bit type
    # Tiles of one program: a long sample keeps the GPU busy all the same.
    steps = cut["STEPS"] if needed >= 16 * most else 1
    rows = most // block
    splits = cdiv(needed, block * steps)
    partial = (
        out
        if splits == 1
        else torch.empty((out.numel(), splits), dtype=out.dtype, device=out.device)
    )
    with torch.cuda.device_of(out):
        launch(
            noise_reduce_kernel, (cdiv(out.numel(), rows), splits), partial, score, sigma_each,
            sigma, key, out.numel(), per_sample, seed, step, stream, offset // 4, offset % 4,
            DOT=reduction == 1, SIGMA_KIND=_kind(sigma_each), HAS_KEY=key is not None,
            CROSSES=_crosses_rows(offset, score.numel(), most), ALIGNED=aligned,
            FULL=aligned and rows == 1 and per_sample % (4 * block * steps) == 0, WIDE=wide,
            ROWS=rows, BLOCK=block, STEPS=steps, num_warps=cut["num_warps"],
        )
        if splits > 1:
            sum_splits.sum_splits([out], [partial], splits)


def _activate_dual(out, s, g, activation):
    if s.numel() == 0:
        return
    n, M = s[0].numel(), len(s) - 1
    constants = {"M": M, "KIND": activation, "WIDE": s.dtype == torch.float64} | tile(
        "activate_dual", s.device
    )
    grid = (cdiv(n, constants["BLOCK"]),)
    with torch.cuda.device_of(out):
        if g is None:
            launch(activate_dual_kernel, grid, out, s, n, **constants)
        else:
            launch(activate_dual_gradient_kernel, grid, out, s, g, n, **constants)


def _activate_jet(out, s, g, directions, activation):
    if s.numel() == 0:
        return
    n = s.numel() // len(s)
    constants = {
        "M": directions,
        "STRAIGHT": len(s) == 1 + directions,
        "KIND": activation,
        "WIDE": s.dtype == torch.float64,
    }
    constants |= tile("activate_jet", s.device)
    grid = (cdiv(n, constants["BLOCK"]),)
    with torch.cuda.device_of(out):
        if g is None:
            launch(activate_jet_kernel, grid, out, s, n, **constants)
        else:
            launch(activate_jet_gradient_kernel, grid, out, s, g, n, **constants)


LAUNCHERS = {
    "fill": _fill,
    "noisy_update": _noisy_update,
    "noise_reduce": _noise_reduce,
    "normalise": launch_normalise.normalise,
    "normalise_backward": launch_normalise.normalise_backward,
    "rademacher_project": launch_rademacher_project.project,
    "rademacher_spread": launch_rademacher_project.spread,
    "activate_dual": _activate_dual,
    "activate_jet": _activate_jet,
}
