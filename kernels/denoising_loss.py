"""Sums over the elements of a sample that involve its noise."""

import triton
import triton.language as tl

from fastscore.kernels.langevin_step import coefficient
from fastscore.kernels.philox import KEY, normals


@triton.jit(do_not_specialize=KEY)
def noise_reduce_kernel(
    partial_ptr, s_ptr, sigma_ptr, sigma, key_ptr, samples, per_sample, splits,
    seed: tl.int64, step: tl.int64, stream: tl.int64, offset: tl.int64,
    DOT: tl.constexpr, SIGMA_KIND: tl.constexpr, HAS_KEY: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (ROWS samples, split) writes a partial sum of 1/2 (sigma s + z)^2 or of s z for each: short samples share a program."""
    program = tl.program_id(0).to(tl.int64)
    sample, split = program // splits * ROWS + tl.arange(0, ROWS), program % splits
    valid = sample < samples
    start = offset + sample * per_sample   # index of the sample's first element
    base = start // 4 + split * BLOCK
    z = normals(base[:, None] + tl.arange(0, BLOCK)[None, :], key_ptr, seed, step, stream, HAS_KEY)
    index = (base * 4 - start)[:, None] + tl.arange(0, 4 * BLOCK)[None, :]
    mask = (index >= 0) & (index < per_sample) & valid[:, None]
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    s = tl.load(s_ptr + sample[:, None] * per_sample + index, mask=mask, other=0.0).to(dtype)
    if DOT:
        v = s * z.to(dtype)
    else:
        each = coefficient(sigma_ptr, sigma, sample[:, None], valid[:, None], SIGMA_KIND, dtype)
        t = each * s + z.to(dtype)
        v = 0.5 * t * t
    tl.store(partial_ptr + sample * splits + split, tl.sum(tl.where(mask, v, 0.0), 1), mask=valid)
