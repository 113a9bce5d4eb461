"""Words, uniforms, normals and signs written to a tensor."""

import triton
import triton.language as tl

from fastscore.kernels.philox import KEY, inside, int64, narrow, polar_of_tile, words_of_tile
from fastscore.kernels.rademacher_project import signed, signs


@triton.jit(do_not_specialize=KEY)
def fill_kernel(
    out_ptr, key_ptr, n, seed: tl.int64, step: tl.int64, stream: tl.int64, first: tl.int64, shift,
    KIND: tl.constexpr, HAS_KEY: tl.constexpr, CROSSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """first: block of element 0, shift: its entry. KIND 0 words, 1 uniform, 2 normal."""
    program = tl.program_id(0).to(tl.int64)
    begin = program * (4 * BLOCK)
    pairs: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth == 16
    if KIND == 2:
        radius, direction = polar_of_tile(
            first + program * BLOCK, 1.0, key_ptr, seed, step, stream, HAS_KEY, CROSSES, pairs,
            BLOCK,
        )
        v = radius * direction
    else:
        w = words_of_tile(
            first + program * BLOCK, key_ptr, seed, step, stream, HAS_KEY, CROSSES, pairs, BLOCK
        )
        v = (
            w.to(tl.int64)
            if KIND == 0
            else ((w >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
        )
    lane, mask = inside(n, begin, shift, 4 * BLOCK)
    tl.store(out_ptr + (begin - shift) + lane, narrow(v, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=KEY)
def sign_kernel(
    out_ptr, key_ptr, n, seed: tl.int64, step: tl.int64, stream: tl.int64, first: tl.int64, shift,
    HAS_KEY: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """first: block of element 0, shift: its entry. A lane is a Philox block of 128 signs."""
    program = tl.program_id(0).to(tl.int64)
    begin = program * (128 * BLOCKS)
    bits = signs(
        first + program * BLOCKS + tl.arange(0, BLOCKS)[None, :], int64(0), key_ptr, seed, step,
        stream, HAS_KEY, True,
    )
    wide: tl.constexpr = out_ptr.dtype.element_ty == tl.float64
    v = signed(
        tl.full([128 * BLOCKS], 1.0, tl.float64 if wide else tl.float32),
        tl.reshape(bits, [128 * BLOCKS]),
    )
    lane, mask = inside(n, begin, shift, 128 * BLOCKS)
    tl.store(out_ptr + (begin - shift) + lane, narrow(v, out_ptr.dtype.element_ty), mask=mask)
