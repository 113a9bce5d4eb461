"""An activation of a value and of its derivatives along M directions, and the gradient of that,
each in one pass over the stack.

First derivatives: the stack is (1 + M, n), u and all tangents. First and second: (1 + 2M, n), u,
all u', all u''; or (1 + M, n) where u'' = 0 (STRAIGHT). M is a constant, as in normalise.py. Bytes
are those of float32, per element of the stack, with second derivatives per element of u.
"""

import triton
import triton.language as tl

from fastscore.kernels import activation
from fastscore.kernels.philox import int64, narrow


@triton.jit
def lanes(n, BLOCK: tl.constexpr):
    """(element, it exists); int64, for the stack may hold more than 2^31 elements."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return index, index < n


@triton.jit
def activate_dual_kernel(
    out_ptr, s_ptr, n, M: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """y = f(u), dy = f'(u) du. Reads s, writes y and dy: 8 bytes per element."""
    index, mask = lanes(n, BLOCK)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    u = tl.load(s_ptr + index, mask=mask, other=0.0).to(dtype)
    tl.store(
        out_ptr + index, narrow(activation.value(u, KIND), out_ptr.dtype.element_ty), mask=mask
    )
    slope = activation.slope(u, KIND)
    for m in range(M):
        at = (m + 1) * int64(n) + index
        du = tl.load(s_ptr + at, mask=mask, other=0.0).to(dtype)
        tl.store(
            out_ptr + at,
            narrow(activation.times_slope(slope, du, KIND), out_ptr.dtype.element_ty),
            mask=mask,
        )


@triton.jit
def activate_dual_gradient_kernel(
    out_ptr,
    s_ptr,
    g_ptr,
    n,
    M: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gu = f' gy + f'' sum of du gdy, gdu = f' gdy.

    Reads s and g, writes gu and gdu: 12 bytes per element.
    """
    index, mask = lanes(n, BLOCK)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    u = tl.load(s_ptr + index, mask=mask, other=0.0).to(dtype)
    g = tl.load(g_ptr + index, mask=mask, other=0.0).to(dtype)
    slope, bend = activation.slope(u, KIND), tl.zeros_like(u)
    for m in range(M):
        at = (m + 1) * int64(n) + index
        gdy = tl.load(g_ptr + at, mask=mask, other=0.0).to(dtype)
        if KIND != activation.RELU:
            bend += gdy * tl.load(s_ptr + at, mask=mask, other=0.0).to(dtype)
        tl.store(
            out_ptr + at,
            narrow(activation.times_slope(slope, gdy, KIND), out_ptr.dtype.element_ty),
            mask=mask,
        )
    gu = activation.times_slope(slope, g, KIND)
    if KIND != activation.RELU:
        gu += activation.curvature(u, KIND) * bend
    tl.store(out_ptr + index, narrow(gu, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def activate_jet_kernel(
    out_ptr,
    s_ptr,
    n,
    M: tl.constexpr,
    STRAIGHT: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = f(u), y' = f' u', y'' = f' u'' + f'' u'^2.

    Reads s, writes out: 8 (1 + 2M) bytes, 4 M fewer where u'' = 0.
    """
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
            y2 = activation.times_slope(
                first, tl.load(s_ptr + beyond, mask=mask, other=0.0).to(dtype), KIND
            )
        if KIND != activation.RELU:   # which does not bend
            y2 += activation.curvature(u, KIND) * u1 * u1
        tl.store(out_ptr + at, narrow(activation.times_slope(first, u1, KIND), element), mask=mask)
        tl.store(out_ptr + beyond, narrow(y2, element), mask=mask)
    tl.store(out_ptr + index, narrow(activation.value(u, KIND), element), mask=mask)


@triton.jit
def activate_jet_gradient_kernel(
    out_ptr,
    s_ptr,
    g_ptr,
    n,
    M: tl.constexpr,
    STRAIGHT: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gu'' = f' g'', gu' = f' g' + 2 f'' u' g'', gu = f' g + sum of f'' u' g' + (f'' u'' + f'''
    u'^2) g''.

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
            tl.store(
                out_ptr + beyond,
                narrow(activation.times_slope(first, g2, KIND), element),
                mask=mask,
            )
    tl.store(out_ptr + index, narrow(gu, element), mask=mask)
