// Compiled with -ffp-contract=off (build_support/native.py): every product is rounded, as by PyTorch's own operators, whose bits these are.
#include "given_noise.h"

#include "dtype_cpu.h"

namespace fastscore {
namespace {

// `out` may be one of the others: each element is read before it is written.
template <class A>
FS_INLINE void update(A* out, const A* x, const A* d, const A* z, A a, A b, int64_t n) {
  if (d) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] + (a * d[i] + b * z[i]);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] + b * z[i];
  }
}

template <class A>
FS_INLINE void update_each(A* out, const A* x, const A* d, const A* z, const A* a, const A* b, int64_t n) {
  if (d) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] + (a[i] * d[i] + b[i] * z[i]);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] + b[i] * z[i];
  }
}

// One tile, with one pair of coefficients for each sample; those of short samples come from arrays, so that the loop stays a vector loop.
template <class A>
FS_INLINE void update_tile(const GivenArgs& p, A* out, const A* x, const A* d, const A* z, int64_t first, int64_t n) {
  const A* each_a = static_cast<const A*>(p.drift_each);
  const A* each_b = static_cast<const A*>(p.diffusion_each);
  const A a = static_cast<A>(p.drift), b = static_cast<A>(p.diffusion);
  if (!each_a && !each_b) return update(out, x, d, z, a, b, n);

  const bool together = p.per_sample < 128;
  A as[kTile], bs[kTile];
  int64_t sample = first / p.per_sample, left = p.per_sample - first % p.per_sample;
  for (int64_t i = 0; i < n; ++sample, left = p.per_sample) {
    const int64_t m = left < n - i ? left : n - i;
    const A sample_a = each_a ? each_a[sample] : a, sample_b = each_b ? each_b[sample] : b;
    if (!together) update(out + i, x + i, d ? d + i : nullptr, z + i, sample_a, sample_b, m);
    for (int64_t j = i; together && j < i + m; ++j) as[j] = sample_a, bs[j] = sample_b;
    i += m;
  }
  if (together) update_each(out, x, d, z, as, bs, n);
}

// Elements as numbers of the compute type: the tensor itself, or a copy of the tile.
template <class T, class A>
FS_INLINE const A* tile_of(const void* tensor, int64_t first, int64_t n, A* buffer) {
  const T* p = static_cast<const T*>(tensor);
  if (!p) return nullptr;
  if constexpr (__is_same(T, A)) return p + first;
  load_row(p + first, 1, n, buffer);
  return buffer;
}

template <class T>
void run(const GivenArgs& p, int64_t begin, int64_t end) {
  using A = typename Compute<T>::type;
  alignas(64) A xs[kTile], ds[kTile], zs[kTile], outs[kTile];
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t n = end - first < kTile ? end - first : kTile;
    T* out = static_cast<T*>(p.out) + first;
    const A* x = tile_of<T>(p.x, first, n, xs);
    const A* d = tile_of<T>(p.direction, first, n, ds);
    const A* z = tile_of<T>(p.noise, first, n, zs);
    if constexpr (__is_same(T, A)) {
      update_tile<A>(p, out, x, d, z, first, n);
    } else {
      update_tile<A>(p, outs, x, d, z, first, n);
      store_row(outs, out, 1, n);
    }
  }
}

}  // namespace

void FS_KERNEL(given_noise)(const GivenArgs& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto element) { run<decltype(element)>(p, begin, end); });
}

}  // namespace fastscore

#if defined(FASTSCORE_REGISTER)
#include "torch_cpu.h"

namespace fastscore {

void launch(const GivenArgs& p) {
  advise_huge_pages(p.out, p.n * (p.dtype == kFloat64 ? 8 : p.dtype == kFloat32 ? 4 : 2));
  const auto kernel = FS_PICK(given_noise);
  for_tiles(p.n, kTile, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace fastscore
#endif
