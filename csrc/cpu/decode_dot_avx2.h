// Products in 256-bit vectors; see decode_tile.h for what a Dot is.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace latentforge {
namespace {

struct FloatTile256 {
  using Source = float;
  using Total = float;
  using Acc = __m256;
  static constexpr int rows = 4, parts = 1, offset_weight = 0;
  static constexpr int tokens(int k) { return k <= 2 ? 4 : 2; }
  static Acc zero() { return _mm256_setzero_ps(); }
  static void sum4(const Acc* acc, float (*out)[4]) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(acc[0], acc[1]), _mm256_unpackhi_ps(acc[0], acc[1]));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(acc[2], acc[3]), _mm256_unpackhi_ps(acc[2], acc[3]));
    const __m256d lo = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const __m256d hi = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const __m256 all = _mm256_add_ps(_mm256_castpd_ps(lo), _mm256_castpd_ps(hi));
    _mm_storeu_ps(out[0], _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};

struct PairOf256 {
  __m256 a, b;
};

// bf16 weights widened to fp32: even and odd columns, a shift and a mask.
struct Bf16Dot : FloatTile256 {
  using Weight = uint16_t;
  using Hidden = float;
  using Piece = PairOf256;
  static constexpr int step = 16, hidden_step = 16;
  static Piece weight(const uint16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static void pack(const float* in, float* out) {
    for (int i = 0; i < 8; ++i) {
      out[i] = in[2 * i];
      out[8 + i] = in[2 * i + 1];
    }
  }
  static PairOf256 hidden(const float* p) { return {_mm256_load_ps(p), _mm256_load_ps(p + 8)}; }
  static Acc add(Acc acc, Piece w, PairOf256 h) { return _mm256_fmadd_ps(w.b, h.b, _mm256_fmadd_ps(w.a, h.a, acc)); }
};

struct F32Dot : FloatTile256 {
  using Weight = float;
  using Hidden = float;
  using Piece = PairOf256;
  static constexpr int step = 16, hidden_step = 16;
  static Piece weight(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void pack(const float* in, float* out) { std::memcpy(out, in, step * sizeof(float)); }
  static PairOf256 hidden(const float* p) { return {_mm256_load_ps(p), _mm256_load_ps(p + 8)}; }
  static Acc add(Acc acc, Piece w, PairOf256 h) { return _mm256_fmadd_ps(w.b, h.b, _mm256_fmadd_ps(w.a, h.a, acc)); }
};

struct Int8Dot {
  using Source = int32_t;
  using Total = int32_t;
  using Weight = int8_t;
  using Hidden = int16_t;
  using Piece = __m256i;
  static constexpr int rows = 4, parts = 3, offset_weight = 0, step = 16, hidden_step = 48;
  static constexpr int tokens(int k) { return k == 1 ? 4 : k == 2 ? 2 : 1; }
  struct Acc {
    __m256i part[3];
  };
  static Acc zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  static Piece weight(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void pack(const int32_t* in, int16_t* out) {
    for (int i = 0; i < step; ++i) {
      int32_t part[3];
      three_bytes(in[i], part);
      for (int p = 0; p < 3; ++p) out[p * step + i] = static_cast<int16_t>(part[p]);
    }
  }
  static const int16_t* hidden(const int16_t* h) { return h; }  // too few registers to hold it
  static Acc add(Acc acc, Piece w, const int16_t* h) {
    for (int p = 0; p < 3; ++p) {
      const __m256i row = _mm256_load_si256(reinterpret_cast<const __m256i*>(h + p * step));
      acc.part[p] = _mm256_add_epi32(acc.part[p], _mm256_madd_epi16(w, row));
    }
    return acc;
  }
  static void sum4(const Acc* acc, int32_t (*out)[4]) {
    for (int p = 0; p < 3; ++p) {
      const __m256i ab = _mm256_hadd_epi32(acc[0].part[p], acc[1].part[p]);
      const __m256i all = _mm256_hadd_epi32(ab, _mm256_hadd_epi32(acc[2].part[p], acc[3].part[p]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[p]),
                       _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
    }
  }
};

}  // namespace
}  // namespace latentforge
