// The elements of a sample as vectors, in either layout. Internal linkage, as in normal_cpu.h.
#pragma once
#include <type_traits>

#include "vector_cpu.h"

namespace fastscore {
namespace {

template <class A> struct VectorOf { using type = vf; static constexpr int lanes = kLanes; };
template <> struct VectorOf<double> { using type = double; static constexpr int lanes = 1; };

FS_INLINE double load_vector(const double* p) { return *p; }
FS_INLINE void store_vector(double v, double* p) { *p = v; }
FS_INLINE double sum_lanes(double v) { return v; }
FS_INLINE float sum_lanes(vf v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

template <class T, class V>
FS_INLINE V load_some(const T* p, int n) {
  T buffer[sizeof(V) / sizeof(typename Compute<T>::type)] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load_vector(buffer);
}
template <class T, class V>
FS_INLINE void store_some(V v, T* p, int n) {
  T buffer[sizeof(V) / sizeof(typename Compute<T>::type)];
  store_vector(v, buffer);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

// One sample of a tensor, walked by vectors: along the pixels of one channel, or pixel by pixel over neighbouring channels.
// Either way a lane keeps its coefficients, so both layouts share every loop below.
template <class T, bool kLast>
struct Sample {
  using A = typename Compute<T>::type;
  using V = typename VectorOf<A>::type;
  static constexpr int L = VectorOf<A>::lanes;
  static constexpr int kChannelStep = kLast ? L : 1;
  int64_t channels, pixels;

  // Pixels that are taken together: all of a row; channels last so many that they stay in the first-level cache with all their channels.
  int64_t piece() const {
    if (!kLast) return pixels;
    const int64_t fitting = 4096 / channels;
    return fitting < 16 ? 16 : fitting < 128 ? fitting : 128;
  }

  // f(whole, k, offset in the sample, valid lanes) over pixels [s0, s1) of kColumns vectors of channels from c on, the k-th of them.
  template <int kColumns, class F>
  FS_INLINE void walk(int64_t c, int64_t s0, int64_t s1, F f) const {
    if constexpr (kColumns == 1) {
      walk(c, s0, s1, [&](auto whole, int64_t at, int n) FS_LAMBDA { f(whole, 0, at, n); });
    } else {
      static_assert(kLast);  
      if (c + kColumns * L <= channels) {
        for (int64_t s = s0; s < s1; ++s)
          for (int k = 0; k < kColumns; ++k) f(std::true_type{}, k, s * channels + c + k * L, L);
      } else {
        for (int k = 0; k < kColumns; ++k)
          walk(c + k * L, s0, s1, [&](auto whole, int64_t at, int n) FS_LAMBDA { f(whole, k, at, n); });
      }
    }
  }
  // f(whole, offset in the sample, valid lanes) over pixels [s0, s1) of the channels from c on.
  template <class F>
  FS_INLINE void walk(int64_t c, int64_t s0, int64_t s1, F f) const {
    if constexpr (kLast) {
      if (c + L <= channels)
        for (int64_t s = s0; s < s1; ++s) f(std::true_type{}, s * channels + c, L);
      else
        for (int64_t s = s0; s < s1; ++s) f(std::false_type{}, s * channels + c, static_cast<int>(channels - c));
    } else {
      const int64_t row = c * pixels;
      int64_t s = s0;
      for (; s + L <= s1; s += L) f(std::true_type{}, row + s, L);
      if (s < s1) f(std::false_type{}, row + s, static_cast<int>(s1 - s));
    }
  }
  template <class Whole>
  FS_INLINE static V load(Whole, const void* p, int64_t at, int n) {
    if constexpr (Whole::value) return load_vector(static_cast<const T*>(p) + at);
    else return load_some<T, V>(static_cast<const T*>(p) + at, n);
  }
  template <class Whole>
  FS_INLINE static void store(Whole, V v, void* p, int64_t at, int n) {
    if constexpr (Whole::value) store_vector(v, static_cast<T*>(p) + at);
    else store_some<T, V>(v, static_cast<T*>(p) + at, n);
  }
  // Lanes that hold no pixel count as 0 in a sum; lanes that hold no channel are never read.
  template <class Whole>
  FS_INLINE static V valid(Whole, V v, int n) {
    if constexpr (Whole::value || kLast) return v;
    else {
      A lanes[L];
      for (int i = 0; i < L; ++i) lanes[i] = i < n ? A(1) : A(0);
      V keep;
      __builtin_memcpy(&keep, lanes, sizeof(V));
      return v * keep;
    }
  }
  // Coefficients of the lanes, from a table over channels (padded).
  FS_INLINE static V coefficient(const A* table, int64_t c) {
    if constexpr (kLast) { V v; __builtin_memcpy(&v, table + c, sizeof(V)); return v; }
    else return V{} + table[c];
  }
  // What the pixels before s0 have left there.
  FS_INLINE static V so_far(const A* table, int64_t c, int64_t s0) { return s0 ? coefficient(table, c) : V{}; }
  FS_INLINE static V total(V sum) {
    if constexpr (kLast) return sum;
    else return V{} + sum_lanes(sum);
  }
  FS_INLINE static void put(V v, A* table, int64_t c) {   // tables are padded
    if constexpr (kLast) __builtin_memcpy(table + c, &v, sizeof(V));
    else { A lanes[L]; __builtin_memcpy(lanes, &v, sizeof(V)); table[c] = lanes[0]; }
  }
};

}  // namespace
}  // namespace fastscore
