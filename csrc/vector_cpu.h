// One vector of elements in memory, of any storage type, as floats. Internal linkage, as in normal_cpu.h.
#pragma once
#include "dtype_cpu.h"

namespace fastscore {
namespace {

FS_INLINE vf load_vector(const float* p) { vf v; __builtin_memcpy(&v, p, kBytes); return v; }
FS_INLINE void store_vector(vf v, float* p) { __builtin_memcpy(p, &v, kBytes); }

FS_INLINE vf load_vector(const BFloat16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

FS_INLINE void store_vector(vf v, BFloat16* p) {
  const vu u = (vu)v, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu h = (vu)select((vi)(v == v), (vf)rounded, (vf)(vu{} + 0x7fc0u));
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)h));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)h, (__m256i)h);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = static_cast<uint16_t>(h[i]);
#endif
}

FS_INLINE vf load_vector(const Float16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

FS_INLINE void store_vector(vf v, Float16* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) narrow(v[i], p[i]);
#endif
}

// The first n lanes of a vector.
template <class T> FS_INLINE vf load_some(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load_vector(buffer);
}
template <class T> FS_INLINE void store_some(vf v, T* p, int64_t n) {
  T buffer[kLanes];
  store_vector(v, buffer);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

// a b + c, fused wherever the compiler would fuse it in a loop over elements.
FS_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Past the caches, reading a line before overwriting it would cost a third of the traffic. p is 64-byte aligned.
FS_INLINE void stream_vector(vf v, float* p) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store_vector(v, p);
#endif
}

// Streamed lines become visible before the thread reports that it is done.
FS_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace fastscore
