// Stable-ABI tensors as the kernels take them: pointers, dtypes, loop nests.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "nest.h"
#include "philox.h"

namespace fastscore {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const void* pointer(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
inline void* mutable_pointer(const OptionalTensor& t) { return t ? t->mutable_data_ptr() : nullptr; }

inline DType dtype_of(const Tensor& t) {
  using S = torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case S::Float: return kFloat32;
    case S::Double: return kFloat64;
    case S::BFloat16: return kBFloat16;
    case S::Half: return kFloat16;
    case S::Long: return kInt64;
    default: STD_TORCH_CHECK(false, "fastscore: dtype must be float32, float64, bfloat16 or float16"); return kFloat32;
  }
}

inline DType float_dtype_of(const Tensor& t) {
  const DType dtype = dtype_of(t);
  STD_TORCH_CHECK(dtype != kInt64, "fastscore: dtype must be float32, float64, bfloat16 or float16");
  return dtype;
}

// Of tensors of one shape, at most 12 dimensions; strides null: not there.
inline Nest nest_of(int64_t dims, const int64_t* sizes, const int64_t* const* strides) {
  Nest nest{};
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 1) continue;
    bool merge = nest.ndim > 0;
    for (int t = 0; merge && t < kMaxTensors; ++t)
      merge = nest.strides[t][nest.ndim - 1] == (strides[t] ? strides[t][d] * sizes[d] : 0);
    if (!merge) nest.sizes[nest.ndim++] = 1;
    nest.sizes[nest.ndim - 1] *= sizes[d];
    for (int t = 0; t < kMaxTensors; ++t) nest.strides[t][nest.ndim - 1] = strides[t] ? strides[t][d] : 0;
  }
  if (nest.ndim == 0) nest.sizes[nest.ndim++] = 1;

  nest.contiguous = nest.ndim == 1;
  for (int t = 0; t < kMaxTensors; ++t)
    if (strides[t] && nest.sizes[0] != 1 && nest.strides[t][0] != 1) nest.contiguous = false;
  return nest;
}

inline Nest nest_of(const Tensor& out, const OptionalTensor& a, const OptionalTensor& b) {
  const int64_t dims = out.dim();
  STD_TORCH_CHECK(dims <= kMaxDims, "fastscore: tensors of more than 12 dimensions are not supported");
  int64_t sizes[kMaxDims], strides[kMaxTensors][kMaxDims];
  for (int64_t d = 0; d < dims; ++d) {
    sizes[d] = out.size(d);
    strides[0][d] = out.stride(d);
    strides[1][d] = a ? a->stride(d) : 0;
    strides[2][d] = b ? b->stride(d) : 0;
  }
  const int64_t* each[kMaxTensors] = {strides[0], a ? strides[1] : nullptr, b ? strides[2] : nullptr};
  return nest_of(dims, sizes, each);
}

}  // namespace fastscore
