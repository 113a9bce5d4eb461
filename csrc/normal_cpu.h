// Sixteen Philox blocks at a time on the CPU, for whichever instruction set this file is compiled with
// (FASTSCORE_ISA = avx512, avx2 or baseline). Words are identical on all three; normals differ by rounding only.
//
// Everything here has internal linkage: a function compiled for AVX-512 must never be the copy the linker keeps.
#pragma once
#include "philox.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastscore {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kBytes = 4 * kLanes;

typedef float vf __attribute__((vector_size(kBytes)));
typedef int32_t vi __attribute__((vector_size(kBytes)));
typedef uint32_t vu __attribute__((vector_size(kBytes)));
typedef uint64_t vq __attribute__((vector_size(kBytes)));     // half as many lanes

constexpr int kGroup = 64;                                    // elements per group: 16 blocks
constexpr int kBatches = 16 / kLanes;                         // vectors of blocks per group

#define FS_INLINE inline __attribute__((always_inline))
#define FS_LAMBDA __attribute__((always_inline))

// Product of the low halves of the 64-bit lanes.
FS_INLINE vq mul_low(vq a, vq b) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

FS_INLINE vf vector_sqrt(vf a) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#elif defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)a);
#else
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(a[i]);
  return r;
#endif
}

FS_INLINE vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
FS_INLINE vf to_float(vu a) { return __builtin_convertvector(a, vf); }
FS_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }

// The state stays in 64-bit lanes, garbage in the upper half: mul_low ignores it, so a round is
// two products, two shifts and two three-way XORs, and no shuffle.
struct State { vq c0, c1, c2, c3; };

struct RoundKeys {
  uint32_t k0[10], k1[10];
};

FS_INLINE RoundKeys round_keys(const NoiseKey& key) {
  RoundKeys r;
  for (int i = 0; i < 10; ++i) {
    r.k0[i] = key.k0 + static_cast<uint32_t>(i) * kPhiloxW0;
    r.k1[i] = key.k1 + static_cast<uint32_t>(i) * kPhiloxW1;
  }
  return r;
}

// Blocks that share their upper counter word: c1, c2 and c3 start as scalars, so the first two rounds cost half.
FS_INLINE State philox_lanes(vq block_low, uint32_t block_high, const NoiseKey& key, const RoundKeys& r) {
  const vq m0 = vq{} + kPhiloxM0, m1 = vq{} + kPhiloxM1;
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * key.step;
  const uint32_t s0 = static_cast<uint32_t>(p1 >> 32) ^ block_high ^ r.k0[0], s1 = static_cast<uint32_t>(p1);
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * s0;
  vq v0 = mul_low(m0, block_low);
  vq c2 = (v0 >> 32) ^ static_cast<uint64_t>(key.stream ^ r.k1[0]);
  vq v1 = mul_low(m1, c2);
  State c;
  c.c0 = (v1 >> 32) ^ static_cast<uint64_t>(s1 ^ r.k0[1]);
  c.c1 = v1;
  c.c2 = v0 ^ static_cast<uint64_t>(static_cast<uint32_t>(p0 >> 32) ^ r.k1[1]);
  c.c3 = vq{} + static_cast<uint32_t>(p0);
#pragma GCC unroll 8
  for (int i = 2; i < 10; ++i) {
    v0 = mul_low(m0, c.c0);
    v1 = mul_low(m1, c.c2);
    c.c0 = (v1 >> 32) ^ c.c1 ^ static_cast<uint64_t>(r.k0[i]);
    c.c2 = (v0 >> 32) ^ c.c3 ^ static_cast<uint64_t>(r.k1[i]);
    c.c1 = v1;
    c.c3 = v0;
  }
  return c;
}

// Two half vectors of blocks interleaved into one: lane 2j from a, lane 2j + 1 from b.
FS_INLINE vu interleave(vq a, vq b) { return (vu)((a & 0xffffffffu) | (b << 32)); }

// Which block (0..15, relative to the group) sits in a lane: after the 4x4 transposition inside each 128-bit lane,
// output vector r must hold blocks that follow one another.
FS_INLINE constexpr int block_of_lane(int lane) { return (lane % 4) * (kLanes / 4) + lane / 4; }

FS_INLINE void block_numbers(vq& even, vq& odd) {
  for (int j = 0; j < kLanes / 2; ++j) {
    even[j] = static_cast<uint64_t>(block_of_lane(2 * j));
    odd[j] = static_cast<uint64_t>(block_of_lane(2 * j + 1));
  }
}

struct Words4 { vu w[4]; };

FS_INLINE Words4 philox_words(uint64_t block, const NoiseKey& key, const RoundKeys& r, vq even, vq odd) {
  const uint64_t low = static_cast<uint32_t>(block);
  const uint32_t high = static_cast<uint32_t>(block >> 32);
  const State a = philox_lanes(even + low, high, key, r), b = philox_lanes(odd + low, high, key, r);
  return {{interleave(a.c0, b.c0), interleave(a.c1, b.c1), interleave(a.c2, b.c2), interleave(a.c3, b.c3)}};
}

// -2 ln((w + 1/2) 2^-32), relative error 1e-7 for every word: near u = 1 the exact 1 - u is kept.
FS_INLINE vf minus_two_log(vu w) {
  const vi near_one = (vi)(w >= kNearOne);
  const vf far = to_float(w) + 0.5f, gap = (to_float((vu)~w) + 0.5f) * -kTwoM32;
  const vi e = ((vi)far - kTwoThirdsBits) >> 23;
  const vf m = (vf)((vi)far - (e << 23));
  const vf f = select(near_one, gap, m - 1.0f);
  const vf exponent = select(near_one, vf{}, to_float(e - 32));
  vf p = f * kLog[7] + kLog[6];
  p = p * f + kLog[5];
  p = p * f + kLog[4];
  p = p * f + kLog[3];
  p = p * f + kLog[2];
  p = p * f + kLog[1];
  p = p * f + kLog[0];
  return exponent * kMinus2Ln2 + (-2.0f * f) * (p * f + 1.0f);
}

FS_INLINE void box_muller(vu even, vu odd, vf& z_even, vf& z_odd) {
  const vf radius = vector_sqrt(minus_two_log(even));
  const vu quadrant = odd + 0x20000000u;                                 // bits 31, 30: nearest quarter turn
  const vf t = to_float((vi)odd - (vi)(quadrant & 0xC0000000u)) * kTwoPi32;   // in [-pi/4, pi/4]
  const vf y = t * t;
  const vf s = t + t * y * ((y * kSin[2] + kSin[1]) * y + kSin[0]);
  const vf c = (((y * kCos[3] + kCos[2]) * y + kCos[1]) * y + kCos[0]) * y + 1.0f;
  const vi swap = (vi)(quadrant << 1) >> 31;
  const vu sign_cos = (quadrant + 0x40000000u) & 0x80000000u, sign_sin = quadrant & 0x80000000u;
  z_even = (vf)((vu)(radius * select(swap, s, c)) ^ sign_cos);
  z_odd = (vf)((vu)(radius * select(swap, c, s)) ^ sign_sin);
}

// 4x4 transposition inside every 128-bit lane.
template <class V>
FS_INLINE void transpose4(V v[4]) {
#if defined(__AVX512F__)
  const __m512i a = (__m512i)v[0], b = (__m512i)v[1], c = (__m512i)v[2], d = (__m512i)v[3];
  const __m512i ab = _mm512_unpacklo_epi32(a, b), AB = _mm512_unpackhi_epi32(a, b);
  const __m512i cd = _mm512_unpacklo_epi32(c, d), CD = _mm512_unpackhi_epi32(c, d);
  v[0] = (V)_mm512_unpacklo_epi64(ab, cd), v[1] = (V)_mm512_unpackhi_epi64(ab, cd);
  v[2] = (V)_mm512_unpacklo_epi64(AB, CD), v[3] = (V)_mm512_unpackhi_epi64(AB, CD);
#elif defined(__AVX2__)
  const __m256i a = (__m256i)v[0], b = (__m256i)v[1], c = (__m256i)v[2], d = (__m256i)v[3];
  const __m256i ab = _mm256_unpacklo_epi32(a, b), AB = _mm256_unpackhi_epi32(a, b);
  const __m256i cd = _mm256_unpacklo_epi32(c, d), CD = _mm256_unpackhi_epi32(c, d);
  v[0] = (V)_mm256_unpacklo_epi64(ab, cd), v[1] = (V)_mm256_unpackhi_epi64(ab, cd);
  v[2] = (V)_mm256_unpacklo_epi64(AB, CD), v[3] = (V)_mm256_unpackhi_epi64(AB, CD);
#else
  V t[4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) t[i][j] = v[j][i];
  for (int i = 0; i < 4; ++i) v[i] = t[i];
#endif
}

template <class V>
FS_INLINE void store(void* p, V v) { __builtin_memcpy(p, &v, kBytes); }

// `block` is a multiple of 16, so the upper counter word never changes inside a group.
template <class Element, class Finish>
FS_INLINE void fill_groups(Element* out, uint64_t block, int64_t groups, const NoiseKey& key, Finish finish) {
  const RoundKeys r = round_keys(key);
  vq even, odd;
  block_numbers(even, odd);
  for (int64_t g = 0; g < groups * kBatches; ++g, block += kLanes, out += 4 * kLanes) {
    Words4 words = philox_words(block, key, r, even, odd);
    finish(out, words.w);
  }
}

// Raw words of `groups` groups of 64 elements.
__attribute__((noinline)) void fill_words(uint32_t* out, uint64_t block, int64_t groups, const NoiseKey& key) {
  fill_groups(out, block, groups, key, [](uint32_t* o, vu w[4]) FS_LAMBDA {
    transpose4(w);
    for (int i = 0; i < 4; ++i) store(o + i * kLanes, w[i]);
  });
}

// Standard normals of `groups` groups of 64 elements, in element order.
__attribute__((noinline)) void fill_normal(float* out, uint64_t block, int64_t groups, const NoiseKey& key) {
  fill_groups(out, block, groups, key, [](float* o, vu w[4]) FS_LAMBDA {
    vf z[4];
    box_muller(w[0], w[1], z[0], z[1]);
    box_muller(w[2], w[3], z[2], z[3]);
    transpose4(z);
    for (int i = 0; i < 4; ++i) store(o + i * kLanes, z[i]);
  });
}

constexpr int kTile = 1024;   // elements per tile: the normals of a tile stay in L1

// Normals of elements [first, first + n), n <= kTile; returns where they start in `buffer` (kTile + 2 * kGroup floats).
FS_INLINE const float* tile_normals(float* buffer, uint64_t first, int64_t n, const NoiseKey& key) {
  const uint64_t start = first / kGroup * kGroup;
  const int64_t groups = static_cast<int64_t>((first + n - start + kGroup - 1) / kGroup);
  fill_normal(buffer, start / 4, groups, key);
  return buffer + (first - start);
}

}  // namespace
}  // namespace fastscore
