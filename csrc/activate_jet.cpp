#include "activate_jet.h"

#include "activation_cpu.h"

namespace fastscore {
namespace {

template <class T, int kKind>
void run(const ActivateJetArgs& p, int64_t begin, int64_t end) {
  const T *s = static_cast<const T*>(p.s), *g = static_cast<const T*>(p.g);
  T* out = static_cast<T*>(p.out);
  const int64_t M = p.directions;
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = end - i < kLanes ? end - i : kLanes;
    const auto load = [&](const T* from, int64_t m) FS_LAMBDA {
      return n == kLanes ? load_vector(from + m * p.n + i) : load_some(from + m * p.n + i, n);
    };
    const auto store = [&](vf v, int64_t m) FS_LAMBDA {
      if (n == kLanes) store_vector(v, out + m * p.n + i);
      else store_some(v, out + m * p.n + i, n);
    };
    vf y, d1, d2, d3;
    if (!g) {
      activate<vf>(kKind, load(s, 0), &y, &d1, &d2);
      store(y, 0);
      for (int64_t m = 1; m <= M; ++m) {
        const vf u1 = load(s, m), bend = kKind == kRelu ? vf{} : d2 * u1 * u1;
        store(times_slope(kKind, d1, u1), m);
        store(p.straight ? bend : bend + times_slope(kKind, d1, load(s, M + m)), M + m);
      }
    } else {
      activate<vf>(kKind, load(s, 0), nullptr, &d1, &d2, &d3);
      vf g0 = times_slope(kKind, d1, load(g, 0));
      for (int64_t m = 1; m <= M; ++m) {
        const vf u1 = load(s, m), g1 = load(g, m), g2 = load(g, M + m);
        if (!p.straight) store(times_slope(kKind, d1, g2), M + m);
        const vf straight = times_slope(kKind, d1, g1);
        if (kKind == kRelu) {   // it does not bend
          store(straight, m);
          continue;
        }
        vf third = d3 * u1 * u1;
        if (!p.straight) third += d2 * load(s, M + m);
        g0 += d2 * u1 * g1 + third * g2;
        store(straight + 2.0f * d2 * u1 * g2, m);
      }
      store(g0, 0);
    }
  }
}

template <class T>
void run(const ActivateJetArgs& p, int64_t begin, int64_t end) {
  switch (p.activation) {
    case kElu: return run<T, kElu>(p, begin, end);
    case kSilu: return run<T, kSilu>(p, begin, end);
    case kRelu: return run<T, kRelu>(p, begin, end);
    case kGelu: return run<T, kGelu>(p, begin, end);
    case kSoftplus: return run<T, kSoftplus>(p, begin, end);
    case kTanh: return run<T, kTanh>(p, begin, end);
    case kGeluTanh: return run<T, kGeluTanh>(p, begin, end);
    default: return run<T, kSigmoid>(p, begin, end);
  }
}

}  // namespace

void FS_KERNEL(activate_jet)(const ActivateJetArgs& p, int64_t begin, int64_t end) {
  if (p.dtype == kFloat32) run<float>(p, begin, end);
  else if (p.dtype == kBFloat16) run<BFloat16>(p, begin, end);
  else run<Float16>(p, begin, end);
}

}  // namespace fastscore

#if defined(FASTSCORE_REGISTER)
#include "torch_cpu.h"

namespace fastscore {
namespace {

void activate_jet(Tensor out, Tensor s, OptionalTensor g, int64_t directions, int64_t activation) {
  STD_TORCH_CHECK(out.is_contiguous() && s.is_contiguous() && (!g || g->is_contiguous()), "fastscore: activate_jet needs contiguous tensors");
  STD_TORCH_CHECK(dtype_of(s) != kFloat64 && dtype_of(s) != kInt64, "fastscore: activate_jet takes float32, bfloat16 or float16");
  if (s.numel() == 0) return;
  const int64_t n = s.numel() / s.size(0);
  const bool straight = s.size(0) == 1 + directions;
  STD_TORCH_CHECK(straight || s.size(0) == 1 + 2 * directions, "fastscore: activate_jet takes (1 + M, *) or (1 + 2M, *)");
  const Tensor& full = g ? *g : out;
  STD_TORCH_CHECK(full.numel() == n * (1 + 2 * directions) && (!g || out.numel() == s.numel()), "fastscore: activate_jet: sizes differ");
  const ActivateJetArgs p{out.mutable_data_ptr(), s.const_data_ptr(), pointer(g), dtype_of(s), n, directions, straight,
                          static_cast<int>(activation)};
  advise_huge_pages(p.out, out.numel() * static_cast<int64_t>(out.element_size()));
  const auto kernel = FS_PICK(activate_jet);
  for_tiles(n, 1024, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastscore, m) {
  m.def("activate_jet(Tensor(a!) out, Tensor s, Tensor? g, int directions, int activation) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("activate_jet", TORCH_BOX(&activate_jet)); }

}  // namespace fastscore
#endif
