// y = f(u) and the moments of rows that fit in the shared memory of a cluster of blocks; a row is a sample, or a group of its channels.
// Bytes per element in float32: 8, for x is read once. Other calls on a GPU run the Triton kernels.
#include <cooperative_groups.h>

#include <algorithm>

#include "activation_cuda.h"
#include "arguments.h"
#include "asked_once.h"
#include "torch_cuda.h"

namespace fastscore {
namespace {

// How a row lies in the blocks of its cluster. A piece is what one warp takes of a channel at once. All of this, and with it the order
// of every sum, depends on the row alone, never on the batch.
struct Cut {
  int rows_of_sample, channels, pixels;
  int parts, length;   // pieces of a channel; pixels of each but the last
  int pieces, stride;  // of a block, at most; bytes of a piece in its shared memory
  int blocks, bytes;   // of the cluster; of a block's shared memory

  __host__ __device__ int of_moments() const { return (pieces * 8 + 15) / 16 * 16; }
  __host__ __device__ int of_channels() const { return (channels + 3) / 4 * 16; }   // of one table
};

// Whether a row should be, and can be, so far as its size tells.
bool cut_row(int64_t channels, int64_t pixels, int64_t rows_of_sample, int64_t itemsize, Cut& cut) {
  if (pixels < kLeastOfChannel || channels * pixels <= kOfOneProgram || channels * pixels * itemsize > kMostBlocks * kMostShared) return false;
  const auto whole = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  const int64_t length = whole(whole(pixels, whole(pixels, kPiece)), 8) * 8, parts = whole(pixels, length);
  cut = {static_cast<int>(rows_of_sample), static_cast<int>(channels), static_cast<int>(pixels), static_cast<int>(parts),
         static_cast<int>(length), 0, static_cast<int>(length * itemsize), 1, 0};
  for (;; cut.blocks *= 2) {
    cut.pieces = static_cast<int>(whole(channels * parts, cut.blocks));
    const int64_t bytes = cut.of_moments() + int64_t{4} * cut.of_channels() + int64_t{cut.pieces} * cut.stride;
    cut.bytes = static_cast<int>(bytes);
    if (bytes <= kGoodShared || (cut.blocks == kMostBlocks && bytes <= kMostShared)) return true;
    if (cut.blocks == kMostBlocks) return false;
  }
}

// Statistics of channels that meet nowhere are those of rows of one channel, where a sample is too large.
bool cut_sample(int64_t C, int64_t pixels, int64_t groups, bool alpha, int64_t itemsize, Cut& cut) {
  if (groups) return cut_row(C / groups, pixels, groups, itemsize, cut);
  return cut_row(C, pixels, 1, itemsize, cut) || (!alpha && cut_row(1, pixels, C, itemsize, cut));
}

template <class T>
struct Rows {
  T* y;
  float* stats;           // (B, C, 2)
  const T* x;
  const float* coef;      // (coef_rows, K C)
  const int64_t* labels;  // (B,) or null
  int64_t coef_rows;
  Cut cut;
  int channels;           // of a sample
  bool grouped, alpha, beta;
  bool streamed;          // x exceeds the L2, and what is written must not take it from others
  float eps;
  int activation;
};

[[maybe_unused]] __device__ __forceinline__ float warp_sum(float v) {   // nobody sums below sm_90
#pragma unroll
  for (int k = 16; k > 0; k /= 2) v += __shfl_xor_sync(0xffffffffu, v, k);
  return v;
}

// Over a table of channels, by each warp for itself; with its rounding error put right.
template <class F>
__device__ __forceinline__ float mean_over(int n, F f) {
  const float share = 1.0f / static_cast<float>(n);
  const int lane = threadIdx.x % 32;
  float sum = 0, rest = 0;
#pragma unroll 1
  for (int c = lane; c < n; c += 32) sum += f(c);
  const float near = warp_sum(sum) * share;
#pragma unroll 1
  for (int c = lane; c < n; c += 32) rest += f(c) - near;
  return near + warp_sum(rest) * share;
}

// The elements of a lane in a piece: those of every 32nd pack, whether they are read as packs or one by one.
template <class T> constexpr int kPacksOfLane = kPiece / 32 / Pack<T>::kSize;

template <class T>
__device__ __forceinline__ int place(int pack) { return (pack * 32 + static_cast<int>(threadIdx.x % 32)) * Pack<T>::kSize; }

// A piece of n elements, zeros behind them.
template <class T, bool kPacked>
__device__ __forceinline__ void load_piece(const T* from, int n, Pack<T>* pack) {
#pragma unroll
  for (int j = 0; j < kPacksOfLane<T>; ++j) {
    const int at = place<T>(j);
    if constexpr (kPacked) {
      pack[j] = {};
      if (at < n) pack[j] = load_pack(from + at);
    } else {
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; ++k) narrow(at + k < n ? widen(from[at + k]) : 0.0f, pack[j].v[k]);
    }
  }
}

template <class T, bool kPacked>
__device__ __forceinline__ void store_piece(T* to, int n, const Pack<T>* pack, bool streamed) {
#pragma unroll
  for (int j = 0; j < kPacksOfLane<T>; ++j) {
    const int at = place<T>(j);
    if constexpr (kPacked) {
      if (at >= n) continue;
      if (streamed) __stcs(reinterpret_cast<uint4*>(to + at), *reinterpret_cast<const uint4*>(&pack[j]));
      else store_pack(to + at, pack[j]);
    } else {
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; ++k)
        if (at + k < n) to[at + k] = pack[j].v[k];
    }
  }
}

// Mean and variance of a piece, by two passes over what its warp holds. kMasked: some of that lies behind the piece's end, in packs
// of their own where the piece consists of whole ones.
template <class T, bool kPacked, bool kMasked>
__device__ __forceinline__ float2 moments(const Pack<T>* pack, int n) {
  const float share = 1.0f / static_cast<float>(n);
  float sum = 0, rest = 0, square = 0;
#pragma unroll
  for (int j = 0; j < kPacksOfLane<T>; ++j)
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) sum += widen(pack[j].v[k]);
  const float near = warp_sum(sum) * share;   // as good as a sum of large numbers is
#pragma unroll
  for (int j = 0; j < kPacksOfLane<T>; ++j)
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      const bool there = !kMasked || place<T>(j) + (kPacked ? 0 : k) < n;
      const float d = there ? widen(pack[j].v[k]) - near : 0.0f;
      rest += d;
      square = fmaf(d, d, square);
    }
  rest = warp_sum(rest) * share;
  return make_float2(near + rest, fmaf(-rest, rest, warp_sum(square) * share));
}

template <class T, int kKind>
__device__ __forceinline__ void apply(Pack<T>* pack, float mean, float scale, float shift) {
#pragma unroll
  for (int j = 0; j < kPacksOfLane<T>; ++j)
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) narrow(activated<kKind>(fmaf(scale, widen(pack[j].v[k]) - mean, shift)), pack[j].v[k]);
}

// Those of the channels in their tables, from those of the pieces, which lie in the blocks of the cluster (Chan et al. 1979).
template <class T, class Of>
__device__ __forceinline__ void merge(const Rows<T>& p, Of of, float* means, float* variances) {
  const Cut& cut = p.cut;
  int lanes = 1;   // that share a channel
  while (lanes < 32 && lanes < cut.parts) lanes *= 2;
  const int first = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const float share = 1.0f / static_cast<float>(cut.pixels);
  const auto weight = [&](int part) { return static_cast<float>(min(cut.length, cut.pixels - part * cut.length)) * share; };
  const auto sum = [&](float v) {
    for (int k = lanes / 2; k > 0; k /= 2) v += __shfl_xor_sync(0xffffffffu, v, k);
    return v;
  };
  for (int c0 = 0; c0 < cut.channels; c0 += kThreads / lanes) {
    const int c = c0 + first, parts = c < cut.channels ? cut.parts : 0;
    float near = 0, rest = 0, square = 0;
#pragma unroll 1
    for (int k = lane; k < parts; k += lanes) near = fmaf(weight(k), of(c * cut.parts + k).x, near);
    near = sum(near);
#pragma unroll 1
    for (int k = lane; k < parts; k += lanes) {
      const float2 m = of(c * cut.parts + k);
      const float d = m.x - near;
      rest = fmaf(weight(k), d, rest);
      square = fmaf(weight(k), fmaf(d, d, m.y), square);
    }
    rest = sum(rest);
    square = sum(square);
    if (parts && lane == 0) means[c] = near + rest, variances[c] = fmaf(-rest, rest, square);
  }
}

// u = scale (x - mean) + shift of every channel of the row, as in kernels/normalise_algebra.py.
template <class T>
__device__ __forceinline__ void between_channels(const Rows<T>& p, int64_t row, const float* means, const float* variances, float* scales,
                                                 float* shifts) {
  const int n = p.cut.channels, K = 1 + p.alpha + p.beta;
  const int64_t sample = row / p.cut.rows_of_sample;
  const int first = static_cast<int>(row - sample * p.cut.rows_of_sample) * n;   // of the row's channels
  const int64_t label = p.labels ? p.labels[sample] : p.coef_rows == 1 ? 0 : sample;
  const bool exists = label >= 0 && label < p.coef_rows;   // a kernel cannot raise, and must not read there
  const float* coef = p.coef + (exists ? label : 0) * K * p.channels + first;

  float centre = 0, r = 0, q = 0;
  if (p.grouped || p.alpha) centre = mean_over(n, [&](int c) { return means[c]; });
  if (p.grouped)
    r = rsqrtf(mean_over(n, [&](int c) { return fmaf(means[c] - centre, means[c] - centre, variances[c]); }) + p.eps);
  if (p.alpha) {
    const float unbiased = static_cast<float>(n) / static_cast<float>(n > 1 ? n - 1 : 1);
    q = rsqrtf(fmaf(mean_over(n, [&](int c) { return (means[c] - centre) * (means[c] - centre); }), unbiased, p.eps));
  }
#pragma unroll 1
  for (int c = threadIdx.x; c < n; c += kThreads) {
    if (!p.grouped) r = rsqrtf(variances[c] + p.eps);
    const float gamma = exists ? coef[c] : __int_as_float(0x7fc00000);
    float shift = p.grouped ? r * (means[c] - centre) : 0.0f;
    float nothing = gamma * 0.0f;   // not a number where a coefficient is none: such a channel is all NaN
    if (p.alpha) {
      const float alpha = coef[p.channels + c];
      shift = fmaf(alpha, (means[c] - centre) * q, shift);
      nothing += alpha * 0.0f;
    }
    shift *= gamma;
    if (p.beta) {
      const float beta = coef[(K - 1) * p.channels + c];
      shift += beta;
      nothing += beta * 0.0f;
    }
    scales[c] = fmaf(gamma, r, nothing);
    shifts[c] = shift + nothing;
  }
}

// A cluster takes a row, a block a part of it that stays in its shared memory, a warp one piece after the other.
template <class T, bool kPacked>
__global__ void __launch_bounds__(kThreads, 3) normalise_rows(const Rows<T> p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) char memory[];
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  const Cut& cut = p.cut;
  float2* const pieces = reinterpret_cast<float2*>(memory);   // mean and variance of this block's
  float* const means = reinterpret_cast<float*>(memory + cut.of_moments());
  float* const variances = means + cut.of_channels() / 4;
  float* const scales = variances + cut.of_channels() / 4;
  float* const shifts = scales + cut.of_channels() / 4;
  T* const kept = reinterpret_cast<T*>(shifts + cut.of_channels() / 4);

  const int64_t row = blockIdx.x / cut.blocks;
  const int rank = static_cast<int>(cluster.block_rank()), warp = threadIdx.x / 32;
  const int first = rank * cut.pieces, count = min(cut.pieces, cut.channels * cut.parts - first);   // of pieces; there may be none
  const int64_t origin = row * cut.channels * cut.pixels;
  const auto each_piece = [&](auto f) {   // (which of this block's, channel, place in the row, elements)
#pragma unroll 1
    for (int i = warp; i < count; i += kThreads / 32) {
      const int c = (first + i) / cut.parts, part = first + i - c * cut.parts;
      f(i, c, c * cut.pixels + part * cut.length, min(cut.length, cut.pixels - part * cut.length));
    }
  };

  each_piece([&](int i, int, int at, int n) {
    Pack<T> pack[kPacksOfLane<T>];
    load_piece<T, kPacked>(p.x + origin + at, n, pack);
    store_piece<T, true>(kept + i * (cut.stride / static_cast<int>(sizeof(T))), cut.length, pack, false);
    const float2 m = n == kPiece ? moments<T, kPacked, false>(pack, n) : moments<T, kPacked, true>(pack, n);
    if (threadIdx.x % 32 == 0) pieces[i] = m;
  });
  cluster.sync();

  merge(p, [&](int piece) {
    const int owner = piece / cut.pieces;
    return cluster.map_shared_rank(pieces, owner)[piece - owner * cut.pieces];
  }, means, variances);
  cluster.sync();   // nobody reads the memory of a block that has ended

  for (int c = rank * kThreads + threadIdx.x; c < cut.channels; c += cut.blocks * kThreads)
    reinterpret_cast<float2*>(p.stats)[row * cut.channels + c] = make_float2(means[c], variances[c]);
  between_channels(p, row, means, variances, scales, shifts);
  __syncthreads();

  each_piece([&](int i, int c, int at, int n) {
    Pack<T> pack[kPacksOfLane<T>];
    load_piece<T, true>(kept + i * (cut.stride / static_cast<int>(sizeof(T))), cut.length, pack);
    const float mean = means[c], scale = scales[c], shift = shifts[c];
    switch (p.activation) {
      case kElu: apply<T, kElu>(pack, mean, scale, shift); break;
      case kSilu: apply<T, kSilu>(pack, mean, scale, shift); break;
      case kRelu: apply<T, kRelu>(pack, mean, scale, shift); break;
      case kGelu: apply<T, kGelu>(pack, mean, scale, shift); break;
      case kSoftplus: apply<T, kSoftplus>(pack, mean, scale, shift); break;
      default: apply<T, kIdentity>(pack, mean, scale, shift);
    }
    store_piece<T, kPacked>(p.y + origin + at, n, pack, p.streamed);
  });
#endif
}

// f(its configuration), of rows rows.
template <class F>
auto with_clusters(const Cut& cut, int64_t rows, cudaStream_t stream, F f) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cut.blocks), 1, 1};
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(blocks_for(rows * cut.blocks, 1));
  configuration.blockDim = dim3(kThreads);
  configuration.dynamicSmemBytes = static_cast<size_t>(cut.bytes);
  configuration.stream = stream;
  configuration.attrs = &attribute;
  configuration.numAttrs = 1;
  return f(configuration);
}

// Questions to a device.
enum : int64_t { kAttribute, kMayHaveShared, kClusters };

int device_attribute(cudaDeviceAttr attribute, int device) {
  return static_cast<int>(asked_once({kAttribute, device, attribute}, [&] {
    int value = 0;
    return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
  }));
}

// Whether a kernel's blocks may have so much shared memory on the current device. It is always asked for the most that there is: what
// another thread asks for between this and the launch must not be less.
template <class Kernel>
bool may_have(Kernel kernel, int device, int bytes) {
  const int most = std::min(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device), static_cast<int>(kMostShared));
  return bytes <= most && asked_once({kMayHaveShared, device, reinterpret_cast<int64_t>(kernel)}, [&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most) == cudaSuccess &&
           cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100) == cudaSuccess;
  });
}

template <class T, bool kPacked>
bool launch(const Rows<T>& p, int64_t rows, int device, cudaStream_t stream) {
  return may_have(normalise_rows<T, kPacked>, device, p.cut.bytes) && with_clusters(p.cut, rows, stream, [&](const cudaLaunchConfig_t& c) {
    return cudaLaunchKernelEx(&c, normalise_rows<T, kPacked>, p) == cudaSuccess;
  });
}

// f(T()) with those element types that have the kernel.
template <class F>
void with_short_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case kFloat32: return f(float());
    case kBFloat16: return f(__nv_bfloat16());
    case kFloat16: return f(__half());
    default: STD_TORCH_CHECK(false, "fastscore: normalise in clusters takes float32, bfloat16 and float16");
  }
}

// How many clusters of rows so cut the current device runs at once.
template <class T>
int clusters_at_once(const Cut& cut, int device) {
  const auto ask = [&] {
    int found = 0;
    if (may_have(normalise_rows<T, true>, device, cut.bytes)) {
      with_clusters(cut, 1, nullptr, [&](const cudaLaunchConfig_t& c) {
        if (cudaOccupancyMaxActiveClusters(&found, normalise_rows<T, true>, &c) != cudaSuccess) found = 0;
        return true;
      });
    }
    cudaGetLastError();   // that it cannot is an answer, no error
    return found;
  };
  return static_cast<int>(asked_once({kClusters, device, sizeof(T), cut.blocks, cut.bytes}, ask));
}

// How many clusters of such a call a device runs at once, by its own word; 0 where the Triton kernels are to do it.
int64_t norm_clusters(int64_t device, int64_t channels, int64_t pixels, int64_t groups, bool alpha, int64_t itemsize) {
  Cut cut;
  if (!cut_sample(channels, pixels, groups, alpha, itemsize, cut)) return 0;
  const int index = static_cast<int>(device);
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, index) < 9) return 0;
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return itemsize == 4 ? clusters_at_once<float>(cut, index) : clusters_at_once<__nv_bfloat16>(cut, index);
}

bool has_norm_clusters(int32_t device, int64_t channels, int64_t pixels, int64_t groups, bool alpha, int64_t itemsize) {
  return norm_clusters(device, channels, pixels, groups, alpha, itemsize) > 0;
}

const bool entered = (cuda_launches.norm_clusters = &has_norm_clusters);

void normalise_cuda(OptionalTensor y, OptionalTensor ty, Tensor stats, Tensor x, OptionalTensor t, Tensor coef, OptionalTensor tcoef,
                    OptionalTensor labels, int64_t groups, bool alpha, bool beta, double eps, int64_t activation) {
  const Checks check{"normalise"};
  const NormArgs given = norm_arguments(check, x, t, coef, tcoef, labels, groups, alpha, beta, eps, activation);
  check_norm(check, given, y, ty, stats, x, t, coef, tcoef, labels);
  check_devices(check, {"x", x}, {{"y", y}, {"ty", ty}, {"stats", stats}, {"t", t}, {"coef", coef}, {"tcoef", tcoef}, {"labels", labels}});
  if (x.numel() == 0) return;
  const int64_t B = x.size(0), C = x.size(1), pixels = x.numel() / (B * C);
  Cut cut;
  STD_TORCH_CHECK(y && !ty && !t && !tcoef && x.is_contiguous() && activation <= kSoftplus &&
                      cut_sample(C, pixels, groups, alpha, x.element_size(), cut),
                  "fastscore: normalise in CUDA C++ takes values of contiguous samples that fit in a cluster of blocks");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t queue = current_stream(x);
  const int device = x.get_device_index();
  const int64_t cache = device_attribute(cudaDevAttrL2CacheSize, device);
  with_short_dtype(dtype_of(x), [&](auto element) {
    using T = decltype(element);
    const Rows<T> p{static_cast<T*>(mutable_pointer(y)),
                    static_cast<float*>(stats.mutable_data_ptr()),
                    static_cast<const T*>(x.const_data_ptr()),
                    static_cast<const float*>(coef.const_data_ptr()),
                    static_cast<const int64_t*>(pointer(labels)),
                    coef.size(0), cut, static_cast<int>(C), groups > 0, alpha, beta,
                    x.numel() * static_cast<int64_t>(sizeof(T)) > cache, static_cast<float>(eps), static_cast<int>(activation)};
    const bool packed = aligned(p.x) && aligned(p.y) && pixels % Pack<T>::kSize == 0;
    const int64_t rows = B * cut.rows_of_sample;
    const bool done = packed ? launch<T, true>(p, rows, device, queue) : launch<T, false>(p, rows, device, queue);
    if (!done) check_launch("normalise");
    STD_TORCH_CHECK(done, "fastscore: normalise could not be launched: this device has no such clusters of blocks");
  });
  check_launch("normalise");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) { m.impl("normalise", TORCH_BOX(&normalise_cuda)); }
STABLE_TORCH_LIBRARY_IMPL(fastscore, CompositeExplicitAutograd, m) { m.impl("norm_clusters", TORCH_BOX(&norm_clusters)); }

}  // namespace fastscore
