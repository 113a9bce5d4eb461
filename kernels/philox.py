"""Philox4x32-10 and Box-Muller for Triton, with the numerics of csrc/philox.h. One lane is one block of four elements."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")   # no inline assembly there


@triton.jit
def minus_two_log(u):
    """-2 ln u; the compiled one is good to 2^-22 absolutely near 1 and relatively elsewhere, without the cases that u never reaches."""
    if INTERPRETED:
        return -2.0 * tl.log(u)
    log2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
    return log2 * -1.3862943611198906


@triton.jit
def square_root(v):
    """Of a positive normal number: the hardware's estimate and one Newton step."""
    if INTERPRETED:
        return tl.sqrt(v)
    estimate = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)
    root = v * estimate
    return root + (v - root * root) * (0.5 * estimate)


@triton.jit
def philox(block, step, stream, k0, k1):
    """Four uint32 words per lane; block is int64 (a bit pattern), the rest are uint32."""
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = c0 * 0 + step
    c3 = c0 * 0 + stream
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53  # one IMAD.WIDE gives both halves
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def box_muller(even, odd):
    """(z_even, z_odd): the angle is a residual in [-pi/2, pi/2] and a sign, which goes to the radius."""
    u = even.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    t = (even ^ 0xFFFFFFFF).to(tl.uint32).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # Near 1 the exact number to keep is t = 1 - u.
    near = 2.0 * t * (1.0 + t * (0.500010073184967 + t * (0.332370400428772 + t * 0.27588674426078796)))
    radius = square_root(tl.where(t < 0.0625, near, minus_two_log(u)))
    flip = (odd + 0x40000000) & 0x80000000
    r = (radius.to(tl.uint32, bitcast=True) ^ flip.to(tl.uint32)).to(tl.float32, bitcast=True)
    a = (odd << 1).to(tl.int32, bitcast=True).to(tl.float32) * 7.314590396335798e-10
    y = a * a
    s = -0.00019806614727713168 + y * 2.6000548132287804e-06
    s = a + y * a * (-0.16666656732559204 + y * (0.008333017118275166 + y * s))
    c = -0.001385592739097774 + y * 2.3194383174995892e-05
    c = 1.0 + y * (-0.4999993145465851 + y * (0.041663989424705505 + y * c))
    return r * c, r * s


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
def normals(block, key_ptr, seed, step, stream, HAS_KEY: tl.constexpr):
    """Standard normals of the lanes' blocks, in element order."""
    counter, k0, k1 = load_key(key_ptr, seed, step, HAS_KEY)
    w0, w1, w2, w3 = philox(block, counter, int64(stream).to(tl.uint32), k0, k1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return in_order(z0, z1, z2, z3)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """To the element type; the interpreter truncates float32 to bfloat16, so there it is rounded to nearest even by hand."""
    if INTERPRETED and dtype == tl.bfloat16 and v.dtype == tl.float32:
        bits = v.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, rounded.to(tl.uint32).to(tl.float32, bitcast=True), v)
    return v.to(dtype)
