// x' = x + a d + b z. Bytes per element: read x and d, write x': three times the element size; nothing else moves.
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

// Whole tiles of contiguous tensors on 16-byte addresses whose element 0 opens a Philox block. No tile crosses 2^32 blocks, so that the
// upper half of the counter is one number in it.
constexpr int kPackThreads = 128, kPacks = 4;   // four packs per thread: 16 elements, 32 of a 16-bit type
template <class T> constexpr int kPackTile = kPackThreads * kPacks * Pack<T>::kSize;
enum Terms : int { kXOnly = 1, kDOnly = 2, kBoth = 3 };
enum Scalars : int { kNumbers, kTensors, kEach };   // key and coefficients: kernel arguments; on the device; those of one sample per pack

// x + a d + b z of four elements: b goes to the radii.
template <int kTerms, class T>
__device__ __forceinline__ void update_block(const Words& w, float a, float b, const T* x, const T* d, T* out) {
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const Polar p = polar(w.w[k], w.w[k + 1]);
    const float r = b * p.radius;
    float even = 0, odd = 0;
    if (kTerms == kXOnly) even = widen(x[k]), odd = widen(x[k + 1]);
    if (kTerms == kDOnly) even = a * widen(d[k]), odd = a * widen(d[k + 1]);
    if (kTerms == kBoth) even = fmaf(a, widen(d[k]), widen(x[k])), odd = fmaf(a, widen(d[k + 1]), widen(x[k + 1]));
    narrow(fmaf(r, p.cosine, even), out[k]);
    narrow(fmaf(r, p.sine, odd), out[k + 1]);
  }
}

template <int kTerms>
__device__ __forceinline__ void update_block(const Words& w, double a, double b, const double* x, const double* d, double* out) {
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const float2 z = box_muller(w.w[k], w.w[k + 1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      double v = b * (i ? z.y : z.x);
      if (kTerms & kXOnly) v += x[k + i];
      if (kTerms & kDOnly) v += a * d[k + i];
      out[k + i] = v;
    }
  }
}

template <class T, int kTerms, int kScalars>
__global__ void __launch_bounds__(kPackThreads) update_packs(const Update<T> p, const RoundKeys round_keys_of_numbers) {
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
  const RoundKeys keys = kScalars == kNumbers ? round_keys_of_numbers : round_keys(key.k0, key.k1);
  const A a0 = kScalars == kNumbers ? p.drift.number : p.drift.at(0), b0 = kScalars == kNumbers ? p.diffusion.number : p.diffusion.at(0);
  const uint64_t tile = key.offset / 4 + static_cast<uint64_t>(blockIdx.x) * (kPackTile<T> / 4);
  const PhiloxTile words(static_cast<uint32_t>(tile >> 32), key.step, key.stream, keys);
  const uint32_t first = static_cast<uint32_t>(tile) + threadIdx.x * (kSize / 4);
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int64_t at = start + j * kStride, sample = kScalars == kEach ? sample_of(at, p.per_sample) : 0;
    const A a = kScalars == kEach ? p.drift.at(sample) : a0, b = kScalars == kEach ? p.diffusion.at(sample) : b0;
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
  float z[4];
  block_normals(block, key, z);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t i = base + k;
    if (i < first || i >= p.n) continue;
    const int64_t sample = sample_of(i, p.per_sample);
    const A x = p.x ? widen(p.x[position(nest, 1, i)]) : A(0), d = p.d ? widen(p.d[position(nest, 2, i)]) : A(0);
    narrow((x + p.drift.at(sample) * d) + p.diffusion.at(sample) * static_cast<A>(z[k]), p.out[position(nest, 0, i)]);
  }
}

template <class T, int kTerms>
void launch_packs(const Update<T>& p, int64_t tiles, bool each, cudaStream_t stream) {
  const unsigned blocks = blocks_for(tiles, 1);
  const RoundKeys keys = round_keys(p.key.key.k0, p.key.key.k1);
  if (each) update_packs<T, kTerms, kEach><<<blocks, kPackThreads, 0, stream>>>(p, keys);
  else if (p.key.tensor || p.drift.each || p.diffusion.each) update_packs<T, kTerms, kTensors><<<blocks, kPackThreads, 0, stream>>>(p, keys);
  else update_packs<T, kTerms, kNumbers><<<blocks, kPackThreads, 0, stream>>>(p, keys);
}

// Whether a tile of the Philox blocks of n elements holds a multiple of 2^32 inside.
template <class T>
bool crosses(uint64_t offset, int64_t n) {
  const uint64_t first = offset / 4;
  return first % (kPackTile<T> / 4) != 0 && first >> 32 != (first + static_cast<uint64_t>(n) / 4) >> 32;
}

// Whole tiles by packs where the layout allows, the rest (or all) by the strided kernel.
template <class T>
void launch(const Update<T>& p, const Nest& nest, cudaStream_t stream) {
  const bool each = p.drift.per_sample || p.diffusion.per_sample;
  const bool packed = nest.contiguous && (p.x || p.d) && aligned(p.out) && aligned(p.x) && aligned(p.d) && p.key.key.offset % 4 == 0 &&
                      !crosses<T>(p.key.key.offset, p.n) && (!each || p.per_sample % Pack<T>::kSize == 0);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) { m.impl("noisy_update", TORCH_BOX(&noisy_update_cuda)); }

}  // namespace fastscore
