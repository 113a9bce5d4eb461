// What the CPU operators need of torch: tensors to pointers, loop nests, keys and threads. Stable ABI only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "dtype_cpu.h"
#include "isa.h"

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

// A coefficient given as a tensor: (1,) replaces the scalar, (B,) is read per sample.
inline void coefficient(const OptionalTensor& each, double& scalar, const void*& pointer, DType dtype) {
  if (!each) return;
  const bool wide = dtype == kFloat64;
  STD_TORCH_CHECK(dtype_of(*each) == (wide ? kFloat64 : kFloat32) && each->is_contiguous(),
                  "fastscore: a coefficient tensor must be contiguous and of the compute dtype");
  const void* p = each->const_data_ptr();
  if (each->numel() > 1) pointer = p;
  else scalar = wide ? *static_cast<const double*>(p) : static_cast<double>(*static_cast<const float*>(p));
}

// `key`, an int64 tensor (seed, step), takes the place of the two numbers.
inline NoiseKey noise_key(const OptionalTensor& key, int64_t seed, int64_t step, int64_t stream, int64_t offset) {
  if (key) {
    const int64_t* p = static_cast<const int64_t*>(key->const_data_ptr());
    seed = p[0];
    step = p[1];
  }
  const uint64_t s = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), static_cast<uint32_t>(step), static_cast<uint32_t>(stream),
          static_cast<uint64_t>(offset)};
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

// Whole tiles per thread, at least 16 of them: noise depends on the element alone, so the split never shows.
template <class F>
void for_tiles(int64_t n, int64_t tile, const F& f) {
  torch::stable::parallel_for(0, (n + tile - 1) / tile, 16, [&](int64_t begin, int64_t end) {
    f(begin * tile, end * tile < n ? end * tile : n);
  });
}

}  // namespace fastscore
