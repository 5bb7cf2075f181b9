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
  // Whether fraction() and scale() are instructions that take any number.
  static constexpr bool scales = true;
  // z - floor(z), for scale(), which rounds down by itself; minus infinity has no fraction.
  static V fraction(V z) { return _mm512_reduce_ps(z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  // p times two to the power of the low bits of `whole`, a whole number that was rounded by a large addend; unchecked.
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

  // The largest of n 16-bit numbers (n a multiple of 32), as unsigned and as signed ones.
  static void bounds(const uint16_t* p, int64_t n, uint16_t& lowest, int16_t& highest) {
    __m512i u = _mm512_setzero_si512(), h = _mm512_set1_epi16(-32768);
    for (int64_t i = 0; i < n; i += 32) {
      const __m512i x = _mm512_loadu_si512(p + i);
      u = _mm512_max_epu16(u, x);
      h = _mm512_max_epi16(h, x);
    }
    const __m256i u16 = _mm256_max_epu16(_mm512_castsi512_si256(u), _mm512_extracti64x4_epi64(u, 1));
    const __m256i h16 = _mm256_max_epi16(_mm512_castsi512_si256(h), _mm512_extracti64x4_epi64(h, 1));
    const __m128i u8 = _mm_max_epu16(_mm256_castsi256_si128(u16), _mm256_extracti128_si256(u16, 1));
    const __m128i h8 = _mm_max_epi16(_mm256_castsi256_si128(h16), _mm256_extracti128_si256(h16, 1));
    // The smallest of eight is an instruction; mirrored, so is the largest.
    const __m128i ones = _mm_set1_epi16(-1), flip = _mm_set1_epi16(0x7fff);
    lowest = static_cast<uint16_t>(~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(u8, ones)), 0));
    highest = static_cast<int16_t>(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(h8, flip)), 0) ^ 0x7fff);
  }

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
