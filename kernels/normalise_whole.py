"""The normalisations of samples that stay on the chip, in one kernel.

Tables and names are those of normalise_algebra.py.
"""

import triton
import triton.language as tl

from fastscore.kernels import activation
from fastscore.kernels.normalise_algebra import affine, bessel, between_channels, reciprocal
from fastscore.kernels.philox import narrow


@triton.jit
def whole_kernel(
    y_ptr,
    stats_ptr,
    x_ptr,
    coef_ptr,
    labels_ptr,
    B,
    C,
    S,
    groups,
    domain,
    coef_rows,
    EPS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    ONE: tl.constexpr,
    KIND: tl.constexpr,
    D: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Everything for one sample, or one group of its channels, that stays on the chip.

    Reads x once, writes y and the moments.

    8 bytes per element in float32.
    """
    row = tl.program_id(0).to(tl.int64)
    j, pixel = tl.arange(0, D), tl.arange(0, PIXELS)
    sample, c, unit, known = row // groups, row % groups * domain + j, row * domain + j, j < domain
    inside = known[:, None] & (pixel < S)[None, :]
    at = unit[:, None] * S + pixel[None, :]
    dtype: tl.constexpr = stats_ptr.dtype.element_ty

    d = tl.load(x_ptr + at, mask=inside, other=0.0).to(dtype)
    per_pixel = reciprocal(S, dtype)
    near = tl.sum(d, 1) * per_pixel
    d = tl.where(inside, d - near[:, None], 0.0)
    rest = tl.sum(d, 1) * per_pixel
    d = tl.where(inside, d - rest[:, None], 0.0)
    mean, variance = near + rest, tl.sum(d * d, 1) * per_pixel
    tl.store(stats_ptr + 2 * unit, mean, mask=known)
    tl.store(stats_ptr + 2 * unit + 1, variance, mask=known)

    share, unbiased, mask = reciprocal(domain, dtype), bessel(domain, dtype), known[None, :]
    r, offset, hat, _ = between_channels(
        mean[None, :], variance[None, :], mask, share, unbiased, EPS, GROUPED, ALPHA
    )
    _, gamma, _, shift, nothing = affine(
        coef_ptr, labels_ptr, sample, c[None, :], mask, B, C, coef_rows, offset, hat, ALPHA, BETA,
        HAS_LABELS, ONE,
    )
    u = tl.trans(gamma * r + nothing) * d + tl.trans(shift + nothing)
    tl.store(y_ptr + at, narrow(activation.value(u, KIND), y_ptr.dtype.element_ty), mask=inside)
