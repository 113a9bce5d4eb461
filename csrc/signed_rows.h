// Rademacher signs as bits of words, and rows of elements under them: summed, written, added up. Internal linkage, as in normal_cpu.h.
#pragma once
#include "rademacher_project.h"
#include "vector_cpu.h"

namespace fastscore {
namespace {

constexpr int64_t kStep = 64;     // elements per turn of an inner loop: two words of signs
constexpr int64_t kShort = 32;    // samples below this size are signed together, then summed one by one
constexpr int64_t kTileOfShort = 1024;

typedef double vd __attribute__((vector_size(kBytes)));
FS_INLINE vd load_vector(const double* p) { vd v; __builtin_memcpy(&v, p, kBytes); return v; }
FS_INLINE void store_vector(vd v, double* p) { __builtin_memcpy(p, &v, kBytes); }

template <class A> struct Vector;
template <> struct Vector<float> { using V = vf; using U = vu; using Bits = uint32_t; };
template <> struct Vector<double> { using V = vd; using U = vq; using Bits = uint64_t; };

// Bits [bit, bit + lanes) of a word, each as the sign bit of its lane.
template <class A>
FS_INLINE typename Vector<A>::U sign_bits(uint32_t word, int bit) {
  using U = typename Vector<A>::U;
  using Bits = typename Vector<A>::Bits;
  constexpr int lanes = kBytes / sizeof(A);
  constexpr Bits top = Bits{1} << (8 * sizeof(A) - 1);
  U lane;
  for (int i = 0; i < lanes; ++i) lane[i] = static_cast<Bits>(i);
#if defined(__AVX2__)
  return ((U{} + word) << (static_cast<Bits>(8 * sizeof(A) - 1 - bit) - lane)) & top;
#else   // no shift by lane: compare instead
  const U mask = (U{} + (Bits{1} << bit)) << lane;
  return (U)(((U{} + word) & mask) == mask) & top;
#endif
}

// The signs of one projection over one task: words, and a copy that starts at any bit.
struct Signs {
  alignas(64) uint32_t words[kSignChunk / 32 + 2 * kGroup + 16];
  alignas(64) uint32_t shifted[kSignChunk / 32 + 16];
  uint64_t start;

  FS_INLINE void fill(uint64_t first, int64_t n, NoiseKey key, int64_t projection) {
    key.stream += static_cast<uint32_t>(projection) << 16;
    const uint64_t word = first / 32 / kGroup * kGroup, last = (first + static_cast<uint64_t>(n) - 1) / 32;
    fill_words(words, word / 4, static_cast<int64_t>((last - word) / kGroup + 1), key);
    start = word * 32;
  }

  // Bit 0 is the sign of element `first`. Bits past n are any.
  FS_INLINE const uint32_t* from(uint64_t first, int64_t n) {
    const uint32_t *w = words + (first - start) / 32, shift = static_cast<uint32_t>(first % 32);
    if (shift == 0) return w;
    for (int64_t i = 0; i < (n + 31) / 32; ++i) shifted[i] = w[i] >> shift | w[i + 1] << (32 - shift);
    return shifted;
  }
};

// full(i) for steps of kStep elements from i on, then rest(i, how many) for what is left.
template <class Full, class Rest>
FS_INLINE void in_steps(int64_t n, Full full, Rest rest) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) full(i);
  if (i < n) rest(i, n - i);
}

// A page ahead, where the hardware's prefetchers stop.
template <class T>
FS_INLINE void prefetch_step(const T* p) {
  for (int64_t line = 0; line < kStep * static_cast<int64_t>(sizeof(T)); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + 4096 + line, 0, 2);
}

// sum[0] = v . j, sum[1] = v . s, sum[2] = s . s
template <bool kJ, bool kS, bool kSquare, class T>
FS_INLINE void row_sums(const T* j, const T* s, const uint32_t* bits, int64_t n, double* sum) {
  using A = typename Compute<T>::type;
  using V = typename Vector<A>::V;
  using U = typename Vector<A>::U;
  constexpr int lanes = kBytes / sizeof(A), vectors = kStep / lanes, chains = 4;
  V js[chains] = {}, ss[chains] = {}, squares[chains] = {};
  const auto step = [&](const T* j, const T* s, const uint32_t* w) FS_LAMBDA {
#pragma GCC unroll 32
    for (int k = 0; k < vectors; ++k) {
      const U sign = sign_bits<A>(w[k * lanes / 32], k * lanes % 32);
      if constexpr (kJ) js[k % chains] += (V)((U)load_vector(j + k * lanes) ^ sign);
      if constexpr (kS) {
        const V v = load_vector(s + k * lanes);
        ss[k % chains] += (V)((U)v ^ sign);
        if constexpr (kSquare) squares[k % chains] += v * v;
      }
    }
  };
  const auto full = [&](int64_t i) FS_LAMBDA {
    if constexpr (kJ) prefetch_step(j + i);
    if constexpr (kS && kSquare) prefetch_step(s + i);   // later projections find it in the cache
    step(kJ ? j + i : j, kS ? s + i : s, bits + i / 32);
  };
  in_steps(n, full, [&](int64_t i, int64_t left) FS_LAMBDA {
    T rest_j[kStep] = {}, rest_s[kStep] = {};
    if constexpr (kJ) __builtin_memcpy(rest_j, j + i, left * sizeof(T));
    if constexpr (kS) __builtin_memcpy(rest_s, s + i, left * sizeof(T));
    step(rest_j, rest_s, bits + i / 32);
  });
  for (int k = 1; k < chains; ++k) js[0] += js[k], ss[0] += ss[k], squares[0] += squares[k];
  for (int i = 0; i < lanes; ++i) sum[0] += js[0][i], sum[1] += ss[0][i], sum[2] += squares[0][i];
}

// out = g v, with one g, or kEach one per element.
template <bool kEach, class T, class A>
FS_INLINE void signed_row(const A* g, const uint32_t* bits, int64_t n, T* out, bool bypass) {
  using V = typename Vector<A>::V;
  using U = typename Vector<A>::U;
  constexpr int lanes = kBytes / sizeof(A), vectors = kStep / lanes;
  const V constant = V{} + *g;
  const auto step = [&](const A* g, const uint32_t* w, T* o, bool stream) FS_LAMBDA {
#pragma GCC unroll 32
    for (int k = 0; k < vectors; ++k) {
      const U sign = sign_bits<A>(w[k * lanes / 32], k * lanes % 32);
      const V v = (V)((U)(kEach ? load_vector(g + k * lanes) : constant) ^ sign);
      if constexpr (__is_same(T, float)) {
        if (stream) {
          stream_vector(v, o + k * lanes);
          continue;
        }
      }
      store_vector(v, o + k * lanes);
    }
  };
  bypass = bypass && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const auto rest = [&](int64_t i, int64_t left) FS_LAMBDA {
    A rest_g[kStep] = {};
    T rest_out[kStep];
    if constexpr (kEach) __builtin_memcpy(rest_g, g + i, left * sizeof(A));
    step(rest_g, bits + i / 32, rest_out, false);
    __builtin_memcpy(out + i, rest_out, left * sizeof(T));
  };
  if (bypass) in_steps(n, [&](int64_t i) FS_LAMBDA { step(kEach ? g + i : g, bits + i / 32, out + i, true); }, rest);
  else in_steps(n, [&](int64_t i) FS_LAMBDA { step(kEach ? g + i : g, bits + i / 32, out + i, false); }, rest);
}

// sum += g v
template <class A>
FS_INLINE void add_signed_row(A g, const uint32_t* bits, int64_t n, A* sum) {
  using V = typename Vector<A>::V;
  using U = typename Vector<A>::U;
  constexpr int lanes = kBytes / sizeof(A), vectors = kStep / lanes;
  const V constant = V{} + g;
  const auto step = [&](const uint32_t* w, A* o) FS_LAMBDA {
#pragma GCC unroll 32
    for (int k = 0; k < vectors; ++k)
      store_vector(load_vector(o + k * lanes) + (V)((U)constant ^ sign_bits<A>(w[k * lanes / 32], k * lanes % 32)), o + k * lanes);
  };
  in_steps(n, [&](int64_t i) FS_LAMBDA { step(bits + i / 32, sum + i); }, [&](int64_t i, int64_t left) FS_LAMBDA {
    A rest[kStep] = {};
    step(bits + i / 32, rest);
    for (int64_t k = 0; k < left; ++k) sum[i + k] += rest[k];
  });
}

// out = x v
template <class T, class A>
FS_INLINE void signed_tile(const T* x, const uint32_t* bits, int64_t n, A* out) {
  alignas(64) A wide[kTileOfShort];
  for (int64_t i = 0; i < n; ++i) wide[i] = widen(x[i]);
  signed_row<true>(wide, bits, n, out, false);
}

}  // namespace
}  // namespace fastscore
