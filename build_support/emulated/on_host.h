// CUDA C++ for a host compiler: what build_support/emulate.py does not translate is here.
// Intrinsics are their IEEE counterparts; the approximations' documented errors can be added (approximation).
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>

#include "driver.h"

#define __global__ static
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __ldg(p) on_host::read_only(p)
#define threadIdx on_host::thread_index
#define blockIdx on_host::block_index
#define blockDim on_host::block_size
#define gridDim on_host::grid_size
constexpr int warpSize = 32;

#define __syncthreads() static_cast<void>(on_host::meet_block(__LINE__, 0))
#define __syncthreads_count(p) on_host::meet_block(__LINE__, p)
#define __syncthreads_or(p) (on_host::meet_block(__LINE__, p) != 0)
#define __syncthreads_and(p) (on_host::meet_block(__LINE__, !(p)) == 0)
#define __syncwarp(...) on_host::sync_warp(__LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __ballot_sync(mask, p) static_cast<unsigned>(on_host::meet_warp(on_host::Meeting::kBallot, __LINE__, mask, (p) != 0, 0))
#define __any_sync(mask, p) (__ballot_sync(mask, p) != 0)
#define __all_sync(mask, p) (__ballot_sync(mask, !(p)) == 0)
#define __shfl_sync(mask, ...) on_host::shuffle(__LINE__, mask, on_host::kFrom, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) on_host::shuffle(__LINE__, mask, on_host::kDown, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) on_host::shuffle(__LINE__, mask, on_host::kUp, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) on_host::shuffle(__LINE__, mask, on_host::kXor, __VA_ARGS__)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
using dim3 = on_host::Size;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return on_host::take_error(); }
inline const char* cudaGetErrorString(cudaError_t error) { return on_host::describe(error); }

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttributeValue { struct { unsigned x, y, z; } clusterDim; };
struct cudaLaunchAttribute { cudaLaunchAttributeID id; cudaLaunchAttributeValue val; };
struct cudaLaunchConfig_t {
  dim3 grid, block;   // gridDim and blockDim, which are macros here
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDeviceAttr { cudaDevAttrL2CacheSize = 38, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrL2CacheSize ? 1 << 15 : what == cudaDevAttrComputeCapabilityMajor ? 9 : 227 * 1024;
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;   // a hint
  return on_host::ask_for_shared_memory(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(P...), const cudaLaunchConfig_t* c) {
  *clusters = on_host::clusters_at_once(reinterpret_cast<const void*>(kernel), c->dynamicSmemBytes, c->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}
#define cudaLaunchKernelEx(config, kernel, ...) on_host::launch_with(#kernel, config, kernel, __VA_ARGS__)

namespace on_host {

template <class T>
T read_only(const T* p) { return *p; }

inline void sync_warp(int site, unsigned mask = 0xffffffffu) { meet_warp(Meeting::kBarrier, site, mask, 0, 0); }
inline unsigned lane() { return (thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z)) % 32; }

enum Shuffle { kFrom, kDown, kUp, kXor };

// Lanes outside the segment of `width` read their own value.
template <class T>
T shuffle(int site, unsigned mask, Shuffle kind, T value, int n, int width = 32) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  const int at = static_cast<int>(lane()), first = at / width * width;
  const int wanted = kind == kFrom ? first + (n & (width - 1)) : kind == kDown ? at + n : kind == kUp ? at - n : at ^ n;
  const bool inside = wanted >= first && wanted < first + width;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(Meeting::kShuffle, site, mask, bits, static_cast<unsigned>(inside ? wanted : at));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// `declaration` is a different function for each, so that every block finds one array at one place.
template <class T, class Declaration>
T& shared(Declaration) {
  static const char declaration = 0;
  return *static_cast<T*>(shared_memory(&declaration, sizeof(T), std::max<size_t>(alignof(T), 16)));
}

struct Configuration {
  const char* kernel;
  unsigned bound;
  Size grid, block;
  size_t shared = 0;
  void* stream = nullptr;
  unsigned cluster = 1;
};

template <class... P>
struct Launcher {
  void (*kernel)(P...);
  Configuration c;

  using Arguments = std::tuple<void (*)(P...), P...>;

  static void run(const void* arguments) {
    std::apply([](auto kernel, const P&... p) { kernel(p...); }, *static_cast<const Arguments*>(arguments));
  }

  template <class... A>
  void operator()(A&&... a) const {
    auto arguments = std::make_shared<Arguments>(kernel, std::forward<A>(a)...);
    launch({c.kernel, c.grid, c.block, c.shared, c.stream, c.bound, &run, arguments, sizeof(Arguments),
            reinterpret_cast<const void*>(kernel), c.cluster});
  }
};

template <class... P>
Launcher<P...> launcher(void (*kernel)(P...), const Configuration& c) { return {kernel, c}; }

// By the name of a kernel without its template's arguments.
template <class... P, class... A>
cudaError_t launch_with(const char* kernel, const cudaLaunchConfig_t* c, void (*function)(P...), A&&... a) {
  static const std::string name(kernel, std::strcspn(kernel, "<"));
  const unsigned cluster = c->numAttrs ? c->attrs[0].val.clusterDim.x : 1;
  launcher(function, {name.c_str(), 0, c->grid, c->block, c->dynamicSmemBytes, c->stream, cluster})(std::forward<A>(a)...);
  return cudaSuccess;   // an error is that of cudaGetLastError
}

template <class T>
T atomically(T* p, T (*f)(T, T), T value) {
  unchecked(true);
  const T before = *p;
  *p = f(before, value);
  unchecked(false);
  return before;
}

// An approximation of `exact` whose documented error is `bound`.
inline float approximate(double exact, double bound) { return static_cast<float>(exact + approximation * bound); }
inline float flush(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }

// PTX, by the names of its instructions; the bounds are those of the PTX manual.
inline void ptx_lg2_approx_ftz_f32(float& d, float a) {
  const double exact = std::log2(static_cast<double>(flush(a)));
  d = flush(approximate(exact, a > 0.5f && a < 2 ? 0x1p-22 : std::fabs(exact) * 0x1p-22));
}
inline void ptx_rsqrt_approx_ftz_f32(float& d, float a) {
  const double exact = 1 / std::sqrt(static_cast<double>(flush(a)));
  d = flush(approximate(exact, std::isfinite(exact) ? exact * 0x1.12p-23 : 0));   // 2^-22.9
}
inline void ptx_ex2_approx_ftz_f32(float& d, float a) {
  const double exact = std::exp2(static_cast<double>(flush(a)));
  d = flush(approximate(exact, exact * 0x1p-22));
}
inline void ptx_rcp_approx_ftz_f32(float& d, float a) {
  const double exact = 1 / static_cast<double>(flush(a));
  d = flush(approximate(exact, std::isfinite(exact) ? exact * 0x1p-23 : 0));
}
inline void ptx_sqrt_approx_ftz_f32(float& d, float a) {
  const double exact = std::sqrt(static_cast<double>(flush(a)));
  d = flush(approximate(exact, exact * 0x1p-23));
}

}  // namespace on_host

// Types of 16 bits: conversions as PyTorch's, which round to nearest even.
struct __nv_bfloat16 { unsigned short bits; };
struct __half { unsigned short bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };
inline float __bfloat162float(__nv_bfloat16 v) { return std::bit_cast<float>(static_cast<unsigned>(v.bits) << 16); }
inline float __half2float(__half v) { return static_cast<float>(c10::Half(v.bits, c10::Half::from_bits())); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {c10::BFloat16(v).x}; }
inline __half __float2half_rn(float v) { return {c10::Half(v).x}; }
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }
inline __half __float2half(float v) { return __float2half_rn(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return static_cast<unsigned __int128>(a) * b >> 64; }
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __popcll(unsigned long long v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return v == 0 ? 0 : std::countr_zero(static_cast<unsigned>(v)) + 1; }
inline unsigned __brev(unsigned v) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (v >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (n & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (n & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> 4 * i & 15, byte = bytes >> 8 * (which & 7) & 255;
    result |= (which & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float rsqrtf(float v) { return static_cast<float>(1 / std::sqrt(static_cast<double>(v))); }
inline double rsqrt(double v) { return 1 / std::sqrt(v); }
// Errors of the CUDA programming guide: two units of the last place for a quotient; for the others those of the PTX inside.
inline float __fdividef(float a, float b) { return on_host::approximate(static_cast<double>(a) / b, std::fabs(a / b) * 0x1p-22); }
inline float __log2f(float v) { on_host::ptx_lg2_approx_ftz_f32(v, v); return v; }
inline float __logf(float v) { return __log2f(v) * 0.693147181f; }
inline float __expf(float v) { v *= 1.44269504f; on_host::ptx_ex2_approx_ftz_f32(v, v); return v; }

// Hints of where to cache change nothing here.
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldca(const T* p) { return *p; }
template <class T> T __ldlu(const T* p) { return *p; }
template <class T> T __ldcv(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
template <class T> void __stcg(T* p, T v) { *p = v; }
template <class T> void __stwt(T* p, T v) { *p = v; }
template <class T> void __stwb(T* p, T v) { *p = v; }

template <class T> T atomicAdd(T* p, std::type_identity_t<T> v) { return on_host::atomically<T>(p, [](T a, T b) { return static_cast<T>(a + b); }, v); }
template <class T> T atomicMax(T* p, std::type_identity_t<T> v) { return on_host::atomically<T>(p, [](T a, T b) { return std::max(a, b); }, v); }
template <class T> T atomicMin(T* p, std::type_identity_t<T> v) { return on_host::atomically<T>(p, [](T a, T b) { return std::min(a, b); }, v); }
template <class T> T atomicExch(T* p, std::type_identity_t<T> v) { return on_host::atomically<T>(p, [](T, T b) { return b; }, v); }
inline unsigned atomicInc(unsigned* p, unsigned most) {
  on_host::unchecked(true);
  const unsigned before = *p;
  *p = before >= most ? 0 : before + 1;
  on_host::unchecked(false);
  return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class A, class B> auto min(A a, B b) -> std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> { return b < a ? b : a; }
template <class A, class B> auto max(A a, B b) -> std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> { return a < b ? b : a; }
