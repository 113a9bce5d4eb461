"""The normalisations' passes over the pixels.

A tile is UNITS channels of samples x PIXELS, the axis contiguous in memory innermost.

M is the number of tangents, a constant because the interpreter of Triton 3.6 has no loops up to a
variable; (units,) are the B C channels of all samples. Bytes per element are those of float32. What
lies between the passes is in normalise_algebra.py, with the meaning of the table's rows.
"""

import triton
import triton.language as tl

from fastscore.kernels import activation
from fastscore.kernels.philox import int64, narrow


@triton.jit
def tile(
    program, units, C, S, splits, LAST: tl.constexpr, UNITS: tl.constexpr, PIXELS: tl.constexpr
):
    """(unit, it exists, split, first element, offsets from it, mask) of a program.

    Units outermost unless channels are last.
    """
    # int32 wraps past 2^31 elements, but programs are fewer.
    block, split = program // splits, (program % splits).to(tl.int64)
    lane, pixel = tl.arange(0, UNITS), tl.arange(0, PIXELS)
    s = split * PIXELS   # int64, like the first element; the offsets within a tile are small
    if LAST:
        blocks = (C + UNITS - 1) // UNITS
        sample, c = (block // blocks).to(tl.int64), (block % blocks).to(tl.int64) * UNITS
        known = c + lane < C
        at = pixel[:, None] * C + lane[None, :]
        return (
            sample * C + c + lane,
            known,
            split,
            (sample * S + s) * C + c,
            at,
            (s + pixel < S)[:, None] & known[None, :],
        )
    else:
        first = block.to(tl.int64) * UNITS
        unit = first + lane
        known = unit < units
        at = lane[:, None] * S + pixel[None, :]
        return unit, known, split, first * S + s, at, (s + pixel < S)[None, :] & known[:, None]


@triton.jit
def backwards():
    """The second pass starts where the first one ended: that part of x is still in the cache."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def over_pixels(v, LAST: tl.constexpr):
    """A value per unit, shaped to meet a tile."""
    return v[None, :] if LAST else v[:, None]


@triton.jit
def row(table_ptr, i, units, unit, known, LAST: tl.constexpr):
    return over_pixels(tl.load(table_ptr + i * int64(units) + unit, mask=known, other=0.0), LAST)


@triton.jit
def total(v, mask, LAST: tl.constexpr):
    return tl.sum(tl.where(mask, v, 0.0), 0 if LAST else 1)


@triton.jit
def over_tile(v, LAST: tl.constexpr):
    return tl.sum(v, 0 if LAST else 1)


@triton.jit
def moments_kernel(
    out_ptr,
    x_ptr,
    t_ptr,
    units,
    C,
    S,
    splits,
    M: tl.constexpr,
    LAST: tl.constexpr,
    UNITS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """(1 + M, units, splits, 2).

    Mean and variance of x, mean of t and of t (x - mean), by two passes over a tile on the chip.

    Reads x and t: 4 + 4 M bytes per element.
    """
    unit, known, split, first, at, mask = tile(
        tl.program_id(0), units, C, S, splits, LAST, UNITS, PIXELS
    )
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    share = 1.0 / tl.minimum(S - split * PIXELS, PIXELS).to(dtype)
    x = tl.load(x_ptr + first + at, mask=mask, other=0.0).to(dtype)
    near = total(x, mask, LAST) * share   # as good as a sum of large numbers is
    d = x - over_pixels(near, LAST)
    rest = total(d, mask, LAST) * share
    d -= over_pixels(rest, LAST)
    out = out_ptr + (unit * splits + split) * 2
    tl.store(out, near + rest, mask=known)
    tl.store(out + 1, total(d * d, mask, LAST) * share, mask=known)
    if M > 0:
        for m in range(M):
            t = tl.load(t_ptr + m * int64(units) * S + first + at, mask=mask, other=0.0).to(dtype)
            out += int64(units) * splits * 2
            tl.store(out, total(t, mask, LAST) * share, mask=known)
            tl.store(out + 1, total(t * d, mask, LAST) * share, mask=known)


@triton.jit
def merge_kernel(
    stats_ptr,
    part_ptr,
    units,
    S,
    splits,
    PIXELS: tl.constexpr,
    UNITS: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The moments of whole rows from those of their splits of PIXELS (Chan et al. 1979).

    Program (units, x or one of its tangents).
    """
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    known, moment = unit < units, tl.program_id(1)
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    near, share = tl.zeros([UNITS], dtype), 1.0 / int64(S).to(dtype)
    for step in range(STEPS):
        split = step * SPLITS + tl.arange(0, SPLITS)
        mask = known[:, None] & (split < splits)[None, :]
        weight = tl.minimum(S - split.to(tl.int64) * PIXELS, PIXELS).to(dtype) * share
        at = (unit[:, None] * splits + split[None, :]) * 2
        near += tl.sum(tl.load(part_ptr + at, mask=mask, other=0.0) * weight[None, :], 1)
    rest, first, second = (
        tl.zeros([UNITS], dtype),
        tl.zeros([UNITS], dtype),
        tl.zeros([UNITS], dtype),
    )
    for step in range(STEPS):
        split = step * SPLITS + tl.arange(0, SPLITS)
        mask = known[:, None] & (split < splits)[None, :]
        weight = tl.minimum(S - split.to(tl.int64) * PIXELS, PIXELS).to(dtype) * share
        at = (unit[:, None] * splits + split[None, :]) * 2
        d = (
            tl.where(mask, tl.load(part_ptr + at, mask=mask, other=0.0) - near[:, None], 0.0)
            * weight[None, :]
        )
        at += moment * int64(units) * splits * 2
        a = tl.load(part_ptr + at, mask=mask, other=0.0)
        a = tl.where((moment == 0) & mask, a - near[:, None], a)
        rest += tl.sum(d, 1)
        first += tl.sum(a * weight[None, :], 1)
        second += tl.sum(
            tl.load(part_ptr + at + 1, mask=mask, other=0.0) * weight[None, :] + d * a, 1
        )
    out = stats_ptr + (moment * int64(units) + unit) * 2
    tl.store(out, tl.where(moment == 0, near + first, first), mask=known)
    tl.store(out + 1, second - rest * first, mask=known)


@triton.jit
def apply_kernel(
    y_ptr,
    ty_ptr,
    x_ptr,
    t_ptr,
    table_ptr,
    units,
    C,
    S,
    splits,
    M: tl.constexpr,
    KIND: tl.constexpr,
    HAS_Y: tl.constexpr,
    EVICT: tl.constexpr,
    LAST: tl.constexpr,
    UNITS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """y = f(u), ty = f'(u) du with u = scale (x - mean) + shift, du = scale t + P (x - mean) + Q.

    Reads x and t, writes y and ty: 8 + 8 M bytes per element, with the moments 12 + 12 M for the
    whole op. EVICT: "evict_first" where they exceed the L2, so that what the first pass left there
    of x and t stays until it is read.
    """
    unit, known, _, first, at, mask = tile(backwards(), units, C, S, splits, LAST, UNITS, PIXELS)
    mean, scale = (
        row(table_ptr, 0, units, unit, known, LAST),
        row(table_ptr, 1, units, unit, known, LAST),
    )
    d = (
        tl.load(x_ptr + first + at, mask=mask, other=0.0, eviction_policy=EVICT).to(mean.dtype)
        - mean
    )
    u = scale * d + row(table_ptr, 2, units, unit, known, LAST)
    if HAS_Y:
        tl.store(
            y_ptr + first + at,
            narrow(activation.value(u, KIND), y_ptr.dtype.element_ty),
            mask=mask,
            eviction_policy=EVICT,
        )
    if M > 0:
        slope = activation.slope(u, KIND)
        for m in range(M):
            there = m * int64(units) * S + first
            t = tl.load(t_ptr + there + at, mask=mask, other=0.0, eviction_policy=EVICT).to(
                mean.dtype
            )
            P, Q = (
                row(table_ptr, 3 + 2 * m, units, unit, known, LAST),
                row(table_ptr, 4 + 2 * m, units, unit, known, LAST),
            )
            ty = activation.times_slope(slope, scale * t + (P * d + Q), KIND)
            tl.store(
                ty_ptr + there + at,
                narrow(ty, ty_ptr.dtype.element_ty),
                mask=mask,
                eviction_policy=EVICT,
            )


@triton.jit
def cotangent_sums_kernel(
    out_ptr,
    x_ptr,
    t_ptr,
    gy_ptr,
    gty_ptr,
    table_ptr,
    units,
    C,
    S,
    splits,
    M: tl.constexpr,
    KIND: tl.constexpr,
    HAS_GY: tl.constexpr,
    LAST: tl.constexpr,
    UNITS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """(2 + 3 M, units, splits).

    Sums of gu and gu (x - mean), and per tangent of g, g (x - mean) and g t, with g = f' gty, gu =
    f' gy + f'' sum du gty.

    Reads x, gy, t, gty: 8 + 8 M bytes per element.
    """
    unit, known, split, first, at, mask = tile(
        tl.program_id(0), units, C, S, splits, LAST, UNITS, PIXELS
    )
    mean, scale = (
        row(table_ptr, 0, units, unit, known, LAST),
        row(table_ptr, 1, units, unit, known, LAST),
    )
    # Beyond the edge d and the cotangents are 0, and with them every term of a sum.
    d = tl.where(mask, tl.load(x_ptr + first + at, mask=mask, other=0.0).to(mean.dtype) - mean, 0.0)
    u = scale * d + row(table_ptr, 2, units, unit, known, LAST)
    slope, bend = activation.slope(u, KIND), tl.zeros_like(d)
    out, stride = out_ptr + unit * splits + split, int64(units) * splits
    if M > 0:
        for m in range(M):
            there = m * int64(units) * S + first
            t = tl.load(t_ptr + there + at, mask=mask, other=0.0).to(mean.dtype)
            gty = tl.load(gty_ptr + there + at, mask=mask, other=0.0).to(mean.dtype)
            if KIND != activation.IDENTITY and KIND != activation.RELU:
                P, Q = (
                    row(table_ptr, 3 + 2 * m, units, unit, known, LAST),
                    row(table_ptr, 4 + 2 * m, units, unit, known, LAST),
                )
                bend += (scale * t + (P * d + Q)) * gty
            g, each = activation.times_slope(slope, gty, KIND), out + (2 + 3 * m) * stride
            tl.store(each, over_tile(g, LAST), mask=known)
            tl.store(each + stride, over_tile(g * d, LAST), mask=known)
            tl.store(each + 2 * stride, over_tile(g * t, LAST), mask=known)
    gu = cotangent(u, slope, bend, gy_ptr, first + at, mask, KIND, HAS_GY, "", M)
    tl.store(out, over_tile(gu, LAST), mask=known)
    tl.store(out + stride, over_tile(gu * d, LAST), mask=known)


@triton.jit
def cotangent(
    u,
    slope,
    bend,
    gy_ptr,
    at,
    mask,
    KIND: tl.constexpr,
    HAS_GY: tl.constexpr,
    EVICT: tl.constexpr,
    M: tl.constexpr,
):
    """gu = f' gy + f'' bend."""
    gu = bend
    if M > 0 and KIND != activation.IDENTITY and KIND != activation.RELU:
        gu = activation.curvature(u, KIND) * bend
    if HAS_GY:
        gy = tl.load(gy_ptr + at, mask=mask, other=0.0, eviction_policy=EVICT).to(u.dtype)
        gu += activation.times_slope(slope, gy, KIND)
    return gu


@triton.jit
def gradient_kernel(
    gx_ptr,
    gt_ptr,
    x_ptr,
    t_ptr,
    gy_ptr,
    gty_ptr,
    table_ptr,
    gtable_ptr,
    units,
    C,
    S,
    splits,
    M: tl.constexpr,
    KIND: tl.constexpr,
    HAS_GY: tl.constexpr,
    EVICT: tl.constexpr,
    LAST: tl.constexpr,
    UNITS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """gx = scale gu + c4 (x - mean) + c5 + sum (P g + c3 t), gt = scale g + c3 (x - mean) + d3.

    Reads x, gy, t, gty, writes gx and gt: 12 + 12 M bytes per element, with the sums 20 + 20 M for
    the whole op.
    """
    unit, known, _, first, at, mask = tile(backwards(), units, C, S, splits, LAST, UNITS, PIXELS)
    mean, scale = (
        row(table_ptr, 0, units, unit, known, LAST),
        row(table_ptr, 1, units, unit, known, LAST),
    )
    d = (
        tl.load(x_ptr + first + at, mask=mask, other=0.0, eviction_policy=EVICT).to(mean.dtype)
        - mean
    )
    u = scale * d + row(table_ptr, 2, units, unit, known, LAST)
    slope, bend = activation.slope(u, KIND), tl.zeros_like(d)
    gx = row(gtable_ptr, 0, units, unit, known, LAST) * d + row(
        gtable_ptr, 1, units, unit, known, LAST
    )
    if M > 0:
        for m in range(M):
            there = m * int64(units) * S + first
            t = tl.load(t_ptr + there + at, mask=mask, other=0.0, eviction_policy=EVICT).to(
                mean.dtype
            )
            gty = tl.load(gty_ptr + there + at, mask=mask, other=0.0, eviction_policy=EVICT).to(
                mean.dtype
            )
            P, Q = (
                row(table_ptr, 3 + 2 * m, units, unit, known, LAST),
                row(table_ptr, 4 + 2 * m, units, unit, known, LAST),
            )
            c3, d3 = (
                row(gtable_ptr, 2 + 2 * m, units, unit, known, LAST),
                row(gtable_ptr, 3 + 2 * m, units, unit, known, LAST),
            )
            g = activation.times_slope(slope, gty, KIND)
            bend += (scale * t + (P * d + Q)) * gty
            gx += P * g + c3 * t
            tl.store(
                gt_ptr + there + at,
                narrow(scale * g + (c3 * d + d3), gt_ptr.dtype.element_ty),
                mask=mask,
                eviction_policy=EVICT,
            )
        if KIND == activation.IDENTITY or KIND == activation.RELU:
            bend = tl.zeros_like(d)
    gx += scale * cotangent(u, slope, bend, gy_ptr, first + at, mask, KIND, HAS_GY, EVICT, M)
    tl.store(
        gx_ptr + first + at, narrow(gx, gx_ptr.dtype.element_ty), mask=mask, eviction_policy=EVICT
    )
