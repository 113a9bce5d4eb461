#include "langevin_step.h"

#include "dtype_cpu.h"

namespace fastscore {
namespace {

template <class A>
FS_INLINE void update(A* out, const A* x, const A* d, const float* z, A a, A b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] + a * d[i]) + b * z[i];
}

#if defined(__AVX512F__)
// Past the caches, reading the output's lines before overwriting them would cost a third of the traffic.
FS_INLINE bool stream(float* out, const float* x, const float* d, const float* z, float a, float b, int64_t n) {
  if (reinterpret_cast<uintptr_t>(out) % 64 != 0 || n % 16 != 0) return false;
  const __m512 va = _mm512_set1_ps(a), vb = _mm512_set1_ps(b);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 drifted = _mm512_fmadd_ps(va, _mm512_loadu_ps(d + i), _mm512_loadu_ps(x + i));
    _mm512_stream_ps(out + i, _mm512_fmadd_ps(vb, _mm512_loadu_ps(z + i), drifted));
  }
  return true;
}
#else
FS_INLINE bool stream(float*, const float*, const float*, const float*, float, float, int64_t) { return false; }
#endif
FS_INLINE bool stream(double*, const double*, const double*, const float*, double, double, int64_t) { return false; }

// One tile with one pair of coefficients per sample; short samples read theirs from arrays so that the loop stays a vector loop.
template <class A>
FS_INLINE void update_tile(const UpdateArgs& p, A* out, const A* x, const A* d, const float* z, int64_t first, int64_t n) {
  const A* each_a = static_cast<const A*>(p.drift_each);
  const A* each_b = static_cast<const A*>(p.diffusion_each);
  const A a = static_cast<A>(p.drift), b = static_cast<A>(p.diffusion);
  if (!each_a && !each_b) {
    if (!p.bypass_cache || !stream(out, x, d, z, a, b, n)) update(out, x, d, z, a, b, n);
    return;
  }
  int64_t sample = first / p.per_sample, left = p.per_sample - first % p.per_sample;
  if (p.per_sample >= 128) {
    for (int64_t i = 0; i < n; ++sample, left = p.per_sample) {
      const int64_t m = left < n - i ? left : n - i;
      const A as = each_a ? each_a[sample] : a, bs = each_b ? each_b[sample] : b;
      if (!p.bypass_cache || !stream(out + i, x + i, d + i, z + i, as, bs, m)) update(out + i, x + i, d + i, z + i, as, bs, m);
      i += m;
    }
    return;
  }
  A as[kTile], bs[kTile];
  for (int64_t i = 0; i < n; ++sample, left = p.per_sample)
    for (const int64_t stop = i + (left < n - i ? left : n - i); i < stop; ++i) {
      as[i] = each_a ? each_a[sample] : a;
      bs[i] = each_b ? each_b[sample] : b;
    }
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] + as[i] * d[i]) + bs[i] * z[i];
}

// Lines of the tile on their way while its normals are computed.
template <int kWrite>
FS_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, kWrite, 2);
}

template <class T>
void run(const UpdateArgs& p, int64_t begin, int64_t end) {
  using A = typename Compute<T>::type;
  constexpr bool direct = __is_same(T, A);
  alignas(64) float noise[kTile + 2 * kGroup];
  alignas(64) A xs[kTile] = {}, ds[kTile] = {}, outs[kTile];
  T* out = static_cast<T*>(p.out);
  const T* x = static_cast<const T*>(p.x);
  const T* d = static_cast<const T*>(p.direction);
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t n = end - first < kTile ? end - first : kTile;
    if (p.nest.contiguous) {   // the hardware's prefetchers stop at the end of a page, which a tile of float32 fills
      if (x) prefetch<0>(x + first, n * sizeof(T));
      if (d) prefetch<0>(d + first, n * sizeof(T));
      if (!p.bypass_cache) prefetch<1>(out + first, n * sizeof(T));
    }
    const float* z = tile_normals(noise, p.key.offset + static_cast<uint64_t>(first), n, p.key);
    if constexpr (direct) {
      if (p.nest.contiguous) {
        update_tile<A>(p, out + first, x ? x + first : xs, d ? d + first : ds, z, first, n);
        continue;
      }
    }
    for_rows(p.nest, first, n, [&](int64_t at, const int64_t* offset, int64_t m) FS_LAMBDA {
      if (x) load_row(x + offset[1], p.nest.strides[1][p.nest.ndim - 1], m, xs + at);
      if (d) load_row(d + offset[2], p.nest.strides[2][p.nest.ndim - 1], m, ds + at);
    });
    UpdateArgs cached = p;
    cached.bypass_cache = false;
    update_tile<A>(cached, outs, xs, ds, z, first, n);
    for_rows(p.nest, first, n, [&](int64_t at, const int64_t* offset, int64_t m) FS_LAMBDA {
      store_row(outs + at, out + offset[0], p.nest.strides[0][p.nest.ndim - 1], m);
    });
  }
#if defined(__AVX512F__)
  _mm_sfence();   // streamed lines become visible before the thread reports that it is done
#endif
}

}  // namespace

void FS_KERNEL(noisy_update)(const UpdateArgs& p, int64_t begin, int64_t end) {
  if (p.dtype == kFloat32) run<float>(p, begin, end);
  else if (p.dtype == kFloat64) run<double>(p, begin, end);
  else if (p.dtype == kBFloat16) run<BFloat16>(p, begin, end);
  else run<Float16>(p, begin, end);
}

}  // namespace fastscore

#if defined(FASTSCORE_REGISTER)
#include "torch_cpu.h"

namespace fastscore {
namespace {

void noisy_update(Tensor out, OptionalTensor x, OptionalTensor direction, OptionalTensor drift_each, double drift,
                  OptionalTensor diffusion_each, double diffusion, OptionalTensor key, int64_t seed, int64_t step,
                  int64_t stream, int64_t offset) {
  UpdateArgs p{};
  const int64_t n = out.numel();
  if (n == 0) return;
  p.out = out.mutable_data_ptr();
  p.x = pointer(x);
  p.direction = pointer(direction);
  p.dtype = dtype_of(out);
  p.nest = nest_of(out, x, direction);
  p.per_sample = out.dim() == 0 ? 1 : n / out.size(0);
  p.drift = drift;
  p.diffusion = diffusion;
  coefficient(drift_each, p.drift, p.drift_each, p.dtype);
  coefficient(diffusion_each, p.diffusion, p.diffusion_each, p.dtype);
  p.bypass_cache = p.dtype == kFloat32 && n >= (int64_t{1} << 22) && p.out != p.x;
  p.key = noise_key(key, seed, step, stream, offset);
  if (p.nest.contiguous) advise_huge_pages(p.out, n * static_cast<int64_t>(out.element_size()));
  const auto kernel = FS_PICK(noisy_update);
  for_tiles(n, kTile, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastscore, m) {
  m.def("noisy_update(Tensor(a!) out, Tensor? x, Tensor? direction, Tensor? drift_each, float drift, Tensor? diffusion_each, "
        "float diffusion, Tensor? key, int seed, int step, int stream, int offset) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("noisy_update", TORCH_BOX(&noisy_update)); }

}  // namespace fastscore
#endif
