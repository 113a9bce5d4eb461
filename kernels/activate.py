"""An activation of a value and its tangents, and the gradient of that, each in one pass over the stack (1 + M, n).

M is a constant, as in normalise.py. Bytes per element of the stack are those of float32.
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
def activate_dual_kernel(out_ptr, s_ptr, n, M: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """y = f(u), dy = f'(u) du. Reads s, writes y and dy: 8 bytes per element."""
    index, mask = lanes(n, BLOCK)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    u = tl.load(s_ptr + index, mask=mask, other=0.0).to(dtype)
    tl.store(out_ptr + index, narrow(activation.value(u, KIND), out_ptr.dtype.element_ty), mask=mask)
    slope = activation.slope(u, KIND)
    for m in range(M):
        at = (m + 1) * int64(n) + index
        du = tl.load(s_ptr + at, mask=mask, other=0.0).to(dtype)
        tl.store(out_ptr + at, narrow(activation.times_slope(slope, du, KIND), out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def activate_dual_gradient_kernel(
    out_ptr, s_ptr, g_ptr, n, M: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gu = f' gy + f'' sum of du gdy, gdu = f' gdy. Reads s and g, writes gu and gdu: 12 bytes per element."""
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
        tl.store(out_ptr + at, narrow(activation.times_slope(slope, gdy, KIND), out_ptr.dtype.element_ty), mask=mask)
    gu = activation.times_slope(slope, g, KIND)
    if KIND != activation.RELU:
        gu += activation.curvature(u, KIND) * bend
    tl.store(out_ptr + index, narrow(gu, out_ptr.dtype.element_ty), mask=mask)
