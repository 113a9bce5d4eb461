#include "activate.h"

#include "activation_cpu.h"

namespace fastscore {
namespace {

template <class T, int kKind>
void run(const ActivateArgs& p, int64_t begin, int64_t end) {
  const T *s = static_cast<const T*>(p.s), *g = static_cast<const T*>(p.g);
  T* out = static_cast<T*>(p.out);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = end - i < kLanes ? end - i : kLanes;
    const auto load = [&](const T* from, int64_t m) FS_LAMBDA {
      return n == kLanes ? load_vector(from + m * p.n + i) : load_some(from + m * p.n + i, n);
    };
    const auto store = [&](vf v, int64_t m) FS_LAMBDA {
      if (n == kLanes) store_vector(v, out + m * p.n + i);
      else store_some(v, out + m * p.n + i, n);
    };
    vf y, d1, d2;
    if (!g) {
      activate<vf>(kKind, load(s, 0), &y, &d1, nullptr);
      store(y, 0);
      for (int64_t m = 1; m <= p.tangents; ++m) store(times_slope(kKind, d1, load(s, m)), m);
    } else {
      activate<vf>(kKind, load(s, 0), nullptr, &d1, &d2);
      vf bend = vf{};
      for (int64_t m = 1; m <= p.tangents; ++m) {
        const vf gm = load(g, m);
        if (kKind != kRelu) bend += gm * load(s, m);
        store(times_slope(kKind, d1, gm), m);
      }
      const vf straight = times_slope(kKind, d1, load(g, 0));
      store(kKind == kRelu ? straight : straight + d2 * bend, 0);
    }
  }
}

template <class T>
void run(const ActivateArgs& p, int64_t begin, int64_t end) {
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

void FS_KERNEL(activate_dual)(const ActivateArgs& p, int64_t begin, int64_t end) {
  if (p.dtype == kFloat32) run<float>(p, begin, end);
  else if (p.dtype == kBFloat16) run<BFloat16>(p, begin, end);
  else run<Float16>(p, begin, end);
}

}  // namespace fastscore

#if defined(FASTSCORE_REGISTER)
#include "torch_cpu.h"

namespace fastscore {
namespace {

void activate_dual(Tensor out, Tensor s, OptionalTensor g, int64_t activation) {
  STD_TORCH_CHECK(out.is_contiguous() && s.is_contiguous() && (!g || g->is_contiguous()), "fastscore: activate_dual needs contiguous tensors");
  STD_TORCH_CHECK(dtype_of(s) != kFloat64 && dtype_of(s) != kInt64, "fastscore: activate_dual takes float32, bfloat16 or float16");
  if (s.numel() == 0) return;
  const int64_t count = s.size(0), n = s.numel() / count;
  const ActivateArgs p{out.mutable_data_ptr(), s.const_data_ptr(), pointer(g), dtype_of(s), n, count - 1, static_cast<int>(activation)};
  advise_huge_pages(p.out, s.numel() * static_cast<int64_t>(s.element_size()));
  const auto kernel = FS_PICK(activate_dual);
  for_tiles(n, 1024, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastscore, m) {
  m.def("activate_dual(Tensor(a!) out, Tensor s, Tensor? g, int activation) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("activate_dual", TORCH_BOX(&activate_dual)); }

}  // namespace fastscore
#endif
