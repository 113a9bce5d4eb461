#include "normalise.h"

#include "activation_cpu.h"
#include "normalise_algebra.h"
#include "normalise_sample.h"

namespace fastscore {
namespace {

static_assert(kLanes <= kPadding);

// Pixels of a channel whose vectors stay in the first-level cache between two passes.
constexpr int64_t kRowChunk = 4096;

// Calls f(channel, s0, s1) for all pixels of the vectors of channels in [begin, end): by rows, a channel as a whole; channels last, a
// piece of memory with all its channels after another, for a cache line holds several vectors of channels, and a page all of them.
// The passes add up over the pixels in order, either way: what they have so far lies in tables between two pieces.
template <class S, class F>
FS_INLINE void for_pieces(const S& sample, int64_t begin, int64_t end, F f) {
  const int64_t piece = sample.piece();
  for (int64_t s0 = 0; s0 < sample.pixels; s0 += piece) {
    const int64_t s1 = s0 + piece < sample.pixels ? s0 + piece : sample.pixels;
    for (int64_t c = begin; c < end; c += S::kChannelStep) f(c, s0, s1);
  }
}

// Mean and biased variance over pixels: two passes over each chunk, chunks merged (Chan et al. 1979), so a large mean costs nothing.
// lost: what rounding has taken from each mean so far (Kahan).
template <class T, bool kLast, class A>
void moments(const Sample<T, kLast>& sample, const T* x, int64_t begin, int64_t end, A* mean, A* variance, A* lost) {
  using S = Sample<T, kLast>;
  using V = typename S::V;
  // kColumns vectors of channels side by side: each waits for its own sum.
  const auto chunk = [&](auto columns, int64_t c0, int64_t s0, int64_t s1) FS_LAMBDA {
    constexpr int kColumns = decltype(columns)::value;
    const A n = static_cast<A>(s1 - s0);
    V sum[kColumns] = {}, near[kColumns], square[kColumns] = {}, rest[kColumns] = {};
    sample.template walk<kColumns>(c0, s0, s1, [&](auto whole, int k, int64_t at, int lanes) FS_LAMBDA { sum[k] += S::load(whole, x, at, lanes); });
    for (int k = 0; k < kColumns; ++k) near[k] = S::total(sum[k]) / n;   // as good as a sum of large numbers is
    sample.template walk<kColumns>(c0, s0, s1, [&](auto whole, int k, int64_t at, int lanes) FS_LAMBDA {
      const V d = S::valid(whole, S::load(whole, x, at, lanes) - near[k], lanes);
      square[k] += d * d;
      rest[k] += d;
    });
    for (int k = 0; k < kColumns; ++k) {
      const int64_t c = c0 + k * S::kChannelStep;
      const V m = S::so_far(mean, c, s0), owed = S::so_far(lost, c, s0), m2 = S::so_far(variance, c, s0);
      const V correction = S::total(rest[k]) / n, delta = ((near[k] - m) + correction) + owed;
      const V step = delta * (n / static_cast<A>(s1)) - owed, moved = m + step;
      const V spread = m2 + ((S::total(square[k]) - correction * correction * n) + delta * delta * (n * static_cast<A>(s0) / static_cast<A>(s1)));
      S::put((moved - m) - step, lost, c);
      S::put(moved, mean, c);
      S::put(s1 == sample.pixels ? spread / static_cast<A>(sample.pixels) : spread, variance, c);
    }
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  if constexpr (kLast) {
    const int64_t piece = sample.piece();
    for (int64_t s0 = 0; s0 < sample.pixels; s0 += piece) {
      const int64_t s1 = s0 + piece < sample.pixels ? s0 + piece : sample.pixels;
      int64_t c = begin;
      for (; c + 2 * S::L <= end; c += 2 * S::L) chunk(two, c, s0, s1);
      for (; c < end; c += S::L) chunk(one, c, s0, s1);
    }
  } else {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t s0 = 0; s0 < sample.pixels; s0 += kRowChunk)
        chunk(one, c, s0, s0 + kRowChunk < sample.pixels ? s0 + kRowChunk : sample.pixels);
  }
}

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
    moments<T, kLast, A>(s, x, begin, end, algebra.at(kMean), algebra.at(kVariance), algebra.at(kWork));
    const A* mean = algebra.at(kMean);
    for (int64_t m = 0; m < p.tangents; ++m) {
      const T* t = static_cast<const T*>(sample(p.t, m));
      A *tau_table = algebra.at(kTau, m), *xi_table = algebra.at(kXi, m);
      for_pieces(s, begin, end, [&](int64_t c, int64_t s0, int64_t s1) FS_LAMBDA {
        const V centre = S::coefficient(mean, c);
        V tau = S::so_far(tau_table, c, s0), xi = S::so_far(xi_table, c, s0);
        s.walk(c, s0, s1, [&](auto whole, int64_t at, int n) FS_LAMBDA {
          const V d = S::load(whole, t, at, n);
          tau += d;
          xi += d * (S::load(whole, x, at, n) - centre);
        });
        const A count = s1 == p.pixels ? static_cast<A>(p.pixels) : A(1);
        S::put(S::total(tau) / count, tau_table, c);
        S::put(S::total(xi) / count, xi_table, c);
      });
    }
  }

  void combine() const {
    const A q = algebra.statistics();
    algebra.value();
    for (int64_t m = 0; m < p.tangents; ++m) algebra.tangent(m, q);
    for (int64_t c = 0; c < p.channels; ++c) {
      saved(0)[2 * c] = algebra.at(kMean)[c], saved(0)[2 * c + 1] = algebra.at(kVariance)[c];
      for (int64_t m = 0; m < p.tangents; ++m)
        saved(1 + m)[2 * c] = algebra.at(kTau, m)[c], saved(1 + m)[2 * c + 1] = algebra.at(kXi, m)[c];
    }
  }

  template <bool kLast>
  void apply() const {
    using S = Sample<T, kLast>;
    using V = typename S::V;
    const S s{p.channels, p.pixels};
    const void* x = sample(p.x);
    if ((p.tangents == 0 || !p.ty) && !p.y) return;
    for_pieces(s, begin, end, [&](int64_t c, int64_t s0, int64_t s1) FS_LAMBDA {
      const V centre = S::coefficient(algebra.at(kMean), c), scale = S::coefficient(algebra.at(kScale), c);
      const V shift = S::coefficient(algebra.at(kShift), c);
      if (p.tangents == 0 || !p.ty) {
        void* y = sample(p.y);
        s.walk(c, s0, s1, [&](auto whole, int64_t at, int n) FS_LAMBDA {
          V out;
          activate<V>(kind(), scale * (S::load(whole, x, at, n) - centre) + shift, &out, nullptr, nullptr);
          S::store(whole, out, y, at, n);
        });
        return;
      }
      for (int64_t m = 0; m < p.tangents; ++m) {
        const V P = S::coefficient(algebra.at(kP, m), c), Q = S::coefficient(algebra.at(kQ, m), c);
        const void* t = sample(p.t, m);
        void *ty = sample(p.ty, m), *y = m == 0 && p.y ? sample(p.y) : nullptr;
        s.walk(c, s0, s1, [&](auto whole, int64_t at, int n) FS_LAMBDA {
          const V d = S::load(whole, x, at, n) - centre;
          V out, slope;
          activate<V>(kind(), scale * d + shift, &out, &slope, nullptr);
          if (y) S::store(whole, out, y, at, n);
          S::store(whole, times_slope(kind(), slope, scale * S::load(whole, t, at, n) + (P * d + Q)), ty, at, n);
        });
      }
    });
  }

  // ---- backward

  void restore() const {
    for (int64_t c = 0; c < p.channels; ++c) {
      algebra.at(kMean)[c] = saved(0)[2 * c], algebra.at(kVariance)[c] = saved(0)[2 * c + 1];
      for (int64_t m = 0; m < p.tangents; ++m)
        algebra.at(kTau, m)[c] = saved(1 + m)[2 * c], algebra.at(kXi, m)[c] = saved(1 + m)[2 * c + 1];
    }
    const A q = algebra.statistics();
    algebra.value();
    for (int64_t m = 0; m < p.tangents; ++m) algebra.tangent(m, q);
  }

  // Without tangents gu = f' gy. With them gu = f' gy + f'' Σ u̇ gty and ĝ = f' gty: f(whole, at, n, d = x - mean, gu, slope, curvature).
  template <bool kLast, class F>
  FS_INLINE void with_gu(const Sample<T, kLast>& s, int64_t c, int64_t s0, int64_t s1, F f) const {
    using S = Sample<T, kLast>;
    using V = typename S::V;
    const V centre = S::coefficient(algebra.at(kMean), c), scale = S::coefficient(algebra.at(kScale), c);
    const V shift = S::coefficient(algebra.at(kShift), c);
    const void *x = sample(p.x), *gy = p.gy ? sample(p.gy) : nullptr;
    if (p.tangents == 0) {
      s.walk(c, s0, s1, [&](auto whole, int64_t at, int n) FS_LAMBDA {
        const V d = S::load(whole, x, at, n) - centre;
        V slope;
        activate<V>(kind(), scale * d + shift, nullptr, &slope, nullptr);
        f(whole, at, n, d, S::valid(whole, times_slope(kind(), slope, S::load(whole, gy, at, n)), n), slope);
      });
      return;
    }
    s.walk(c, s0, s1, [&](auto whole, int64_t at, int n) FS_LAMBDA {
      const V d = S::load(whole, x, at, n) - centre;
      V slope, curvature, bend = V{};
      activate<V>(kind(), scale * d + shift, nullptr, &slope, &curvature);
      if (kind() != kIdentity && kind() != kRelu)
        for (int64_t m = 0; m < p.tangents; ++m) {
          const V P = S::coefficient(algebra.at(kP, m), c), Q = S::coefficient(algebra.at(kQ, m), c);
          bend += (scale * S::load(whole, sample(p.t, m), at, n) + (P * d + Q)) * S::load(whole, sample(p.gty, m), at, n);
        }
      V gu = kind() == kRelu ? V{} : curvature * bend;
      if (gy) gu += times_slope(kind(), slope, S::load(whole, gy, at, n));
      f(whole, at, n, d, S::valid(whole, gu, n), slope);
    });
  }

  // Without tangents the sums leave gu in the place of gx, where that rounds nothing: its slope costs more than the memory.
  static constexpr bool kKeepsGu = __is_same(T, A) && kKind != kIdentity;

  template <bool kLast>
  void cotangent_sums() const {
    using S = Sample<T, kLast>;
    using V = typename S::V;
    const S s{p.channels, p.pixels};
    for_pieces(s, begin, end, [&](int64_t c, int64_t s0, int64_t s1) FS_LAMBDA {
      V sum = S::so_far(algebra.at(kSumG), c, s0), sum_x = S::so_far(algebra.at(kSumGx), c, s0);
      if (p.tangents == 0) {
        void* gx = sample(p.gx);
        with_gu<kLast>(s, c, s0, s1, [&](auto whole, int64_t at, int n, V d, V gu, V) FS_LAMBDA {
          sum += gu, sum_x += gu * d;
          if (kKeepsGu) S::store(whole, gu, gx, at, n);
        });
      } else {
        const int64_t M = p.tangents;
        for (int64_t m = 0; m < M; ++m) {
          const void *t = sample(p.t, m), *gty = sample(p.gty, m);
          V g = S::so_far(algebra.at(kG, m), c, s0), gx = S::so_far(algebra.at(kGx, m), c, s0), gt = S::so_far(algebra.at(kGt, m), c, s0);
          with_gu<kLast>(s, c, s0, s1, [&](auto whole, int64_t at, int n, V d, V gu, V slope) FS_LAMBDA {
            if (m == 0) sum += gu, sum_x += gu * d;
            const V hat = S::valid(whole, times_slope(kind(), slope, S::load(whole, gty, at, n)), n);
            g += hat;
            gx += hat * d;
            gt += hat * S::load(whole, t, at, n);
          });
          S::put(S::total(g), algebra.at(kG, m), c);
          S::put(S::total(gx), algebra.at(kGx, m), c);
          S::put(S::total(gt), algebra.at(kGt, m), c);
        }
      }
      S::put(S::total(sum), algebra.at(kSumG), c);
      S::put(S::total(sum_x), algebra.at(kSumGx), c);
    });
  }

  template <bool kLast>
  void cotangent_apply() const {
    using S = Sample<T, kLast>;
    using V = typename S::V;
    const S s{p.channels, p.pixels};
    void* gx = sample(p.gx);
    for_pieces(s, begin, end, [&](int64_t c, int64_t s0, int64_t s1) FS_LAMBDA {
      const V c4 = S::coefficient(algebra.at(kC4), c), c5 = S::coefficient(algebra.at(kC5), c);
      const V scale = S::coefficient(algebra.at(kScale), c);
      if (kKeepsGu && p.tangents == 0) {
        const V centre = S::coefficient(algebra.at(kMean), c);
        const void* x = sample(p.x);
        s.walk(c, s0, s1, [&](auto whole, int64_t at, int n) FS_LAMBDA {
          const V d = S::load(whole, x, at, n) - centre;
          S::store(whole, scale * S::load(whole, gx, at, n) + (c4 * d + c5), gx, at, n);
        });
        return;
      }
      with_gu<kLast>(s, c, s0, s1, [&](auto whole, int64_t at, int n, V d, V gu, V slope) FS_LAMBDA {
        V out = scale * gu + (c4 * d + c5);
        for (int64_t m = 0; m < p.tangents; ++m) {
          const V t = S::load(whole, sample(p.t, m), at, n), hat = times_slope(kind(), slope, S::load(whole, sample(p.gty, m), at, n));
          out += S::coefficient(algebra.at(kC2, m), c) * hat + S::coefficient(algebra.at(kC3, m), c) * t;
          const V gt = scale * hat + (S::coefficient(algebra.at(kC3, m), c) * d + S::coefficient(algebra.at(kD3, m), c));
          S::store(whole, gt, sample(p.gt, m), at, n);
        }
        S::store(whole, out, gx, at, n);
      });
    });
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

// The common activations have loops of their own, float64 excepted; the others share one.
template <class T>
void run(const NormArgs& p, bool backward, NormPhase phase, int64_t b, int64_t begin, int64_t end, void* scratch) {
  if constexpr (__is_same(T, double)) return run<T, -1>(p, backward, phase, b, begin, end, scratch);
  else if (p.activation == kIdentity) run<T, kIdentity>(p, backward, phase, b, begin, end, scratch);
  else if (p.activation == kElu) run<T, kElu>(p, backward, phase, b, begin, end, scratch);
  else if (p.activation == kSilu) run<T, kSilu>(p, backward, phase, b, begin, end, scratch);
  else run<T, -1>(p, backward, phase, b, begin, end, scratch);
}

}  // namespace

void FS_KERNEL(normalise)(const NormArgs& p, bool backward, NormPhase phase, int64_t b, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto element) { run<decltype(element)>(p, backward, phase, b, begin, end, scratch); });
}

}  // namespace fastscore

#if defined(FASTSCORE_REGISTER)
#include <vector>

#include "arguments.h"
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
  const int64_t lanes = p.channels_last ? kPadding : 1, units = (p.channels + lanes - 1) / lanes, grain = 8192 / (lanes * p.pixels + 1) + 1;
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

// norm_arguments() of labels that the host can read.
NormArgs arguments(const Checks& check, const Tensor& x, const OptionalTensor& t, const Tensor& coef, const OptionalTensor& tcoef,
                   const OptionalTensor& labels, int64_t groups, bool alpha, bool beta, double eps, int64_t activation) {
  const NormArgs p = norm_arguments(check, x, t, coef, tcoef, labels, groups, alpha, beta, eps, activation);
  for (int64_t b = 0; p.labels && b < p.batch; ++b)
    if (p.labels[b] < 0 || p.labels[b] >= p.coef_rows) check.refuse("labels must be in 0..", p.coef_rows - 1, "; got ", p.labels[b]);
  return p;
}

void normalise(OptionalTensor y, OptionalTensor ty, Tensor stats, Tensor x, OptionalTensor t, Tensor coef, OptionalTensor tcoef,
               OptionalTensor labels, int64_t groups, bool alpha, bool beta, double eps, int64_t activation) {
  const Checks check{"normalise"};
  NormArgs p = arguments(check, x, t, coef, tcoef, labels, groups, alpha, beta, eps, activation);
  check_norm(check, p, y, ty, stats, x, t, coef, tcoef, labels);

  p.y = mutable_pointer(y), p.ty = mutable_pointer(ty), p.stats = stats.mutable_data_ptr();
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  if (p.y) advise_huge_pages(p.y, bytes);
  if (p.ty) advise_huge_pages(p.ty, bytes * p.tangents);
  launch(p, false);
}

void normalise_backward(Tensor gx, OptionalTensor gt, Tensor gcoef, OptionalTensor gtcoef, Tensor x, OptionalTensor t, Tensor stats,
                        Tensor coef, OptionalTensor tcoef, OptionalTensor labels, OptionalTensor gy, OptionalTensor gty, int64_t groups,
                        bool alpha, bool beta, double eps, int64_t activation) {
  const Checks check{"normalise_backward"};
  NormArgs p = arguments(check, x, t, coef, tcoef, labels, groups, alpha, beta, eps, activation);
  const DType wide = compute_dtype(p.dtype);
  const int64_t width = p.channels * (1 + alpha + beta);
  check.present("gt", gt, t.has_value(), "t");
  check.present("gty", gty, t.has_value(), "t");
  check.present("gtcoef", gtcoef, t.has_value(), "t");
  if (!t) check.present("gy", gy, true, "x alone");
  check_image(check, "gx", gx, x, p.channels_last);
  check_image(check, "gy", gy, x, p.channels_last);
  check_image(check, "gt", gt, x, p.channels_last, p.tangents);
  check_image(check, "gty", gty, x, p.channels_last, p.tangents);
  check.table("stats", stats, wide, {1 + p.tangents, p.batch, p.channels, 2});
  check.table("gcoef", gcoef, wide, {p.batch, width});
  check.table("gtcoef", gtcoef, wide, {p.tangents, p.batch, width});
  check.apart({{"gx", gx}, {"gt", gt}, {"gcoef", gcoef}, {"gtcoef", gtcoef}},
              {{"x", x}, {"t", t}, {"stats", stats}, {"coef", coef}, {"tcoef", tcoef}, {"labels", labels}, {"gy", gy}, {"gty", gty}});

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
  m.def("norm_clusters(int device, int channels, int pixels, int groups, bool alpha, int itemsize) -> int");   // of normalise.cu
}
STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) {
  m.impl("normalise", TORCH_BOX(&normalise));
  m.impl("normalise_backward", TORCH_BOX(&normalise_backward));
}

}  // namespace fastscore
#endif
