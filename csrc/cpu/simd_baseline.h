// 128-bit vectors in the compiler's own notation: SSE2 on x86-64, NEON on
// aarch64. No fused multiply-add is assumed.
//
// What every simd_*.h must give the row kernels is here: `V` of `width` floats, `fused` (whether fma rounds once),
// set add sub mul fma (a b + c) fnma (c - a b) max floor sum highest where_positive, scale_clamped(p, n) = p 2^n,
// `scales` with fraction and scale, add_exponent; load2 and store2 of 2 * width elements, fp32 in their order and
// bf16 in any order that is the same for both; store2_ordered to bf16 in the columns' order; prefetch.
#pragma once

#include <cstdint>
#include <cstring>

namespace latentforge {
namespace {

struct Simd {
  typedef float V __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  static constexpr int width = 4;
  static constexpr bool fused = false;

  static V set(float x) { return V{x, x, x, x}; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V fnma(V a, V b, V c) { return c - a * b; }
  static V select(I mask, V a, V b) { return (V)((mask & (I)a) | (~mask & (I)b)); }
  // Returns the second operand where either is NaN.
  static V max(V a, V b) { return select(a > b, a, b); }
  // For values in (-2^22, 2^22): rounds with a magic addend, then steps down
  // where that went up.
  static V floor(V a) {
    const V magic = set(12582912.0f);
    const V n = (a + magic) - magic;
    return n - select(n > a, set(1.0f), set(0.0f));
  }
  static V clamped(V z) {
    const V above = max(set(-127.0f), z);
    return select(above > set(127.0f), set(127.0f), above);
  }
  // p * 2^n for whole n in [-127, 127]: -127 gives 0, NaN in p stays NaN.
  static V scale(V p, V n) {
    const I exponent = __builtin_convertvector(select(n == n, n, set(0.0f)), I) + 127;
    return p * (V)(exponent << 23);
  }
  static V scale_clamped(V p, V n) { return scale(p, clamped(n)); }
  // Whether fraction() and scale() are instructions that take any number.
  static constexpr bool scales = false;
  static V fraction(V z) { return sub(z, floor(z)); }
  // p times two to the power of the low bits of `whole`, a whole number that was rounded by a large addend; unchecked.
  static V add_exponent(V p, V whole) { return (V)((U)p + ((U)whole << 23)); }
  // value where gate > 0, else 0.
  static V where_positive(V gate, V value) { return select(gate > set(0.0f), value, set(0.0f)); }
  static float sum(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static float highest(V a) {
    const float x = a[0] > a[1] ? a[0] : a[1];
    const float y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
  }

  // Two vectors at once: for bf16 the even and the odd columns, which costs a
  // shift and a mask instead of a shuffle.
  static void load2(const float* p, V& a, V& b) {
    std::memcpy(&a, p, sizeof a);
    std::memcpy(&b, p + width, sizeof b);
  }
  static void load2(const uint16_t* p, V& a, V& b) {
    U x;
    std::memcpy(&x, p, sizeof x);
    a = (V)(x << 16);
    b = (V)(x & 0xffff0000u);
  }
  static void store2(float* p, V a, V b) {
    std::memcpy(p, &a, sizeof a);
    std::memcpy(p + width, &b, sizeof b);
  }
  // To nearest, ties away from zero; the bf16 is in the upper half.
  static U rounded(V a) { return (U)a + 0x8000u; }
  static void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
  static void store2(uint16_t* p, V a, V b) {
    const U x = (rounded(a) >> 16) | (rounded(b) & 0xffff0000u);
    std::memcpy(p, &x, sizeof x);
  }
  // From the columns' own order, for gradients of fp32 rows.
  static void store2_ordered(uint16_t* p, V a, V b) {
    const U x = rounded(a) >> 16, y = rounded(b) >> 16;
    for (int i = 0; i < width; ++i) {
      p[i] = static_cast<uint16_t>(x[i]);
      p[i + width] = static_cast<uint16_t>(y[i]);
    }
  }
};

}  // namespace
}  // namespace latentforge
