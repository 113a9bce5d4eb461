#include "noisy_update.h"

#include "vector_cpu.h"

namespace fastscore {
namespace {

template <class A>
FS_INLINE void update(A* out, const A* x, const A* d, const float* z, A a, A b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] + a * d[i]) + b * z[i];
}

FS_INLINE bool stream(float* out, const float* x, const float* d, const float* z, float a, float b, int64_t n) {
  if (reinterpret_cast<uintptr_t>(out) % 64 != 0 || n % kLanes != 0) return false;
  for (int64_t i = 0; i < n; i += kLanes)
    stream_vector((load_vector(x + i) + load_vector(d + i) * a) + load_vector(z + i) * b, out + i);
  return true;
}
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

enum Terms : int { kX = 1, kDirection = 2, kBoth = 3 };

// Whole groups of contiguous tensors: the normals never leave the registers. A vector lies in one sample.
template <int kTerms, bool kEach, class T>
__attribute__((noinline)) void update_groups(const UpdateArgs& p, const T* x, const T* d, T* out, int64_t first, int64_t groups, bool bypass) {
  const float *each_a = static_cast<const float*>(p.drift_each), *each_b = static_cast<const float*>(p.diffusion_each);
  vf a = vf{} + static_cast<float>(p.drift), b = vf{} + static_cast<float>(p.diffusion);
  int64_t sample = first / p.per_sample, left = p.per_sample - first % p.per_sample;
  const auto load_coefficients = [&]() FS_LAMBDA {
    if (each_a) a = vf{} + each_a[sample];
    if (each_b) b = vf{} + each_b[sample];
  };
  if constexpr (kEach) load_coefficients();
  fill_groups(out + first, (p.key.offset + static_cast<uint64_t>(first)) / 4, groups, p.key, [&](T* o, WordVectors& words) FS_LAMBDA {
    const int64_t i = o - out;
    for (int64_t line = 0; line < kPass * static_cast<int64_t>(sizeof(T)); line += 64) {   // a page ahead, where the hardware's prefetchers stop
      if constexpr (kTerms & kX) __builtin_prefetch(reinterpret_cast<const char*>(x + i) + 4096 + line, 0, 2);
      if constexpr (kTerms & kDirection) __builtin_prefetch(reinterpret_cast<const char*>(d + i) + 4096 + line, 0, 2);
    }
#pragma GCC unroll 4
    for (int j = 0, at = 0; j < kChains; j += kBeside) {
      vf z[2 * kBeside];
      chain_normals(words, j, z);
#pragma GCC unroll 8
      for (int k = 0; k < 2 * kBeside; ++k, at += kLanes) {
        vf y;   // in the order of update(), to the bit
        if constexpr (kTerms == kBoth) y = multiply_add(a, load_vector(d + i + at), load_vector(x + i + at));
        if constexpr (kTerms == kX) y = load_vector(x + i + at);
        if constexpr (kTerms == kDirection) y = a * load_vector(d + i + at);
        y = multiply_add(b, z[k], y);
        if (__is_same(T, float) && bypass) stream_vector(y, reinterpret_cast<float*>(o + at));
        else store_vector(y, o + at);
        if constexpr (kEach) {
          left -= kLanes;
          if (left == 0) {
            left = p.per_sample;
            if (i + at + kLanes < p.n) ++sample, load_coefficients();
          }
        }
      }
    }
  });
}

template <int kTerms, class T>
void update_groups(const UpdateArgs& p, const T* x, const T* d, T* out, int64_t first, int64_t groups) {
  const bool bypass = p.bypass_cache && reinterpret_cast<uintptr_t>(out + first) % 64 == 0;
  if (p.drift_each || p.diffusion_each) update_groups<kTerms, true>(p, x, d, out, first, groups, bypass);
  else update_groups<kTerms, false>(p, x, d, out, first, groups, bypass);
}

template <class T>
void run(const UpdateArgs& p, int64_t begin, int64_t end) {
  using A = typename Compute<T>::type;
  constexpr bool direct = __is_same(T, A);
  alignas(64) float noise[kTile + 2 * kGroup];
  alignas(64) A xs[kTile], ds[kTile], outs[kTile];
  for (int i = 0; i < kTile; ++i) xs[i] = ds[i] = A(-0.0);   // a missing term: -0 is the number that adds nothing, not even a sign
  T* out = static_cast<T*>(p.out);
  const T* x = static_cast<const T*>(p.x);
  const T* d = static_cast<const T*>(p.direction);
  const bool each = p.drift_each || p.diffusion_each;
  const bool grouped = p.nest.contiguous && (x || d) && (!each || (p.per_sample % kLanes == 0 && p.key.offset % kLanes == 0));
  for (int64_t first = begin, n; first < end; first += n) {
    n = end - first < kTile ? end - first : kTile;
    if constexpr (__is_same(A, float)) {
      const int64_t lead = static_cast<int64_t>((p.key.offset + static_cast<uint64_t>(first)) % kGroup), groups = (end - first) / kGroup;
      if (grouped && lead == 0 && groups > 0) {
        if (x && d) update_groups<kBoth>(p, x, d, out, first, groups);
        else if (x) update_groups<kX>(p, x, d, out, first, groups);
        else update_groups<kDirection>(p, x, d, out, first, groups);
        n = groups * kGroup;
        continue;
      }
      if (grouped && lead + n > kGroup) n = kGroup - lead;   // up to where whole groups start
    }
    Prefetch ahead;
    if (p.nest.contiguous) {   // the hardware's prefetchers stop at the end of a page, which a tile of float32 fills
      if (x) ahead.add(0, x + first, sizeof(T));
      if (d) ahead.add(1, d + first, sizeof(T));
      if (!p.bypass_cache) ahead.add(2, out + first, sizeof(T));
    }
    const float* z = tile_normals(noise, p.key.offset + static_cast<uint64_t>(first), n, p.key, ahead);
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
  if (p.bypass_cache) stream_fence();
}

}  // namespace

void FS_KERNEL(noisy_update)(const UpdateArgs& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto element) { run<decltype(element)>(p, begin, end); });
}

}  // namespace fastscore

#if defined(FASTSCORE_REGISTER)
#include "arguments.h"
#include "torch_cpu.h"

namespace fastscore {

void launch(UpdateArgs& p) {
  const int64_t bytes = p.n * (p.dtype == kFloat64 ? 8 : p.dtype == kFloat32 ? 4 : 2);
  p.bypass_cache = p.dtype == kFloat32 && p.n >= (int64_t{1} << 22) && p.out != p.x;
  if (p.nest.contiguous) advise_huge_pages(p.out, bytes);
  const auto kernel = FS_PICK(noisy_update);
  for_tiles(p.n, kTile, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

namespace {

void noisy_update(Tensor out, OptionalTensor x, OptionalTensor direction, OptionalTensor drift_each, double drift,
                  OptionalTensor diffusion_each, double diffusion, OptionalTensor key, int64_t seed, int64_t step,
                  int64_t stream, int64_t offset) {
  check_update(Checks{"noisy_update"}, out, x, direction, drift_each, diffusion_each, key, stream, offset);
  const int64_t n = out.numel(), batch = out.dim() == 0 ? 1 : out.size(0);
  if (n == 0) return;

  UpdateArgs p{};
  p.out = out.mutable_data_ptr();
  p.x = pointer(x);
  p.direction = pointer(direction);
  p.dtype = dtype_of(out);
  p.nest = nest_of(out, x, direction);
  p.n = n;
  p.per_sample = n / batch;
  p.drift = drift;
  p.diffusion = diffusion;
  coefficient(drift_each, p.drift, p.drift_each, p.dtype);
  coefficient(diffusion_each, p.diffusion, p.diffusion_each, p.dtype);
  p.key = noise_key(key, seed, step, stream, offset);
  launch(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastscore, m) {
  m.def("noisy_update(Tensor(a!) out, Tensor? x, Tensor? direction, Tensor? drift_each, float drift, Tensor? diffusion_each, "
        "float diffusion, Tensor? key, int seed, int step, int stream, int offset) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("noisy_update", TORCH_BOX(&noisy_update)); }

}  // namespace fastscore
#endif
