// The few things that the kernels ask of the device, in one place: the tests compile the same kernels for the host,
// with a stand-in for each of them (tests/kernels/cuda/emulation).
#pragma once

#include <cstdint>

#ifdef LF_HOST_EMULATION
#include "cuda_host.h"
#else
#include <cuda_runtime.h>
#define LF_LAUNCH(kernel, blocks, threads, shared, stream, ...) kernel<<<blocks, threads, shared, stream>>>(__VA_ARGS__)
#endif

namespace latentforge::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Bf16 {
  uint16_t bits;
};

#ifdef LF_HOST_EMULATION

using lf_host::exp2_approximate;
using lf_host::float_from_bits;
using lf_host::load_again;
using lf_host::load_once;
using lf_host::load_vector;
using lf_host::store_vector;

inline uint32_t pack_bf16(float low, float high) { return lf_host::round_bf16(low) | lf_host::round_bf16(high) << 16; }

#else

__device__ __forceinline__ float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }

// 2^x in one instruction of the special function unit: relative error 2^-22, results under 2^-126 are zero.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest even, `low` at the lower address.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// 16 aligned bytes that stay in the second-level cache for the second pass.
__device__ __forceinline__ uint4 load_vector(const void* p) { return __ldcg(static_cast<const uint4*>(p)); }
// 16 aligned bytes that the first-level cache keeps: they are read over and over, and nobody writes them.
__device__ __forceinline__ uint4 load_again(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
// 16 aligned bytes that nobody reads again.
__device__ __forceinline__ uint4 load_once(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
__device__ __forceinline__ void store_vector(void* p, uint4 value) { __stcs(static_cast<uint4*>(p), value); }

#endif

__device__ __forceinline__ float minus_infinity() { return float_from_bits(0xff800000u); }
__device__ __forceinline__ float not_a_number() { return float_from_bits(0x7fc00000u); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, Bf16* out) {
  out->bits = static_cast<uint16_t>(pack_bf16(x, 0.0f) & 0xffffu);
}

// Butterflies: every lane ends with the same bits, since a + b and b + a are equal, and the order is fixed.
__device__ __forceinline__ float warp_max(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

}  // namespace latentforge::cuda
