"""Philox4x32-10 and Box-Muller for Triton, with the numerics of csrc/philox.h.

One lane is one block of four elements.
"""

import os

import triton
import triton.language as tl

# Arguments of a kernel that Triton must not specialise on: a run over seeds and steps is one
# kernel, and a captured one stays it.
KEY = ["seed", "step", "stream", "first", "offset"]
# No inline assembly there.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def root_log(w):
    """sqrt(-log2 u) of u = (w + 1/2) 2^-32, as csrc/philox.h explains.

    The larger of the hardware's logarithm and a fit in g near u = 1.
    """
    u = w.to(tl.float32) * 2.328306992099033e-10 + 1.1641534960495165e-10   # (1 + 2^-22) u
    g = w.to(tl.int32, bitcast=True).to(tl.float32)
    near = (
        (u * 5.8253621835790336e-30 - 1.1763571072520622e-29) * g + 3.912537478629398e-20
    ) * g - 3.359027223037714e-10
    near = near * g - 1.679513611518857e-10
    if INTERPRETED:
        return tl.sqrt(tl.maximum(near, -tl.log2(u)))
    far = tl.inline_asm_elementwise(  # a minus sign of Triton's would be a subtraction
        "{ lg2.approx.ftz.f32 $0, $1; neg.f32 $0, $0; }",
        "=f,f",
        [u],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    q = tl.maximum(near, far)
    rsqrt = tl.inline_asm_elementwise(
        "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [q], dtype=tl.float32, is_pure=True, pack=1
    )
    root = q * rsqrt
    return root + (q - root * root) * (0.5 * rsqrt)   # one Newton step


@triton.jit
def multiply(c, M: tl.constexpr, ASM: tl.constexpr, USE_ASM: tl.constexpr):
    """The 64-bit product c M.

    By assembly it is one IMAD.WIDE; without, some become two instructions, and the compiler is
    freer.
    """
    if INTERPRETED or not USE_ASM:
        return c.to(tl.uint64) * M
    return tl.inline_asm_elementwise(ASM, "=l,r", [c], dtype=tl.uint64, is_pure=True, pack=1)


@triton.jit
def rounds(c0, c1, c2, c3, k0, k1, USE_ASM: tl.constexpr):
    """Philox4x32-10 of uint32 words, lanes or one number for all of them.

    What all lanes share is computed once.
    """
    for _ in tl.static_range(10):
        p0 = multiply(c0, 0xD2511F53, "mul.wide.u32 $0, $1, 0xD2511F53;", USE_ASM)
        p1 = multiply(c2, 0xCD9E8D57, "mul.wide.u32 $0, $1, 0xCD9E8D57;", USE_ASM)
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def philox(block, step, stream, k0, k1, USE_ASM: tl.constexpr = True):
    """Four uint32 words per lane; block is int64 (a bit pattern), the rest are uint32."""
    return rounds(block.to(tl.uint32), (block >> 32).to(tl.uint32), step, stream, k0, k1, USE_ASM)


@triton.jit
def polar(even, odd, scale):
    """scale (z_even, z_odd) = radius (cosine, sine).

    The angle is a residual in [-pi/2, pi/2] and a sign, which goes to the radius; the fits hold
    sqrt(2 ln 2).
    """
    radius = root_log(even) * scale
    flip = (odd + 0x40000000) & 0x80000000
    r = (radius.to(tl.uint32, bitcast=True) ^ flip.to(tl.uint32)).to(tl.float32, bitcast=True)
    a = (odd << 1).to(tl.int32, bitcast=True).to(tl.float32) * 7.314590396335798e-10
    y = a * a
    s = -0.00023313773272093385 + y * 3.050063469345332e-06
    s = a * (1.1774100065231323 + y * (-0.1962347775697708 + y * (0.009811239317059517 + y * s)))
    c = -0.0016311488579958677 + y * 2.7261627110419795e-05
    c = 1.1774100065231323 + y * (-0.5887038707733154 + y * (0.04905512183904648 + y * c))
    return r, c, s


@triton.jit
def int64(value):
    """A launcher's int arrives as int32, int64 or (the number 1) a constant."""
    return tl.full([], 0, tl.int64) + value


@triton.jit
def load_key(key_ptr, seed, step, HAS_KEY: tl.constexpr):
    """(step, k0, k1) as uint32, from the numbers or from the int64 tensor (seed, step)."""
    if HAS_KEY:
        seed = tl.load(key_ptr)
        step = tl.load(key_ptr + 1)
    seed, step = int64(seed), int64(step)
    return step.to(tl.uint32), seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def in_order(a, b, c, d):
    """Lanes of four become 4 BLOCK elements: entry k of lane j is element 4 j + k."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def words_of_lanes(block, lane, counter, stream, k0, k1, CROSSES: tl.constexpr):
    """The four words of each lane's block, `block` (int64) + lane."""
    if CROSSES:
        w0, w1, w2, w3 = philox(block + lane, counter, stream, k0, k1)
    else:  # the upper half of the counter is one number
        w0, w1, w2, w3 = rounds(
            block.to(tl.uint32) + lane.to(tl.uint32),
            (block >> 32).to(tl.uint32),
            counter,
            stream,
            k0,
            k1,
            True,
        )
    return w0, w1, w2, w3


@triton.jit
def words_of_tile(
    block,
    key_ptr,
    seed,
    step,
    stream,
    HAS_KEY: tl.constexpr,
    CROSSES: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The words of BLOCK blocks from `block` on, in element order.

    CROSSES and PAIRS as in polar_of_tile.
    """
    counter, k0, k1 = load_key(key_ptr, seed, step, HAS_KEY)
    stream = int64(stream).to(tl.uint32)
    if PAIRS:
        lane = tl.arange(0, BLOCK // 2) * 2
        w0, w1, w2, w3 = words_of_lanes(block, lane, counter, stream, k0, k1, CROSSES)
        v0, v1, v2, v3 = words_of_lanes(block, lane + 1, counter, stream, k0, k1, CROSSES)
        return tl.interleave(in_order(w0, w2, v0, v2), in_order(w1, w3, v1, v3))
    else:
        w0, w1, w2, w3 = words_of_lanes(
            block, tl.arange(0, BLOCK), counter, stream, k0, k1, CROSSES
        )
        return in_order(w0, w1, w2, w3)


@triton.jit
def polar_of_lanes(block, lane, scale, counter, stream, k0, k1, CROSSES: tl.constexpr):
    """(radius of the first pair, of the second, then cosine and sine of each)."""
    w0, w1, w2, w3 = words_of_lanes(block, lane, counter, stream, k0, k1, CROSSES)
    r0, c0, s0 = polar(w0, w1, scale)
    r1, c1, s1 = polar(w2, w3, scale)
    return r0, r1, c0, s0, c1, s1


@triton.jit
def polar_of_lane_pairs(
    block, lane, scale, other_scale, counter, stream, k0, k1, CROSSES: tl.constexpr
):
    """(radius, direction) of the eight elements of lanes `lane` and `lane + 1`, in element
    order."""
    r0, r1, c0, s0, c1, s1 = polar_of_lanes(block, lane, scale, counter, stream, k0, k1, CROSSES)
    q0, q1, d0, t0, d1, t1 = polar_of_lanes(
        block, lane + 1, other_scale, counter, stream, k0, k1, CROSSES
    )
    radius = in_order(r0, r1, q0, q1)
    return tl.interleave(radius, radius), tl.interleave(
        in_order(c0, c1, d0, d1), in_order(s0, s1, t0, t1)
    )


@triton.jit
def polar_of_tile(
    block,
    scale,
    key_ptr,
    seed,
    step,
    stream,
    HAS_KEY: tl.constexpr,
    CROSSES: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(radius, direction), whose product is scale times the normals of BLOCK blocks from `block`
    (int64) on, in element order.

    CROSSES: a multiple of 2^32 may lie within. PAIRS: a thread gets two neighbouring blocks, as
        many elements as it loads of a 16-bit type.
    """
    counter, k0, k1 = load_key(key_ptr, seed, step, HAS_KEY)
    stream = int64(stream).to(tl.uint32)
    if PAIRS:
        lane = tl.arange(0, BLOCK // 2) * 2
        return polar_of_lane_pairs(block, lane, scale, scale, counter, stream, k0, k1, CROSSES)
    else:
        r0, r1, c0, s0, c1, s1 = polar_of_lanes(
            block, tl.arange(0, BLOCK), scale, counter, stream, k0, k1, CROSSES
        )
        return in_order(r0, r0, r1, r1), in_order(c0, s0, c1, s1)


@triton.jit
def polar_of_rows(
    block,
    count,
    key_ptr,
    seed,
    step,
    stream,
    HAS_KEY: tl.constexpr,
    CROSSES: tl.constexpr,
    PAIRS: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for a row of BLOCK blocks from each of `block` (ROWS, 1).

    Unless FULL, from its block `count` on the radius is 0.
    """
    counter, k0, k1 = load_key(key_ptr, seed, step, HAS_KEY)
    stream = int64(stream).to(tl.uint32)
    if PAIRS:
        lane = (tl.arange(0, BLOCK // 2) * 2)[None, :]
        here, next_one = (
            (1.0, 1.0)
            if FULL
            else (tl.where(lane < count, 1.0, 0.0), tl.where(lane + 1 < count, 1.0, 0.0))
        )
        return polar_of_lane_pairs(block, lane, here, next_one, counter, stream, k0, k1, CROSSES)
    else:
        lane = tl.arange(0, BLOCK)[None, :]
        here = 1.0 if FULL else tl.where(lane < count, 1.0, 0.0)
        r0, r1, c0, s0, c1, s1 = polar_of_lanes(block, lane, here, counter, stream, k0, k1, CROSSES)
        return in_order(r0, r0, r1, r1), in_order(c0, s0, c1, s1)


@triton.jit
def inside(n, begin, shift, SIZE: tl.constexpr):
    """(lane, it is an element) of SIZE lanes of which lane 0 is element begin - shift."""
    lane = tl.arange(0, SIZE)
    low = tl.maximum(shift - begin, 0).to(tl.int32)
    high = tl.minimum(n + shift - begin, SIZE).to(tl.int32)
    return lane, (lane >= low) & (lane < high)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """To the element type.

    The interpreter truncates float32 to bfloat16, so there it is rounded to nearest even by hand.
    """
    if INTERPRETED and dtype == tl.bfloat16 and v.dtype == tl.float32:
        bits = v.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, rounded.to(tl.uint32).to(tl.float32, bitcast=True), v)
    return v.to(dtype)
