// Activations f with f', f'' and f''', on a vector of floats or on one double. Internal linkage, as in normal_cpu.h.
#pragma once
#include <cmath>

#include "activate.h"
#include "vector_cpu.h"

namespace fastscore {

namespace {

FS_INLINE vf where(vi mask, vf a, vf b) { return select(mask, a, b); }
FS_INLINE double where(bool mask, double a, double b) { return mask ? a : b; }

// Lawson fits: expm1(r) = r + r^2 P(r) on |r| < ln 2 / 2, relative error 1.3e-8; erfc(a) e^(a^2) / 2 = t P(t), t = 1/(1 + 0.4 a), 1.2e-7.
constexpr float kExpm1[5] = {0.4999999701976776f, 0.1666654348373413f, 0.04166720062494278f, 0.008366520516574383f, 0.0013882521307095885f};
constexpr float kErfc[9] = {0.11283750087022781f, 0.11284539103507996f, 0.10382068157196045f, 0.08476314693689346f, 0.06933696568012238f,
                            -0.0005049587925896049f, 0.08228977024555206f, -0.09025341272354126f, 0.024864966049790382f};

// gelu's approximation by tanh is u sigmoid(terms[0] u + terms[1] u^3).
constexpr double kGeluTanhTerms[2] = {1.5957691216057308, 1.5957691216057308 * 0.044715};

// 2^k (0 below -87) and expm1(r) with x = k ln 2 + r, for x <= 0.
FS_INLINE void split_exp(vf x, vf& power, vf& expm1_r) {
  const vi none = x < -87.0f;
  x = where(x < -87.0f, vf{} - 87.0f, x);   // NaN stays
  const vf shifted = x * 1.44269504088896f + 12582912.0f, k = shifted - 12582912.0f;
  const vf r = (x - k * 0.693145751953125f) - k * 1.42860682030941723212e-6f;
  vf p = vf{} + kExpm1[4];
  for (int i = 3; i >= 0; --i) p = p * r + kExpm1[i];
  expm1_r = p * (r * r) + r;
  power = where(none, vf{}, (vf)(((vi)shifted << 23) + 0x3f800000));
}
FS_INLINE vf exp_negative(vf x) { vf power, e; split_exp(x, power, e); return power * e + power; }
FS_INLINE vf expm1_negative(vf x) { vf power, e; split_exp(x, power, e); return power * e + (power - 1.0f); }
FS_INLINE double exp_negative(double x) { return std::exp(x); }
FS_INLINE double expm1_negative(double x) { return std::expm1(x); }

template <class V> FS_INLINE V constant(double c) {
  if constexpr (sizeof(V) == sizeof(double)) return c;
  else return V{} + static_cast<float>(c);
}

FS_INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }
FS_INLINE double magnitude(double x) { return std::fabs(x); }

// log(1 + e) for e in [0, 1].
FS_INLINE vf log1p_unit(vf e) {
  const vi big = e > 0.333333343f;
  const vf f = where(big, e * 0.5f - 0.5f, e);
  vf p = vf{} + kLog[7];
  for (int i = 6; i >= 0; --i) p = p * f + kLog[i];
  return where(big, vf{} + 0.693147180559945f, vf{}) + (p * (f * f) + f);
}
FS_INLINE double log1p_unit(double e) { return std::log1p(e); }

// Normal distribution function and density.
FS_INLINE void normal_law(vf u, vf& cdf, vf& density) {
  const vf a = magnitude(u), w = exp_negative(a * a * -0.5f), t = 1.0f / (a * 0.282842712474619f + 1.0f);
  vf p = vf{} + kErfc[8];
  for (int i = 7; i >= 0; --i) p = p * t + kErfc[i];
  const vf tail = w * p * t;
  cdf = where(u < 0.0f, tail, 1.0f - tail);
  density = w * 0.398942280401433f;
}
FS_INLINE void normal_law(double u, double& cdf, double& density) {
  cdf = 0.5 * std::erfc(-u * 0.70710678118654752440);
  density = std::exp(-0.5 * u * u) * 0.39894228040143267794;
}

template <class V>
FS_INLINE V sigmoid(V u) {
  const V e = exp_negative(-magnitude(u));
  return where(u < 0, e, V{} + 1) / (1 + e);
}

// y = f(u), d1 = f'(u), d2 = f''(u), d3 = f'''(u); a null pointer is not computed.
template <class V>
FS_INLINE void activate(int kind, V u, V* y, V* d1, V* d2, V* d3 = nullptr) {
  const V one = V{} + 1, zero = V{};
  switch (kind) {
    case kElu: {
      const V below = where(u > 0, zero, u), e = expm1_negative(below);   // NaN is not above 0
      if (y) *y = where(u > 0, u, e);
      if (d1) *d1 = e + 1;
      if (d2) *d2 = where(u >= 0, zero, e + 1);   // PyTorch's at the jump
      if (d3) *d3 = where(u >= 0, zero, e + 1);
      return;
    }
    case kSilu: {
      const V s = sigmoid(u);
      if (y) *y = u * s;
      if (d1) *d1 = s * (u * (1 - s) + 1);
      if (d2) *d2 = s * (1 - s) * (u * (1 - s - s) + 2);
      if (d3) *d3 = s * (1 - s) * (3 * (1 - s - s) + u * (1 - 6 * s * (1 - s)));
      return;
    }
    case kRelu:
      if (y) *y = where(u < 0, zero, u);
      if (d1) *d1 = where(u <= 0, zero, one);   // PyTorch's mask: 1 for NaN
      if (d2) *d2 = zero;
      if (d3) *d3 = zero;
      return;
    case kGelu: {
      V cdf, density;
      normal_law(u, cdf, density);
      if (y) *y = u * cdf;
      if (d1) *d1 = cdf + u * density;
      if (d2) *d2 = density * (2 - u * u);
      if (d3) *d3 = density * u * (u * u - 4);
      return;
    }
    case kSoftplus: {
      const V s = sigmoid(u);
      if (y) *y = where(u < 0, zero, u) + log1p_unit(exp_negative(-magnitude(u)));
      if (d1) *d1 = s;
      if (d2) *d2 = s * (1 - s);
      if (d3) *d3 = s * (1 - s) * (1 - s - s);
      return;
    }
    case kTanh: {
      const V e = expm1_negative(magnitude(u) * -2), t = -e / (e + 2), s = where(u < 0, -t, t);
      if (y) *y = s;
      if (d1) *d1 = 1 - s * s;
      if (d2) *d2 = -2 * s * (1 - s * s);
      if (d3) *d3 = (1 - s * s) * (6 * s * s - 2);
      return;
    }
    case kSigmoid: {
      const V s = sigmoid(u);
      if (y) *y = s;
      if (d1) *d1 = s * (1 - s);
      if (d2) *d2 = s * (1 - s) * (1 - s - s);
      if (d3) *d3 = s * (1 - s) * (1 - 6 * s * (1 - s));
      return;
    }
    case kGeluTanh: {   // u s(z), s the sigmoid, and w = s' = s (1 - s): nothing cancels. Beyond 30 s is 0 or 1.
      const V v = where(u > 30, V{} + 30, where(u < -30, V{} - 30, u)), v2 = v * v;
      const V a = constant<V>(kGeluTanhTerms[0]), b = constant<V>(kGeluTanhTerms[1]);
      const V z = v * (v2 * b + a), e = exp_negative(-magnitude(z)), r = 1 / (1 + e);
      const V s = where(z < 0, e * r, r), w = e * r * r, odd = 1 - s - s;
      const V z1 = v2 * (3 * b) + a, z2 = v * (6 * b);
      const V s1 = w * z1, s2 = w * (z2 + odd * z1 * z1);
      if (y) *y = u * s;
      if (d1) *d1 = s + v * s1;
      if (d2) *d2 = 2 * s1 + v * s2;
      if (d3) *d3 = 3 * s2 + v * w * (6 * b + 3 * odd * z1 * z2 + (1 - 6 * w) * z1 * z1 * z1);
      return;
    }
    default:
      if (y) *y = u;
      if (d1) *d1 = one;
      if (d2) *d2 = zero;
      if (d3) *d3 = zero;
  }
}

// f' g. A mask, as of ReLU, takes nothing from what it hides, even if that is not finite.
template <class V>
FS_INLINE V times_slope(int kind, V slope, V g) {
  return kind == kRelu ? where(slope <= 0, V{}, g) : slope * g;
}

}  // namespace
}  // namespace fastscore
