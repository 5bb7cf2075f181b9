// 256-bit vectors with fused multiply-add for the row kernels.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace latentforge {
namespace {

struct Simd {
  using V = __m256;
  static constexpr int width = 8;
  static constexpr bool fused = true;

  static V set(float x) { return _mm256_set1_ps(x); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
  // Returns the second operand where either is NaN.
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V floor(V a) { return _mm256_floor_ps(a); }
  // p * 2^n for whole n in [-127, 127]: -127 gives 0, NaN in p stays NaN.
  static V scale(V p, V n) {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return mul(p, _mm256_castsi256_ps(bits));
  }
  static V scale_clamped(V p, V n) { return scale(p, _mm256_min_ps(set(127.0f), max(set(-127.0f), n))); }
  // Whether fraction() and scale() are instructions that take any number.
  static constexpr bool scales = false;
  static V fraction(V z) { return sub(z, floor(z)); }
  // p times two to the power of the low bits of `whole`, a whole number that was rounded by a large addend; unchecked.
  static V add_exponent(V p, V whole) {
    const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  }
  // value where gate > 0, else 0.
  static V where_positive(V gate, V value) {
    return _mm256_and_ps(_mm256_cmp_ps(gate, _mm256_setzero_ps(), _CMP_GT_OQ), value);
  }
  static float sum(V a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static float highest(V a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }

  // Two vectors at once: for bf16 the even and the odd columns, which costs a
  // shift and a mask instead of a shuffle.
  static void load2(const float* p, V& a, V& b) {
    a = _mm256_loadu_ps(p);
    b = _mm256_loadu_ps(p + width);
  }
  static void load2(const uint16_t* p, V& a, V& b) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void store2(float* p, V a, V b) {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + width, b);
  }
  // To nearest, ties away from zero; the bf16 is in the upper half.
  static __m256i rounded(V a) { return _mm256_add_epi32(_mm256_castps_si256(a), _mm256_set1_epi32(0x8000)); }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static void store2(uint16_t* p, V a, V b) {
    const __m256i even = _mm256_srli_epi32(rounded(a), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, rounded(b), 0xaa));
  }
  // From the columns' own order, for gradients of fp32 rows.
  static void store2_ordered(uint16_t* p, V a, V b) {
    const __m256i low = _mm256_srli_epi32(rounded(a), 16), high = _mm256_srli_epi32(rounded(b), 16);
    // The pack works within halves; the permutation puts the quarters back in
    // order.
    const __m256i x = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }
};

}  // namespace
}  // namespace latentforge
