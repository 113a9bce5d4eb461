#include "normalise.h"

#include "activation_cpu.h"

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
  FS_INLINE static V total(V sum) {
    if constexpr (kLast) return sum;
    else return V{} + sum_lanes(sum);
  }
  FS_INLINE static void put(V v, A* table, int64_t c) {   // tables are padded
    if constexpr (kLast) __builtin_memcpy(table + c, &v, sizeof(V));
    else { A lanes[L]; __builtin_memcpy(lanes, &v, sizeof(V)); table[c] = lanes[0]; }
  }
};

// Pixels whose vectors stay in the first-level cache between two passes.
constexpr int64_t kRowChunk = 4096, kLastChunk = 128;

// Mean and biased variance over pixels: two passes over each chunk, chunks merged (Chan et al. 1979), so a large mean costs nothing.
template <class T, bool kLast, class A>
void moments(const Sample<T, kLast>& sample, const T* x, int64_t begin, int64_t end, A* mean, A* variance) {
  using S = Sample<T, kLast>;
  using V = typename S::V;
  const int64_t chunk = kLast ? kLastChunk : kRowChunk;
  for (int64_t c = begin; c < end; c += S::kChannelStep) {
    V m = V{}, lost = V{}, m2 = V{};   // lost: what rounding has taken from m so far (Kahan)
    for (int64_t s0 = 0; s0 < sample.pixels; s0 += chunk) {
      const int64_t s1 = s0 + chunk < sample.pixels ? s0 + chunk : sample.pixels;
      const A n = static_cast<A>(s1 - s0);
      V sum = V{}, square = V{}, rest = V{};
      sample.walk(c, s0, s1, [&](auto whole, int64_t at, int lanes) FS_LAMBDA { sum += S::load(whole, x, at, lanes); });
      const V near = S::total(sum) / n;   // as good as a sum of large numbers is
      sample.walk(c, s0, s1, [&](auto whole, int64_t at, int lanes) FS_LAMBDA {
        const V d = S::valid(whole, S::load(whole, x, at, lanes) - near, lanes);
        square += d * d;
        rest += d;
      });
      const V correction = S::total(rest) / n, delta = ((near - m) + correction) + lost;
      const V step = delta * (n / static_cast<A>(s1)) - lost, moved = m + step;
      lost = (moved - m) - step;
      m = moved;
      m2 += (S::total(square) - correction * correction * n) + delta * delta * (n * static_cast<A>(s0) / static_cast<A>(s1));
    }
    S::put(m, mean, c);
    S::put(m2 / static_cast<A>(sample.pixels), variance, c);
  }
}

// The algebra of one sample between its sums and its elementwise pass. Letters as in the comments of fastscore/ops/normalise.py.
template <class A>
struct Algebra {
  const NormArgs& p;
  int64_t b, C, M;
  A* tables;

  Algebra(const NormArgs& p, int64_t b, void* scratch) : p(p), b(b), C(p.channels), M(p.tangents), tables(static_cast<A*>(scratch)) {}

  enum Table { kMean, kVariance, kScale, kShift, kRstd, kOffset, kHat, kDomain, kSumG, kSumGx, kC1, kC4, kC5, kWork, kWork2, kFixed };
  enum TangentTable { kTau, kXi, kP, kQ, kPool, kInner, kHatDot, kG, kGx, kGt, kC2, kC3, kD2, kD3, kPerTangent };
  A* at(Table i) const { return tables + i * (C + kPadding); }
  A* at(TangentTable i, int64_t m) const { return tables + (kFixed + m * kPerTangent + i) * (C + kPadding); }

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

  // From the sums of the cotangents: gradients of the coefficients, and gx = c1 gu + c4 (x - mean) + c5 + Σ (c2 ĝ + c3 t),
  // gt = scale ĝ + d2 (x - mean) + d3.
  void cotangents(A q) const {
    const A *rstd = at(kRstd), *offset = at(kOffset), *hat = at(kHat), *g = gamma(p.coef), *a = alpha(p.coef);
    const A *sum = at(kSumG), *sum_x = at(kSumGx);
    A *c1 = at(kC1), *c4 = at(kC4), *c5 = at(kC5), *ghat = at(kWork), *work = at(kWork2);
    const int64_t n = domain();
    const A pixels = static_cast<A>(p.pixels), count = pixels * static_cast<A>(n);
    const int K = 1 + p.has_alpha + p.has_beta;
    A* gc = static_cast<A*>(p.gcoef) + b * K * C;
    for (int64_t c = 0; c < C; ++c) {
      c1[c] = at(kScale)[c];
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
      A *c2 = at(kC2, m), *c3 = at(kC3, m), *d2 = at(kD2, m), *d3 = at(kD3, m);
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
          d2[c] = -r * r * Bh;
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

template <class T, int kKind>   // kKind: an activation, or -1 for whichever the arguments name
struct Norm {
  using A = typename Compute<T>::type;
  const NormArgs& p;
  int64_t b, begin, end;
  Algebra<A> algebra;

  Norm(const NormArgs& p, int64_t b, int64_t begin, int64_t end, void* scratch) : p(p), b(b), begin(begin), end(end), algebra(p, b, scratch) {}

  FS_INLINE int kind() const { return kKind >= 0 ? kKind : p.activation; }
  template <class P>
  P* sample(P* tensor, int64_t m = 0) const {
    using E = std::conditional_t<std::is_const_v<P>, const T, T>;
    return static_cast<E*>(tensor) + (m * p.batch + b) * p.channels * p.pixels;
  }
  A* saved(int64_t m) const { return static_cast<A*>(p.stats) + (m * p.batch + b) * p.channels * 2; }

  // ---- forward

  template <bool kLast>
  void sums() const {
    using S = Sample<T, kLast>;
    using V = typename S::V;
    const S s{p.channels, p.pixels};
    const T* x = static_cast<const T*>(sample(p.x));
    moments<T, kLast, A>(s, x, begin, end, algebra.at(Algebra<A>::kMean), algebra.at(Algebra<A>::kVariance));
    const A* mean = algebra.at(Algebra<A>::kMean);
    for (int64_t m = 0; m < p.tangents; ++m) {
      const T* t = static_cast<const T*>(sample(p.t, m));
      for (int64_t c = begin; c < end; c += S::kChannelStep) {
        const V centre = S::coefficient(mean, c);
        V tau = V{}, xi = V{};
        s.walk(c, 0, p.pixels, [&](auto whole, int64_t at, int n) FS_LAMBDA {
          const V d = S::load(whole, t, at, n);
          tau += d;
          xi += d * (S::load(whole, x, at, n) - centre);
        });
        S::put(S::total(tau) / static_cast<A>(p.pixels), algebra.at(Algebra<A>::kTau, m), c);
        S::put(S::total(xi) / static_cast<A>(p.pixels), algebra.at(Algebra<A>::kXi, m), c);
      }
    }
  }

  void combine() const {
    const A q = algebra.statistics();
    algebra.value();
    for (int64_t m = 0; m < p.tangents; ++m) algebra.tangent(m, q);
    for (int64_t c = 0; c < p.channels; ++c) {
      saved(0)[2 * c] = algebra.at(Algebra<A>::kMean)[c], saved(0)[2 * c + 1] = algebra.at(Algebra<A>::kVariance)[c];
      for (int64_t m = 0; m < p.tangents; ++m)
        saved(1 + m)[2 * c] = algebra.at(Algebra<A>::kTau, m)[c], saved(1 + m)[2 * c + 1] = algebra.at(Algebra<A>::kXi, m)[c];
    }
  }

  template <bool kLast>
  void apply() const {
    using S = Sample<T, kLast>;
    using V = typename S::V;
    using G = Algebra<A>;
    const S s{p.channels, p.pixels};
    const void* x = sample(p.x);
    for (int64_t c = begin; c < end; c += S::kChannelStep) {
      const V centre = S::coefficient(algebra.at(G::kMean), c), scale = S::coefficient(algebra.at(G::kScale), c);
      const V shift = S::coefficient(algebra.at(G::kShift), c);
      if (p.tangents == 0 || !p.ty) {
        if (!p.y) return;
        void* y = sample(p.y);
        s.walk(c, 0, p.pixels, [&](auto whole, int64_t at, int n) FS_LAMBDA {
          V out;
          activate<V>(kind(), scale * (S::load(whole, x, at, n) - centre) + shift, &out, nullptr, nullptr);
          S::store(whole, out, y, at, n);
        });
        continue;
      }
      for (int64_t m = 0; m < p.tangents; ++m) {
        const V P = S::coefficient(algebra.at(G::kP, m), c), Q = S::coefficient(algebra.at(G::kQ, m), c);
        const void* t = sample(p.t, m);
        void *ty = sample(p.ty, m), *y = m == 0 && p.y ? sample(p.y) : nullptr;
        s.walk(c, 0, p.pixels, [&](auto whole, int64_t at, int n) FS_LAMBDA {
          const V d = S::load(whole, x, at, n) - centre;
          V out, slope;
          activate<V>(kind(), scale * d + shift, &out, &slope, nullptr);
          if (y) S::store(whole, out, y, at, n);
          S::store(whole, times_slope(kind(), slope, scale * S::load(whole, t, at, n) + (P * d + Q)), ty, at, n);
        });
      }
    }
  }

  // ---- backward

  void restore() const {
    using G = Algebra<A>;
    for (int64_t c = 0; c < p.channels; ++c) {
      algebra.at(G::kMean)[c] = saved(0)[2 * c], algebra.at(G::kVariance)[c] = saved(0)[2 * c + 1];
      for (int64_t m = 0; m < p.tangents; ++m)
        algebra.at(G::kTau, m)[c] = saved(1 + m)[2 * c], algebra.at(G::kXi, m)[c] = saved(1 + m)[2 * c + 1];
    }
    const A q = algebra.statistics();
    algebra.value();
    for (int64_t m = 0; m < p.tangents; ++m) algebra.tangent(m, q);
  }

  // Without tangents gu = f' gy. With them gu = f' gy + f'' Σ u̇ gty and ĝ = f' gty: f(whole, at, n, d = x - mean, gu, slope, curvature).
  template <bool kLast, class F>
  FS_INLINE void with_gu(const Sample<T, kLast>& s, int64_t c, F f) const {
    using S = Sample<T, kLast>;
    using V = typename S::V;
    using G = Algebra<A>;
    const V centre = S::coefficient(algebra.at(G::kMean), c), scale = S::coefficient(algebra.at(G::kScale), c);
    const V shift = S::coefficient(algebra.at(G::kShift), c);
    const void *x = sample(p.x), *gy = p.gy ? sample(p.gy) : nullptr;
    if (p.tangents == 0) {
      s.walk(c, 0, p.pixels, [&](auto whole, int64_t at, int n) FS_LAMBDA {
        const V d = S::load(whole, x, at, n) - centre;
        V slope;
        activate<V>(kind(), scale * d + shift, nullptr, &slope, nullptr);
        f(whole, at, n, d, S::valid(whole, times_slope(kind(), slope, S::load(whole, gy, at, n)), n), slope);
      });
      return;
    }
    s.walk(c, 0, p.pixels, [&](auto whole, int64_t at, int n) FS_LAMBDA {
      const V d = S::load(whole, x, at, n) - centre;
      V slope, curvature, bend = V{};
      activate<V>(kind(), scale * d + shift, nullptr, &slope, &curvature);
      if (kind() != kIdentity && kind() != kRelu)
        for (int64_t m = 0; m < p.tangents; ++m) {
          const V P = S::coefficient(algebra.at(G::kP, m), c), Q = S::coefficient(algebra.at(G::kQ, m), c);
          bend += (scale * S::load(whole, sample(p.t, m), at, n) + (P * d + Q)) * S::load(whole, sample(p.gty, m), at, n);
        }
      V gu = kind() == kRelu ? V{} : curvature * bend;
      if (gy) gu += times_slope(kind(), slope, S::load(whole, gy, at, n));
      f(whole, at, n, d, S::valid(whole, gu, n), slope);
    });
  }

  template <bool kLast>
  void cotangent_sums() const {
    using S = Sample<T, kLast>;
    using V = typename S::V;
    using G = Algebra<A>;
    const S s{p.channels, p.pixels};
    for (int64_t c = begin; c < end; c += S::kChannelStep) {
      V sum = V{}, sum_x = V{};
      if (p.tangents == 0) {
        with_gu<kLast>(s, c, [&](auto, int64_t, int, V d, V gu, V) FS_LAMBDA { sum += gu, sum_x += gu * d; });
      } else {
        const int64_t M = p.tangents;
        for (int64_t m = 0; m < M; ++m) {
          const void *t = sample(p.t, m), *gty = sample(p.gty, m);
          V g = V{}, gx = V{}, gt = V{};
          with_gu<kLast>(s, c, [&](auto whole, int64_t at, int n, V d, V gu, V slope) FS_LAMBDA {
            if (m == 0) sum += gu, sum_x += gu * d;
            const V hat = S::valid(whole, times_slope(kind(), slope, S::load(whole, gty, at, n)), n);
            g += hat;
            gx += hat * d;
            gt += hat * S::load(whole, t, at, n);
          });
          S::put(S::total(g), algebra.at(G::kG, m), c);
          S::put(S::total(gx), algebra.at(G::kGx, m), c);
          S::put(S::total(gt), algebra.at(G::kGt, m), c);
        }
      }
      S::put(S::total(sum), algebra.at(G::kSumG), c);
      S::put(S::total(sum_x), algebra.at(G::kSumGx), c);
    }
  }

  template <bool kLast>
  void cotangent_apply() const {
    using S = Sample<T, kLast>;
    using V = typename S::V;
    using G = Algebra<A>;
    const S s{p.channels, p.pixels};
    void* gx = sample(p.gx);
    for (int64_t c = begin; c < end; c += S::kChannelStep) {
      const V c1 = S::coefficient(algebra.at(G::kC1), c), c4 = S::coefficient(algebra.at(G::kC4), c);
      const V c5 = S::coefficient(algebra.at(G::kC5), c), scale = S::coefficient(algebra.at(G::kScale), c);
      with_gu<kLast>(s, c, [&](auto whole, int64_t at, int n, V d, V gu, V slope) FS_LAMBDA {
        V out = c1 * gu + (c4 * d + c5);
        for (int64_t m = 0; m < p.tangents; ++m) {
          const V t = S::load(whole, sample(p.t, m), at, n), hat = times_slope(kind(), slope, S::load(whole, sample(p.gty, m), at, n));
          out += S::coefficient(algebra.at(G::kC2, m), c) * hat + S::coefficient(algebra.at(G::kC3, m), c) * t;
          const V gt = scale * hat + (S::coefficient(algebra.at(G::kD2, m), c) * d + S::coefficient(algebra.at(G::kD3, m), c));
          S::store(whole, gt, sample(p.gt, m), at, n);
        }
        S::store(whole, out, gx, at, n);
      });
    }
  }

  template <bool kLast>
  void forward(NormPhase phase) const {
    if (phase == kSums || phase == kAll) sums<kLast>();
    if (phase == kCombine || phase == kAll) combine();
    if (phase == kApply || phase == kAll) apply<kLast>();
  }
  template <bool kLast>
  void backward(NormPhase phase) const {
    if (phase == kAll) restore();
    if (phase == kSums || phase == kAll) cotangent_sums<kLast>();
    if (phase == kCombine || phase == kAll) algebra.cotangents(algebra.statistics());
    if (phase == kApply || phase == kAll) cotangent_apply<kLast>();
  }
};

template <class T, int kKind>
void run(const NormArgs& p, bool backward, NormPhase phase, int64_t b, int64_t begin, int64_t end, void* scratch) {
  const Norm<T, kKind> norm(p, b, begin, end, scratch);
  if (backward && phase == kRestore) return norm.restore();
  if (p.channels_last) backward ? norm.template backward<true>(phase) : norm.template forward<true>(phase);
  else backward ? norm.template backward<false>(phase) : norm.template forward<false>(phase);
}

// The common activations have loops of their own; the others share one.
template <class T>
void run(const NormArgs& p, bool backward, NormPhase phase, int64_t b, int64_t begin, int64_t end, void* scratch) {
  if (p.activation == kIdentity) run<T, kIdentity>(p, backward, phase, b, begin, end, scratch);
  else if (p.activation == kElu) run<T, kElu>(p, backward, phase, b, begin, end, scratch);
  else if (p.activation == kSilu) run<T, kSilu>(p, backward, phase, b, begin, end, scratch);
  else run<T, -1>(p, backward, phase, b, begin, end, scratch);
}

}  // namespace

void FS_KERNEL(normalise)(const NormArgs& p, bool backward, NormPhase phase, int64_t b, int64_t begin, int64_t end, void* scratch) {
  if (p.dtype == kFloat32) run<float>(p, backward, phase, b, begin, end, scratch);
  else if (p.dtype == kFloat64) run<double, -1>(p, backward, phase, b, begin, end, scratch);
  else if (p.dtype == kBFloat16) run<BFloat16>(p, backward, phase, b, begin, end, scratch);
  else run<Float16>(p, backward, phase, b, begin, end, scratch);
}

}  // namespace fastscore

#if defined(FASTSCORE_REGISTER)
#include <vector>

#include "torch_cpu.h"

namespace fastscore {

// Whole samples per thread where there are enough of them: one sample stays in a core's cache between its passes.
void launch(const NormArgs& p, bool backward) {
  if (p.batch * p.channels * p.pixels == 0) return;
  const auto kernel = FS_PICK(normalise);
  const int64_t size = scratch_size(p), elements = p.channels * p.pixels;
  const auto scratch = [&] { return std::vector<double>((size * (p.dtype == kFloat64 ? 8 : 4) + 7) / 8); };
  if (p.batch >= torch::stable::get_num_threads() || elements < 32768) {
    const int64_t grain = 16384 / (elements + 1) + 1;
    torch::stable::parallel_for(0, p.batch, grain, [&](int64_t begin, int64_t end) {
      auto tables = scratch();
      for (int64_t b = begin; b < end; ++b) kernel(p, backward, kAll, b, 0, p.channels, tables.data());
    });
    return;
  }
  auto tables = scratch();
  const int64_t lanes = p.channels_last ? 16 : 1, units = (p.channels + lanes - 1) / lanes, grain = 8192 / (lanes * p.pixels + 1) + 1;
  for (int64_t b = 0; b < p.batch; ++b) {
    const auto spread = [&](NormPhase phase) {
      torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
        kernel(p, backward, phase, b, begin * lanes, end * lanes < p.channels ? end * lanes : p.channels, tables.data());
      });
    };
    if (backward) kernel(p, backward, kRestore, b, 0, p.channels, tables.data());
    spread(kSums);
    kernel(p, backward, kCombine, b, 0, p.channels, tables.data());
    spread(kApply);
  }
}

namespace {

void* mutable_pointer(const OptionalTensor& t) { return t ? t->mutable_data_ptr() : nullptr; }

NormArgs arguments(const Tensor& x, const OptionalTensor& t, const Tensor& coef, const OptionalTensor& tcoef, const OptionalTensor& labels,
                   int64_t groups, bool alpha, bool beta, double eps, int64_t activation) {
  for (const OptionalTensor* c : {&tcoef, &labels}) STD_TORCH_CHECK(!*c || (*c)->is_contiguous(), "fastscore: normalise needs contiguous tables and labels");
  STD_TORCH_CHECK(coef.is_contiguous() && coef.size(1) == x.size(1) * (1 + alpha + beta), "fastscore: normalise needs a contiguous table of ",
                  1 + alpha + beta, " coefficients per channel");
  NormArgs p{};
  p.dtype = dtype_of(x);
  p.channels_last = !x.is_contiguous();
  p.batch = x.size(0), p.channels = x.size(1);
  p.pixels = p.batch * p.channels ? x.numel() / (p.batch * p.channels) : 0;
  p.tangents = t ? t->size(0) : 0;
  p.groups = groups, p.has_alpha = alpha, p.has_beta = beta, p.eps = eps, p.activation = static_cast<int>(activation);
  p.x = x.const_data_ptr(), p.t = pointer(t);
  p.coef = coef.const_data_ptr(), p.tcoef = pointer(tcoef), p.coef_rows = coef.size(0);
  p.labels = static_cast<const int64_t*>(pointer(labels));
  for (int64_t b = 0; p.labels && b < p.batch; ++b)
    STD_TORCH_CHECK(0 <= p.labels[b] && p.labels[b] < p.coef_rows, "fastscore: labels must be in 0..", p.coef_rows - 1, "; got ", p.labels[b]);
  return p;
}

void normalise(OptionalTensor y, OptionalTensor ty, Tensor stats, Tensor x, OptionalTensor t, Tensor coef, OptionalTensor tcoef,
               OptionalTensor labels, int64_t groups, bool alpha, bool beta, double eps, int64_t activation) {
  NormArgs p = arguments(x, t, coef, tcoef, labels, groups, alpha, beta, eps, activation);
  p.y = mutable_pointer(y), p.ty = mutable_pointer(ty), p.stats = stats.mutable_data_ptr();
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  if (p.y) advise_huge_pages(p.y, bytes);
  if (p.ty) advise_huge_pages(p.ty, bytes * p.tangents);
  launch(p, false);
}

void normalise_backward(Tensor gx, OptionalTensor gt, Tensor gcoef, OptionalTensor gtcoef, Tensor x, OptionalTensor t, Tensor stats,
                        Tensor coef, OptionalTensor tcoef, OptionalTensor labels, OptionalTensor gy, OptionalTensor gty, int64_t groups,
                        bool alpha, bool beta, double eps, int64_t activation) {
  NormArgs p = arguments(x, t, coef, tcoef, labels, groups, alpha, beta, eps, activation);
  p.gy = pointer(gy), p.gty = pointer(gty), p.stats = const_cast<void*>(stats.const_data_ptr());
  p.gx = gx.mutable_data_ptr(), p.gt = mutable_pointer(gt), p.gcoef = gcoef.mutable_data_ptr(), p.gtcoef = mutable_pointer(gtcoef);
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  advise_huge_pages(p.gx, bytes);
  if (p.gt) advise_huge_pages(p.gt, bytes * p.tangents);
  launch(p, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastscore, m) {
  m.def("normalise(Tensor(a!)? y, Tensor(b!)? ty, Tensor(c!) stats, Tensor x, Tensor? t, Tensor coef, Tensor? tcoef, Tensor? labels, "
        "int groups, bool alpha, bool beta, float eps, int activation) -> ()");
  m.def("normalise_backward(Tensor(a!) gx, Tensor(b!)? gt, Tensor(c!) gcoef, Tensor(d!)? gtcoef, Tensor x, Tensor? t, Tensor stats, "
        "Tensor coef, Tensor? tcoef, Tensor? labels, Tensor? gy, Tensor? gty, int groups, bool alpha, bool beta, float eps, "
        "int activation) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) {
  m.impl("normalise", TORCH_BOX(&normalise));
  m.impl("normalise_backward", TORCH_BOX(&normalise_backward));
}

}  // namespace fastscore
#endif
