// 128-bit vectors of aarch64 for the row kernels, with fused multiply-add; and, in a unit that is compiled for it, the
// bf16 conversion of Armv8.6 (Cortex-X925, Neoverse N2 and later).
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace latentforge {
namespace {

struct Simd {
  using V = float32x4_t;
  static constexpr int width = 4;
  static constexpr bool fused = true;

  static V set(float x) { return vdupq_n_f32(x); }
  static V add(V a, V b) { return vaddq_f32(a, b); }
  static V sub(V a, V b) { return vsubq_f32(a, b); }
  static V mul(V a, V b) { return vmulq_f32(a, b); }
  static V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static V fnma(V a, V b, V c) { return vfmsq_f32(c, a, b); }
  // Returns the second operand where either is NaN.
  static V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static V floor(V a) { return vrndmq_f32(a); }
  // NaN stays NaN.
  static V clamped(V z) { return vminq_f32(set(127.0f), vmaxq_f32(set(-127.0f), z)); }
  // p * 2^n for whole n in [-127, 127]: -127 gives 0, NaN in p stays NaN.
  static V scale(V p, V n) {
    const int32x4_t bits = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    return mul(p, vreinterpretq_f32_s32(bits));
  }
  static V scale_clamped(V p, V n) { return scale(p, clamped(n)); }
  // Whether fraction() and scale() are instructions that take any number.
  static constexpr bool scales = false;
  static V fraction(V z) { return sub(z, floor(z)); }
  // p times two to the power of the low bits of `whole`, a whole number that was rounded by a large addend; unchecked.
  static V add_exponent(V p, V whole) {
    const int32x4_t power = vshlq_n_s32(vreinterpretq_s32_f32(whole), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), power));
  }
  // value where gate > 0, else 0.
  static V where_positive(V gate, V value) {
    return vreinterpretq_f32_u32(vandq_u32(vcgtzq_f32(gate), vreinterpretq_u32_f32(value)));
  }
  static float sum(V a) { return vaddvq_f32(a); }
  static float highest(V a) { return vmaxvq_f32(a); }

  // Two vectors at once. Interleaving with zeros widens bf16 in the columns' own order, as cheaply as any other.
  static void load2(const float* p, V& a, V& b) {
    a = vld1q_f32(p);
    b = vld1q_f32(p + width);
  }
  static void load2(const uint16_t* p, V& a, V& b) {
    const uint16x8_t x = vld1q_u16(p), zero = vdupq_n_u16(0);
    a = vreinterpretq_f32_u16(vzip1q_u16(zero, x));
    b = vreinterpretq_f32_u16(vzip2q_u16(zero, x));
  }
  static void store2(float* p, V a, V b) {
    vst1q_f32(p, a);
    vst1q_f32(p + width, b);
  }
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  // To nearest, ties to even: the instruction's rounding, which differs from the other variants' in exact ties only.
  static void store2(uint16_t* p, V a, V b) {
    vst1q_u16(p, vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(a), b)));
  }
#else
  // To nearest, ties away from zero; the bf16 is in the upper half.
  static void store2(uint16_t* p, V a, V b) { vst1q_u16(p, vuzp2q_u16(rounded(a), rounded(b))); }
#endif
  static uint16x8_t rounded(V a) {
    return vreinterpretq_u16_u32(vaddq_u32(vreinterpretq_u32_f32(a), vdupq_n_u32(0x8000)));
  }
  static void store2_ordered(uint16_t* p, V a, V b) { store2(p, a, b); }
  static void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
};

}  // namespace
}  // namespace latentforge
