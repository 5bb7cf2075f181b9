// Products in 128-bit vectors of the compiler's own notation, without a fused multiply-add; see decode_tile.h for what
// a Dot is.
#pragma once

#include <cstdint>
#include <cstring>

namespace latentforge {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Word4 __attribute__((vector_size(16)));

struct FloatTile128 {
  using Source = float;
  using Total = float;
  using Acc = Float4;
  using Hidden = float;
  struct Piece {
    Float4 a, b;
  };
  static constexpr int rows = 4, parts = 1, offset_weight = 0, step = 8, hidden_step = 8;
  static constexpr int tokens(int k) { return k <= 2 ? 4 : 2; }
  static Acc zero() { return Acc{}; }
  static const float* hidden(const float* h) { return h; }  // too few registers to hold it
  static Acc add(Acc acc, Piece w, const float* h) {
    Float4 a, b;
    std::memcpy(&a, h, sizeof a);
    std::memcpy(&b, h + 4, sizeof b);
    return (acc + w.a * a) + w.b * b;
  }
  static void sum4(const Acc* acc, float (*out)[4]) {
    for (int i = 0; i < 4; ++i) out[0][i] = (acc[i][0] + acc[i][2]) + (acc[i][1] + acc[i][3]);
  }
};

// bf16 weights widened to fp32: even and odd columns, a shift and a mask.
struct Bf16Dot : FloatTile128 {
  using Weight = uint16_t;
  static Piece weight(const uint16_t* p) {
    Word4 x;
    std::memcpy(&x, p, sizeof x);
    return {(Float4)(x << 16), (Float4)(x & 0xffff0000u)};
  }
  static void pack(const float* in, float* out) {
    for (int i = 0; i < 4; ++i) {
      out[i] = in[2 * i];
      out[4 + i] = in[2 * i + 1];
    }
  }
};

struct F32Dot : FloatTile128 {
  using Weight = float;
  static Piece weight(const float* p) {
    Piece piece;
    std::memcpy(&piece, p, sizeof piece);
    return piece;
  }
  static void pack(const float* in, float* out) { std::memcpy(out, in, step * sizeof(float)); }
};

struct Int8Dot {
  using Source = int32_t;
  using Total = int32_t;
  using Weight = int8_t;
  using Hidden = int32_t;
  using Piece = Int4;
  static constexpr int rows = 4, parts = 3, offset_weight = 0, step = 4, hidden_step = 12;
  static constexpr int tokens(int k) { return k == 1 ? 4 : k == 2 ? 2 : 1; }
  struct Acc {
    Int4 part[3];
  };
  static Acc zero() { return Acc{}; }
  static Piece weight(const int8_t* p) { return Int4{p[0], p[1], p[2], p[3]}; }
  static void pack(const int32_t* in, int32_t* out) {
    for (int i = 0; i < step; ++i) {
      int32_t part[3];
      three_bytes(in[i], part);
      for (int p = 0; p < 3; ++p) out[p * step + i] = part[p];
    }
  }
  static const int32_t* hidden(const int32_t* h) { return h; }
  static Acc add(Acc acc, Piece w, const int32_t* h) {
    for (int p = 0; p < 3; ++p) {
      Int4 row;
      std::memcpy(&row, h + p * step, sizeof row);
      acc.part[p] += w * row;
    }
    return acc;
  }
  static void sum4(const Acc* acc, int32_t (*out)[4]) {
    for (int p = 0; p < 3; ++p)
      for (int i = 0; i < 4; ++i) {
        const Int4 x = acc[i].part[p];
        out[p][i] = (x[0] + x[2]) + (x[1] + x[3]);
      }
  }
};

}  // namespace
}  // namespace latentforge
