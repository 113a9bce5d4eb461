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

// Lawson fits. log1p(f) = f + f^2 P(f) on [-1/3, 1/3], relative error 3e-8; sin and cos on [-pi/2, pi/2], 5e-9 and 5e-8.
constexpr float kLog[8] = {-0.49999937415122986f, 0.33333197236061096f, -0.2500782012939453f, 0.20011168718338013f,
                           -0.1641596108675003f,  0.13995806872844696f, -0.1538853943347931f, 0.14026358723640442f};
constexpr float kSin[4] = {-0.16666656732559204f, 0.008333017118275166f, -0.00019806614727713168f, 2.6000548132287804e-06f};
constexpr float kCos[4] = {-0.4999993145465851f, 0.041663989424705505f, -0.001385592739097774f, 2.3194383174995892e-05f};
// -ln(1 - t) = t + t^2 P(t) on [0, 1/16], relative error 3e-8: beside the hardware logarithm, which is poor near 1.
constexpr float kNear[3] = {0.500010073184967f, 0.332370400428772f, 0.27588674426078796f};
constexpr float kPi32 = 7.314590396335798e-10f;       // pi / 2^32
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

#ifdef __CUDACC__
// The radius is within 1e-6 by the documented bounds of lg2.approx (2^-22, absolute on (1/2, 2), else relative) and the Newton step.
// Entries (z_even, z_odd) of the pair (w_even, w_odd). The angle is a residual in [-pi/2, pi/2] and a sign, which goes to the radius.
__device__ __forceinline__ float2 box_muller(uint32_t w_even, uint32_t w_odd) {
  const float u = fmaf(static_cast<float>(w_even), kTwoM32, 0.5f * kTwoM32);
  const float t = fmaf(static_cast<float>(~w_even), kTwoM32, 0.5f * kTwoM32);
  float lg, rsqrt;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(lg) : "f"(u));
  const float near = -2.0f * t * fmaf(t, fmaf(t, fmaf(t, kNear[2], kNear[1]), kNear[0]), 1.0f);
  const float l = t < 0.0625f ? -near : lg * kMinus2Ln2;   // -2 ln u > 0
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(rsqrt) : "f"(l));
  const float estimate = l * rsqrt, root = fmaf(fmaf(-estimate, estimate, l), 0.5f * rsqrt, estimate);   // one Newton step
  const float r = __uint_as_float(__float_as_uint(root) ^ ((w_odd + 0x40000000u) & 0x80000000u));
  const float a = static_cast<float>(static_cast<int32_t>(w_odd << 1)) * kPi32, y = a * a;
  const float s = fmaf(y * a, fmaf(y, fmaf(y, fmaf(y, kSin[3], kSin[2]), kSin[1]), kSin[0]), a);
  const float c = fmaf(y, fmaf(y, fmaf(y, fmaf(y, kCos[3], kCos[2]), kCos[1]), kCos[0]), 1.0f);
  return make_float2(r * c, r * s);
}
#endif

FS_HD float uniform(uint32_t w) { return (static_cast<float>(w >> 8) + 0.5f) * 5.9604644775390625e-08f; }

}  // namespace fastscore
