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
FS_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }
FS_INLINE vf to_float(vu a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // No instruction converts these. The halves are the last bits of 2^39 and of 2^23, and their sum is rounded once.
  const vf upper = (vf)((a >> 16) + 0x53000000u), lower = (vf)_mm256_blend_epi16((__m256i)a, _mm256_set1_epi32(0x4b000000), 0xaa);
  return (upper - 549764202496.0f) + lower;
#else
  return __builtin_convertvector(a, vf);
#endif
}
FS_INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return select(a > b, a, b);
#endif
}

// A round waits for its own products, so kChains chains of blocks run side by side. One fills half the lanes with each of its words.
constexpr int kChains = 4;
constexpr int kPass = 2 * kChains * kLanes;   // elements per pass over the chains

// Of two blocks in every 128 bits: words 0, 0, 2, 2 and words 1, 1, 3, 3.
struct WordVectors { vu even[kChains], odd[kChains]; };

// Lower, or upper, halves of 64-bit lanes: two of a, then two of b, in every 128 bits.
FS_INLINE vu low_halves(vq a, vq b) {
#if defined(__AVX512F__)
  return (vu)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88);
#elif defined(__AVX2__)
  return (vu)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
#else
  return vu{static_cast<uint32_t>(a[0]), static_cast<uint32_t>(a[1]), static_cast<uint32_t>(b[0]), static_cast<uint32_t>(b[1])};
#endif
}
FS_INLINE vu high_halves(vq a, vq b) {
#if defined(__AVX512F__)
  return (vu)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xdd);
#elif defined(__AVX2__)
  return (vu)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
#else
  return low_halves(a >> 32, b >> 32);
#endif
}

// Elements of a chain in order, from what stands at its even and at its odd words.
template <class V>
FS_INLINE void in_order(V even, V odd, V out[2]) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_unpacklo_epi32((__m512i)even, (__m512i)odd), high = _mm512_unpackhi_epi32((__m512i)even, (__m512i)odd);
  out[0] = (V)_mm512_unpacklo_epi64(low, high);
  out[1] = (V)_mm512_unpackhi_epi64(low, high);
#elif defined(__AVX2__)
  const __m256i low = _mm256_unpacklo_epi32((__m256i)even, (__m256i)odd), high = _mm256_unpackhi_epi32((__m256i)even, (__m256i)odd);
  out[0] = (V)_mm256_unpacklo_epi64(low, high);
  out[1] = (V)_mm256_unpackhi_epi64(low, high);
#else
  out[0] = V{even[0], odd[0], even[2], odd[2]};
  out[1] = V{even[1], odd[1], even[3], odd[3]};
#endif
}

// Which block of a pass sits in 64-bit lane i of a chain: in_order() takes every other one first.
FS_INLINE constexpr uint32_t block_of_lane(int chain, int i) { return static_cast<uint32_t>(chain * kLanes / 2 + i % 2 * (kLanes / 4) + i / 2); }

#if defined(__AVX512F__)
constexpr bool kThreeWay = true;    // one instruction XORs three vectors
#else
constexpr bool kThreeWay = false;
#endif

FS_INLINE uint64_t halves(uint32_t upper, uint32_t lower) { return static_cast<uint64_t>(upper) << 32 | lower; }

// All that blocks with one upper counter word share. Their first two rounds start from scalars, and so cost half.
struct Schedule {
  vq number[kChains];        // kPhiloxM0 times the number of the block in its pass
  vq start[3];               // to be XORed to the products of rounds 0, 1 and 2
  vq key0[9], key1[9];       // of rounds 3 to 8
  vu last;                   // of round 9

  // A word is the upper half of a product, the lower half of the one before it and a key. XORed to a product, halves(k, l) is the key k
  // of this round and the key l of the next one, which saves every second XOR; three-way XORs need no such thing.
  __attribute__((noinline)) Schedule(const NoiseKey& key, uint32_t block_high) {
    const auto k0 = [&](uint32_t round) { return key.k0 + round * kPhiloxW0; };
    const auto k1 = [&](uint32_t round) { return key.k1 + round * kPhiloxW1; };
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * key.step;
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(p1 >> 32) ^ block_high ^ k0(0));
    start[0] = vq{} + halves(key.stream ^ k1(0), static_cast<uint32_t>(p0 >> 32) ^ k1(1));
    start[1] = vq{} + halves(static_cast<uint32_t>(p1) ^ k0(1), k0(2));
    start[2] = vq{} + halves(static_cast<uint32_t>(p0) ^ k1(2), kThreeWay ? 0 : k1(3));
    for (uint32_t i = 3; i < 9; ++i) {
      key0[i] = vq{} + (kThreeWay ? k0(i) : halves(k0(i), k0(i + 1)));
      key1[i] = vq{} + (kThreeWay ? k1(i) : halves(k1(i), k1(i + 1)));
    }
    for (int i = 0; i < kLanes; ++i) last[i] = i % 4 < 2 ? k0(9) : kThreeWay ? k1(9) : 0;
    for (int j = 0; j < kChains; ++j)
      for (int i = 0; i < kLanes / 2; ++i) number[j][i] = static_cast<uint64_t>(kPhiloxM0) * block_of_lane(j, i);
  }
};

// From the product of this round and the one before it: a factor of the next round. The upper half of a factor is any.
FS_INLINE vq factor(vq& product, vq before, vq key, bool keyed) {
  if (kThreeWay) return (product >> 32) ^ before ^ key;
  if (keyed) product ^= key;
  return (product >> 32) ^ before;
}

// The words of a pass from `block` on. Products stay in 64-bit lanes, so a round needs no shuffle.
FS_INLINE WordVectors philox_words(uint64_t block, const Schedule& s) {
  const vq m0 = vq{} + kPhiloxM0, m1 = vq{} + kPhiloxM1, first = vq{} + kPhiloxM0 * static_cast<uint64_t>(static_cast<uint32_t>(block));
  vq c0[kChains], c2[kChains], v0[kChains], v1[kChains], w0[kChains], w1[kChains];
#pragma GCC unroll 4
  for (int j = 0; j < kChains; ++j) {
    w0[j] = (first + s.number[j]) ^ s.start[0];
    v1[j] = mul_low(m1, w0[j] >> 32) ^ s.start[1];
    v0[j] = mul_low(m0, v1[j] >> 32) ^ s.start[2];
    w1[j] = mul_low(m1, w0[j]);
    c0[j] = (w1[j] >> 32) ^ v1[j];
    c2[j] = v0[j] >> 32;
    v1[j] = w1[j];
  }
#pragma GCC unroll 8
  for (int i = 3; i < 9; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) w0[j] = mul_low(m0, c0[j]), w1[j] = mul_low(m1, c2[j]);
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      c0[j] = factor(w1[j], v1[j], s.key0[i], i % 2 == 1);
      c2[j] = factor(w0[j], v0[j], s.key1[i], i % 2 == 0);
      v0[j] = w0[j];
      v1[j] = w1[j];
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kChains; ++j) w0[j] = mul_low(m0, c0[j]), w1[j] = mul_low(m1, c2[j]);
  WordVectors words;
#pragma GCC unroll 4
  for (int j = 0; j < kChains; ++j) {
    words.even[j] = high_halves(w1[j], w0[j]) ^ low_halves(v1[j], v0[j]) ^ s.last;
    words.odd[j] = low_halves(w1[j], w0[j]);
  }
  return words;
}

// u = (w + 1/2) 2^-32 as 1 + f and a power of 2, or as 1 + f alone near 1, where the exact 1 - u, which ~w gives, is kept.
FS_INLINE void split_log(vu w, vf& f, vf& exponent) {
#if defined(__AVX512F__)
  const __mmask16 near_one = _mm512_cmpge_epu32_mask((__m512i)w, _mm512_set1_epi32(static_cast<int>(kNearOne)));
  const vu x = (vu)_mm512_mask_xor_epi32((__m512i)w, near_one, (__m512i)w, _mm512_set1_epi32(-1));
#else
  vi near_one = (vi)(w >= kNearOne);
#if defined(__x86_64__)
  asm("" : "+x"(near_one));   // a mask, which the compiler would else turn into a choice for each lane
#endif
  const vu x = w ^ (vu)near_one;
#endif
  const vf u = to_float(x) * kTwoM32 + 0.5f * kTwoM32;   // or 1 - u
  const vi e = ((vi)u - kTwoThirdsBits) & static_cast<int>(0xff800000u);   // exponent of u / (2/3), in place
#if defined(__AVX512F__)
  const vf m = (vf)((vi)u - e) - 1.0f;
  f = (vf)_mm512_mask_sub_ps((__m512)m, near_one, _mm512_setzero_ps(), (__m512)u);
  exponent = (vf)_mm512_maskz_cvtepi32_ps(_knot_mask16(near_one), (__m512i)e);
#else
  const vi power = e & ~near_one;
  const vf m = (vf)((vi)u - power);   // in [2/3, 4/3), or at most 1/3
  f = larger(-m, m - 1.0f);
  exponent = to_float(power);
#endif
}

// Each operation of a normal waits for the one before it, so the normals of several chains are computed side by side: of as many as have
// room in the registers.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kBeside = 2;
#else
constexpr int kBeside = 4;
#endif
static_assert(kChains % kBeside == 0);

template <int n, class F>
FS_INLINE void each(F f) {
#pragma GCC unroll 4
  for (int j = 0; j < n; ++j) f(j);
}

// A constant in a register: with AVX2 the compiler would have each multiplication read it from memory, and the loads bind.
FS_INLINE vf held(float c) {
  vf v = vf{} + c;
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("" : "+x"(v));
#endif
  return v;
}

// terms[0] + terms[1] x + terms[2] x^2 + terms[3] x^3.
template <int n>
FS_INLINE void cubic(const float (&terms)[4], const vf* x, vf* p) {
  const vf third = held(terms[3]), second = held(terms[2]), first = held(terms[1]), constant = held(terms[0]);
  each<n>([&](int j) FS_LAMBDA { p[j] = x[j] * third + second; });
  each<n>([&](int j) FS_LAMBDA { p[j] = p[j] * x[j] + first; });
  each<n>([&](int j) FS_LAMBDA { p[j] = p[j] * x[j] + constant; });
}

// Normals of even and of odd number from n vectors of pairs of words.
template <int n>
FS_INLINE void box_muller(const vu* even, const vu* odd, vf* z_even, vf* z_odd) {
  vf f[n], exponent[n], p[n], r[n], t[n], y[n], s[n], c[n];
  each<n>([&](int j) FS_LAMBDA { split_log(even[j], f[j], exponent[j]); });
  each<n>([&](int j) FS_LAMBDA { p[j] = f[j] * (-2.0f * kLog[7]) + -2.0f * kLog[6]; });
#pragma GCC unroll 8
  for (int k = 5; k >= 0; --k) each<n>([&](int j) FS_LAMBDA { p[j] = p[j] * f[j] + -2.0f * kLog[k]; });
  const vf per_exponent = held(kMinus2Ln2 / 8388608);
  each<n>([&](int j) FS_LAMBDA {
    const vf square = exponent[j] * per_exponent + f[j] * (p[j] * f[j] - 2.0f);   // -2 ln u, relative error 1e-7 for every word
    // A residual in [-pi/2, pi/2] and a sign, which goes to the radius.
    r[j] = (vf)((vu)vector_sqrt(square) ^ ((odd[j] + 0x40000000u) & 0x80000000u));
  });
  const vf pi = held(kPi32), one = held(1.0f);
  each<n>([&](int j) FS_LAMBDA {
    t[j] = to_float((vi)(odd[j] << 1)) * pi;
    y[j] = t[j] * t[j];
  });
  cubic<n>(kSin, y, s);
  cubic<n>(kCos, y, c);
  each<n>([&](int j) FS_LAMBDA { z_even[j] = r[j] * (c[j] * y[j] + one); });
  each<n>([&](int j) FS_LAMBDA { z_odd[j] = r[j] * (t[j] + t[j] * y[j] * s[j]); });
}

// The normals of the chains from `first` on that go side by side, in order.
FS_INLINE void chain_normals(const WordVectors& words, int first, vf z[2 * kBeside]) {
  vf z_even[kBeside], z_odd[kBeside];
  box_muller<kBeside>(words.even + first, words.odd + first, z_even, z_odd);
  each<kBeside>([&](int j) FS_LAMBDA { in_order(z_even[j], z_odd[j], z + 2 * j); });
}

template <class V>
FS_INLINE void store(void* p, V v) { __builtin_memcpy(p, &v, kBytes); }

// `block` is a multiple of 32, so the upper counter word never changes inside a pass.
template <class Element, class Finish>
FS_INLINE void fill_groups(Element* out, uint64_t block, int64_t groups, const NoiseKey& key, Finish finish) {
  for (uint64_t left = kGroup / 4 * groups; left > 0;) {
    const Schedule schedule(key, static_cast<uint32_t>(block >> 32));
    const uint64_t same = (uint64_t{1} << 32) - static_cast<uint32_t>(block), end = block + (left < same ? left : same);
    left -= end - block;
    for (; block != end; block += kPass / 4, out += kPass) {
      WordVectors words = philox_words(block, schedule);
      finish(out, words);
    }
  }
}

// Raw words of `groups` groups of elements.
__attribute__((noinline)) void fill_words(uint32_t* out, uint64_t block, int64_t groups, const NoiseKey& key) {
  fill_groups(out, block, groups, key, [](uint32_t* o, WordVectors& words) FS_LAMBDA {
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j, o += 2 * kLanes) {
      vu w[2];
      in_order(words.even[j], words.odd[j], w);
      store(o, w[0]);
      store(o + kLanes, w[1]);
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
    ahead.pass();
#pragma GCC unroll 4
    for (int j = 0; j < kChains; j += kBeside) {
      vf z[2 * kBeside];
      chain_normals(words, j, z);
#pragma GCC unroll 8
      for (int k = 0; k < 2 * kBeside; ++k, o += kLanes) store(o, z[k]);
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
