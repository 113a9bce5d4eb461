// What door.cpp calls for tensors of a GPU: launches on the current stream of their device. Here so that the door, which every build has,
// names no CUDA: where no .cu file is built, nobody enters a launch.
#pragma once
#include <cstdint>

#include "nest.h"
#include "philox.h"

namespace fastscore {

// How DLPack 1 describes a tensor.
struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

inline char* data_of(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }
inline int32_t device_of(const DLTensor& t) { return t.device_id; }

// A coefficient: a number, or a tensor of one or of a value for each sample, in the compute type.
struct DirectCoefficient {
  const DLTensor* each = nullptr;
  double number = 0;
};

// Arguments as the raw ops have them, of tensors that are plain, of one device and not empty; `out` is what is written. Null: not there.
struct Launches {
  void (*fill)(const DLTensor& out, DType dtype, int kind, const NoiseKey& key);
  void (*noisy_update)(const DLTensor& out, DType dtype, const DLTensor* x, const DLTensor* direction, const DirectCoefficient& drift,
                       const DirectCoefficient& diffusion, const NoiseKey& key);
  // False where the sums need memory of their own: nothing has happened then.
  bool (*noise_reduce)(const DLTensor& out, DType dtype, const DLTensor& score, const DirectCoefficient& sigma, const NoiseKey& key,
                       int reduction);
  // Whether a norm of such samples is CUDA C++'s (normalise.cu).
  bool (*norm_clusters)(int32_t device, int64_t channels, int64_t pixels, int64_t groups, bool alpha, int64_t itemsize);
};

inline Launches cuda_launches{};

}  // namespace fastscore
