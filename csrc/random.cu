// A tensor of words, uniforms, normals or signs: writes only.
#include "arguments.h"
#include "torch_cuda.h"

namespace fastscore {
namespace {

// Eight elements per thread, from element (8 thread - shift) on, where offset - shift is a multiple of 8.
template <class T, FillKind kKind>
__global__ void __launch_bounds__(kThreads) fill_elements(T* out, int64_t n, DeviceKey device_key, int shift, bool aligned_out) {
  const NoiseKey key = device_key.load();
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8 - shift;
  if (first >= n) return;
  const uint64_t element = key.offset + static_cast<uint64_t>(first);
  alignas(16) T v[8];
  if constexpr (kKind == kRademacher) {
    const Words words = philox(element / 128, key);   // eight neighbours share a word
    const uint32_t which = static_cast<uint32_t>(element % 128 / 32), shift = static_cast<uint32_t>(element % 32);
    const uint32_t w = which < 2 ? (which == 0 ? words.w[0] : words.w[1]) : (which == 2 ? words.w[2] : words.w[3]);
#pragma unroll
    for (int i = 0; i < 8; ++i) narrow(static_cast<typename ComputeType<T>::type>((w >> (shift + i)) & 1 ? -1.0f : 1.0f), v[i]);
  } else {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      if constexpr (kKind == kNormal) {
        float z[4];
        block_normals(element / 4 + j / 4, key, z);
#pragma unroll
        for (int k = 0; k < 4; ++k) narrow(static_cast<typename ComputeType<T>::type>(z[k]), v[j + k]);
      } else {
        const Words w = philox(element / 4 + j / 4, key);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if constexpr (kKind == kWords) v[j + k] = w.w[k];
          else narrow(static_cast<typename ComputeType<T>::type>(uniform(w.w[k])), v[j + k]);
        }
      }
    }
  }
  if (aligned_out && first >= 0 && first + 8 <= n) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(v) / 16); ++i) reinterpret_cast<uint4*>(out + first)[i] = reinterpret_cast<uint4*>(v)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (first + i >= 0 && first + i < n) out[first + i] = v[i];
  }
}

// Whole tiles on 16-byte addresses whose first element opens a Philox block: four 128-bit stores per thread, of the 8-byte types eight.
// No tile crosses 2^32 blocks.
template <class T, FillKind kKind>
__global__ void __launch_bounds__(kPackThreads) fill_packs(T* out, DeviceKey device_key) {
  constexpr int kSize = Pack<T>::kSize, kStride = kPackThreads * kSize;
  const NoiseKey key = device_key.load();
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kPackTile<T> + threadIdx.x * kSize;
  const uint64_t tile = key.offset / 4 + static_cast<uint64_t>(blockIdx.x) * (kPackTile<T> / 4);
  const PhiloxTile words(static_cast<uint32_t>(tile >> 32), key.step, key.stream, round_keys(key.k0, key.k1));
  const uint32_t first = static_cast<uint32_t>(tile) + threadIdx.x * (kSize / 4);
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const Words w = words(first + (j * kStride + i) / 4);
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        if constexpr (kKind == kWords) {
          pack.v[i + k] = w.w[k], pack.v[i + k + 1] = w.w[k + 1];
        } else {
          using A = typename ComputeType<T>::type;
          const float2 z = kKind == kNormal ? box_muller(w.w[k], w.w[k + 1]) : make_float2(uniform(w.w[k]), uniform(w.w[k + 1]));
          narrow(static_cast<A>(z.x), pack.v[i + k]), narrow(static_cast<A>(z.y), pack.v[i + k + 1]);
        }
      }
    }
    store_pack(out + start + j * kStride, pack);
  }
}

// Signs: a warp computes 32 Philox blocks, one each, and hands their words to the threads that write 16 bytes of them at a time.

// 1.0 with the sign of bit `at` of the word: the upper four bytes of an 8-byte type, both halves of two 16-bit elements (bits at, at + 1).
template <class T>
__device__ __forceinline__ uint32_t sign_bits(uint32_t word, int at) {
  constexpr uint32_t kOne = sizeof(T) == 8 ? 0x3ff00000u : sizeof(T) == 4 ? 0x3f800000u : __is_same(T, __half) ? 0x3c003c00u : 0x3f803f80u;
  if constexpr (sizeof(T) == 2) return kOne | ((word << (15 - at)) & 0x8000u) | ((word << (30 - at)) & 0x80000000u);
  else return kOne | ((word << (31 - at)) & 0x80000000u);
}

template <class T>
__global__ void __launch_bounds__(kPackThreads) fill_signs(T* out, DeviceKey device_key) {
  constexpr int kSize = 16 / sizeof(T), kRound = 32 * kSize, kRegisters = 4;   // elements of a store, of a warp's store
  __shared__ uint32_t shared[kPackThreads / 32][4][32];
  const NoiseKey key = device_key.load();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tile = (static_cast<int64_t>(blockIdx.x) * (kPackThreads / 32) + warp) * kSignTile;
  const Words words = philox((key.offset + tile) / 128 + lane, key);
#pragma unroll
  for (int k = 0; k < 4; ++k) shared[warp][k][lane] = words.w[k];
  __syncwarp();
  out += tile + lane * kSize;
#pragma unroll
  for (int j = 0; j < kSignTile / kRound; ++j) {
    const int element = j * kRound + lane * kSize;   // in the tile; its store lies in one word
    const uint32_t word = shared[warp][element / 32 % 4][element / 128] >> (lane * kSize % 32);
    alignas(16) uint32_t v[kRegisters];
    if constexpr (sizeof(T) == 8) {
      v[0] = v[2] = 0, v[1] = sign_bits<T>(word, 0), v[3] = sign_bits<T>(word, 1);
    } else {
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) v[i] = sign_bits<T>(word, i * (sizeof(T) == 2 ? 2 : 1));
    }
    *reinterpret_cast<uint4*>(out + j * kRound) = *reinterpret_cast<uint4*>(v);
  }
}

// Whole tiles where the layout allows; how many elements that were.
template <class T, FillKind kKind>
int64_t launch_tiles(T* out, int64_t n, const DeviceKey& key, cudaStream_t stream) {
  constexpr int64_t kTile = kKind == kRademacher ? kPackThreads / 32 * kSignTile : kPackTile<T>, kUnit = kKind == kRademacher ? 128 : 4;
  const uint64_t offset = key.key.offset, first = offset / 4;
  const bool crosses = kKind != kRademacher && first % (kTile / 4) != 0 && first >> 32 != (first + static_cast<uint64_t>(n) / 4) >> 32;
  const int64_t tiles = aligned(out) && offset % kUnit == 0 && !crosses ? n / kTile : 0;
  if (tiles == 0) return 0;
  if constexpr (kKind == kRademacher) fill_signs<T><<<blocks_for(tiles, 1), kPackThreads, 0, stream>>>(out, key);
  else fill_packs<T, kKind><<<blocks_for(tiles, 1), kPackThreads, 0, stream>>>(out, key);
  return tiles * kTile;
}

template <class T, FillKind kKind>
void launch(T* out, int64_t n, DeviceKey key, cudaStream_t stream) {
  const int64_t done = launch_tiles<T, kKind>(out, n, key, stream);
  if (done == n) return;
  out += done, n -= done, key.key.offset += done;
  const int shift = static_cast<int>(key.key.offset % 8);
  const bool aligned_out = aligned(out) && shift * sizeof(T) % 16 == 0;
  fill_elements<T, kKind><<<blocks_for(n + shift, 8 * kThreads), kThreads, 0, stream>>>(out, n, key, shift, aligned_out);
}

template <class T>
void launch(void* out, int64_t n, FillKind kind, const DeviceKey& key, cudaStream_t stream) {
  T* p = static_cast<T*>(out);
  if constexpr (__is_same(T, int64_t)) launch<T, kWords>(p, n, key, stream);
  else if (kind == kUniform) launch<T, kUniform>(p, n, key, stream);
  else if (kind == kNormal) launch<T, kNormal>(p, n, key, stream);
  else launch<T, kRademacher>(p, n, key, stream);
}

void launch(void* out, DType dtype, int64_t n, FillKind kind, const DeviceKey& key, cudaStream_t stream) {
  if (kind == kWords) launch<int64_t>(out, n, kWords, key, stream);
  else with_dtype(dtype, [&](auto element) { launch<decltype(element)>(out, n, kind, key, stream); });
}

void fill_cuda(Tensor out, int64_t kind, OptionalTensor key, int64_t seed, int64_t step, int64_t stream, int64_t offset) {
  const Checks check{"fill"};
  check_fill(check, out, kind, key, stream, offset);
  check_devices(check, {"out", out}, {{"key", key}});
  if (out.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const DeviceKey k = device_key(key, seed, step, stream, offset);
  launch(out.mutable_data_ptr(), dtype_of(out), out.numel(), static_cast<FillKind>(kind), k, current_stream(out));
  check_launch("fill");
}

void fill_direct(const DLTensor& out, DType dtype, int kind, const NoiseKey& key) {
  const torch::stable::accelerator::DeviceGuard guard(device_of(out));
  int64_t n = 1;
  for (int32_t d = 0; d < out.ndim; ++d) n *= out.shape[d];
  launch(data_of(out), dtype, n, static_cast<FillKind>(kind), {key, nullptr}, current_stream(device_of(out)));
  check_launch("fill");
}

const bool entered = (cuda_launches.fill = &fill_direct);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) { m.impl("fill", TORCH_BOX(&fill_cuda)); }

}  // namespace fastscore
