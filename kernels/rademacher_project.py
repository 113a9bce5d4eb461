"""Rademacher projections and their transpose.

A lane is a Philox block of 128 signs, which never become numbers in memory.

Bytes per element of a sample, in float32: project 4 (M + 1), one read of js and of s; spread 4 M
for gjs, 4 for gs, 4 for s.
"""

import triton
import triton.language as tl

from fastscore.kernels.philox import INTERPRETED, KEY, in_order, int64, load_key, narrow, philox

# Nor on what would change how a tile lies in the threads, and with that the order of a sum: a
# sample is the same in any part of a batch.
PLACE = [*KEY, "per_sample", "shift"]


@triton.jit
def signs(
    block, projection, key_ptr, seed, step, stream, HAS_KEY: tl.constexpr, USE_ASM: tl.constexpr
):
    """(ROWS, 128 BLOCKS) words whose highest bit is an element's sign.

    `block` (ROWS, BLOCKS) is int64, the element index over 128.
    """
    counter, k0, k1 = load_key(key_ptr, seed, step, HAS_KEY)
    stream = (int64(stream) + (projection << 16)).to(tl.uint32)
    w0, w1, w2, w3 = philox(block, counter, stream, k0, k1, USE_ASM)
    word = in_order(w0, w1, w2, w3)
    bits = word[:, :, None] << (31 - tl.arange(0, 32)).to(tl.uint32)[None, None, :]
    return tl.reshape(bits, [block.shape[0], 128 * block.shape[1]])


@triton.jit
def signed(x, bits):
    """x, float32 or float64, with its sign flipped where the highest bit is set."""
    # One instruction, where the compiler would share a mask and take three for two.
    if x.dtype == tl.float32 and not INTERPRETED:
        flip: tl.constexpr = "lop3.b32 $0, $1, $2, 0x80000000, 0x78;"
        return tl.inline_asm_elementwise(
            flip, "=f,f,r", [x, bits], dtype=tl.float32, is_pure=True, pack=1
        )
    elif x.dtype == tl.float32:
        return (x.to(tl.uint32, bitcast=True) ^ (bits & 0x80000000).to(tl.uint32)).to(
            tl.float32, bitcast=True
        )
    else:
        return tl.where(bits.to(tl.int32, bitcast=True) < 0, -x, x)


@triton.jit
def signed_all(g, bits, dtype: tl.constexpr, compute: tl.constexpr):
    """The number `g` of each row, as `dtype`, with the sign of each element of `bits`."""
    if dtype.primitive_bitwidth == 16 and not INTERPRETED:
        # Both of a pair at once: rounded before, for their signs do not matter for that.
        flip: tl.constexpr = """{
            .reg .b32 both;
            prmt.b32 both, $2, $3, 0x7632;
            lop3.b32 $0, $1, both, 0x80008000, 0x78;
        }"""
        each = tl.broadcast_to(narrow(g, dtype), bits.shape)
        return tl.inline_asm_elementwise(
            flip, "=r,r,r,r", [each, bits], dtype=each.dtype, is_pure=True, pack=2
        )
    return narrow(signed(tl.zeros(bits.shape, compute) + g, bits), dtype)


@triton.jit
def load(ptr, mask, dtype: tl.constexpr, FULL: tl.constexpr):
    v = tl.load(ptr) if FULL else tl.load(ptr, mask=mask, other=0.0)
    return v.to(dtype)


@triton.jit
def store(ptr, v, mask, FULL: tl.constexpr):
    v = narrow(v, ptr.dtype.element_ty)
    if FULL:
        tl.store(ptr, v)
    else:
        tl.store(ptr, v, mask=mask)


@triton.jit
def by_thread(v, N: tl.constexpr):
    """Sums of N neighbours, which a thread loads at once."""
    return tl.sum(tl.reshape(v, [v.shape[0], v.shape[1] // N, N]), 2)


@triton.jit
def whole(n, ALIGNED: tl.constexpr):
    """n, of which the compiler shall know that it is a multiple of 16 where it is."""
    return (n >> 4) * 16 if ALIGNED else n


@triton.jit
def place(
    samples,
    per_sample,
    first,
    shift,
    step,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """(sample (ROWS, 1), blocks (ROWS, BLOCKS), where the tile begins, offset from there, mask).

    Short samples share a program.

    first: block of element 0, shift: its entry there. ALIGNED: both and the sample are whole runs
    of 16 elements. FULL: of STEPS tiles, and there is no mask.
    """
    sample = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, 128 * BLOCKS)[None, :]
    start = sample * per_sample
    begin = (tl.program_id(1).to(tl.int64) * STEPS + step) * (128 * BLOCKS)
    if FULL:
        at = tl.program_id(0) * per_sample + begin   # of one sample: a number
        at, block = whole(at, True), first + (at >> 7) + tl.arange(0, BLOCKS)[None, :]
        mask = lane >= 0   # true, and not looked at
    else:
        entry = (start + shift) & 127   # of the sample's first element in its block
        block = first + ((start + shift) >> 7) + (begin >> 7) + tl.arange(0, BLOCKS)[None, :]
        low = tl.maximum(entry - begin, 0).to(tl.int32)
        high = tl.where(
            sample < samples, tl.minimum(per_sample + entry - begin, 128 * BLOCKS), 0
        ).to(tl.int32)
        # 128-bit accesses, each under one bit of the mask.
        at, low, high = (
            whole(start + begin - entry, ALIGNED),
            whole(low, ALIGNED),
            whole(high, ALIGNED),
        )
        mask = (lane >= low) & (lane < high)
    return sample, block, at, lane, mask


@triton.jit(do_not_specialize=PLACE)
def project_kernel(
    vjv_ptr,
    vs_ptr,
    ss_ptr,
    js_ptr,
    s_ptr,
    key_ptr,
    projections,
    samples,
    per_sample: tl.int64,
    seed: tl.int64,
    step: tl.int64,
    stream: tl.int64,
    first: tl.int64,
    shift: tl.int64,
    HAS_J: tl.constexpr,
    HAS_S: tl.constexpr,
    HAS_KEY: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Program (ROWS samples, split) writes partial sums v_m .

    js_m, v_m . s and s . s for each: (M, B, splits), the last (B, splits).

    STEPS > 1: of one projection, a program takes so many tiles and sums over its threads once.
    """
    sample, block, at, lane, mask = place(
        samples, per_sample, first, shift, 0, ALIGNED, FULL, ROWS, BLOCKS, STEPS
    )
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    valid, splits = sample < samples, tl.num_programs(1)
    row = sample * splits + tl.program_id(1)
    if STEPS > 1:
        element: tl.constexpr = (js_ptr if HAS_J else s_ptr).dtype.element_ty
        N: tl.constexpr = min(8, 128 // element.primitive_bitwidth)
        nothing = tl.zeros([1, 128 * BLOCKS // N], dtype)
        vjv, vs, ss = nothing, nothing, nothing
        for i in range(STEPS):
            sample, block, at, lane, mask = place(
                samples, per_sample, first, shift, i, ALIGNED, FULL, ROWS, BLOCKS, STEPS
            )
            bits = signs(block, int64(0), key_ptr, seed, step, stream, HAS_KEY, True)
            if HAS_J:
                vjv += by_thread(signed(load(js_ptr + at + lane, mask, dtype, FULL), bits), N)
            if HAS_S:
                s = load(s_ptr + at + lane, mask, dtype, FULL)
                vs += by_thread(signed(s, bits), N)
                ss += by_thread(s * s, N)
        if HAS_J:
            tl.store(vjv_ptr + row, tl.sum(vjv, 1)[:, None], mask=valid)
        if HAS_S:
            tl.store(vs_ptr + row, tl.sum(vs, 1)[:, None], mask=valid)
            tl.store(ss_ptr + row, tl.sum(ss, 1)[:, None], mask=valid)
    else:
        if HAS_S:
            s = load(s_ptr + at + lane, mask, dtype, FULL)
            tl.store(ss_ptr + row, tl.sum(s * s, 1)[:, None], mask=valid)
        m = int64(0)
        while m < projections:
            bits = signs(block, m, key_ptr, seed, step, stream, HAS_KEY, True)
            if HAS_J:
                js = load(
                    js_ptr + whole(m * samples * per_sample, ALIGNED) + at + lane, mask, dtype, FULL
                )
                tl.store(
                    vjv_ptr + m * samples * splits + row,
                    tl.sum(signed(js, bits), 1)[:, None],
                    mask=valid,
                )
            if HAS_S:
                tl.store(
                    vs_ptr + m * samples * splits + row,
                    tl.sum(signed(s, bits), 1)[:, None],
                    mask=valid,
                )
            m += 1


@triton.jit(do_not_specialize=PLACE)
def spread_kernel(
    gjs_ptr,
    gs_ptr,
    gvjv_ptr,
    gvs_ptr,
    gss_ptr,
    s_ptr,
    key_ptr,
    projections,
    samples,
    per_sample: tl.int64,
    seed: tl.int64,
    step: tl.int64,
    stream: tl.int64,
    first: tl.int64,
    shift: tl.int64,
    HAS_GJS: tl.constexpr,
    HAS_GVS: tl.constexpr,
    HAS_GSS: tl.constexpr,
    HAS_KEY: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """gjs_m = g_vjv[m] v_m and gs = sum of g_vs[m] v_m + 2 g_ss s."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    for i in range(STEPS):
        sample, block, at, lane, mask = place(
            samples, per_sample, first, shift, i, ALIGNED, FULL, ROWS, BLOCKS, STEPS
        )
        valid = sample < samples
        gs = tl.zeros([ROWS, 128 * BLOCKS], dtype)
        if HAS_GSS:
            each = tl.load(gss_ptr + sample, mask=valid, other=0.0)
            gs += 2 * each * load(s_ptr + at + lane, mask, dtype, FULL)
        if HAS_GJS or HAS_GVS:
            m = int64(0)
            while m < projections:
                # Assembly takes 25 registers more.
                bits = signs(block, m, key_ptr, seed, step, stream, HAS_KEY, False)
                if HAS_GJS:
                    each = tl.load(gvjv_ptr + m * samples + sample, mask=valid, other=0.0)
                    g = signed_all(each, bits, gjs_ptr.dtype.element_ty, dtype)
                    store(
                        gjs_ptr + whole(m * samples * per_sample, ALIGNED) + at + lane,
                        g,
                        mask,
                        FULL,
                    )
                if HAS_GVS:
                    each = tl.load(gvs_ptr + m * samples + sample, mask=valid, other=0.0)
                    gs += signed(tl.zeros([ROWS, 128 * BLOCKS], dtype) + each, bits)
                m += 1
        if HAS_GVS or HAS_GSS:
            store(gs_ptr + at + lane, gs, mask, FULL)
