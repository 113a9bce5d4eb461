#include "random.h"

#include "dtype_cpu.h"

namespace fastscore {
namespace {

// Words [first, first + n), n <= kTile, from a group boundary on.
FS_INLINE const uint32_t* tile_words(uint32_t* buffer, uint64_t first, int64_t n, const NoiseKey& key) {
  const uint64_t start = first / kGroup * kGroup;
  fill_words(buffer, start / 4, static_cast<int64_t>((first + n - start + kGroup - 1) / kGroup), key);
  return buffer + (first - start);
}

// Signs [first, first + n), n <= kTile: every bit of the words they touch, as the sign bit of 1.0f.
FS_INLINE const float* tile_signs(uint32_t* buffer, float* out, uint64_t first, int64_t n, const NoiseKey& key) {
  const uint64_t word = first / 32;
  const int64_t count = static_cast<int64_t>((first + n - 1) / 32 - word + 1);
  const uint32_t* w = tile_words(buffer, word, count, key);
  for (int64_t j = 0; j < count; ++j)
    for (uint32_t bit = 0; bit < 32; ++bit) out[32 * j + bit] = float_of(0x3f800000u | (w[j] >> bit << 31));
  return out + first % 32;
}

template <class T>
void run(const FillArgs& p, int64_t begin, int64_t end) {
  alignas(64) uint32_t words[kTile + 2 * kGroup];
  alignas(64) float noise[kTile + 2 * kGroup];
  using A = typename Compute<T>::type;
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = end - at < kTile ? end - at : kTile;
    const uint64_t first = p.key.offset + static_cast<uint64_t>(at);
    const float* z = noise;
    if (p.kind == kNormal) {
      z = tile_normals(noise, first, n, p.key);
    } else if (p.kind == kRademacher) {
      z = tile_signs(words, noise, first, n, p.key);
    } else {
      const uint32_t* w = tile_words(words, first, n, p.key);
      for (int64_t i = 0; i < n; ++i) noise[i] = uniform(w[i]);
    }
    T* out = static_cast<T*>(p.out) + at;
    for (int64_t i = 0; i < n; ++i) narrow(static_cast<A>(z[i]), out[i]);
  }
}

void run_words(const FillArgs& p, int64_t begin, int64_t end) {
  alignas(64) uint32_t words[kTile + 2 * kGroup];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = end - at < kTile ? end - at : kTile;
    const uint32_t* w = tile_words(words, p.key.offset + static_cast<uint64_t>(at), n, p.key);
    int64_t* out = static_cast<int64_t*>(p.out) + at;
    for (int64_t i = 0; i < n; ++i) out[i] = w[i];
  }
}

}  // namespace

void FS_KERNEL(fill)(const FillArgs& p, int64_t begin, int64_t end) {
  if (p.kind == kWords) run_words(p, begin, end);
  else with_dtype(p.dtype, [&](auto element) { run<decltype(element)>(p, begin, end); });
}

}  // namespace fastscore

#if defined(FASTSCORE_REGISTER)
#include "arguments.h"
#include "torch_cpu.h"

namespace fastscore {

void launch(const FillArgs& p, int64_t n) {
  advise_huge_pages(p.out, n * (p.dtype == kFloat64 || p.dtype == kInt64 ? 8 : p.dtype == kFloat32 ? 4 : 2));
  const auto kernel = FS_PICK(fill);
  for_tiles(n, kTile, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

namespace {

void fill(Tensor out, int64_t kind, OptionalTensor key, int64_t seed, int64_t step, int64_t stream, int64_t offset) {
  const Checks check{"fill"};
  check_fill(check, out, kind, key, stream, offset);
  if (out.numel() == 0) return;
  const FillArgs p{out.mutable_data_ptr(), dtype_of(out), static_cast<FillKind>(kind), noise_key(key, seed, step, stream, offset)};
  launch(p, out.numel());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastscore, m) {
  m.def("fill(Tensor(a!) out, int kind, Tensor? key, int seed, int step, int stream, int offset) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("fill", TORCH_BOX(&fill)); }

}  // namespace fastscore
#endif
