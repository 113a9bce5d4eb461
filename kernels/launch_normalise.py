"""Launchers of the normalisations: moments, algebra, elementwise pass.

Cotangent sums, algebra, gradient.
"""

import functools

import torch

from fastscore.kernels.launch import cdiv, launch, power_of_two
from fastscore.kernels.normalise import (
    apply_kernel,
    cotangent_sums_kernel,
    gradient_kernel,
    merge_kernel,
    moments_kernel,
)
from fastscore.kernels.normalise_algebra import coefficients_kernel, cotangents_kernel
from fastscore.kernels.normalise_whole import whole_kernel
from fastscore.kernels.tiles import cache_bytes, tile


def tiles_of(x, M, elementwise=False):
    B, C = x.shape[:2]
    small = elementwise and x.numel() < 2**21  # sums keep their order at every batch size
    cut = tile(
        "normalise small" if small else "normalise with tangents" if M else "normalise", x.device
    )
    return Tiles(
        B, C, x.numel() // (B * C), x.element_size(), not x.is_contiguous(), M, cut["tile"],
        cut["each"],
    )


def _evict(tensors, x, M):
    """The policy of a second pass that reads `tensors` of x's size, and as many of each tangent."""
    return (
        "evict_first"
        if tensors * (1 + M) * x.numel() * x.element_size() > cache_bytes(x.device)
        else ""
    )


@functools.lru_cache(4096)
class Tiles:
    """How a pass cuts x up: a tile is whole rows of pixels or a part of one.

    Where channels are last, 128 bytes of them times pixels.
    """

    def __init__(self, B, C, S, itemsize, last, M, tile, each):
        self.C, self.S, self.M, self.last = C, S, M, last
        self.units = B * C
        tile, each = tile * 4 // itemsize, each * 4 // itemsize
        pixels = power_of_two(self.S)
        if self.last:
            self.UNITS = min(power_of_two(self.C), 128 // itemsize)
            self.PIXELS = min(pixels, tile // self.UNITS)
        else:
            self.PIXELS = min(pixels, tile)
            # Whatever the batch: a sum's order does not depend on it.
            self.UNITS = tile // self.PIXELS
        self.splits = cdiv(self.S, self.PIXELS)
        blocks = B * cdiv(self.C, self.UNITS) if self.last else cdiv(self.units, self.UNITS)
        self.programs, self.warps = (
            blocks * self.splits,
            max(1, self.UNITS * self.PIXELS // (32 * each)),
        )

    def launch(self, kernel, *pointers, **constants):
        launch(
            kernel, (self.programs,),
            *pointers, self.units, self.C, self.S, self.splits, self.M, **constants,
            LAST=self.last, UNITS=self.UNITS, PIXELS=self.PIXELS, num_warps=self.warps,
        )  # fmt: skip


def _algebra(kernel, pointers, shape, coef, tcoef, labels, groups, alpha, beta, eps, M):
    """One program takes whole rows of channels: all of a sample, or groups."""
    assert not (groups and alpha), "the channel term belongs to statistics per channel"
    B, C, *_ = shape
    rows, domain = B * (groups or 1), C // (groups or 1)
    D = power_of_two(domain)
    ROWS = max(1, 256 // D)  # of D alone: sums over channels keep their order at every batch size
    launch(
        kernel, (cdiv(rows, ROWS),), *pointers, coef, tcoef, labels, *shape, groups or 1, domain,
        len(coef), M, EPS=eps, GROUPED=groups > 0, ALPHA=alpha, BETA=beta,
        HAS_LABELS=labels is not None, ONE=len(coef) == 1, HAS_TCOEF=tcoef is not None, ROWS=ROWS,
        D=D, num_warps=min(16, ROWS * D // 32),
    )


def _coefficients(x, stats, coef, tcoef, labels, numbers, M):
    table = torch.empty((3 + 2 * M, stats[0].numel() // 2), dtype=stats.dtype, device=x.device)
    _algebra(coefficients_kernel, (table, stats), x.shape[:2], coef, tcoef, labels, *numbers, M)
    return table


def _moments(x, t, stats, M):
    tiles = tiles_of(x, M)
    parts = (
        stats
        if tiles.splits == 1
        else torch.empty((1 + M, tiles.units, tiles.splits, 2), dtype=stats.dtype, device=x.device)
    )
    tiles.launch(moments_kernel, parts, x, t)
    if tiles.splits > 1:
        SPLITS = min(power_of_two(tiles.splits), 1024)
        UNITS = 1024 // SPLITS
        launch(
            merge_kernel, (cdiv(tiles.units, UNITS), 1 + M),
            stats, parts, tiles.units, tiles.S, tiles.splits,
            PIXELS=tiles.PIXELS, UNITS=UNITS, SPLITS=SPLITS, STEPS=cdiv(tiles.splits, SPLITS),
        )  # fmt: skip


# Elements of a tile that one program keeps in its registers: 32 of each of 512 threads; of float64
# 8, for more would spill.
WHOLE, WHOLE_WIDE = 16_384, 4096


def _whole(y, stats, x, coef, labels, groups, alpha, beta, eps, activation):
    """In one launch, where a sample, or a group of it, fits; whether it did.

    By the size of a sample alone, never by the batch.
    """
    B, C = x.shape[:2]
    rows, domain, S = B * (groups or 1), C // (groups or 1), x.numel() // (B * C)
    D, PIXELS = power_of_two(domain), power_of_two(S)
    if D * PIXELS > (WHOLE_WIDE if x.dtype == torch.float64 else WHOLE) or not x.is_contiguous():
        return False
    launch(
        whole_kernel, (rows,), y, stats, x, coef, labels, B, C, S, groups or 1, domain, len(coef),
        EPS=eps, GROUPED=groups > 0, ALPHA=alpha, BETA=beta, HAS_LABELS=labels is not None,
        ONE=len(coef) == 1, KIND=activation, D=D, PIXELS=PIXELS,
        num_warps=max(1, min(16, D * PIXELS // 512)),
    )
    return True


def normalise(y, ty, stats, x, t, coef, tcoef, labels, groups, alpha, beta, eps, activation):
    if x.numel() == 0:
        return
    M, numbers = 0 if t is None else len(t), (groups, alpha, beta, eps)
    with torch.cuda.device_of(x):
        if M == 0 and y is not None and _whole(y, stats, x, coef, labels, *numbers, activation):
            return
        _moments(x, t, stats, M)
        if y is None and ty is None:
            return
        table = _coefficients(x, stats, coef, tcoef, labels, numbers, M)
        flags = {"KIND": activation, "HAS_Y": y is not None, "EVICT": _evict(1, x, M)}
        tiles_of(x, 0 if ty is None else M, True).launch(apply_kernel, y, ty, x, t, table, **flags)


def normalise_backward(
    gx,
    gt,
    gcoef,
    gtcoef,
    x,
    t,
    stats,
    coef,
    tcoef,
    labels,
    gy,
    gty,
    groups,
    alpha,
    beta,
    eps,
    activation,
):
    if x.numel() == 0:
        return
    M, numbers = 0 if t is None else len(t), (groups, alpha, beta, eps)
    flags = {"KIND": activation, "HAS_GY": gy is not None}
    with torch.cuda.device_of(x):
        table = _coefficients(x, stats, coef, tcoef, labels, numbers, M)
        tiles = tiles_of(x, M)
        sums = torch.empty(
            (2 + 3 * M, tiles.units, tiles.splits), dtype=stats.dtype, device=x.device
        )
        tiles.launch(cotangent_sums_kernel, sums, x, t, gy, gty, table, **flags)
        sums = sums.sum(-1) if tiles.splits > 1 else sums
        gtable = torch.empty((2 + 2 * M, tiles.units), dtype=stats.dtype, device=x.device)
        _algebra(
            cotangents_kernel, (gtable, gcoef, gtcoef, sums, stats), (*x.shape[:2], tiles.S), coef,
            tcoef, labels, *numbers, M,
        )
        tiles_of(x, M, True).launch(
            gradient_kernel, gx, gt, x, t, gy, gty, table, gtable, EVICT=_evict(2, x, M), **flags
        )
