// Thirty-two Philox blocks at a time on the CPU, for whichever instruction set this file is compiled with
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

constexpr int kGroup = 128;                                   // elements per group: 32 blocks

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

// The state stays in 64-bit lanes, garbage in the upper half: mul_low ignores it, so a round is two products, two
// shifts and two three-way XORs, and no shuffle. A round waits for its own products, so kChains states run side by side.
constexpr int kChains = 4;
constexpr int kPass = 4 * (kChains / 2) * kLanes;   // elements per pass over the chains
struct State { vq c0[kChains], c1[kChains], c2[kChains], c3[kChains]; };

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
FS_INLINE State philox_lanes(const vq* block_low, uint32_t block_high, const NoiseKey& key, const RoundKeys& r) {
  const vq m0 = vq{} + kPhiloxM0, m1 = vq{} + kPhiloxM1;
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * key.step;
  const uint32_t s0 = static_cast<uint32_t>(p1 >> 32) ^ block_high ^ r.k0[0], s1 = static_cast<uint32_t>(p1);
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * s0;
  State c;
#pragma GCC unroll 4
  for (int j = 0; j < kChains; ++j) {
    const vq v0 = mul_low(m0, block_low[j]);
    const vq v1 = mul_low(m1, (v0 >> 32) ^ static_cast<uint64_t>(key.stream ^ r.k1[0]));
    c.c0[j] = (v1 >> 32) ^ static_cast<uint64_t>(s1 ^ r.k0[1]);
    c.c1[j] = v1;
    c.c2[j] = v0 ^ static_cast<uint64_t>(static_cast<uint32_t>(p0 >> 32) ^ r.k1[1]);
    c.c3[j] = vq{} + static_cast<uint32_t>(p0);
  }
#pragma GCC unroll 8
  for (int i = 2; i < 10; ++i) {
    vq v0[kChains], v1[kChains];
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) v0[j] = mul_low(m0, c.c0[j]), v1[j] = mul_low(m1, c.c2[j]);
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      c.c0[j] = (v1[j] >> 32) ^ c.c1[j] ^ static_cast<uint64_t>(r.k0[i]);
      c.c2[j] = (v0[j] >> 32) ^ c.c3[j] ^ static_cast<uint64_t>(r.k1[i]);
      c.c1[j] = v1[j];
      c.c3[j] = v0[j];
    }
  }
  return c;
}

// Two half vectors of blocks interleaved into one: lane 2j from a, lane 2j + 1 from b.
FS_INLINE vu interleave(vq a, vq b) {
#if defined(__AVX512F__)
  return (vu)_mm512_mask_shuffle_epi32((__m512i)a, 0xAAAA, (__m512i)b, _MM_PERM_CCAA);
#else
  return (vu)((a & 0xffffffffu) | (b << 32));
#endif
}

// Which block of a vector sits in a lane: after the 4x4 transposition inside each 128-bit lane,
// output vector r must hold blocks that follow one another.
FS_INLINE constexpr int block_of_lane(int lane) { return (lane % 4) * (kLanes / 4) + lane / 4; }

FS_INLINE void block_numbers(vq& even, vq& odd) {
  for (int j = 0; j < kLanes / 2; ++j) {
    even[j] = static_cast<uint64_t>(block_of_lane(2 * j));
    odd[j] = static_cast<uint64_t>(block_of_lane(2 * j + 1));
  }
}

// Words of 2 kLanes blocks: w[v][k] is word k of the blocks of vector v.
struct WordVectors { vu w[kChains / 2][4]; };

FS_INLINE WordVectors philox_words(uint64_t block, const NoiseKey& key, const RoundKeys& r, vq even, vq odd) {
  vq low[kChains];
  for (int j = 0; j < kChains; ++j) low[j] = (j % 2 ? odd : even) + (static_cast<uint32_t>(block) + j / 2 * kLanes);
  const State c = philox_lanes(low, static_cast<uint32_t>(block >> 32), key, r);
  WordVectors words;
  for (int v = 0; v < kChains / 2; ++v) {
    words.w[v][0] = interleave(c.c0[2 * v], c.c0[2 * v + 1]);
    words.w[v][1] = interleave(c.c1[2 * v], c.c1[2 * v + 1]);
    words.w[v][2] = interleave(c.c2[2 * v], c.c2[2 * v + 1]);
    words.w[v][3] = interleave(c.c3[2 * v], c.c3[2 * v + 1]);
  }
  return words;
}

#define FS_EACH for (int j = 0; j < kChains; ++j)

// -2 ln u, u = (w + 1/2) 2^-32, relative error 1e-7 for every word: near u = 1 the exact 1 - u, which ~w gives, is kept.
FS_INLINE void minus_two_log(const vu* w, vf* out) {
  vf f[kChains], exponent[kChains], p[kChains];
#pragma GCC unroll 4
  FS_EACH {
#if defined(__AVX512F__)
    const __mmask16 near_one = _mm512_cmpge_epu32_mask((__m512i)w[j], _mm512_set1_epi32(static_cast<int>(kNearOne)));
    const vu x = (vu)_mm512_mask_xor_epi32((__m512i)w[j], near_one, (__m512i)w[j], _mm512_set1_epi32(-1));
#else
    const vi near_one = (vi)(w[j] >= kNearOne);
    const vu x = w[j] ^ (vu)near_one;
#endif
    const vf u = to_float(x) * kTwoM32 + 0.5f * kTwoM32;   // or 1 - u
    const vi e = ((vi)u - kTwoThirdsBits) & static_cast<int>(0xff800000u);   // exponent of u / (2/3), in place
    const vf m = (vf)((vi)u - e) - 1.0f;
#if defined(__AVX512F__)
    f[j] = (vf)_mm512_mask_sub_ps((__m512)m, near_one, _mm512_setzero_ps(), (__m512)u);
    exponent[j] = (vf)_mm512_maskz_cvtepi32_ps(_knot_mask16(near_one), (__m512i)e);
#else
    f[j] = select(near_one, -u, m);
    exponent[j] = to_float(e & ~near_one);
#endif
    p[j] = f[j] * kLog[7] + kLog[6];
  }
#pragma GCC unroll 8
  for (int k = 5; k >= 0; --k)
#pragma GCC unroll 4
    FS_EACH p[j] = p[j] * f[j] + kLog[k];
#pragma GCC unroll 4
  FS_EACH out[j] = exponent[j] * (kMinus2Ln2 / 8388608) + (-2.0f * f[j]) * (p[j] * f[j] + 1.0f);
}

// z[v][0], z[v][1] from the pair of words 0, 1 and z[v][2], z[v][3] from 2, 3.
FS_INLINE void box_muller(const WordVectors& words, vf (*z)[4]) {
  vu even[kChains];
  vf radius[kChains];
#pragma GCC unroll 4
  FS_EACH even[j] = words.w[j / 2][j % 2 * 2];
  minus_two_log(even, radius);
#pragma GCC unroll 4
  FS_EACH {
    const vu odd = words.w[j / 2][j % 2 * 2 + 1];
    // A residual in [-pi/2, pi/2] and a sign, which goes to the radius.
    const vf r = (vf)((vu)vector_sqrt(radius[j]) ^ ((odd + 0x40000000u) & 0x80000000u));
    const vf t = to_float((vi)(odd << 1)) * kPi32, y = t * t;
    const vf s = t + t * y * (((y * kSin[3] + kSin[2]) * y + kSin[1]) * y + kSin[0]);
    const vf c = (((y * kCos[3] + kCos[2]) * y + kCos[1]) * y + kCos[0]) * y + 1.0f;
    z[j / 2][j % 2 * 2] = r * c;
    z[j / 2][j % 2 * 2 + 1] = r * s;
  }
}

#undef FS_EACH

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

// `block` is a multiple of 32, so the upper counter word never changes inside a group.
template <class Element, class Finish>
FS_INLINE void fill_groups(Element* out, uint64_t block, int64_t groups, const NoiseKey& key, Finish finish) {
  const RoundKeys r = round_keys(key);
  vq even, odd;
  block_numbers(even, odd);
  for (const uint64_t end = block + kGroup / 4 * groups; block != end; block += kPass / 4, out += kPass) {
    WordVectors words = philox_words(block, key, r, even, odd);
    finish(out, words);
  }
}

// Raw words of `groups` groups of elements.
__attribute__((noinline)) void fill_words(uint32_t* out, uint64_t block, int64_t groups, const NoiseKey& key) {
  fill_groups(out, block, groups, key, [](uint32_t* o, WordVectors& words) FS_LAMBDA {
    for (auto& w : words.w) {
      transpose4(w);
      for (int i = 0; i < 4; ++i, o += kLanes) store(o, w[i]);
    }
  });
}

// Lines that the caller will want once the noise is there, asked for while it is made: a tile's lines asked for at once
// would wait for one another.
struct Prefetch {
  static constexpr int kStreams = 3;
  const char* line[kStreams] = {};   // null: no such stream
  int64_t bytes[kStreams] = {};      // per pass
  FS_INLINE void add(int i, const void* p, int64_t element_size) {
    line[i] = static_cast<const char*>(p);
    bytes[i] = kPass * element_size;
  }
  FS_INLINE void pass() {
    for (int i = 0; i < kStreams; ++i) {
      if (!line[i]) continue;
      for (int64_t at = 0; at < bytes[i]; at += 64) __builtin_prefetch(line[i] + at, 0, 2);
      line[i] += bytes[i];
    }
  }
};

// Standard normals of `groups` groups of elements, in element order.
__attribute__((noinline)) void fill_normal(float* out, uint64_t block, int64_t groups, const NoiseKey& key, Prefetch ahead = {}) {
  fill_groups(out, block, groups, key, [&](float* o, WordVectors& words) FS_LAMBDA {
    vf z[kChains / 2][4];
    ahead.pass();
    box_muller(words, z);
    for (auto& v : z) {
      transpose4(v);
      for (int i = 0; i < 4; ++i, o += kLanes) store(o, v[i]);
    }
  });
}

constexpr int kTile = 1024;   // elements per tile: the normals of a tile stay in L1

// Normals of elements [first, first + n), n <= kTile; returns where they start in `buffer` (kTile + 2 * kGroup floats).
FS_INLINE const float* tile_normals(float* buffer, uint64_t first, int64_t n, const NoiseKey& key, Prefetch ahead = {}) {
  const uint64_t start = first / kGroup * kGroup;
  const int64_t groups = static_cast<int64_t>((first + n - start + kGroup - 1) / kGroup);
  fill_normal(buffer, start / 4, groups, key, ahead);
  return buffer + (first - start);
}

}  // namespace
}  // namespace fastscore
