"""x' = x + a d + b z in one pass."""

import triton
import triton.language as tl

from fastscore.kernels.philox import narrow, normals


@triton.jit
def coefficient(each_ptr, number, sample, mask, PER_SAMPLE: tl.constexpr, dtype: tl.constexpr):
    """0: the number; 1: one value on the device; 2: one value per sample."""
    if PER_SAMPLE == 2:
        return tl.load(each_ptr + sample, mask=mask, other=0.0).to(dtype)
    elif PER_SAMPLE == 1:
        return tl.load(each_ptr).to(dtype)
    else:
        return number   # float32; a float64 call passes tensors


@triton.jit
def noisy_update_kernel(
    out_ptr, x_ptr, d_ptr, a_ptr, a, b_ptr, b, key_ptr, n, per_sample, seed, step, stream, first, shift,
    HAS_X: tl.constexpr, HAS_D: tl.constexpr, A_KIND: tl.constexpr, B_KIND: tl.constexpr,
    HAS_KEY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One lane per Philox block; first: block of element 0, shift: its entry in that block."""
    program = tl.program_id(0).to(tl.int64)
    z = normals(first + program * BLOCK + tl.arange(0, BLOCK), key_ptr, seed, step, stream, HAS_KEY)
    index = program * 4 * BLOCK + tl.arange(0, 4 * BLOCK) - shift
    mask = (index >= 0) & (index < n)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    sample = index
    if A_KIND == 2 or B_KIND == 2:
        sample = index // per_sample
    y = coefficient(b_ptr, b, sample, mask, B_KIND, dtype) * z.to(dtype)
    if HAS_D:
        y += coefficient(a_ptr, a, sample, mask, A_KIND, dtype) * tl.load(d_ptr + index, mask=mask, other=0.0).to(dtype)
    if HAS_X:
        y += tl.load(x_ptr + index, mask=mask, other=0.0).to(dtype)
    tl.store(out_ptr + index, narrow(y, out_ptr.dtype.element_ty), mask=mask)
