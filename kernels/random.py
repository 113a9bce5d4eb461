"""Words, uniforms, normals and signs written to a tensor."""

import triton
import triton.language as tl

from fastscore.kernels.philox import KEY, four_normals, in_order, int64, load_key, narrow, philox


@triton.jit(do_not_specialize=KEY)
def fill_kernel(
    out_ptr, key_ptr, n, seed: tl.int64, step: tl.int64, stream: tl.int64, first: tl.int64, shift,
    KIND: tl.constexpr, HAS_KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """first: block of element 0, shift: its entry. KIND 0 words, 1 uniform, 2 normal, 3 signs (a block is 128 of them)."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counter, k0, k1 = load_key(key_ptr, seed, step, HAS_KEY)
    index = tl.program_id(0).to(tl.int64) * 4 * BLOCK + tl.arange(0, 4 * BLOCK) - shift
    if KIND == 3:
        lane = (lane * 4) // 128   # four neighbouring signs lie in one word
    w0, w1, w2, w3 = philox(first + lane, counter, int64(stream).to(tl.uint32), k0, k1)
    if KIND == 0:
        v = in_order(w0, w1, w2, w3).to(tl.int64)
    elif KIND == 1:
        v = ((in_order(w0, w1, w2, w3) >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    elif KIND == 2:
        z0, z1, z2, z3 = four_normals(w0, w1, w2, w3, 1.0)
        v = in_order(z0, z1, z2, z3)
    else:
        element = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)) * 4
        which = (element % 128) // 32
        w = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
        w = w >> (element % 32).to(tl.uint32)
        w = in_order(w, w >> 1, w >> 2, w >> 3) & 1
        v = 1.0 - 2.0 * w.to(tl.float32)
    tl.store(out_ptr + index, narrow(v, out_ptr.dtype.element_ty), mask=(index >= 0) & (index < n))
