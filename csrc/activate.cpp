#include "activate.h"

#include "activation_cpu.h"

namespace fastscore {
namespace {

// A vector of every row of the stacks: elements [i, i + n), n <= kLanes. By value: behind a reference to the arguments they were loaded
// again after each store.
template <class T>
struct Column {
  const T *const stack, *const gradient;
  T* const out;
  const int64_t length, n;
  const bool straight;

  FS_INLINE Column(const ActivateArgs& p, int64_t i, int64_t count)
      : stack(static_cast<const T*>(p.s) + i), gradient(p.g ? static_cast<const T*>(p.g) + i : nullptr),
        out(static_cast<T*>(p.out) + i), length(p.n), n(count), straight(p.straight) {}

  FS_INLINE vf load(const T* at) const { return n == kLanes ? load_vector(at) : load_some(at, n); }
  FS_INLINE vf s(int64_t row) const { return load(stack + row * length); }
  FS_INLINE vf g(int64_t row) const { return load(gradient + row * length); }
  FS_INLINE void store(vf v, int64_t row) const {
    T* at = out + row * length;
    if (n == kLanes) store_vector(v, at);
    else store_some(v, at, n);
  }
};

template <class T, int kKind>
FS_INLINE void first_order(const Column<T>& c, int64_t M) {
  vf y, d1;
  activate<vf>(kKind, c.s(0), &y, &d1, nullptr);
  c.store(y, 0);
  for (int64_t m = 1; m <= M; ++m) c.store(times_slope(kKind, d1, c.s(m)), m);
}

template <class T, int kKind>
FS_INLINE void first_order_gradient(const Column<T>& c, int64_t M) {
  vf d1, d2, bend = vf{};
  activate<vf>(kKind, c.s(0), nullptr, &d1, &d2);
  for (int64_t m = 1; m <= M; ++m) {
    const vf gm = c.g(m);
    if (kKind != kRelu) bend += gm * c.s(m);
    c.store(times_slope(kKind, d1, gm), m);
  }
  const vf straight = times_slope(kKind, d1, c.g(0));
  c.store(kKind == kRelu ? straight : straight + d2 * bend, 0);
}

template <class T, int kKind>
FS_INLINE void second_order(const Column<T>& c, int64_t M) {
  vf y, d1, d2;
  activate<vf>(kKind, c.s(0), &y, &d1, &d2);
  c.store(y, 0);
  for (int64_t m = 1; m <= M; ++m) {
    const vf u1 = c.s(m), bend = kKind == kRelu ? vf{} : d2 * u1 * u1;
    c.store(times_slope(kKind, d1, u1), m);
    c.store(c.straight ? bend : bend + times_slope(kKind, d1, c.s(M + m)), M + m);
  }
}

template <class T, int kKind>
FS_INLINE void second_order_gradient(const Column<T>& c, int64_t M) {
  vf d1, d2, d3;
  activate<vf>(kKind, c.s(0), nullptr, &d1, &d2, &d3);
  vf g0 = times_slope(kKind, d1, c.g(0));
  for (int64_t m = 1; m <= M; ++m) {
    const vf u1 = c.s(m), g1 = c.g(m), g2 = c.g(M + m);
    vf gu1 = times_slope(kKind, d1, g1);
    if (kKind != kRelu) {   // which does not bend
      vf third = d3 * u1 * u1;
      if (!c.straight) third += d2 * c.s(M + m);
      g0 += d2 * u1 * g1 + third * g2;
      gu1 += 2.0f * d2 * u1 * g2;
    }
    if (!c.straight) c.store(times_slope(kKind, d1, g2), M + m);
    c.store(gu1, m);
  }
  c.store(g0, 0);
}

template <class T, int kKind, int kOrder>
void run(const ActivateArgs& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const Column<T> column(p, i, end - i < kLanes ? end - i : kLanes);
    if constexpr (kOrder == 1) p.g ? first_order_gradient<T, kKind>(column, p.directions) : first_order<T, kKind>(column, p.directions);
    else p.g ? second_order_gradient<T, kKind>(column, p.directions) : second_order<T, kKind>(column, p.directions);
  }
}

template <class T, int kOrder>
void run(const ActivateArgs& p, int64_t begin, int64_t end) {
  switch (p.activation) {
    case kElu: return run<T, kElu, kOrder>(p, begin, end);
    case kSilu: return run<T, kSilu, kOrder>(p, begin, end);
    case kRelu: return run<T, kRelu, kOrder>(p, begin, end);
    case kGelu: return run<T, kGelu, kOrder>(p, begin, end);
    case kSoftplus: return run<T, kSoftplus, kOrder>(p, begin, end);
    case kTanh: return run<T, kTanh, kOrder>(p, begin, end);
    case kGeluTanh: return run<T, kGeluTanh, kOrder>(p, begin, end);
    default: return run<T, kSigmoid, kOrder>(p, begin, end);
  }
}

}  // namespace

void FS_KERNEL(activate_dual)(const ActivateArgs& p, int64_t begin, int64_t end) {
  with_one_of<float, BFloat16, Float16>(p.dtype, [&](auto element) { run<decltype(element), 1>(p, begin, end); });
}

void FS_KERNEL(activate_jet)(const ActivateArgs& p, int64_t begin, int64_t end) {
  with_one_of<float, BFloat16, Float16>(p.dtype, [&](auto element) { run<decltype(element), 2>(p, begin, end); });
}

}  // namespace fastscore

#if defined(FASTSCORE_REGISTER)
#include <vector>

#include "torch_cpu.h"

namespace fastscore {
namespace {

// A stack of `rows` derivatives, of the dtype and the trailing sizes of s.
void check_stack(const Checks& check, const char* name, const OptionalTensor& stack, const Tensor& s, int64_t rows) {
  if (!stack) return;
  check.memory(name, *stack);
  check.dtype(name, *stack, dtype_of(s));
  std::vector<int64_t> sizes(s.sizes().begin(), s.sizes().end());
  sizes[0] = rows;
  check.shape(name, *stack, Sizes(sizes.data(), sizes.size()));
  if (!stack->is_contiguous()) check.refuse(name, " must be contiguous");
}

template <class Kernel>
void launch(Kernel kernel, const ActivateArgs& p, int64_t bytes) {
  advise_huge_pages(p.out, bytes);
  for_tiles(p.n, 1024, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

template <class Kernel>
void launch(const Checks& check, Kernel kernel, Tensor& out, const Tensor& s, const OptionalTensor& g, int64_t directions, bool straight,
            int64_t activation) {
  if (check.floating("s", s) == kFloat64) check.refuse("s must be float32, bfloat16 or float16; got float64");
  const int64_t rows = s.size(0), all = straight ? 1 + 2 * directions : rows;
  check_stack(check, "s", s, s, rows);
  check_stack(check, "g", g, s, all);
  check_stack(check, "out", out, s, g ? rows : all);
  check.number("activation", activation, kElu, kGeluTanh);
  check.apart("out", out, "s", s);
  check.apart("out", out, "g", g);
  if (s.numel() == 0) return;

  const int64_t n = s.numel() / rows;
  const ActivateArgs p{out.mutable_data_ptr(), s.const_data_ptr(), pointer(g), dtype_of(s), n, directions, straight, static_cast<int>(activation)};
  launch(kernel, p, out.numel() * static_cast<int64_t>(out.element_size()));
}

void activate_dual(Tensor out, Tensor s, OptionalTensor g, int64_t activation) {
  const Checks check{"activate_dual"};
  if (s.dim() == 0 || s.size(0) == 0) check.refuse("s must be (1 + M, *); got ", shown(s.sizes()));
  launch(check, FS_PICK(activate_dual), out, s, g, s.size(0) - 1, false, activation);
}

void activate_jet(Tensor out, Tensor s, OptionalTensor g, int64_t directions, int64_t activation) {
  const Checks check{"activate_jet"};
  check.number("directions", directions, 0, int64_t{1} << 40);
  const bool straight = s.dim() > 0 && s.size(0) == 1 + directions;
  if (!straight && (s.dim() == 0 || s.size(0) != 1 + 2 * directions))
    check.refuse("s must be (1 + M, *) or (1 + 2M, *) with M = ", directions, "; got ", shown(s.sizes()));
  launch(check, FS_PICK(activate_jet), out, s, g, directions, straight, activation);
}

}  // namespace

void launch(const ActivateArgs& p, bool second) {
  const int64_t rows = 1 + p.directions * (!second || (p.straight && p.g) ? 1 : 2);
  launch(second ? FS_PICK(activate_jet) : FS_PICK(activate_dual), p, rows * p.n * (p.dtype == kFloat32 ? 4 : 2));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastscore, m) {
  m.def("activate_dual(Tensor(a!) out, Tensor s, Tensor? g, int activation) -> ()");
  m.def("activate_jet(Tensor(a!) out, Tensor s, Tensor? g, int directions, int activation) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) {
  m.impl("activate_dual", TORCH_BOX(&activate_dual));
  m.impl("activate_jet", TORCH_BOX(&activate_jet));
}

}  // namespace fastscore
#endif
