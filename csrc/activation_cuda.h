// Activations f on a GPU, those of norms, by the formulas of kernels/activation.py.
#pragma once
#include "activate.h"

namespace fastscore {

// To 2 units of the last place; without ftz the compiler adds three instructions for results that are no normal numbers.
__device__ __forceinline__ float exponential(float x) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * 1.44269504f));
  return e;
}

// Of a number from 1 on.
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// e^x - 1 for x <= 0, without cancellation near 0.
__device__ __forceinline__ float expm1_negative(float x) {
  float p = fmaf(0.0013882521307095885f, x, 0.008366520516574383f);
  p = fmaf(p, x, 0.04166720062494278f);
  p = fmaf(p, x, 0.1666654348373413f);
  p = fmaf(p, x, 0.4999999701976776f);
  return x > -0.34657359f ? fmaf(p, x * x, x) : exponential(x) - 1.0f;
}

// log(1 + e) for e in [0, 1].
__device__ __forceinline__ float log1p_unit(float e) {
  const bool far = e > 0.333333343f;
  const float f = far ? e * 0.5f - 0.5f : e;
  float p = fmaf(0.14026358723640442f, f, -0.1538853943347931f);
  p = fmaf(p, f, 0.13995806872844696f);
  p = fmaf(p, f, -0.1641596108675003f);
  p = fmaf(p, f, 0.20011168718338013f);
  p = fmaf(p, f, -0.2500782012939453f);
  p = fmaf(p, f, 0.33333197236061096f);
  p = fmaf(p, f, -0.49999937415122986f);
  return (far ? 0.693147180559945f : 0.0f) + fmaf(p, f * f, f);
}

__device__ __forceinline__ float sigmoid(float u) {
  const float e = exponential(-fabsf(u));
  return (u < 0 ? e : 1.0f) * reciprocal(1.0f + e);
}

__device__ __forceinline__ float normal_cdf(float u) {
  const float t = reciprocal(fmaf(fabsf(u), 0.282842712474619f, 1.0f));
  float p = fmaf(0.024864966049790382f, t, -0.09025341272354126f);
  p = fmaf(p, t, 0.08228977024555206f);
  p = fmaf(p, t, -0.0005049587925896049f);
  p = fmaf(p, t, 0.06933696568012238f);
  p = fmaf(p, t, 0.08476314693689346f);
  p = fmaf(p, t, 0.10382068157196045f);
  p = fmaf(p, t, 0.11284539103507996f);
  p = fmaf(p, t, 0.11283750087022781f);
  const float tail = exponential(u * u * -0.5f) * p * t;
  return u < 0 ? tail : 1.0f - tail;
}

template <int kKind>
__device__ __forceinline__ float activated(float u) {
  if constexpr (kKind == kElu) return u > 0 ? u : expm1_negative(u);   // NaN is not above 0
  else if constexpr (kKind == kSilu) return u * sigmoid(u);
  else if constexpr (kKind == kRelu) return u < 0 ? 0.0f : u;
  else if constexpr (kKind == kGelu) return u * normal_cdf(u);
  else if constexpr (kKind == kSoftplus) return (u < 0 ? 0.0f : u) + log1p_unit(exponential(-fabsf(u)));
  else return u;
}

}  // namespace fastscore
