// A tensor of words, uniforms, normals or signs: writes only.
#include "random.h"

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

template <class T>
void launch(const Tensor& out, FillKind kind, const DeviceKey& key) {
  const int shift = static_cast<int>(key.key.offset % 8);
  T* p = static_cast<T*>(out.mutable_data_ptr());
  const bool aligned_out = aligned(p) && shift * sizeof(T) % 16 == 0;
  const unsigned blocks = blocks_for(out.numel() + shift, 8 * kThreads);
  const cudaStream_t stream = current_stream(out);
  if constexpr (__is_same(T, int64_t)) {
    fill_elements<T, kWords><<<blocks, kThreads, 0, stream>>>(p, out.numel(), key, shift, aligned_out);
  } else {
    if (kind == kUniform) fill_elements<T, kUniform><<<blocks, kThreads, 0, stream>>>(p, out.numel(), key, shift, aligned_out);
    else if (kind == kNormal) fill_elements<T, kNormal><<<blocks, kThreads, 0, stream>>>(p, out.numel(), key, shift, aligned_out);
    else fill_elements<T, kRademacher><<<blocks, kThreads, 0, stream>>>(p, out.numel(), key, shift, aligned_out);
  }
}

void fill_cuda(Tensor out, int64_t kind, OptionalTensor key, int64_t seed, int64_t step, int64_t stream, int64_t offset) {
  STD_TORCH_CHECK(out.is_contiguous(), "fastscore: fill needs a contiguous tensor");
  STD_TORCH_CHECK((kind == kWords) == (dtype_of(out) == kInt64), "fastscore: words are int64, noise is floating point");
  if (out.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const DeviceKey k = device_key(key, seed, step, stream, offset);
  if (kind == kWords) launch<int64_t>(out, kWords, k);
  else with_dtype(dtype_of(out), [&](auto element) { launch<decltype(element)>(out, static_cast<FillKind>(kind), k); });
  check_launch("fill");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) { m.impl("fill", TORCH_BOX(&fill_cuda)); }

}  // namespace fastscore
