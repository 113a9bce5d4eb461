// x' = x + a d + b z. Bytes per element: read x and d, write x': three times the element size; nothing else moves.
#include "arguments.h"
#include "torch_cuda.h"

namespace fastscore {
namespace {

template <class T>
struct Update {
  using A = typename ComputeType<T>::type;
  T* out;
  const T *x, *d;   // null: no such term
  Coefficient<A> drift, diffusion;
  int64_t n, per_sample;
  DeviceKey key;
};

// Division of a number below 2^31 by a divisor in [2, 2^31), as a product: with l = ceil(log2 divisor), multiplier = floor(2^(31 + l) /
// divisor) + 1 is at most divisor / 2^(31 + l) too large relative to the quotient's own, which a number below 2^31 does not notice.
struct Divisor {
  uint32_t multiplier, shift;

  __device__ __forceinline__ uint32_t quotient(uint32_t n) const { return __umulhi(n, multiplier) >> shift; }
};

inline Divisor divisor_of(uint32_t d) {
  uint32_t l = 1;
  while ((uint64_t{1} << l) < d) ++l;
  return {static_cast<uint32_t>((uint64_t{1} << (31 + l)) / d + 1), l - 1};
}

// A coefficient of a sample; what is one for all of them is read with a stride of zero.
template <class A>
struct EachSample {
  const char* first;   // null: the number
  A number;
  uint32_t stride;

  template <bool kMayBeNumber>
  __device__ __forceinline__ A at(uint32_t sample) const {
    if (kMayBeNumber && !first) return number;
    return *reinterpret_cast<const A*>(first + static_cast<uint64_t>(sample) * stride);
  }
};

template <class A>
EachSample<A> each_sample(const Coefficient<A>& c) {
  return {reinterpret_cast<const char*>(c.each), c.number, c.per_sample ? static_cast<uint32_t>(sizeof(A)) : 0u};
}

// What a launch adds to its update: the round keys of a key of numbers; how a pack finds its sample.
template <class A>
struct Extra {
  RoundKeys keys;
  EachSample<A> drift, diffusion;
  Divisor per_sample;
};

// Whole tiles of contiguous tensors on 16-byte addresses whose element 0 opens a Philox block. No tile crosses 2^32 blocks, so that the
// upper half of the counter is one number in it.

enum Terms : int { kXOnly = 1, kDOnly = 2, kBoth = 3 };
// Key and coefficients: kernel arguments; on the device; those of one sample per pack, all of them tensors; or one of them a number.
enum Scalars : int { kNumbers, kTensors, kEach, kMixed };

// x + a d + b z, with b in the radius: one formula for packs and for strided elements, so that no bit depends on how a batch is split.
// A term that is not there is a zero: fma(a, 0, x) is x, fma(a, d, 0) is a d.
struct Noise { float radius, direction; };

__device__ __forceinline__ void noise_of(const Words& w, Noise* z) {
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const Polar p = polar(w.w[k], w.w[k + 1]);
    z[k] = {p.radius, p.cosine}, z[k + 1] = {p.radius, p.sine};
  }
}

template <int kTerms>
__device__ __forceinline__ float updated(float a, float b, float x, float d, Noise z) {
  return fmaf(b * z.radius, z.direction, kTerms == kBoth ? fmaf(a, d, x) : kTerms == kDOnly ? a * d : x);
}

template <int kTerms>
__device__ __forceinline__ double updated(double a, double b, double x, double d, Noise z) {
  return fma(b, static_cast<double>(z.radius * z.direction), kTerms == kBoth ? fma(a, d, x) : kTerms == kDOnly ? a * d : x);
}

template <int kTerms, class A, class T>
__device__ __forceinline__ void update_block(const Words& w, A a, A b, const T* x, const T* d, T* out) {
  Noise z[4];
  noise_of(w, z);
#pragma unroll
  for (int k = 0; k < 4; ++k) narrow(updated<kTerms>(a, b, kTerms & kXOnly ? widen(x[k]) : A(0), kTerms & kDOnly ? widen(d[k]) : A(0), z[k]), out[k]);
}

template <class T, int kTerms, int kScalars>
__global__ void __launch_bounds__(kPackThreads) update_packs(const Update<T> p, const Extra<typename Update<T>::A> extra) {
  using A = typename Update<T>::A;
  constexpr int kSize = Pack<T>::kSize, kStride = kPackThreads * kSize;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kPackTile<T> + threadIdx.x * kSize;
  Pack<T> x[kPacks] = {}, d[kPacks] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    if (kTerms & kXOnly) x[j] = load_pack(p.x + start + j * kStride);
    if (kTerms & kDOnly) d[j] = load_pack(p.d + start + j * kStride);
  }
  const NoiseKey key = kScalars == kNumbers ? p.key.key : p.key.load();
  const RoundKeys keys = kScalars == kNumbers ? extra.keys : round_keys(key.k0, key.k1);
  const A a0 = kScalars == kTensors ? p.drift.at(0) : p.drift.number, b0 = kScalars == kTensors ? p.diffusion.at(0) : p.diffusion.number;
  const uint64_t tile = key.offset / 4 + static_cast<uint64_t>(blockIdx.x) * (kPackTile<T> / 4);
  const PhiloxTile words(static_cast<uint32_t>(tile >> 32), key.step, key.stream, keys);
  const uint32_t first = static_cast<uint32_t>(tile) + threadIdx.x * (kSize / 4);
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int64_t at = start + j * kStride;
    A a = a0, b = b0;
    if constexpr (kScalars == kEach || kScalars == kMixed) {
      const uint32_t sample = extra.per_sample.quotient(static_cast<uint32_t>(at));   // n is below 2^31 there
      if (kTerms & kDOnly) a = extra.drift.template at<kScalars == kMixed>(sample);
      b = extra.diffusion.template at<kScalars == kMixed>(sample);
    }
    Pack<T> out;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      update_block<kTerms>(words(first + (j * kStride + i) / 4), a, b, x[j].v + i, d[j].v + i, out.v + i);
    }
    store_pack(p.out + at, out);
  }
}

// Any strides and offsets, from element `first` on: one thread per Philox block.
template <class T>
__global__ void __launch_bounds__(kThreads) update_strided(const Update<T> p, const Nest nest, int64_t first) {
  using A = typename Update<T>::A;
  const NoiseKey key = p.key.load();
  const int64_t block = static_cast<int64_t>((key.offset + first) / 4) + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t base = block * 4 - static_cast<int64_t>(key.offset);   // may lie before `first`
  if (base >= p.n) return;
  Noise z[4];
  noise_of(philox(block, key), z);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t i = base + k;
    if (i < first || i >= p.n) continue;
    const int64_t sample = sample_of(i, p.per_sample);
    const A x = p.x ? widen(p.x[position(nest, 1, i)]) : A(0), d = p.d ? widen(p.d[position(nest, 2, i)]) : A(0);
    narrow(updated<kBoth>(p.drift.at(sample), p.diffusion.at(sample), x, d, z[k]), p.out[position(nest, 0, i)]);
  }
}

template <class T, int kTerms>
void launch_packs(const Update<T>& p, int64_t tiles, bool each, cudaStream_t stream) {
  const unsigned blocks = blocks_for(tiles, 1);
  const Extra<typename Update<T>::A> extra{round_keys(p.key.key.k0, p.key.key.k1), each_sample(p.drift), each_sample(p.diffusion),
                                           each ? divisor_of(static_cast<uint32_t>(p.per_sample)) : Divisor{}};
  const bool tensors = p.diffusion.each && (p.drift.each || !(kTerms & kDOnly));
  if (each && tensors) update_packs<T, kTerms, kEach><<<blocks, kPackThreads, 0, stream>>>(p, extra);
  else if (each) update_packs<T, kTerms, kMixed><<<blocks, kPackThreads, 0, stream>>>(p, extra);
  else if (p.key.tensor || p.drift.each || p.diffusion.each) update_packs<T, kTerms, kTensors><<<blocks, kPackThreads, 0, stream>>>(p, extra);
  else update_packs<T, kTerms, kNumbers><<<blocks, kPackThreads, 0, stream>>>(p, extra);
}

// Whether a tile of the Philox blocks of n elements holds a multiple of 2^32 inside.
template <class T>
bool crosses(uint64_t offset, int64_t n) {
  const uint64_t first = offset / 4;
  return first % (kPackTile<T> / 4) != 0 && first >> 32 != (first + static_cast<uint64_t>(n) / 4) >> 32;
}

constexpr int64_t kFewer = int64_t{1} << 31;

// Samples [begin, end) of contiguous tensors.
template <class T>
Update<T> part_of(const Update<T>& p, int64_t begin, int64_t end) {
  const int64_t first = begin * p.per_sample;
  Update<T> part = p;
  part.out += first, part.x += p.x ? first : 0, part.d += p.d ? first : 0;
  part.drift.each += p.drift.per_sample ? begin : 0, part.diffusion.each += p.diffusion.per_sample ? begin : 0;
  part.n = (end - begin) * p.per_sample, part.key.key.offset += first;
  return part;
}

// Whole tiles by packs where the layout allows, the rest (or all) by the strided kernel.
template <class T>
void launch(const Update<T>& p, const Nest& nest, cudaStream_t stream) {
  const bool each = p.drift.per_sample || p.diffusion.per_sample;
  const bool packed = nest.contiguous && (p.x || p.d) && aligned(p.out) && aligned(p.x) && aligned(p.d) && p.key.key.offset % 4 == 0 &&
                      !crosses<T>(p.key.key.offset, p.n) && (!each || (p.per_sample % Pack<T>::kSize == 0 && p.per_sample < kFewer));
  if (packed && each && p.n >= kFewer) {   // a pack finds its sample among fewer than 2^31 elements
    const int64_t samples = p.n / p.per_sample, most = (kFewer - 1) / p.per_sample;
    for (int64_t begin = 0; begin < samples; begin += most) launch(part_of(p, begin, begin + most < samples ? begin + most : samples), nest, stream);
    return;
  }
  const int64_t tiles = packed ? p.n / kPackTile<T> : 0, done = tiles * kPackTile<T>;
  if (tiles > 0) {
    if (p.x && p.d) launch_packs<T, kBoth>(p, tiles, each, stream);
    else if (p.x) launch_packs<T, kXOnly>(p, tiles, each, stream);
    else launch_packs<T, kDOnly>(p, tiles, each, stream);
  }
  if (done < p.n) update_strided<T><<<blocks_for(p.n - done + 4, 4 * kThreads), kThreads, 0, stream>>>(p, nest, done);
}

void noisy_update_cuda(Tensor out, OptionalTensor x, OptionalTensor direction, OptionalTensor drift_each, double drift,
                       OptionalTensor diffusion_each, double diffusion, OptionalTensor key, int64_t seed, int64_t step,
                       int64_t stream, int64_t offset) {
  const Checks check{"noisy_update"};
  check_update(check, out, x, direction, drift_each, diffusion_each, key, stream, offset);
  check_devices(check, {"out", out},
                {{"x", x}, {"direction", direction}, {"drift_each", drift_each}, {"diffusion_each", diffusion_each}, {"key", key}});
  const int64_t n = out.numel();
  if (n == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  with_dtype(dtype_of(out), [&](auto element) {
    using T = decltype(element);
    using A = typename Update<T>::A;
    const Update<T> p{static_cast<T*>(out.mutable_data_ptr()),
                      static_cast<const T*>(pointer(x)),
                      static_cast<const T*>(pointer(direction)),
                      device_coefficient<A>(drift_each, drift),
                      device_coefficient<A>(diffusion_each, diffusion),
                      n,
                      out.dim() == 0 ? 1 : n / out.size(0),
                      device_key(key, seed, step, stream, offset)};
    launch(p, nest_of(out, x, direction), current_stream(out));
  });
  check_launch("noisy_update");
}

void noisy_update_direct(const DLTensor& out, DType dtype, const DLTensor* x, const DLTensor* direction, const DirectCoefficient& drift,
                         const DirectCoefficient& diffusion, const NoiseKey& key) {
  const torch::stable::accelerator::DeviceGuard guard(device_of(out));
  int64_t n = 1;
  for (int32_t d = 0; d < out.ndim; ++d) n *= out.shape[d];
  const int64_t* strides[kMaxTensors] = {out.strides, x ? x->strides : nullptr, direction ? direction->strides : nullptr};
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = typename Update<T>::A;
    const Update<T> p{reinterpret_cast<T*>(data_of(out)),
                      x ? reinterpret_cast<const T*>(data_of(*x)) : nullptr,
                      direction ? reinterpret_cast<const T*>(data_of(*direction)) : nullptr,
                      device_coefficient<A>(drift),
                      device_coefficient<A>(diffusion),
                      n,
                      out.ndim == 0 ? 1 : n / out.shape[0],
                      {key, nullptr}};
    launch(p, nest_of(out.ndim, out.shape, strides), current_stream(device_of(out)));
  });
  check_launch("noisy_update");
}

const bool entered = (cuda_launches.noisy_update = &noisy_update_direct);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) { m.impl("noisy_update", TORCH_BOX(&noisy_update_cuda)); }

}  // namespace fastscore
