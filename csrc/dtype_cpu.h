// Tiles of float, double, bfloat16 and float16 as arrays of the type the kernels compute in. Internal linkage, as in normal_cpu.h.
#pragma once
#include "nest.h"
#include "normal_cpu.h"

namespace fastscore {

namespace {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class T> constexpr DType kDTypeOf = kFloat32;
template <> constexpr DType kDTypeOf<double> = kFloat64;
template <> constexpr DType kDTypeOf<BFloat16> = kBFloat16;
template <> constexpr DType kDTypeOf<Float16> = kFloat16;

// f(T()) for the one of the element types that `dtype` names; the operators have refused all others.
template <class... Ts, class F>
FS_INLINE void with_one_of(DType dtype, F f) { (void)((dtype == kDTypeOf<Ts> && (f(Ts()), true)) || ...); }
template <class F>
FS_INLINE void with_dtype(DType dtype, F f) { with_one_of<float, double, BFloat16, Float16>(dtype, f); }

template <class T> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };

FS_INLINE uint32_t bits_of(float f) { uint32_t u; __builtin_memcpy(&u, &f, 4); return u; }
FS_INLINE float float_of(uint32_t u) { float f; __builtin_memcpy(&f, &u, 4); return f; }

FS_INLINE float widen(float v) { return v; }
FS_INLINE double widen(double v) { return v; }
FS_INLINE float widen(BFloat16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }
FS_INLINE float widen(Float16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  // 2^112 rescales the exponent; a subnormal half becomes a normal float in the same product.
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  float f = float_of(magnitude) * 5.192296858534828e+33f;
  if (magnitude >= 0x0f800000u) f = float_of(magnitude | 0x7f800000u);
  return float_of(bits_of(f) | static_cast<uint32_t>(v.bits & 0x8000u) << 16);
#endif
}

FS_INLINE void narrow(float v, float& out) { out = v; }
FS_INLINE void narrow(double v, double& out) { out = v; }
FS_INLINE void narrow(float v, BFloat16& out) {
  const uint32_t u = bits_of(v), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(v != v ? 0x7fc0u : rounded);
}
FS_INLINE void narrow(float v, Float16& out) {
#if defined(__F16C__)
  out.bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t u = bits_of(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) h = 0x7e00u;
  else if (magnitude >= 0x477ff000u) h = 0x7c00u;                       // rounds past 65504
  else if (magnitude < 0x38800000u) h = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;   // subnormal: the adder rounds
  else h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  out.bits = static_cast<uint16_t>(sign | h);
#endif
}

template <class T, class A>
FS_INLINE void load_row(const T* p, int64_t stride, int64_t n, A* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (__is_same(T, Float16)) {
    if (stride == 1)
      for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + i))));
  }
#endif
  if (stride == 1)
    for (; i < n; ++i) out[i] = widen(p[i]);
  else
    for (; i < n; ++i) out[i] = widen(p[i * stride]);
}

template <class T, class A>
FS_INLINE void store_row(const A* v, T* p, int64_t stride, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (__is_same(T, Float16)) {
    if (stride == 1)
      for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i*)(p + i), _mm512_cvtps_ph(_mm512_loadu_ps(v + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  if (stride == 1)
    for (; i < n; ++i) narrow(v[i], p[i]);
  else
    for (; i < n; ++i) narrow(v[i], p[i * stride]);
}

}  // namespace

namespace {

// Calls row(position in the tile, element offset of each tensor, length) for the logical range [first, first + n).
template <class Row>
FS_INLINE void for_rows(const Nest& nest, int64_t first, int64_t n, Row row) {
  const int last = nest.ndim - 1;
  int64_t index[kMaxDims], offset[kMaxTensors] = {0, 0, 0}, rest = first;
  for (int d = last; d >= 0; --d) {
    index[d] = rest % nest.sizes[d];
    rest /= nest.sizes[d];
    for (int t = 0; t < kMaxTensors; ++t) offset[t] += index[d] * nest.strides[t][d];
  }
  for (int64_t done = 0; done < n;) {
    const int64_t room = nest.sizes[last] - index[last], length = room < n - done ? room : n - done;
    row(done, offset, length);
    done += length;
    index[last] += length;
    for (int t = 0; t < kMaxTensors; ++t) offset[t] += length * nest.strides[t][last];
    for (int d = last; d > 0 && index[d] == nest.sizes[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
      for (int t = 0; t < kMaxTensors; ++t) offset[t] += nest.strides[t][d - 1] - nest.sizes[d] * nest.strides[t][d];
    }
  }
}

}  // namespace
}  // namespace fastscore
