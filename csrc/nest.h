// Where the elements of up to three tensors lie, for the host and for kernels.
#pragma once
#include <cstdint>

namespace fastscore {

enum DType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kInt64 };

// A loop nest over logical C order, shared by up to three tensors; adjacent dimensions are merged where all allow it.
constexpr int kMaxDims = 12, kMaxTensors = 3;
struct Nest {
  int ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxTensors][kMaxDims];
  bool contiguous;
};

}  // namespace fastscore
