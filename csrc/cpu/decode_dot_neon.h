// Products in the 128-bit vectors of aarch64; see decode_tile.h for what a Dot is. The last two are for a unit that is
// compiled for Armv8.6's bf16 and Armv8.4's dot products.
//
// An accumulator is two vectors that take turns, so that the next multiply-add need not wait for the one before.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace latentforge {
namespace {

struct NeonTile {
  static constexpr int rows = 4, offset_weight = 0;
  static constexpr int tokens(int k) { return k <= 2 ? 4 : 2; }
};

struct FloatTileNeon : NeonTile {
  using Source = float;
  using Total = float;
  struct Acc {
    float32x4_t a, b;
  };
  static constexpr int parts = 1;
  static Acc zero() { return {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}; }
  static void sum4(const Acc* acc, float (*out)[4]) {
    float32x4_t x[4];
    for (int i = 0; i < 4; ++i) x[i] = vaddq_f32(acc[i].a, acc[i].b);
    vst1q_f32(out[0], vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
  }
};

struct F32Dot : FloatTileNeon {
  using Weight = float;
  using Hidden = float;
  struct Piece {
    float32x4_t a, b;
  };
  static constexpr int step = 8, hidden_step = 8;
  static Piece weight(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void pack(const float* in, float* out) { std::memcpy(out, in, step * sizeof(float)); }
  static Piece hidden(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static Acc add(Acc acc, Piece w, Piece h) { return {vfmaq_f32(acc.a, w.a, h.a), vfmaq_f32(acc.b, w.b, h.b)}; }
};

// bf16 weights widened to fp32 by interleaving them with zeros.
struct Bf16Dot : F32Dot {
  using Weight = uint16_t;
  static Piece weight(const uint16_t* p) {
    const uint16x8_t x = vld1q_u16(p), zero = vdupq_n_u16(0);
    return {vreinterpretq_f32_u16(vzip1q_u16(zero, x)), vreinterpretq_f32_u16(vzip2q_u16(zero, x))};
  }
};

struct IntTileNeon : NeonTile {
  using Source = int32_t;
  using Total = int32_t;
  using Weight = int8_t;
  using Hidden = int8_t;
  struct Acc {
    int32x4_t part[3];
  };
  static constexpr int parts = 3;
  static constexpr int tokens(int k) { return k == 1 ? 4 : 2; }
  static Acc zero() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  static void sum4(const Acc* acc, int32_t (*out)[4]) {
    for (int p = 0; p < parts; ++p)
      vst1q_s32(out[p],
                vpaddq_s32(vpaddq_s32(acc[0].part[p], acc[1].part[p]), vpaddq_s32(acc[2].part[p], acc[3].part[p])));
  }
  template <int step>
  static void pack_bytes(const int32_t* in, int8_t* out) {
    for (int i = 0; i < step; ++i) {
      int32_t part[3];
      three_bytes(in[i], part);
      for (int p = 0; p < parts; ++p) out[p * step + i] = static_cast<int8_t>(part[p]);
    }
  }
};

// Bytes times bytes in 16 bits (128 * 128 fits), added in pairs to sums of 32.
struct Int8Dot : IntTileNeon {
  using Piece = int8x8_t;
  static constexpr int step = 8, hidden_step = 24;
  static Piece weight(const int8_t* p) { return vld1_s8(p); }
  static void pack(const int32_t* in, int8_t* out) { pack_bytes<step>(in, out); }
  struct Row {
    int8x8_t part[3];
  };
  static Row hidden(const int8_t* h) { return {{vld1_s8(h), vld1_s8(h + step), vld1_s8(h + 2 * step)}}; }
  static Acc add(Acc acc, Piece w, Row h) {
    for (int p = 0; p < parts; ++p) acc.part[p] = vpadalq_s16(acc.part[p], vmull_s8(w, h.part[p]));
    return acc;
  }
};

#if defined(__ARM_FEATURE_DOTPROD)
struct Int8DotProduct : IntTileNeon {
  using Piece = int8x16_t;
  static constexpr int step = 16, hidden_step = 48;
  static Piece weight(const int8_t* p) { return vld1q_s8(p); }
  static void pack(const int32_t* in, int8_t* out) { pack_bytes<step>(in, out); }
  struct Row {
    int8x16_t part[3];
  };
  static Row hidden(const int8_t* h) { return {{vld1q_s8(h), vld1q_s8(h + step), vld1q_s8(h + 2 * step)}}; }
  static Acc add(Acc acc, Piece w, Row h) {
    for (int p = 0; p < parts; ++p) acc.part[p] = vdotq_s32(acc.part[p], w, h.part[p]);
    return acc;
  }
};
#endif

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// bfdot: two products and a sum a lane and instruction. Each addition rounds to odd (the last bit is set where bits are
// lost) and denormals are flushed, whatever the mode: errors of up to one unit in the last place instead of half a
// one, without a bias. Other variants' bits differ.
struct Bf16PairDot : FloatTileNeon {
  using Weight = uint16_t;
  using Hidden = uint16_t;
  struct Piece {
    bfloat16x8_t a, b;
  };
  static constexpr int step = 16, hidden_step = 16;
  static bfloat16x8_t load(const uint16_t* p) { return vreinterpretq_bf16_u16(vld1q_u16(p)); }
  static Piece weight(const uint16_t* p) { return {load(p), load(p + 8)}; }
  static void pack(const float* in, uint16_t* out) {
    for (int i = 0; i < step; ++i) out[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, in[i]) >> 16);
  }
  static Piece hidden(const uint16_t* p) { return {load(p), load(p + 8)}; }
  static Acc add(Acc acc, Piece w, Piece h) { return {vbfdotq_f32(acc.a, w.a, h.a), vbfdotq_f32(acc.b, w.b, h.b)}; }
};
#endif

}  // namespace
}  // namespace latentforge
