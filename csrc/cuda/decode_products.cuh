// Products of four rows of the weight with eight rows of hidden states, by one warp.
//
// Each product is summed in one order, whatever else is computed beside it: a lane takes every 32nd group of columns,
// one after the other, and the lanes' sums meet in a butterfly. A batch, a tile or a device changes no bit.
#pragma once

#include "decode_call.h"
#include "device.cuh"

namespace latentforge::cuda {

constexpr int kTokens = 4;
constexpr int kGroup = 8;
static_assert(kTokens * kGroup == kWarp, "one product for each lane");

// The columns of a row of the weight that a lane takes at once, and four of them as numbers.
template <class W>
struct Weights {
  static constexpr int kColumns = sizeof(W) == 1 ? 16 : 8;
  static constexpr int kVectors = kColumns * sizeof(W) / 16;
  uint4 raw[kVectors];

  template <int part>
  __device__ __forceinline__ void unpack(float (&w)[4]) const {
    if constexpr (sizeof(W) == 4) {
      w[0] = float_from_bits(raw[part].x);
      w[1] = float_from_bits(raw[part].y);
      w[2] = float_from_bits(raw[part].z);
      w[3] = float_from_bits(raw[part].w);
    } else if constexpr (sizeof(W) == 2) {
      const uint32_t low = part == 0 ? raw[0].x : raw[0].z, high = part == 0 ? raw[0].y : raw[0].w;
      w[0] = float_from_bits(low << 16);
      w[1] = float_from_bits(low & 0xffff0000u);
      w[2] = float_from_bits(high << 16);
      w[3] = float_from_bits(high & 0xffff0000u);
    } else {
      const uint32_t word = part == 0 ? raw[0].x : part == 1 ? raw[0].y : part == 2 ? raw[0].z : raw[0].w;
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = static_cast<float>(static_cast<int8_t>(word >> (8 * i) & 0xffu));
    }
  }
};

template <class W>
__device__ __forceinline__ void load_weights(Weights<W>& to, const W* row, int64_t column, int64_t width,
                                             bool vectors) {
  constexpr int kVectors = Weights<W>::kVectors;
  constexpr int kPerWord = 4 / sizeof(W);
  if (vectors && row != nullptr && column + Weights<W>::kColumns <= width) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) to.raw[i] = load_once(row + column + i * (16 / sizeof(W)));
    return;
  }
  uint32_t words[4 * kVectors];
#pragma unroll
  for (int i = 0; i < 4 * kVectors; ++i) {
    words[i] = 0;
#pragma unroll 1
    for (int j = 0; j < kPerWord; ++j) {
      const int64_t at = column + i * kPerWord + j;
      uint32_t bits = 0;
      if (row != nullptr && at < width) {
        if constexpr (sizeof(W) == 4) {
          bits = __float_as_uint(row[at]);
        } else if constexpr (sizeof(W) == 2) {
          bits = row[at].bits;
        } else {
          bits = static_cast<uint8_t>(row[at]);
        }
      }
      words[i] |= bits << (8 * sizeof(W) * j);
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    to.raw[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
}

// Adds what four columns give: their weights with each row's hidden states.
template <class W, int part>
__device__ __forceinline__ void add_columns(float (&sums)[kWarp], const Weights<W> (&raw)[kTokens], const float* hidden,
                                            int64_t stride, int rows) {
  float w[kTokens][4];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) raw[t].template unpack<part>(w[t]);
#pragma unroll
  for (int r = 0; r < kGroup; ++r) {
    if (r < rows) {
      const uint4 h = load_again(hidden + r * stride + part * 4);
      const float x[4] = {float_from_bits(h.x), float_from_bits(h.y), float_from_bits(h.z), float_from_bits(h.w)};
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r * kTokens + t] = fmaf(w[t][i], x[i], sums[r * kTokens + t]);
    }
  }
  if constexpr (4 * (part + 1) < Weights<W>::kColumns) add_columns<W, part + 1>(sums, raw, hidden, stride, rows);
}

// A butterfly that keeps half of the sums at each step: the lane ends with the sum of its own number.
template <int half>
__device__ __forceinline__ void scatter_sums(float (&sums)[kWarp]) {
  const bool upper = threadIdx.x & half;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float keep = upper ? sums[i + half] : sums[i], give = upper ? sums[i] : sums[i + half];
    sums[i] = keep + __shfl_xor_sync(kAllLanes, give, half);
  }
  if constexpr (half > 1) scatter_sums<half / 2>(sums);
}

// The product that is this lane's: row lane / 4 of the group, token lane % 4. Rows from `rows` on are left out.
template <class W>
__device__ __forceinline__ float products(const DecodeCall& call, int64_t token, int64_t row, int rows) {
  constexpr int kColumns = Weights<W>::kColumns;
  const W* weight = static_cast<const W*>(call.weight) + token * call.weight_stride;
  const float* hidden = call.hidden + row * call.hidden_stride;
  const bool vectors = reinterpret_cast<uintptr_t>(call.weight) % 16 == 0 &&
                       call.weight_stride * static_cast<int64_t>(sizeof(W)) % 16 == 0;
  float sums[kWarp] = {};
#pragma unroll 1
  for (int64_t column = threadIdx.x % kWarp * kColumns; column < call.hidden_stride; column += kWarp * kColumns) {
    Weights<W> raw[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      load_weights(raw[t], token + t < call.vocab ? weight + t * call.weight_stride : nullptr, column, call.width,
                   vectors);
    add_columns<W, 0>(sums, raw, hidden + column, call.hidden_stride, rows);
  }
  scatter_sums<kWarp / 2>(sums);
  return sums[0];
}

}  // namespace latentforge::cuda
