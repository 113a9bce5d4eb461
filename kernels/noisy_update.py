"""x' = x + a d + b z in one pass."""

import triton
import triton.language as tl

from fastscore.kernels.philox import KEY, in_order, inside, int64, narrow, polar_of_tile


@triton.jit
def coefficient(each_ptr, number, sample, mask, PER_SAMPLE: tl.constexpr, dtype: tl.constexpr):
    """0: the number; 1: one value on the device; 2: one value per sample."""
    if PER_SAMPLE == 2:
        other: tl.constexpr = None if mask is None else 0.0
        return tl.load(each_ptr + sample, mask=mask, other=other).to(dtype)
    elif PER_SAMPLE == 1:
        return tl.load(each_ptr).to(dtype)
    else:
        return number   # float32; a float64 call passes tensors


@triton.jit
def sample_of(at, magic, bits):
    """at // per_sample for uint32 below 2^31, by the product that kernels/__init__.py's
    `_divisor` prepares."""
    return (tl.umulhi(at, int64(magic).to(tl.uint32)) >> int64(bits).to(tl.uint32)).to(tl.int32)


@triton.jit
def each_element(v, PAIRS: tl.constexpr):
    """A value per Philox block, or per two of them, for each of their elements."""
    v = in_order(v, v, v, v)
    return tl.interleave(v, v) if PAIRS else v


@triton.jit(do_not_specialize=[*KEY, "magic", "bits"])
def noisy_update_kernel(
    out_ptr,
    x_ptr,
    d_ptr,
    a_ptr,
    a,
    b_ptr,
    b,
    key_ptr,
    n,
    per_sample,
    seed: tl.int64,
    step: tl.int64,
    stream: tl.int64,
    first: tl.int64,
    shift,
    magic: tl.int64,
    bits: tl.int64,
    HAS_X: tl.constexpr,
    HAS_D: tl.constexpr,
    A_KIND: tl.constexpr,
    B_KIND: tl.constexpr,
    EACH: tl.constexpr,
    HAS_KEY: tl.constexpr,
    CROSSES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One lane per Philox block; first: block of element 0, shift: its entry in that block.

    EACH: coefficients are those of samples, and what a thread loads at once lies in one of them.
    """
    program = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    pairs: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth == 16
    if EACH:
        # Of 32 bits, and an offset at a block's start: lanes are elements of the tensor, which
        # takes fewer instructions than to add them to a program's first one. Beyond the end the
        # coefficients are the last sample's: loads without a mask need no zeros there.
        begin = tl.program_id(0) * (4 * BLOCK)
        lane = begin + tl.arange(0, 4 * BLOCK)
        mask = lane < n
        groups: tl.constexpr = BLOCK // 2 if pairs else BLOCK
        at = tl.minimum(begin + tl.arange(0, groups) * (4 * BLOCK // groups), n - 1)
        sample, known = sample_of(at.to(tl.uint32), magic, bits), None
        begin = 0
    else:
        begin = program * (4 * BLOCK) - shift
        lane, mask = inside(n, program * (4 * BLOCK), shift, 4 * BLOCK)
        sample, known = begin + lane, mask
        if A_KIND == 2 or B_KIND == 2:
            sample = sample // per_sample
    scale = 1.0   # of the radii: one coefficient in float32 costs a product per pair there
    if (EACH or B_KIND != 2) and not WIDE:
        scale = coefficient(b_ptr, b, sample, known, B_KIND, dtype)
    radius, direction = polar_of_tile(
        first + program * BLOCK, scale, key_ptr, seed, step, stream, HAS_KEY, CROSSES, pairs, BLOCK
    )
    # Every product and sum that may be one instruction is: left to the compiler, aligned and
    # shifted tensors would round differently.
    y = tl.zeros([4 * BLOCK], dtype)
    if HAS_X:
        y = tl.load(x_ptr + begin + lane, mask=mask, other=0.0).to(dtype)
    if HAS_D:
        d = tl.load(d_ptr + begin + lane, mask=mask, other=0.0).to(dtype)
        drift = coefficient(a_ptr, a, sample, known, A_KIND, dtype)
        if EACH and A_KIND == 2:
            drift = each_element(drift, pairs)
        else:
            drift = tl.zeros_like(d) + drift
        y = tl.fma(drift, d, y)
    if WIDE:
        y = tl.fma(
            tl.zeros_like(y) + coefficient(b_ptr, b, sample, mask, B_KIND, dtype),
            (radius * direction).to(dtype),
            y,
        )
    else:
        if B_KIND == 2 and not EACH:
            radius *= coefficient(b_ptr, b, sample, mask, B_KIND, dtype)
        y = tl.fma(radius, direction, y)
    tl.store(out_ptr + begin + lane, narrow(y, out_ptr.dtype.element_ty), mask=mask)
