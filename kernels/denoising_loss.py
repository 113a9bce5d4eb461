"""Sums over the elements of a sample that involve its noise."""

import triton
import triton.language as tl

from fastscore.kernels.noisy_update import coefficient
from fastscore.kernels.philox import KEY, polar_of_rows
from fastscore.kernels.rademacher_project import by_thread


@triton.jit(do_not_specialize=[*KEY, "shift"])
def noise_reduce_kernel(
    partial_ptr,
    s_ptr,
    sigma_ptr,
    sigma,
    key_ptr,
    samples,
    per_sample,
    seed: tl.int64,
    step: tl.int64,
    stream: tl.int64,
    first: tl.int64,
    shift: tl.int64,
    DOT: tl.constexpr,
    SIGMA_KIND: tl.constexpr,
    HAS_KEY: tl.constexpr,
    CROSSES: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Program (ROWS samples, split) writes a partial sum of 1/2 (sigma s + z)^2 or of s z for each:
    short samples share a program.

    first: block of element 0, shift: its entry there. ALIGNED: every sample is whole blocks, in
    whole 128-bit words; FULL: and whole splits of STEPS tiles. Reads s: 4 bytes per element.
    """
    sample = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    split, splits = tl.program_id(1), tl.num_programs(1)
    valid = sample < samples
    start = sample * per_sample   # the sample's first element
    # Its block, and where it stands there.
    opened, entry = start >> 2, tl.zeros([ROWS, 1], tl.int64)
    if not ALIGNED:
        opened, entry = (start + shift) >> 2, (start + shift) & 3
    lane = tl.arange(0, 4 * BLOCK)[None, :]
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    pairs: tl.constexpr = s_ptr.dtype.element_ty.primitive_bitwidth == 16
    if not DOT:
        each = coefficient(sigma_ptr, sigma, sample, valid, SIGMA_KIND, dtype)

    # What a thread loads at once is in its sample or out of it, as a whole, and so is its sum: one
    # selection, where radii of zero would be a product for each pair of elements. What lies outside
    # is not read, and is whatever the registers hold.
    N: tl.constexpr = 8 if pairs else 4
    GROUPED: tl.constexpr = ALIGNED and not (FULL or DOT or WIDE)
    total = tl.zeros([ROWS, 4 * BLOCK // N if GROUPED else 4 * BLOCK], dtype)
    for i in range(STEPS):
        begin = (split.to(tl.int64) * STEPS + i) * (4 * BLOCK)
        block = first + opened + (begin >> 2)
        if FULL:
            s = tl.load(s_ptr + (start + begin) + lane).to(dtype)
            radius, direction = polar_of_rows(
                block, 0, key_ptr, seed, step, stream, HAS_KEY, CROSSES, pairs, True, BLOCK
            )
        else:
            end = tl.minimum(per_sample + entry - begin, 4 * BLOCK).to(tl.int32)
            if ROWS > 1:
                end = tl.where(valid, end, 0)
            mask = lane < end
            if GROUPED:
                s = tl.load(s_ptr + (start + begin) + lane, mask=mask).to(dtype)
            else:
                if not ALIGNED:
                    mask = mask & (lane >= entry - begin)
                s = tl.load(s_ptr + (start + begin - entry) + lane, mask=mask, other=0.0).to(dtype)
            radius, direction = polar_of_rows(
                block, (end + 3) >> 2, key_ptr, seed, step, stream, HAS_KEY, CROSSES, pairs,
                GROUPED, BLOCK,
            )
        z = (radius * direction).to(dtype)
        if DOT:
            total = tl.fma(s, z, total) if STEPS > 1 else s * z   # elsewhere s is 0
        else:
            t = tl.fma(tl.zeros_like(s) + each, s, z)
            if GROUPED:
                inside = N * tl.arange(0, 4 * BLOCK // N)[None, :] < end
                sums = tl.where(inside, by_thread(t * t, N), 0.0)
                total = total + sums if STEPS > 1 else sums
            else:
                if not ALIGNED:
                    t = tl.where(mask, t, 0.0)
                total = tl.fma(t, t, total) if STEPS > 1 else t * t
    reduced = tl.sum(total, 1)[:, None]
    tl.store(partial_ptr + sample * splits + split, reduced if DOT else 0.5 * reduced, mask=valid)
