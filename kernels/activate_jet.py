"""An activation of a value and of its first and second derivatives along M directions, and the gradient of that, each in one pass.

The stack is (1 + 2M, n): u, all u', all u''; or (1 + M, n) where u'' = 0 (STRAIGHT). M is a constant, as in normalise.py.
Everything of one direction is read before anything is written. Bytes per element of u are those of float32.
"""

import triton
import triton.language as tl

from fastscore.kernels import activation
from fastscore.kernels.activate import lanes
from fastscore.kernels.philox import int64, narrow


@triton.jit
def activate_jet_kernel(
    out_ptr, s_ptr, n, M: tl.constexpr, STRAIGHT: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = f(u), y' = f' u', y'' = f' u'' + f'' u'^2. Reads s, writes out: 8 (1 + 2M) bytes, 4 M fewer where u'' = 0."""
    index, mask = lanes(n, BLOCK)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    element: tl.constexpr = out_ptr.dtype.element_ty
    u = tl.load(s_ptr + index, mask=mask, other=0.0).to(dtype)
    first = activation.slope(u, KIND)
    for m in range(M):
        at = (m + 1) * int64(n) + index
        beyond = at + M * int64(n)
        u1 = tl.load(s_ptr + at, mask=mask, other=0.0).to(dtype)
        y2 = tl.zeros_like(u)
        if not STRAIGHT:
            y2 = activation.times_slope(first, tl.load(s_ptr + beyond, mask=mask, other=0.0).to(dtype), KIND)
        if KIND != activation.RELU:   # which does not bend
            y2 += activation.curvature(u, KIND) * u1 * u1
        tl.store(out_ptr + at, narrow(activation.times_slope(first, u1, KIND), element), mask=mask)
        tl.store(out_ptr + beyond, narrow(y2, element), mask=mask)
    tl.store(out_ptr + index, narrow(activation.value(u, KIND), element), mask=mask)


@triton.jit
def activate_jet_gradient_kernel(
    out_ptr, s_ptr, g_ptr, n, M: tl.constexpr, STRAIGHT: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gu'' = f' g'', gu' = f' g' + 2 f'' u' g'', gu = f' g + sum of f'' u' g' + (f'' u'' + f''' u'^2) g''.

    Reads s and g, writes out: 12 (1 + 2M) bytes, 8 M fewer where u'' = 0.
    """
    index, mask = lanes(n, BLOCK)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    element: tl.constexpr = out_ptr.dtype.element_ty
    bends: tl.constexpr = KIND != activation.RELU
    u = tl.load(s_ptr + index, mask=mask, other=0.0).to(dtype)
    first = activation.slope(u, KIND)
    gu = activation.times_slope(first, tl.load(g_ptr + index, mask=mask, other=0.0).to(dtype), KIND)
    for m in range(M):
        at = (m + 1) * int64(n) + index
        beyond = at + M * int64(n)
        g1 = tl.load(g_ptr + at, mask=mask, other=0.0).to(dtype)
        gu1 = activation.times_slope(first, g1, KIND)
        if bends or not STRAIGHT:
            g2 = tl.load(g_ptr + beyond, mask=mask, other=0.0).to(dtype)
        if bends:
            second = activation.curvature(u, KIND)
            u1 = tl.load(s_ptr + at, mask=mask, other=0.0).to(dtype)
            third = activation.third(u, KIND) * u1 * u1
            if not STRAIGHT:
                third += second * tl.load(s_ptr + beyond, mask=mask, other=0.0).to(dtype)
            gu += second * u1 * g1 + third * g2
            gu1 += 2.0 * second * u1 * g2
        tl.store(out_ptr + at, narrow(gu1, element), mask=mask)
        if not STRAIGHT:
            tl.store(out_ptr + beyond, narrow(activation.times_slope(first, g2, KIND), element), mask=mask)
    tl.store(out_ptr + index, narrow(gu, element), mask=mask)
