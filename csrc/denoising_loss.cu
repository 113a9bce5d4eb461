// Sums over a sample that involve its noise. Bytes per element: one read of the score; nothing is written but (B,) numbers.
#include "denoising_loss.h"

#include "torch_cuda.h"

namespace fastscore {
namespace {

template <class T>
struct Reduce {
  using A = typename ComputeType<T>::type;
  double* partial;   // (samples, splits)
  const T* score;
  Coefficient<A> sigma;
  int64_t samples, splits, per_sample, per_split;   // per_split: elements, a multiple of 8
  DeviceKey key;
};

template <class A>
__device__ __forceinline__ A term(A s, A sigma, float z, ReduceMode mode) {
  if (mode == kDot) return s * static_cast<A>(z);
  const A t = sigma * s + static_cast<A>(z);
  return A(0.5) * t * t;
}

// The four elements of a block that lie in [begin, end) of the sample.
template <class T, ReduceMode kMode>
__device__ __forceinline__ typename Reduce<T>::A strided_block(const Reduce<T>& p, const Nest& nest, const NoiseKey& key, uint64_t block,
                                                               int64_t sample, int64_t begin, int64_t end, typename Reduce<T>::A sigma) {
  using A = typename Reduce<T>::A;
  float z[4];
  block_normals(block, key, z);
  A sum = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t i = static_cast<int64_t>(block * 4 + k - key.offset) - sample * p.per_sample;
    if (i < begin || i >= end) continue;
    const int64_t element = sample * p.per_sample + i;
    sum += term(widen(p.score[nest.contiguous ? element : position(nest, 0, element)]), sigma, z[k], kMode);
  }
  return sum;
}

// kGroup threads share a split: one thread for tiny samples, a warp for small ones, a block for the rest.
template <class T, ReduceMode kMode, bool kPacked, int kGroup>
__global__ void __launch_bounds__(kThreads) reduce_samples(const Reduce<T> p, const Nest nest) {
  using A = typename Reduce<T>::A;
  const NoiseKey key = p.key.load();
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
  const int lane = threadIdx.x % kGroup;
  double total = 0;
  if (task < p.samples * p.splits) {
    const int64_t sample = task / p.splits, begin = task % p.splits * p.per_split;
    const int64_t end = begin + p.per_split < p.per_sample ? begin + p.per_split : p.per_sample;
    const A sigma = p.sigma.at(sample);
    A sum = 0;
    if constexpr (kPacked) {
      constexpr int kSize = Pack<T>::kSize;
      for (int64_t i = begin + lane * kSize; i < end; i += kGroup * kSize) {
        const int64_t element = sample * p.per_sample + i;
        const Pack<T> s = load_pack(p.score + element);
#pragma unroll
        for (int j = 0; j < kSize; j += 4) {
          float z[4];
          block_normals((key.offset + element + j) / 4, key, z);
#pragma unroll
          for (int k = 0; k < 4; ++k) sum += term(widen(s.v[j + k]), sigma, z[k], kMode);
        }
      }
    } else {
      const uint64_t origin = key.offset + static_cast<uint64_t>(sample * p.per_sample);
      const uint64_t last = (origin + end - 1) / 4;
      for (uint64_t block = (origin + begin) / 4 + lane; block <= last; block += kGroup)
        sum += strided_block<T, kMode>(p, nest, key, block, sample, begin, end, sigma);
    }
    total = static_cast<double>(sum);
  }
  if constexpr (kGroup > 1) {
#pragma unroll
    for (int k = 16; k > 0; k /= 2) total += __shfl_down_sync(0xffffffffu, total, k);
  }
  if constexpr (kGroup == kThreads) {
    __shared__ double warps[kThreads / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
    __syncthreads();
    total = 0;
    if (threadIdx.x == 0)
      for (int i = 0; i < kThreads / 32; ++i) total += warps[i];
  }
  if (lane == 0 && task < p.samples * p.splits) p.partial[task] = total;
}

// In order, so the result depends on the shape alone.
template <class A>
__global__ void __launch_bounds__(kThreads) sum_splits(const double* partial, A* out, int64_t samples, int64_t splits) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= samples) return;
  double total = 0;
  for (int64_t i = 0; i < splits; ++i) total += partial[b * splits + i];
  out[b] = static_cast<A>(total);
}

template <class T, ReduceMode kMode, bool kPacked>
void launch(const Reduce<T>& p, const Nest& nest, cudaStream_t stream) {
  const int64_t tasks = p.samples * p.splits;
  if (p.per_sample <= 16) reduce_samples<T, kMode, kPacked, 1><<<blocks_for(tasks, kThreads), kThreads, 0, stream>>>(p, nest);
  else if (p.per_sample <= 2048) reduce_samples<T, kMode, kPacked, 32><<<blocks_for(tasks, kThreads / 32), kThreads, 0, stream>>>(p, nest);
  else reduce_samples<T, kMode, kPacked, kThreads><<<blocks_for(tasks, 1), kThreads, 0, stream>>>(p, nest);
}

void noise_reduce_cuda(Tensor out, Tensor score, OptionalTensor sigma_each, double sigma, OptionalTensor key, int64_t seed,
                       int64_t step, int64_t stream, int64_t offset, int64_t reduction) {
  const int64_t batch = out.numel();
  if (batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(score.get_device_index());
  if (score.numel() == 0) {
    torch::stable::zero_(out);
    return;
  }
  const int64_t per_sample = score.numel() / batch;
  const int64_t splits = per_sample <= kChunk ? 1 : (per_sample + kChunk - 1) / kChunk;
  const Tensor partial = torch::stable::new_empty(out, {batch * splits}, torch::headeronly::ScalarType::Double);
  const cudaStream_t queue = current_stream(score);
  with_dtype(dtype_of(score), [&](auto element) {
    using T = decltype(element);
    using A = typename Reduce<T>::A;
    const Nest nest = nest_of(score, std::nullopt, std::nullopt);
    const Reduce<T> p{static_cast<double*>(partial.mutable_data_ptr()),
                      static_cast<const T*>(score.const_data_ptr()),
                      device_coefficient<A>(sigma_each, sigma),
                      batch, splits, per_sample, splits == 1 ? per_sample : kChunk,
                      device_key(key, seed, step, stream, offset)};
    const bool packed = nest.contiguous && aligned(p.score) && offset % 4 == 0 && per_sample % Pack<T>::kSize == 0;
    if (reduction == kDot) packed ? launch<T, kDot, true>(p, nest, queue) : launch<T, kDot, false>(p, nest, queue);
    else packed ? launch<T, kLoss, true>(p, nest, queue) : launch<T, kLoss, false>(p, nest, queue);
    sum_splits<A><<<blocks_for(batch, kThreads), kThreads, 0, queue>>>(p.partial, static_cast<A*>(out.mutable_data_ptr()), batch, splits);
  });
  check_launch("noise_reduce");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) { m.impl("noise_reduce", TORCH_BOX(&noise_reduce_cuda)); }

}  // namespace fastscore
