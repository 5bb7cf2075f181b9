// Products in 512-bit vectors; see decode_tile.h for what a Dot is.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace latentforge {
namespace {

// (x0 + x2) + (x1 + x3) within each 128 bits of four vectors, then over the four quarters.
inline __m128 sum4_vectors(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline __m128i sum4_vectors(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Keeps a vector in its register: gcc repeats a load as the operand of every instruction that needs it, where a
// processor may load one vector in the time of two products, and moves crowded accumulators to the stack and back.
template <class V>
inline V kept(V x) {
  asm("" : "+v"(x));
  return x;
}

struct FloatTile512 {
  using Source = float;
  using Total = float;
  static constexpr int rows = 8, parts = 1, offset_weight = 0;
  static constexpr int tokens(int k) { return k == 1 ? 8 : k <= 4 ? 4 : 3; }
  using Acc = __m512;
  static Acc zero() { return _mm512_setzero_ps(); }
  static void sum4(const Acc* acc, float (*out)[4]) {
    _mm_storeu_ps(out[0], sum4_vectors(acc[0], acc[1], acc[2], acc[3]));
  }
};

struct PairOf512 {
  __m512 a, b;
};

// bf16 weights widened to fp32: even and odd columns, a shift and a mask.
struct Bf16Dot : FloatTile512 {
  using Weight = uint16_t;
  using Hidden = float;
  using Piece = PairOf512;
  static constexpr int step = 32, hidden_step = 32;
  static Piece weight(const uint16_t* p) {
    const __m512i x = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static void pack(const float* in, float* out) {
    for (int i = 0; i < 16; ++i) {
      out[i] = in[2 * i];
      out[16 + i] = in[2 * i + 1];
    }
  }
  static PairOf512 hidden(const float* p) { return {kept(_mm512_load_ps(p)), kept(_mm512_load_ps(p + 16))}; }
  static Acc add(Acc acc, Piece w, PairOf512 h) {
    return kept(_mm512_fmadd_ps(w.b, h.b, kept(_mm512_fmadd_ps(w.a, h.a, acc))));
  }
};

struct F32Dot : FloatTile512 {
  using Weight = float;
  using Hidden = float;
  using Piece = PairOf512;
  static constexpr int step = 32, hidden_step = 32;
  static Piece weight(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
  static void pack(const float* in, float* out) { std::memcpy(out, in, step * sizeof(float)); }
  static PairOf512 hidden(const float* p) { return {kept(_mm512_load_ps(p)), kept(_mm512_load_ps(p + 16))}; }
  static Acc add(Acc acc, Piece w, PairOf512 h) {
    return kept(_mm512_fmadd_ps(w.b, h.b, kept(_mm512_fmadd_ps(w.a, h.a, acc))));
  }
};

struct IntTile512 {
  using Source = int32_t;
  using Total = int32_t;
  using Weight = int8_t;
  static constexpr int rows = 4, parts = 3;
  static constexpr int tokens(int k) { return k <= 2 ? 4 : 2; }  // more spills: three sums a pair
  struct Acc {
    __m512i part[3];
  };
  using Row = Acc;
  static Acc zero() { return {{_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()}}; }
  static void sum4(const Acc* acc, int32_t (*out)[4]) {
    for (int p = 0; p < 3; ++p)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[p]),
                       sum4_vectors(acc[0].part[p], acc[1].part[p], acc[2].part[p], acc[3].part[p]));
  }
};

// Sixteen-bit products: for processors without VNNI.
struct Int8Dot : IntTile512 {
  using Hidden = int16_t;
  using Piece = __m512i;
  static constexpr int step = 32, hidden_step = 96, offset_weight = 0;
  static Piece weight(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void pack(const int32_t* in, int16_t* out) {
    for (int i = 0; i < step; ++i) {
      int32_t part[3];
      three_bytes(in[i], part);
      for (int p = 0; p < 3; ++p) out[p * step + i] = static_cast<int16_t>(part[p]);
    }
  }
  static Row hidden(const int16_t* h) {
    return {{kept(_mm512_load_si512(h)), kept(_mm512_load_si512(h + step)), kept(_mm512_load_si512(h + 2 * step))}};
  }
  static Acc add(Acc acc, Piece w, Row h) {
    for (int p = 0; p < 3; ++p) acc.part[p] = _mm512_add_epi32(acc.part[p], _mm512_madd_epi16(w, h.part[p]));
    return acc;
  }
};

#if defined(__AVX512VNNI__)
// Weights plus 128 are unsigned bytes, as the instruction wants them.
struct Int8VnniDot : IntTile512 {
  using Hidden = int8_t;
  using Piece = __m512i;
  static constexpr int step = 64, hidden_step = 192, offset_weight = 128;
  static Piece weight(const int8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static void pack(const int32_t* in, int8_t* out) {
    for (int i = 0; i < step; ++i) {
      int32_t part[3];
      three_bytes(in[i], part);
      for (int p = 0; p < 3; ++p) out[p * step + i] = static_cast<int8_t>(part[p]);
    }
  }
  static Row hidden(const int8_t* h) {
    return {{kept(_mm512_load_si512(h)), kept(_mm512_load_si512(h + step)), kept(_mm512_load_si512(h + 2 * step))}};
  }
  static Acc add(Acc acc, Piece w, Row h) {
    for (int p = 0; p < 3; ++p) acc.part[p] = kept(_mm512_dpbusd_epi32(acc.part[p], w, h.part[p]));
    return acc;
  }
};
#endif

#if defined(__AVX512BF16__)
// Pairs of bf16 products, added to fp32 by one instruction; for hidden rows that are bf16.
struct Bf16PairDot : FloatTile512 {
  using Weight = uint16_t;
  using Hidden = uint16_t;
  using Piece = __m512i;
  static constexpr int step = 32, hidden_step = 32;
  static Piece weight(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static void pack(const float* in, uint16_t* out) {
    for (int i = 0; i < step; ++i) out[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, in[i]) >> 16);
  }
  static __m512i hidden(const uint16_t* h) { return kept(_mm512_load_si512(h)); }
  static Acc add(Acc acc, Piece w, __m512i h) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)h); }
};
#endif

}  // namespace
}  // namespace latentforge
