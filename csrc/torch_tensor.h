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

inline Nest nest_of(const Tensor& out, const OptionalTensor& a, const OptionalTensor& b) {
  const int64_t dims = out.dim();
  STD_TORCH_CHECK(dims <= kMaxDims, "fastscore: tensors of more than 12 dimensions are not supported");
  Nest nest{};
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t size = out.size(d);
    if (size == 1) continue;
    const int64_t s[kMaxTensors] = {out.stride(d), a ? a->stride(d) : 0, b ? b->stride(d) : 0};
    bool merge = nest.ndim > 0;
    for (int t = 0; merge && t < kMaxTensors; ++t) merge = nest.strides[t][nest.ndim - 1] == s[t] * size;
    if (!merge) nest.sizes[nest.ndim++] = 1;
    nest.sizes[nest.ndim - 1] *= size;
    for (int t = 0; t < kMaxTensors; ++t) nest.strides[t][nest.ndim - 1] = s[t];
  }
  if (nest.ndim == 0) nest.sizes[nest.ndim++] = 1;
  const int64_t* last[kMaxTensors] = {nest.strides[0], nest.strides[1], nest.strides[2]};
  nest.contiguous = nest.ndim == 1 && (nest.sizes[0] == 1 || (last[0][0] == 1 && (!a || last[1][0] == 1) && (!b || last[2][0] == 1)));
  return nest;
}

}  // namespace fastscore
