#include "denoising_loss.h"

#include "dtype_cpu.h"

namespace fastscore {
namespace {

// Sixteen running sums: a vector, and one rounding per 16 elements instead of one per element.
template <class A, class Z>
FS_INLINE double reduce_row(const A* s, const Z* z, A sigma, ReduceMode mode, int64_t n) {
  A sums[16] = {};
  int64_t i = 0;
  if (mode == kLoss) {
    for (; i + 16 <= n; i += 16)
      for (int j = 0; j < 16; ++j) {
        const A t = sigma * s[i + j] + z[i + j];
        sums[j] += t * t;
      }
    for (int j = 0; i < n; ++i, ++j) {
      const A t = sigma * s[i] + z[i];
      sums[j] += t * t;
    }
  } else {
    for (; i + 16 <= n; i += 16)
      for (int j = 0; j < 16; ++j) sums[j] += s[i + j] * z[i + j];
    for (int j = 0; i < n; ++i, ++j) sums[j] += s[i] * z[i];
  }
  double total = 0;
  for (int j = 0; j < 16; ++j) total += sums[j];
  return mode == kLoss ? 0.5 * total : total;
}

// The score or the noise in the compute type: the tensor itself, or a copy of the tile.
template <class T, class A>
FS_INLINE const A* tile_of(const void* tensor, const ReduceArgs& p, A* buffer, int64_t first, int64_t n) {
  const T* s = static_cast<const T*>(tensor);
  if constexpr (__is_same(T, A))
    if (p.nest.contiguous) return s + first;
  for_rows(p.nest, first, n, [&](int64_t at, const int64_t* offset, int64_t m) FS_LAMBDA {
    load_row(s + offset[0], p.nest.strides[0][p.nest.ndim - 1], m, buffer + at);
  });
  return buffer;
}

// noise(first, n): a tile of z.
template <class T, class Noise>
FS_INLINE void reduce(const ReduceArgs& p, int64_t begin, int64_t end, Noise noise) {
  using A = typename Compute<T>::type;
  alignas(64) A buffer[kTile];
  const auto sigma_of = [&](int64_t b) { return p.sigma_each ? static_cast<const A*>(p.sigma_each)[b] : static_cast<A>(p.sigma); };
  if (p.per_sample <= kTile) {   // a task is a sample; as many as fit share a tile of noise
    const int64_t fit = kTile / p.per_sample;
    for (int64_t b = begin; b < end; b += fit) {
      const int64_t m = end - b < fit ? end - b : fit, first = b * p.per_sample, n = m * p.per_sample;
      const auto* z = noise(first, n);
      const A* s = tile_of<T, A>(p.score, p, buffer, first, n);
      for (int64_t j = 0; j < m; ++j)
        p.partial[b + j] = reduce_row(s + j * p.per_sample, z + j * p.per_sample, sigma_of(b + j), p.mode, p.per_sample);
    }
    return;
  }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.chunks, from = task % p.chunks * kChunk;
    const int64_t to = from + kChunk < p.per_sample ? from + kChunk : p.per_sample;
    double total = 0;
    for (int64_t i = from; i < to; i += kTile) {
      const int64_t first = b * p.per_sample + i, n = to - i < kTile ? to - i : kTile;
      const auto* z = noise(first, n);
      total += reduce_row(tile_of<T, A>(p.score, p, buffer, first, n), z, sigma_of(b), p.mode, n);
    }
    p.partial[task] = total;
  }
}

template <class T>
void run(const ReduceArgs& p, int64_t begin, int64_t end) {
  using A = typename Compute<T>::type;
  if (p.noise) {
    alignas(64) A given[kTile];
    reduce<T>(p, begin, end, [&](int64_t first, int64_t n) FS_LAMBDA { return tile_of<T, A>(p.noise, p, given, first, n); });
  } else {
    alignas(64) float drawn[kTile + 2 * kGroup];
    reduce<T>(p, begin, end, [&](int64_t first, int64_t n) FS_LAMBDA {
      return tile_normals(drawn, p.key.offset + static_cast<uint64_t>(first), n, p.key);
    });
  }
}

}  // namespace

void FS_KERNEL(noise_reduce)(const ReduceArgs& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto element) { run<decltype(element)>(p, begin, end); });
}

}  // namespace fastscore

#if defined(FASTSCORE_REGISTER)
#include <vector>

#include "arguments.h"
#include "torch_cpu.h"

namespace fastscore {

void launch(ReduceArgs& p, int64_t batch, void* out) {
  std::vector<double> totals(batch, 0.0), partial;
  if (p.per_sample > 0) {
    p.chunks = p.per_sample <= kTile ? 1 : (p.per_sample + kChunk - 1) / kChunk;
    partial.resize(batch * p.chunks);
    p.partial = partial.data();
    const auto kernel = FS_PICK(noise_reduce);
    const int64_t grain = p.per_sample <= kTile ? (kChunk + p.per_sample - 1) / p.per_sample : 1;
    torch::stable::parallel_for(0, batch * p.chunks, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    for (int64_t i = 0; i < batch * p.chunks; ++i) totals[i / p.chunks] += partial[i];
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (p.dtype == kFloat64) static_cast<double*>(out)[b] = totals[b];
    else static_cast<float*>(out)[b] = static_cast<float>(totals[b]);
  }
}

namespace {

// out (B,) in the compute dtype.
void noise_reduce(Tensor out, Tensor score, OptionalTensor sigma_each, double sigma, OptionalTensor key, int64_t seed,
                  int64_t step, int64_t stream, int64_t offset, int64_t mode) {
  check_reduce(Checks{"noise_reduce"}, out, score, sigma_each, key, stream, offset, mode);
  const int64_t batch = score.size(0);
  if (batch == 0) return;

  ReduceArgs p{};
  p.dtype = dtype_of(score);
  p.score = score.const_data_ptr();
  p.per_sample = score.numel() / batch;
  p.sigma = sigma;
  coefficient(sigma_each, p.sigma, p.sigma_each, p.dtype);
  p.mode = static_cast<ReduceMode>(mode);
  p.key = noise_key(key, seed, step, stream, offset);
  if (p.per_sample > 0) p.nest = nest_of(score, std::nullopt, std::nullopt);
  launch(p, batch, out.mutable_data_ptr());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastscore, m) {
  m.def("noise_reduce(Tensor(a!) out, Tensor score, Tensor? sigma_each, float sigma, Tensor? key, int seed, int step, int stream, "
        "int offset, int reduction) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("noise_reduce", TORCH_BOX(&noise_reduce)); }

}  // namespace fastscore
#endif
