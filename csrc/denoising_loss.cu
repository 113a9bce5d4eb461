// Sums over a sample that involve its noise. Bytes per element: one read of the score; nothing is written but (B,) numbers.
#include "arguments.h"
#include "torch_cuda.h"

namespace fastscore {
namespace {

template <class T>
struct Reduce {
  using A = typename ComputeType<T>::type;
  A* out;            // (samples), written where a sample has one split
  double* partial;   // (samples, splits) where it has more
  const T* score;
  Coefficient<A> sigma;
  int64_t samples, splits, per_sample, per_split;   // per_split: elements, a multiple of 8
  DeviceKey key;
};

// Of the sum that is halved at its end: (sigma s + z)^2; or s z.
template <ReduceMode kMode, class A>
__device__ __forceinline__ A added(A sum, A s, A sigma, float z) {
  if (kMode == kDot) return fma(s, static_cast<A>(z), sum);
  const A t = fma(sigma, s, static_cast<A>(z));
  return fma(t, t, sum);
}

// The four elements of a block that lie in [from, to). In turn, for four copies of `position` side by side need more registers than a target
// gives them: sm_100 kept a number in local memory. What is chosen from z by comparisons stays in registers.
template <class T, ReduceMode kMode>
__device__ __forceinline__ typename Reduce<T>::A strided_block(const Reduce<T>& p, const Nest& nest, const NoiseKey& key, uint64_t block,
                                                               int64_t from, int64_t to, typename Reduce<T>::A sigma,
                                                               typename Reduce<T>::A sum) {
  float z[4];
  block_normals(block, key, z);
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {
    const int64_t element = static_cast<int64_t>(block * 4 + k - key.offset);
    if (element < from || element >= to) continue;
    const float normal = k < 2 ? (k == 0 ? z[0] : z[1]) : (k == 2 ? z[2] : z[3]);
    sum = added<kMode>(sum, widen(p.score[nest.contiguous ? element : position(nest, 0, element)]), sigma, normal);
  }
  return sum;
}

// How a split is read: element by element; by packs, 64 bytes of a thread in flight; by packs whose blocks may cross 2^32.
enum Reading : int { kStrided, kPacked, kCrossing };

// Packs [begin, end) of a sample, by kGroup threads in turn.
template <class T, ReduceMode kMode, bool kCrosses, int kGroup>
__device__ __forceinline__ typename Reduce<T>::A packed_split(const T* score, const NoiseKey& key, uint64_t block, int packs, int lane,
                                                              typename Reduce<T>::A sigma) {
  constexpr int kSize = Pack<T>::kSize, kLoads = kInFlight<T>;
  const PhiloxTile words(static_cast<uint32_t>(block >> 32), key.step, key.stream, round_keys(key.k0, key.k1));
  typename Reduce<T>::A sum = 0;
  for (int i = lane; i < packs; i += kLoads * kGroup) {
    Pack<T> s[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      if (i + j * kGroup < packs) s[j] = load_pack(score + (i + j * kGroup) * kSize);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (i + j * kGroup >= packs) break;
#pragma unroll
      for (int k = 0; k < kSize; k += 4) {
        const uint32_t at = (i + j * kGroup) * (kSize / 4) + k / 4;
        const Words w = kCrosses ? philox(block + at, key) : words(static_cast<uint32_t>(block) + at);
#pragma unroll
        for (int l = 0; l < 4; l += 2) {
          const float2 z = box_muller(w.w[l], w.w[l + 1]);
          sum = added<kMode>(added<kMode>(sum, widen(s[j].v[k + l]), sigma, z.x), widen(s[j].v[k + l + 1]), sigma, z.y);
        }
      }
    }
  }
  return sum;
}

// The sum over a group of threads, in its first one.
template <int kGroup>
__device__ __forceinline__ double group_sum(double total) {
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
  return total;
}

// kGroup threads share a split: one thread for tiny samples, a warp for small ones, a block for the rest.
template <class T, ReduceMode kMode, Reading kReading, int kGroup>
__global__ void __launch_bounds__(kThreads) reduce_samples(const Reduce<T> p, const Nest nest) {
  using A = typename Reduce<T>::A;
  const NoiseKey key = p.key.load();
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
  const int lane = threadIdx.x % kGroup;
  double total = 0;
  if (task < p.samples * p.splits) {
    const int64_t sample = p.splits == 1 ? task : task / p.splits, begin = (task - sample * p.splits) * p.per_split;
    const int64_t end = begin + p.per_split < p.per_sample ? begin + p.per_split : p.per_sample;
    const A sigma = p.sigma.at(sample);
    A sum = 0;
    if constexpr (kReading != kStrided) {
      const int64_t first = sample * p.per_sample + begin;
      sum = packed_split<T, kMode, kReading == kCrossing, kGroup>(p.score + first, key, (key.offset + first) / 4,
                                                                  static_cast<int>((end - begin) / Pack<T>::kSize), lane, sigma);
    } else {
      const int64_t from = sample * p.per_sample + begin, to = sample * p.per_sample + end;
      const uint64_t last = (key.offset + to - 1) / 4;
      for (uint64_t block = (key.offset + from) / 4 + lane; block <= last; block += kGroup)
        sum = strided_block<T, kMode>(p, nest, key, block, from, to, sigma, sum);
    }
    total = static_cast<double>(sum) * (kMode == kDot ? 1.0 : 0.5);
  }
  total = group_sum<kGroup>(total);
  if (lane != 0 || task >= p.samples * p.splits) return;
  if (p.splits == 1) p.out[task] = static_cast<A>(total);
  else p.partial[task] = total;
}

// kGroup threads per sample, in an order that depends on the number of splits alone.
template <class A, int kGroup>
__global__ void __launch_bounds__(kThreads) sum_splits(const double* partial, A* out, int64_t samples, int64_t splits) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
  double total = 0;
  if (b < samples)
    for (int64_t i = threadIdx.x % kGroup; i < splits; i += kGroup) total += partial[b * splits + i];
  total = group_sum<kGroup>(total);
  if (b < samples && threadIdx.x % kGroup == 0) out[b] = static_cast<A>(total);
}

template <class T, ReduceMode kMode, Reading kReading>
void launch(const Reduce<T>& p, const Nest& nest, cudaStream_t stream) {
  const int64_t tasks = p.samples * p.splits;
  if (p.per_sample <= kOfThread) reduce_samples<T, kMode, kReading, 1><<<blocks_for(tasks, kThreads), kThreads, 0, stream>>>(p, nest);
  else if (p.per_sample <= kOfWarp) reduce_samples<T, kMode, kReading, 32><<<blocks_for(tasks, kThreads / 32), kThreads, 0, stream>>>(p, nest);
  else reduce_samples<T, kMode, kReading, kThreads><<<blocks_for(tasks, 1), kThreads, 0, stream>>>(p, nest);
  using A = typename Reduce<T>::A;
  if (p.splits > kSplitsOfWarp) sum_splits<A, kThreads><<<blocks_for(p.samples, 1), kThreads, 0, stream>>>(p.partial, p.out, p.samples, p.splits);
  else if (p.splits > 1) sum_splits<A, 32><<<blocks_for(p.samples, kThreads / 32), kThreads, 0, stream>>>(p.partial, p.out, p.samples, p.splits);
}

template <class T, ReduceMode kMode>
void launch(const Reduce<T>& p, const Nest& nest, Reading reading, cudaStream_t stream) {
  if (reading == kPacked) launch<T, kMode, kPacked>(p, nest, stream);
  else if (reading == kCrossing) launch<T, kMode, kCrossing>(p, nest, stream);
  else launch<T, kMode, kStrided>(p, nest, stream);
}

// How the score is read.
template <class T>
void launch(Reduce<T> p, ReduceMode mode, const Nest& nest, cudaStream_t stream) {
  const uint64_t offset = p.key.key.offset, first = offset / 4, last = first + static_cast<uint64_t>(p.samples * p.per_sample) / 4;
  const bool packed = nest.contiguous && aligned(p.score) && offset % 4 == 0 && p.per_sample % Pack<T>::kSize == 0;
  const Reading reading = !packed ? kStrided : first >> 32 == last >> 32 ? kPacked : kCrossing;
  if (mode == kDot) launch<T, kDot>(p, nest, reading, stream);
  else launch<T, kLoss>(p, nest, reading, stream);
}

int64_t splits_of(int64_t per_sample) { return per_sample <= kChunk ? 1 : (per_sample + kChunk - 1) / kChunk; }

void noise_reduce_cuda(Tensor out, Tensor score, OptionalTensor sigma_each, double sigma, OptionalTensor key, int64_t seed,
                       int64_t step, int64_t stream, int64_t offset, int64_t reduction) {
  const Checks check{"noise_reduce"};
  check_reduce(check, out, score, sigma_each, key, stream, offset, reduction);
  check_devices(check, {"score", score}, {{"out", out}, {"sigma_each", sigma_each}, {"key", key}});
  const int64_t batch = out.numel();
  if (batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(score.get_device_index());
  if (score.numel() == 0) {
    torch::stable::zero_(out);
    return;
  }
  const int64_t per_sample = score.numel() / batch, splits = splits_of(per_sample);
  const int64_t partials = splits > 1 ? batch * splits : 0;   // nothing is allocated for none
  const Tensor partial = torch::stable::new_empty(out, {partials}, torch::headeronly::ScalarType::Double);
  const cudaStream_t queue = current_stream(score);
  with_dtype(dtype_of(score), [&](auto element) {
    using T = decltype(element);
    using A = typename Reduce<T>::A;
    const Reduce<T> p{static_cast<A*>(out.mutable_data_ptr()),
                      static_cast<double*>(partial.mutable_data_ptr()),
                      static_cast<const T*>(score.const_data_ptr()),
                      device_coefficient<A>(sigma_each, sigma),
                      batch, splits, per_sample, splits == 1 ? per_sample : kChunk,
                      device_key(key, seed, step, stream, offset)};
    launch(p, static_cast<ReduceMode>(reduction), nest_of(score, std::nullopt, std::nullopt), queue);
  });
  check_launch("noise_reduce");
}

bool noise_reduce_direct(const DLTensor& out, DType dtype, const DLTensor& score, const DirectCoefficient& sigma, const NoiseKey& key,
                         int reduction) {
  int64_t per_sample = 1;
  for (int32_t d = 1; d < score.ndim; ++d) per_sample *= score.shape[d];
  if (splits_of(per_sample) > 1) return false;
  const torch::stable::accelerator::DeviceGuard guard(device_of(score));
  const int64_t* strides[kMaxTensors] = {score.strides, nullptr, nullptr};
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = typename Reduce<T>::A;
    const Reduce<T> p{reinterpret_cast<A*>(data_of(out)),
                      nullptr,
                      reinterpret_cast<const T*>(data_of(score)),
                      device_coefficient<A>(sigma),
                      score.shape[0], 1, per_sample, per_sample,
                      {key, nullptr}};
    launch(p, static_cast<ReduceMode>(reduction), nest_of(score.ndim, score.shape, strides), current_stream(device_of(score)));
  });
  check_launch("noise_reduce");
  return true;
}

const bool entered = (cuda_launches.noise_reduce = &noise_reduce_direct);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) { m.impl("noise_reduce", TORCH_BOX(&noise_reduce_cuda)); }

}  // namespace fastscore
