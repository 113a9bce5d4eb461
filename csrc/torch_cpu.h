// What the CPU operators need of torch beyond tensors: values of coefficients and keys, and threads.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dtype_cpu.h"
#include "isa.h"
#include "refuse.h"

namespace fastscore {

// A coefficient given as a tensor: (1,) replaces the scalar, (B,) is read per sample.
inline void coefficient(const OptionalTensor& each, double& scalar, const void*& pointer, DType dtype) {
  if (!each) return;
  const void* p = each->const_data_ptr();
  if (each->numel() > 1) pointer = p;
  else scalar = dtype == kFloat64 ? *static_cast<const double*>(p) : static_cast<double>(*static_cast<const float*>(p));
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

// A result of many megabytes arrives unmapped: with huge pages it costs 512 times fewer faults, which are most of the time there.
inline void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) & ~(kHuge - 1), end = (reinterpret_cast<uintptr_t>(p) + bytes) & ~(kHuge - 1);
  if (bytes >= int64_t{8} << 20) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);   // a refusal changes nothing
#endif
}

// Whole tiles per thread, at least 16 of them: noise depends on the element alone, so the split never shows.
template <class F>
void for_tiles(int64_t n, int64_t tile, const F& f) {
  const int64_t tiles = (n + tile - 1) / tile, least = 16;
  if (tiles <= least) return f(0, n);   // of one thread PyTorch need not know
  torch::stable::parallel_for(0, tiles, least, [&](int64_t begin, int64_t end) {
    f(begin * tile, end * tile < n ? end * tile : n);
  });
}

}  // namespace fastscore
