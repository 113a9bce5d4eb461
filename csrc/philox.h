// Philox4x32-10 and Box-Muller, one element at a time: the noise contract for CUDA and for scalar host code.
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FS_HD __host__ __device__ __forceinline__
#define FS_HD_MEMBER FS_HD
#else
#define FS_HD static inline
#define FS_HD_MEMBER inline
#endif

namespace fastscore {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// Lawson fits. log1p(f) = f + f^2 P(f) on [-1/3, 1/3], relative error 3e-8; sin and cos on [-pi/2, pi/2], 5e-9 and 5e-8.
constexpr float kLog[8] = {-0.49999937415122986f, 0.33333197236061096f, -0.2500782012939453f, 0.20011168718338013f,
                           -0.1641596108675003f,  0.13995806872844696f, -0.1538853943347931f, 0.14026358723640442f};
constexpr float kSin[4] = {-0.16666656732559204f, 0.008333017118275166f, -0.00019806614727713168f, 2.6000548132287804e-06f};
constexpr float kCos[4] = {-0.4999993145465851f, 0.041663989424705505f, -0.001385592739097774f, 2.3194383174995892e-05f};
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

// What the ten rounds add in: the key, raised by a constant from round to round.
struct RoundKeys { uint32_t k0[10], k1[10]; };

FS_HD RoundKeys round_keys(uint32_t k0, uint32_t k1) {
  RoundKeys keys;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (uint32_t round = 0; round < 10; ++round) keys.k0[round] = k0 + round * kPhiloxW0, keys.k1[round] = k1 + round * kPhiloxW1;
  return keys;
}

template <int kFirst>
FS_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const RoundKeys& keys) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = kFirst; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0, p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ keys.k0[round];
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ keys.k1[round];
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

// The blocks of one tile, whose counters differ in their first word alone: half of the first two rounds is the same for all of them, and
// what a block shall meet of it is combined here, once.
struct PhiloxTile {
  RoundKeys keys;
  uint32_t first, second, third, fourth;

  FS_HD_MEMBER PhiloxTile(uint32_t upper, uint32_t step, uint32_t stream, const RoundKeys& k) : keys(k) {
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * step;
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(p1 >> 32) ^ upper ^ k.k0[0]);
    first = stream ^ k.k1[0];
    second = static_cast<uint32_t>(p1) ^ k.k0[1];
    third = static_cast<uint32_t>(p0 >> 32) ^ k.k1[1];
    fourth = static_cast<uint32_t>(p0) ^ k.k1[2];
  }

  FS_HD_MEMBER Words operator()(uint32_t block) const {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * block;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * (static_cast<uint32_t>(p0 >> 32) ^ first);
    const uint64_t q0 = static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(p1 >> 32) ^ second);
    const uint64_t q1 = static_cast<uint64_t>(kPhiloxM1) * (static_cast<uint32_t>(p0) ^ third);
    return philox<3>(static_cast<uint32_t>(q1 >> 32) ^ static_cast<uint32_t>(p1) ^ keys.k0[2], static_cast<uint32_t>(q1),
                     static_cast<uint32_t>(q0 >> 32) ^ fourth, static_cast<uint32_t>(q0), keys);
  }
};

FS_HD Words philox(uint64_t block, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  return philox<0>(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), c2, c3, round_keys(k0, k1));
}

FS_HD Words philox(uint64_t block, const NoiseKey& key) { return philox(block, key.step, key.stream, key.k0, key.k1); }

#ifdef __CUDACC__
#define FS_HARDWARE __device__ __forceinline__
FS_HARDWARE float hardware_log2(float u) { float v; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(u)); return v; }
FS_HARDWARE float hardware_rsqrt(float q) { float v; asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(q)); return v; }
#endif

#ifdef FS_HARDWARE   // or a test that brings its own two functions
// Everything below is in units of -log2 u and of its root: the factor sqrt(2 ln 2) of the radius is in the fits of sine and cosine.
// -log2(1 - t) on [0, 0.13] as a quartic in g = -(t 2^32 + 1/2), whose innermost term is linear in u = 1 - t: its own coefficient would be
// denormal. The root is right to 8e-8; from 0.13 on and for negative t it lies below the logarithm.
constexpr float kNear[5] = {-1.679513611518857e-10f, -3.359027223037714e-10f, 3.912537478629398e-20f, -1.1763571072520622e-29f,
                            5.8253621835790336e-30f};
constexpr float kScaledSin[5] = {1.1774100065231323f, -0.1962347775697708f, 0.009811239317059517f, -0.00023313773272093385f,
                                 3.050063469345332e-06f};
constexpr float kScaledCos[5] = {1.1774100065231323f, -0.5887038707733154f, 0.04905512183904648f, -0.0016311488579958677f,
                                 2.7261627110419795e-05f};
constexpr float kAbove = 1.0000002384185791f;   // 1 + 2^-22

// sqrt(-log2 u) of u = (w + 1/2) 2^-32. The hardware's logarithm is good to 2^-22, absolutely on (1/2, 2) and relatively elsewhere. It sees
// u (1 + 2^-22), so that near 1 it errs below, and the larger of it and the fit is the fit. By those bounds the radius is within 1e-6,
// beyond 4 within 1.2e-6 (tests/gpu_normal_error.cpp).
FS_HARDWARE float root_log(uint32_t w) {
  const float u = fmaf(static_cast<float>(w), kAbove * kTwoM32, kAbove * 0.5f * kTwoM32), g = static_cast<float>(static_cast<int32_t>(w));
  const float near = fmaf(fmaf(fmaf(fmaf(u, kNear[4], kNear[3]), g, kNear[2]), g, kNear[1]), g, kNear[0]);
  const float q = fmaxf(near, -hardware_log2(u)), rsqrt = hardware_rsqrt(q), estimate = q * rsqrt;
  return fmaf(fmaf(-estimate, estimate, q), 0.5f * rsqrt, estimate);   // one Newton step
}

#endif

#ifdef __CUDACC__
// A pair (w_even, w_odd) as z_even = radius cosine, z_odd = radius sine. The angle is a residual in [-pi/2, pi/2] and a sign, which goes
// to the radius.
struct Polar { float radius, cosine, sine; };

__device__ __forceinline__ Polar polar(uint32_t w_even, uint32_t w_odd) {
  const float r = __uint_as_float(__float_as_uint(root_log(w_even)) ^ ((w_odd + 0x40000000u) & 0x80000000u));
  const float a = static_cast<float>(static_cast<int32_t>(w_odd << 1)) * kPi32, y = a * a;
  const float c = fmaf(y, fmaf(y, fmaf(y, fmaf(y, kScaledCos[4], kScaledCos[3]), kScaledCos[2]), kScaledCos[1]), kScaledCos[0]);
  const float s = fmaf(y, fmaf(y, fmaf(y, fmaf(y, kScaledSin[4], kScaledSin[3]), kScaledSin[2]), kScaledSin[1]), kScaledSin[0]);
  return {r, c, a * s};
}

__device__ __forceinline__ float2 box_muller(uint32_t w_even, uint32_t w_odd) {
  const Polar p = polar(w_even, w_odd);
  return make_float2(p.radius * p.cosine, p.radius * p.sine);
}
#endif

FS_HD float uniform(uint32_t w) { return (static_cast<float>(w >> 8) + 0.5f) * 5.9604644775390625e-08f; }

}  // namespace fastscore
