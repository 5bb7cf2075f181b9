// 512-bit vectors for the row kernels.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace latentforge {
namespace {

struct Simd {
  using V = __m512;
  static constexpr int width = 16;
  static constexpr bool fused = true;

  static V set(float x) { return _mm512_set1_ps(x); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
  // Returns the second operand where either is NaN.
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V floor(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  // p * 2^floor(n); minus infinity and anything below the range give 0, NaN
  // stays NaN.
  static V scale(V p, V n) { return _mm512_scalef_ps(p, n); }
  static V scale_clamped(V p, V n) { return scale(p, n); }
  // x * c rounded down to a whole number, plus `addend`, a large one: the whole number is in the low bits.
  static constexpr bool rounds_down = true;
  static V whole(V x, V c, V addend) {
    return _mm512_fmadd_round_ps(x, c, addend, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  // p times two to the power of the low bits of `whole`, unchecked.
  static V add_exponent(V p, V whole) {
    const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(whole), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power));
  }
  // value where gate > 0, else 0.
  static V where_positive(V gate, V value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_GT_OQ), value);
  }
  static float sum(V a) { return _mm512_reduce_add_ps(a); }
  static float highest(V a) { return _mm512_reduce_max_ps(a); }

  // Two vectors at once: for bf16 the even and the odd columns, which costs a
  // shift and a mask instead of a shuffle.
  static void load2(const float* p, V& a, V& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + width);
  }
  static void load2(const uint16_t* p, V& a, V& b) {
    const __m512i x = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void store2(float* p, V a, V b) {
    _mm512_storeu_ps(p, a);
    _mm512_storeu_ps(p + width, b);
  }
  // To nearest, ties away from zero; the bf16 is in the upper half.
  static __m512i rounded(V a) { return _mm512_add_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(0x8000)); }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static void store2(uint16_t* p, V a, V b) {
    const __m512i even = _mm512_srli_epi32(rounded(a), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, even, rounded(b)));
  }
  // From the columns' own order, for gradients of fp32 rows.
  static void store2_ordered(uint16_t* p, V a, V b) {
    const auto narrowed = [](uint16_t* q, V v) {
      const __m256i x = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(v), 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), x);
    };
    narrowed(p, a);
    narrowed(p + width, b);
  }
};

}  // namespace
}  // namespace latentforge
