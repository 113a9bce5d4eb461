// Philox4x32-10 and Box-Muller, one element at a time: the noise contract for CUDA and for scalar host code.
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FS_HD __host__ __device__ __forceinline__
#else
#define FS_HD static inline
#endif

namespace fastscore {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// log1p(f) = f + f^2 P(f) on [-1/3, 1/3], relative error 3e-8; sin and cos on [-pi/4, pi/4], 4e-9 and 6e-11 (Lawson fits).
constexpr float kLog[8] = {-0.49999937415122986f, 0.33333197236061096f, -0.2500782012939453f, 0.20011168718338013f,
                           -0.1641596108675003f,  0.13995806872844696f, -0.1538853943347931f, 0.14026358723640442f};
constexpr float kSin[3] = {-0.16666655242443085f, 0.008332177996635437f, -0.0001951729936990887f};
constexpr float kCos[4] = {-0.5f, 0.04166662320494652f, -0.0013886763481423259f, 2.4390450562350452e-05f};
constexpr float kTwoPi32 = 1.4629180792671596e-09f;   // 2 pi / 2^32
constexpr float kTwoM32 = 2.3283064365386963e-10f;    // 2^-32
constexpr float kMinus2Ln2 = -1.3862943611198906f;
constexpr uint32_t kNearOne = 0xAAAAAAAAu;            // words from here on are u > 2/3, where 1 - u is the exact number to keep
constexpr int32_t kTwoThirdsBits = 0x3F2AAAAB;        // the float 2/3

// The noise key of one call, as read by every kernel.
struct NoiseKey {
  uint32_t k0, k1;    // seed
  uint32_t step;      // counter word 2
  uint32_t stream;    // counter word 3: stream | substream << 16
  uint64_t offset;    // index of element 0
};

struct Words { uint32_t w[4]; };

FS_HD Words philox(uint64_t block, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0, p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

FS_HD Words philox(uint64_t block, const NoiseKey& key) { return philox(block, key.step, key.stream, key.k0, key.k1); }

FS_HD float uniform(uint32_t w) { return (static_cast<float>(w >> 8) + 0.5f) * 5.9604644775390625e-08f; }

}  // namespace fastscore
