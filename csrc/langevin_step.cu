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

template <class A>
__device__ __forceinline__ A updated(A x, A a, A d, A b, float z) { return (x + a * d) + b * static_cast<A>(z); }

// Contiguous tensors on 16-byte addresses whose element 0 opens a Philox block; a pack lies in one sample.
template <class T, bool kEach>
__global__ void __launch_bounds__(kThreads) update_packs(const Update<T> p) {
  using A = typename Update<T>::A;
  constexpr int kSize = Pack<T>::kSize, kPacks = 8 / kSize;
  const int64_t start = (static_cast<int64_t>(blockIdx.x) * (kPacks * kThreads) + threadIdx.x) * kSize;
  Pack<T> x[kPacks], d[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int64_t at = start + j * kThreads * kSize;
    x[j] = d[j] = Pack<T>{};
    if (p.x && at < p.n) x[j] = load_pack(p.x + at);
    if (p.d && at < p.n) d[j] = load_pack(p.d + at);
  }
  const NoiseKey key = p.key.load();
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int64_t at = start + j * kThreads * kSize;
    if (at >= p.n) return;
    const int64_t sample = kEach ? sample_of(at, p.per_sample) : 0;
    const A a = p.drift.at(sample), b = p.diffusion.at(sample);
    Pack<T> out;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      float z[4];
      block_normals((key.offset + at + i) / 4, key, z);
#pragma unroll
      for (int k = 0; k < 4; ++k) narrow(updated(widen(x[j].v[i + k]), a, widen(d[j].v[i + k]), b, z[k]), out.v[i + k]);
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
  for (int k = 0; k < 4; ++k) {
    const int64_t i = base + k;
    if (i < first || i >= p.n) continue;
    const int64_t sample = sample_of(i, p.per_sample);
    const A x = p.x ? widen(p.x[position(nest, 1, i)]) : A(0), d = p.d ? widen(p.d[position(nest, 2, i)]) : A(0);
    narrow(updated(x, p.drift.at(sample), d, p.diffusion.at(sample), z[k]), p.out[position(nest, 0, i)]);
  }
}

template <class T>
void launch(const Update<T>& p, const Nest& nest, cudaStream_t stream) {
  constexpr int kSize = Pack<T>::kSize;
  const bool each = p.drift.per_sample || p.diffusion.per_sample;
  const bool packed = nest.contiguous && aligned(p.out) && aligned(p.x) && aligned(p.d) && p.key.key.offset % 4 == 0 &&
                      (!each || p.per_sample % kSize == 0);
  Update<T> whole = p;
  whole.n = packed ? p.n - p.n % kSize : 0;
  if (whole.n > 0) {
    const unsigned blocks = blocks_for(whole.n, 8 * kThreads);
    if (each) update_packs<T, true><<<blocks, kThreads, 0, stream>>>(whole);
    else update_packs<T, false><<<blocks, kThreads, 0, stream>>>(whole);
  }
  if (whole.n < p.n) update_strided<T><<<blocks_for(p.n - whole.n + 4, 4 * kThreads), kThreads, 0, stream>>>(p, nest, whole.n);
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
