// What stands between a sample's sums over pixels and its elementwise pass: algebra over channels. Internal linkage, as in normal_cpu.h.
#pragma once
#include <cmath>

#include "normal_cpu.h"
#include "normalise.h"

namespace fastscore {
namespace {

// The algebra of one sample between its sums and its elementwise pass. Letters as in the comments of fastscore/ops/normalise.py.
template <class A>
struct Algebra {
  const NormArgs& p;
  int64_t b, C, M;
  A* tables;

  Algebra(const NormArgs& p, int64_t b, void* scratch) : p(p), b(b), C(p.channels), M(p.tangents), tables(static_cast<A*>(scratch)) {}

  A* at(NormTable i) const { return tables + i * (C + kPadding); }
  A* at(NormTangentTable i, int64_t m) const { return tables + (kFixed + m * kPerTangent + i) * (C + kPadding); }

  const A* row(const void* table, int64_t m, int column) const {   // null column where the coefficient is missing
    const int K = 1 + p.has_alpha + p.has_beta;
    const int64_t r = p.labels ? p.labels[b] : p.coef_rows == 1 ? 0 : b;
    return static_cast<const A*>(table) + ((m * p.coef_rows + r) * K + column) * C;
  }
  const A* gamma(const void* table, int64_t m = 0) const { return row(table, m, 0); }
  const A* alpha(const void* table, int64_t m = 0) const { return p.has_alpha ? row(table, m, 1) : nullptr; }
  const A* beta(const void* table, int64_t m = 0) const { return p.has_beta ? row(table, m, 1 + p.has_alpha) : nullptr; }

  int64_t domain() const { return p.groups ? C / p.groups : 1; }   // channels that share their statistics
  template <class F>
  A mean_over(int64_t c0, int64_t n, F f) const {
    double sum = 0;
    for (int64_t c = c0; c < c0 + n; ++c) sum += f(c);
    return static_cast<A>(sum / n);
  }
  A unbiased() const { return A(1) / static_cast<A>(C > 1 ? C - 1 : 1); }
  // Transpose of the channels' normalisation: q (a - mean a) - q m̂ Σ(a m̂)/(C - 1), in place.
  void through_channels(A* a, A q) const {
    const A* hat = at(kHat);
    const A mean = mean_over(0, C, [&](int64_t c) { return a[c]; });
    const A inner = mean_over(0, C, [&](int64_t c) { return a[c] * hat[c]; }) * C * unbiased();
    for (int64_t c = 0; c < C; ++c) a[c] = q * (a[c] - mean) - q * hat[c] * inner;
  }

  // From means and variances: 1/std and the value of h at a channel's mean; then m̂ and its 1/std (returned).
  A statistics() const {
    const A *mean = at(kMean), *variance = at(kVariance);
    A *rstd = at(kRstd), *offset = at(kOffset), *hat = at(kHat);
    const int64_t n = domain();
    for (int64_t c0 = 0; c0 < C; c0 += n) {
      const A centre = mean_over(c0, n, [&](int64_t c) { return mean[c]; });
      const A v = mean_over(c0, n, [&](int64_t c) { return variance[c] + (mean[c] - centre) * (mean[c] - centre); });
      const A r = A(1) / std::sqrt(v + static_cast<A>(p.eps));
      for (int64_t c = c0; c < c0 + n; ++c) rstd[c] = r, offset[c] = n > 1 ? r * (mean[c] - centre) : A(0);
    }
    for (int64_t c = 0; c < C; ++c) hat[c] = 0;
    if (!p.has_alpha) return 0;
    const A m = mean_over(0, C, [&](int64_t c) { return mean[c]; });
    const A w = mean_over(0, C, [&](int64_t c) { return (mean[c] - m) * (mean[c] - m); }) * C * unbiased();
    const A q = A(1) / std::sqrt(w + static_cast<A>(p.eps));
    for (int64_t c = 0; c < C; ++c) hat[c] = (mean[c] - m) * q;
    return q;
  }

  // u = scale (x - mean) + shift. Coefficients that are not finite make a channel NaN, whatever order they are multiplied in.
  void value() const {
    const A *rstd = at(kRstd), *offset = at(kOffset), *hat = at(kHat), *g = gamma(p.coef), *a = alpha(p.coef), *e = beta(p.coef);
    A *scale = at(kScale), *shift = at(kShift);
    for (int64_t c = 0; c < C; ++c) {
      const A nothing = g[c] * 0 + (a ? a[c] * 0 : A(0)) + (e ? e[c] * 0 : A(0));
      scale[c] = g[c] * rstd[c] + nothing;
      shift[c] = g[c] * (offset[c] + (a ? a[c] * hat[c] : A(0))) + (e ? e[c] : A(0)) + nothing;
    }
  }

  // du = scale t + P (x - mean) + Q. A direction that is not finite makes all that it reaches NaN, as coefficients do.
  void tangent(int64_t m, A q) const {
    const A *rstd = at(kRstd), *offset = at(kOffset), *hat = at(kHat), *g = gamma(p.coef), *a = alpha(p.coef);
    const A *tau = at(kTau, m), *xi = at(kXi, m);
    A *pool = at(kPool, m), *inner = at(kInner, m), *hat_dot = at(kHatDot, m), *P = at(kP, m), *Q = at(kQ, m);
    const int64_t n = domain();
    for (int64_t c0 = 0; c0 < C; c0 += n) {
      const A mean_t = mean_over(c0, n, [&](int64_t c) { return tau[c]; });
      const A mean_th = mean_over(c0, n, [&](int64_t c) { return rstd[c] * xi[c] + offset[c] * tau[c]; });
      const A nothing = mean_t * 0 + mean_th * 0;
      for (int64_t c = c0; c < c0 + n; ++c) pool[c] = mean_t + nothing, inner[c] = mean_th + nothing;
    }
    for (int64_t c = 0; c < C; ++c) hat_dot[c] = 0;
    if (a) {
      const A mean = mean_over(0, C, [&](int64_t c) { return tau[c]; });
      const A s = mean_over(0, C, [&](int64_t c) { return hat[c] * tau[c]; }) * C * unbiased();
      for (int64_t c = 0; c < C; ++c) hat_dot[c] = q * (tau[c] - mean) - q * hat[c] * s + mean * 0;
    }
    const A *dg = p.tcoef ? gamma(p.tcoef, m) : nullptr, *da = p.tcoef ? alpha(p.tcoef, m) : nullptr, *de = p.tcoef ? beta(p.tcoef, m) : nullptr;
    for (int64_t c = 0; c < C; ++c) {
      const A w = (dg ? dg[c] : A(0)) - g[c] * rstd[c] * inner[c];
      P[c] = rstd[c] * w;
      Q[c] = offset[c] * w - g[c] * rstd[c] * pool[c] + (de ? de[c] : A(0));
      if (a) Q[c] += g[c] * a[c] * hat_dot[c] + (dg ? dg[c] * a[c] * hat[c] : A(0)) + (da ? g[c] * da[c] * hat[c] : A(0));
    }
  }

  // From the sums of the cotangents: gradients of the coefficients, and gx = scale gu + c4 (x - mean) + c5 + Σ (c2 ĝ + c3 t),
  // gt = scale ĝ + c3 (x - mean) + d3.
  void cotangents(A q) const {
    const A *rstd = at(kRstd), *offset = at(kOffset), *hat = at(kHat), *g = gamma(p.coef), *a = alpha(p.coef);
    const A *sum = at(kSumG), *sum_x = at(kSumGx);
    A *c4 = at(kC4), *c5 = at(kC5), *ghat = at(kWork), *work = at(kWork2);
    const int64_t n = domain();
    const A pixels = static_cast<A>(p.pixels), count = pixels * static_cast<A>(n);
    const int K = 1 + p.has_alpha + p.has_beta;
    A* gc = static_cast<A*>(p.gcoef) + b * K * C;
    for (int64_t c = 0; c < C; ++c) {
      gc[c] = rstd[c] * sum_x[c] + offset[c] * sum[c] + (a ? a[c] * hat[c] * sum[c] : A(0));
      if (a) gc[C + c] = g[c] * hat[c] * sum[c], ghat[c] = a[c] * g[c] * sum[c];
      if (p.has_beta) gc[(K - 1) * C + c] = sum[c];
    }
    for (int64_t c0 = 0; c0 < C; c0 += n) {   // r M1 and r (M2 + R), shared by the domain
      double first = 0, second = 0;
      for (int64_t c = c0; c < c0 + n; ++c) first += g[c] * sum[c], second += g[c] * (rstd[c] * sum_x[c] + offset[c] * sum[c]);
      for (int64_t c = c0; c < c0 + n; ++c) c5[c] = static_cast<A>(first) / count, c4[c] = static_cast<A>(second) / count;
    }
    A between = 0;   // Σ over tangents and channels of a ṁ
    for (int64_t m = 0; m < M; ++m) {
      const A *pool = at(kPool, m), *inner = at(kInner, m), *hat_dot = at(kHatDot, m), *tau = at(kTau, m);
      const A *G = at(kG, m), *Gx = at(kGx, m), *Gt = at(kGt, m);
      const A *dg = p.tcoef ? gamma(p.tcoef, m) : nullptr, *da = p.tcoef ? alpha(p.tcoef, m) : nullptr;
      A *c2 = at(kC2, m), *c3 = at(kC3, m), *d3 = at(kD3, m);
      A* gtc = static_cast<A*>(p.gtcoef) + (m * p.batch + b) * K * C;
      const auto Gh = [&](int64_t c) { return rstd[c] * Gx[c] + offset[c] * G[c]; };
      const auto Ghdot = [&](int64_t c) { return rstd[c] * (Gt[c] - pool[c] * G[c] - inner[c] * Gh(c)); };   // Σ ĝ ḣ
      for (int64_t c = 0; c < C; ++c) {
        gc[c] += Ghdot(c) + (a ? a[c] * hat_dot[c] * G[c] + (da ? da[c] * hat[c] * G[c] : A(0)) : A(0));
        gtc[c] = Gh(c) + (a ? a[c] * hat[c] * G[c] : A(0));
        if (a) {
          gc[C + c] += g[c] * hat_dot[c] * G[c] + (dg ? dg[c] * hat[c] * G[c] : A(0));
          gtc[C + c] = g[c] * hat[c] * G[c];
        }
        if (p.has_beta) gtc[(K - 1) * C + c] = G[c];
      }
      for (int64_t c0 = 0; c0 < C; c0 += n) {
        double mean_g = 0, mean_gh = 0, gh1 = 0, gh2 = 0, explicit_r = 0;
        for (int64_t c = c0; c < c0 + n; ++c) {
          const A w = (dg ? dg[c] : A(0)) - g[c] * rstd[c] * inner[c];
          mean_g += g[c] * G[c], mean_gh += g[c] * Gh(c);
          gh1 += w * G[c], gh2 += w * Gh(c), explicit_r += g[c] * Ghdot(c);
          c2[c] = rstd[c] * w;
        }
        const A Ag = static_cast<A>(mean_g) / count, Bh = static_cast<A>(mean_gh) / count;
        for (int64_t c = c0; c < c0 + n; ++c) {
          const A r = rstd[c];
          c3[c] = -r * r * Bh;
          d3[c] = -r * offset[c] * Bh - r * Ag;
          c5[c] += static_cast<A>(gh1) / count - r * Bh * pool[c];
          c4[c] += static_cast<A>(gh2 + explicit_r) / count - r * Bh * inner[c];
        }
      }
      if (a) {
        for (int64_t c = 0; c < C; ++c) work[c] = g[c] * a[c] * G[c];   // cotangent of ṁ
        const A s = mean_over(0, C, [&](int64_t c) { return hat[c] * tau[c]; }) * C * unbiased();
        const A along = mean_over(0, C, [&](int64_t c) { return work[c] * hat[c]; }) * C * unbiased();
        between += mean_over(0, C, [&](int64_t c) { return work[c] * hat_dot[c]; }) * C;
        for (int64_t c = 0; c < C; ++c)
          ghat[c] += (dg ? dg[c] * a[c] * G[c] : A(0)) + (da ? g[c] * da[c] * G[c] : A(0)) - q * s * work[c] - q * along * tau[c];
        through_channels(work, q);
        for (int64_t c = 0; c < C; ++c) d3[c] += work[c] / pixels;
      }
    }
    if (a) through_channels(ghat, q);
    for (int64_t c = 0; c < C; ++c) {
      const A first = c5[c], second = c4[c], r = rstd[c];
      c4[c] = -r * r * second;
      c5[c] = -r * offset[c] * second - r * first;
      if (a) c5[c] += (ghat[c] - q * hat[c] * between * unbiased()) / pixels;
    }
  }
};

}  // namespace
}  // namespace fastscore
