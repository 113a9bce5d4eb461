"""Rademacher projections and their transpose. A lane is a word of 32 signs, which never become numbers in memory.

Bytes per element of a sample, in float32: project 4 (M + 1), one read of js and of s; spread 4 M for gjs, 4 for gs, 4 for s.
"""

import triton
import triton.language as tl

from fastscore.kernels.philox import KEY, int64, load_key, narrow, philox


@triton.jit
def sign_words(word, projection, key_ptr, seed, step, stream, HAS_KEY: tl.constexpr):
    """Words (ROWS, WORDS) of 32 signs each; `word` is int64, the element index over 32."""
    counter, k0, k1 = load_key(key_ptr, seed, step, HAS_KEY)
    stream = (int64(stream) + (projection << 16)).to(tl.uint32)
    w0, w1, w2, w3 = philox(word >> 2, counter, stream, k0, k1, False)   # assembly would spill a register on sm_100
    which = word & 3
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def signed(x, word, bit):
    """x (ROWS, WORDS, 32), float32 or float64, with its signs flipped where the bits are set."""
    w = word[:, :, None] >> bit
    if x.dtype == tl.float32:
        return (x.to(tl.uint32, bitcast=True) ^ (w << 31)).to(tl.float32, bitcast=True)
    else:
        return tl.where((w & 1) == 0, x, -x)


@triton.jit
def total(x):
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def place(samples, per_sample, splits, offset, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """(sample (ROWS), split, first words (ROWS, WORDS), element in its sample (ROWS, WORDS, 32), mask): short samples share a program."""
    program = tl.program_id(0).to(tl.int64)
    sample, split = program // splits * ROWS + tl.arange(0, ROWS), program % splits
    start = offset + sample * per_sample   # index of the sample's first element
    base = start // 32 + split * WORDS
    word = base[:, None] + tl.arange(0, WORDS)[None, :]
    index = (base * 32 - start)[:, None, None] + (tl.arange(0, WORDS)[:, None] * 32 + tl.arange(0, 32)[None, :])[None, :, :]
    return sample, split, word, index, (index >= 0) & (index < per_sample) & (sample < samples)[:, None, None]


@triton.jit(do_not_specialize=KEY)
def project_kernel(
    vjv_ptr, vs_ptr, ss_ptr, js_ptr, s_ptr, key_ptr, projections, samples, per_sample, splits,
    seed: tl.int64, step: tl.int64, stream: tl.int64, offset: tl.int64,
    HAS_J: tl.constexpr, HAS_S: tl.constexpr, HAS_KEY: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Program (ROWS samples, split) writes partial sums v_m . js_m, v_m . s and s . s for each: (M, B, splits), the last (B, splits)."""
    sample, split, word, index, mask = place(samples, per_sample, splits, offset, ROWS, WORDS)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    bit = tl.arange(0, 32)[None, None, :].to(tl.uint32)
    at, valid = sample[:, None, None] * per_sample + index, sample < samples
    row = sample * splits + split
    if HAS_S:
        s = tl.load(s_ptr + at, mask=mask, other=0.0).to(dtype)
        tl.store(ss_ptr + row, total(s * s), mask=valid)
    m = int64(0)
    while m < projections:
        w = sign_words(word, m, key_ptr, seed, step, stream, HAS_KEY)
        if HAS_J:
            js = tl.load(js_ptr + m * samples * per_sample + at, mask=mask, other=0.0).to(dtype)
            tl.store(vjv_ptr + m * samples * splits + row, total(signed(js, w, bit)), mask=valid)
        if HAS_S:
            tl.store(vs_ptr + m * samples * splits + row, total(signed(s, w, bit)), mask=valid)
        m += 1


@triton.jit(do_not_specialize=KEY)
def spread_kernel(
    gjs_ptr, gs_ptr, gvjv_ptr, gvs_ptr, gss_ptr, s_ptr, key_ptr, projections, samples, per_sample, splits,
    seed: tl.int64, step: tl.int64, stream: tl.int64, offset: tl.int64,
    HAS_GJS: tl.constexpr, HAS_GVS: tl.constexpr, HAS_GSS: tl.constexpr, HAS_KEY: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """gjs_m = g_vjv[m] v_m and gs = sum of g_vs[m] v_m + 2 g_ss s."""
    sample, split, word, index, mask = place(samples, per_sample, splits, offset, ROWS, WORDS)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    bit = tl.arange(0, 32)[None, None, :].to(tl.uint32)
    at, valid = sample[:, None, None] * per_sample + index, sample < samples
    gs = tl.zeros([ROWS, WORDS, 32], dtype)
    if HAS_GSS:
        each = tl.load(gss_ptr + sample, mask=valid, other=0.0)
        gs += 2 * each[:, None, None] * tl.load(s_ptr + at, mask=mask, other=0.0).to(dtype)
    if HAS_GJS or HAS_GVS:
        m = int64(0)
        while m < projections:
            w = sign_words(word, m, key_ptr, seed, step, stream, HAS_KEY)
            if HAS_GJS:
                each = tl.load(gvjv_ptr + m * samples + sample, mask=valid, other=0.0)
                g = signed(tl.zeros([ROWS, WORDS, 32], dtype) + each[:, None, None], w, bit)
                tl.store(gjs_ptr + m * samples * per_sample + at, narrow(g, gjs_ptr.dtype.element_ty), mask=mask)
            if HAS_GVS:
                each = tl.load(gvs_ptr + m * samples + sample, mask=valid, other=0.0)
                gs += signed(tl.zeros([ROWS, WORDS, 32], dtype) + each[:, None, None], w, bit)
            m += 1
    if HAS_GVS or HAS_GSS:
        tl.store(gs_ptr + at, narrow(gs, gs_ptr.dtype.element_ty), mask=mask)
