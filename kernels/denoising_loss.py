"""Sums over the elements of a sample that involve its noise."""

import triton
import triton.language as tl
from fastscore.kernels.langevin_step import coefficient
from fastscore.kernels.philox import normals


@triton.jit
def noise_reduce_kernel(
    partial_ptr, s_ptr, sigma_ptr, sigma, key_ptr, per_sample, splits, seed, step, stream, offset,
    DOT: tl.constexpr, SIGMA_KIND: tl.constexpr, HAS_KEY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (sample, split) writes one partial sum of 1/2 (sigma s + z)^2 or of s z."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // splits
    start = offset + sample * per_sample   # index of the sample's first element
    base = start // 4 + program % splits * BLOCK
    z = normals(base + tl.arange(0, BLOCK), key_ptr, seed, step, stream, HAS_KEY)
    index = base * 4 + tl.arange(0, 4 * BLOCK) - start
    mask = (index >= 0) & (index < per_sample)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    s = tl.load(s_ptr + sample * per_sample + index, mask=mask, other=0.0).to(dtype)
    if DOT:
        v = s * z.to(dtype)
    else:
        t = coefficient(sigma_ptr, sigma, sample, True, SIGMA_KIND, dtype) * s + z.to(dtype)
        v = 0.5 * t * t
    tl.store(partial_ptr + program, tl.sum(tl.where(mask, v, 0.0), 0))
