// Elementary functions over logits, in IEEE operations that the compiler makes vectors of: the same bits in every
// instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace latentforge {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Integers in the order of the floats; plus and minus zero must have been made one (x + 0.0f does).
inline int32_t order_key(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float from_order_key(int32_t key) { return __builtin_bit_cast(float, key ^ ((key >> 31) & 0x7fffffff)); }
inline int32_t is_impossible(float x) {  // NaN or plus infinity
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return (bits & 0x7fffffffu) >= 0x7f800000u && bits != 0xff800000u;
}

// One number that is larger for the better token: larger logit first, of equals the lower id.
inline uint64_t rank(int32_t key, int64_t id) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(key) ^ 0x80000000u) << 32) |
         (0xffffffffu - static_cast<uint32_t>(id));
}
inline int32_t rank_key(uint64_t rank) { return static_cast<int32_t>(static_cast<uint32_t>(rank >> 32) ^ 0x80000000u); }
inline int64_t rank_id(uint64_t rank) { return 0xffffffffu - static_cast<uint32_t>(rank); }

// e^d for d <= 0, relative error 1e-7; below -87, 0. (Cephes' expf.)
inline float exp_of_negative(float d) {
  const float x = d < -87.0f ? -87.0f : d;
  const float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const float f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  const float y = (p * (f * f) + f) + 1.0f;
  const float scaled = y * __builtin_bit_cast(float, (static_cast<int32_t>(n) + 127) << 23);
  const int32_t inside = d < -87.0f ? 0 : -1;
  return __builtin_bit_cast(float, __builtin_bit_cast(int32_t, scaled) & inside);
}

// Cephes' tanhf: a polynomial near 0, the exponential elsewhere.
inline float tanh_of(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x), sign = bits & static_cast<int32_t>(0x80000000u);
  const float a = __builtin_bit_cast(float, bits & 0x7fffffff), square = a * a;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  const float near = (p * square) * a + a, e = exp_of_negative(-2.0f * a), far = (1.0f - e) / (1.0f + e);
  const int32_t small = a < 0.625f ? -1 : 0;
  const int32_t magnitude = (__builtin_bit_cast(int32_t, near) & small) | (__builtin_bit_cast(int32_t, far) & ~small);
  return __builtin_bit_cast(float, magnitude | sign);
}

// A token's share of the row's mass as an integer, 2^42 for the most likely one: sums do not depend on their order.
inline uint64_t mass_units(float s, float highest) {
  return static_cast<uint64_t>(static_cast<double>(exp_of_negative(s - highest)) * 4398046511104.0);
}
constexpr double kMassUnit = 4398046511104.0;

}  // namespace
}  // namespace latentforge
