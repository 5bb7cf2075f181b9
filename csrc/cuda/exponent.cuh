// 2^(c * d) for d = logit - reference, in two accuracies.
//
// bf16 logits: one multiplication and the special function unit (2^-22), which is far under the rounding of a bf16
// gradient. fp32 logits: c in two parts, so that nothing is lost in the product, and a polynomial of degree six
// (2e-9 beside the rounding of fp32), made of IEEE operations only.
#pragma once

#include "device.cuh"

namespace latentforge::cuda {

constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLog2e = 1.44269504088896340736;

// A factor from logits to powers of two; `low` is what fp32 leaves of it.
struct Factor {
  float high = 0.0f;
  float low = 0.0f;
};

inline Factor factor_of(double exact) {
  const float high = static_cast<float>(exact);
  return {high, static_cast<float>(exact - static_cast<double>(high))};
}

struct FastExp {
  static __device__ __forceinline__ float power(float z) { return exp2_approximate(z); }
  static __device__ __forceinline__ float of(float d, Factor c) { return exp2_approximate(d * c.high); }
};

struct ExactExp {
  // 2^(z + rest), |rest| far under 1. NaN gives NaN; under 2^-126 the result is zero.
  static __device__ __forceinline__ float power(float z, float rest = 0.0f) {
    const float shifted = z + 12582912.0f;  // 1.5 * 2^23: the integer nearest to z stands in the lowest bits
    const float f = (z - (shifted - 12582912.0f)) + rest;
    float p = 1.535336188319500e-4f;
    p = fmaf(p, f, 1.339887440266574e-3f);
    p = fmaf(p, f, 9.618437357674640e-3f);
    p = fmaf(p, f, 5.550332471162809e-2f);
    p = fmaf(p, f, 2.402264791363012e-1f);
    p = fmaf(p, f, 6.931472028550421e-1f);
    p = fmaf(p, f, 1.0f);
    const float scale = float_from_bits((static_cast<uint32_t>(__float_as_int(shifted)) << 23) + 0x3f800000u);
    return z < -126.0f ? 0.0f : p * scale;
  }
  static __device__ __forceinline__ float of(float d, Factor c) {
    const float z = d * c.high;
    return power(z, fmaf(d, c.high, -z) + d * c.low);
  }
};

template <class T>
struct ExpFor {
  using type = FastExp;
};
template <>
struct ExpFor<float> {
  using type = ExactExp;
};

}  // namespace latentforge::cuda
