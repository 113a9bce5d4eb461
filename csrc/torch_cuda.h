// What the CUDA operators share: keys and coefficients that may live on the device, 128-bit packs, index nests, launches.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda_stream.h"
#include "direct.h"
#include "tiles.h"
#include "torch_tensor.h"

namespace fastscore {

template <class T> struct ComputeType { using type = float; };
template <> struct ComputeType<double> { using type = double; };

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ void narrow(float v, float& out) { out = v; }
__device__ __forceinline__ void narrow(double v, double& out) { out = v; }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }
__device__ __forceinline__ void narrow(float v, __half& out) { out = __float2half_rn(v); }

// The key as numbers, or as the int64 tensor (seed, step), read when the kernel runs so that a captured graph advances.
struct DeviceKey {
  NoiseKey key;
  const int64_t* tensor;

  __device__ __forceinline__ NoiseKey load() const {
    NoiseKey k = key;
    if (tensor) {
      const uint64_t seed = static_cast<uint64_t>(tensor[0]);
      k.k0 = static_cast<uint32_t>(seed);
      k.k1 = static_cast<uint32_t>(seed >> 32);
      k.step = static_cast<uint32_t>(tensor[1]);
    }
    return k;
  }
};

inline DeviceKey device_key(const OptionalTensor& key, int64_t seed, int64_t step, int64_t stream, int64_t offset) {
  const uint64_t s = static_cast<uint64_t>(seed);
  const NoiseKey numbers{static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), static_cast<uint32_t>(step),
                         static_cast<uint32_t>(stream), static_cast<uint64_t>(offset)};
  return {numbers, key ? static_cast<const int64_t*>(key->const_data_ptr()) : nullptr};
}

// A number, one value on the device, or one per sample.
template <class A>
struct Coefficient {
  const A* each;
  A number;
  bool per_sample;

  __device__ __forceinline__ A at(int64_t sample) const { return each ? each[per_sample ? sample : 0] : number; }
};

template <class A>
Coefficient<A> device_coefficient(const OptionalTensor& each, double number) {
  if (!each) return {nullptr, static_cast<A>(number), false};
  return {static_cast<const A*>(each->const_data_ptr()), A(0), each->numel() > 1};
}

template <class A>
Coefficient<A> device_coefficient(const DirectCoefficient& c) {
  if (!c.each) return {nullptr, static_cast<A>(c.number), false};
  return {reinterpret_cast<const A*>(data_of(*c.each)), A(0), c.each->ndim == 1 && c.each->shape[0] > 1};
}

// Sample of an element; 32-bit division is several times cheaper and serves all but the largest tensors.
__device__ __forceinline__ int64_t sample_of(int64_t element, int64_t per_sample) {
  if ((element | per_sample) >> 32) return element / per_sample;
  return static_cast<uint32_t>(element) / static_cast<uint32_t>(per_sample);
}

// Whole Philox blocks in whole 128-bit words: four elements of float or double, eight of the 16-bit types.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = sizeof(T) == 2 ? 8 : 4;
  T v[kSize];
};

// Elements of a block of whole packs.
template <class T> constexpr int kPackTile = kPackThreads * kPacks * Pack<T>::kSize;

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) reinterpret_cast<uint4*>(&pack)[i] = reinterpret_cast<const uint4*>(p)[i];
  return pack;
}

template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& pack) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&pack)[i];
}

// The normals of one Philox block.
__device__ __forceinline__ void block_normals(uint64_t block, const NoiseKey& key, float* z) {
  const Words w = philox(block, key);
  const float2 a = box_muller(w.w[0], w.w[1]), b = box_muller(w.w[2], w.w[3]);
  z[0] = a.x, z[1] = a.y, z[2] = b.x, z[3] = b.y;
}

// Where logical element i of tensor t lies.
__device__ __forceinline__ int64_t position(const Nest& nest, int t, int64_t i) {
  int64_t at = 0;
  for (int d = nest.ndim - 1; d > 0; --d) {
    const int64_t q = sample_of(i, nest.sizes[d]);
    at += (i - q * nest.sizes[d]) * nest.strides[t][d];
    i = q;
  }
  return at + i * nest.strides[t][0];
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "fastscore: a tensor of more than 2^40 elements is not supported");
  return static_cast<unsigned>(blocks);
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(torch_cuda_stream(device, &stream), "fastscore: torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline cudaStream_t current_stream(const Tensor& t) { return current_stream(t.get_device_index()); }

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "fastscore: ", op, " could not be launched: ", cudaGetErrorString(error));
}

// f(T()) with the element type of a dtype.
template <class F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case kFloat32: return f(float());
    case kFloat64: return f(double());
    case kBFloat16: return f(__nv_bfloat16());
    case kFloat16: return f(__half());
    default: STD_TORCH_CHECK(false, "fastscore: dtype must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace fastscore
