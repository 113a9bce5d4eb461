"""x' = x + a d + b z in one pass."""

import triton
import triton.language as tl

from fastscore.kernels.philox import KEY, narrow, polar_of_tile


@triton.jit
def coefficient(each_ptr, number, sample, mask, PER_SAMPLE: tl.constexpr, dtype: tl.constexpr):
    """0: the number; 1: one value on the device; 2: one value per sample."""
    if PER_SAMPLE == 2:
        return tl.load(each_ptr + sample, mask=mask, other=0.0).to(dtype)
    elif PER_SAMPLE == 1:
        return tl.load(each_ptr).to(dtype)
    else:
        return number   # float32; a float64 call passes tensors


@triton.jit(do_not_specialize=KEY)
def noisy_update_kernel(
    out_ptr, x_ptr, d_ptr, a_ptr, a, b_ptr, b, key_ptr, n, per_sample,
    seed: tl.int64, step: tl.int64, stream: tl.int64, first: tl.int64, shift,
    HAS_X: tl.constexpr, HAS_D: tl.constexpr, A_KIND: tl.constexpr, B_KIND: tl.constexpr,
    HAS_KEY: tl.constexpr, CROSSES: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One lane per Philox block; first: block of element 0, shift: its entry in that block."""
    program = tl.program_id(0).to(tl.int64)
    index = program * 4 * BLOCK + tl.arange(0, 4 * BLOCK) - shift
    mask = (index >= 0) & (index < n)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    sample = index
    if A_KIND == 2 or B_KIND == 2:
        sample = index // per_sample
    scale = 1.0   # of the radii: one coefficient in float32 costs a product per pair there
    if B_KIND != 2 and not WIDE:
        scale = coefficient(b_ptr, b, sample, mask, B_KIND, dtype)
    pairs: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth == 16
    radius, direction = polar_of_tile(first + program * BLOCK, scale, key_ptr, seed, step, stream, HAS_KEY, CROSSES, pairs, BLOCK)
    # Every product and sum that may be one instruction is: left to the compiler, aligned and shifted tensors would round differently.
    y = tl.zeros([4 * BLOCK], dtype)
    if HAS_X:
        y = tl.load(x_ptr + index, mask=mask, other=0.0).to(dtype)
    if HAS_D:
        d = tl.load(d_ptr + index, mask=mask, other=0.0).to(dtype)
        y = tl.fma(tl.zeros_like(d) + coefficient(a_ptr, a, sample, mask, A_KIND, dtype), d, y)
    if WIDE:
        y = tl.fma(tl.zeros_like(y) + coefficient(b_ptr, b, sample, mask, B_KIND, dtype), (radius * direction).to(dtype), y)
    else:
        if B_KIND == 2:
            radius *= coefficient(b_ptr, b, sample, mask, B_KIND, dtype)
        y = tl.fma(radius, direction, y)
    tl.store(out_ptr + index, narrow(y, out_ptr.dtype.element_ty), mask=mask)
