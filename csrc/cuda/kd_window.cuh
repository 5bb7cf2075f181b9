// Eight columns of a row in registers: loaded, shaped, stored.
#pragma once

#include "kd_sums.cuh"

namespace latentforge::cuda {

constexpr int kWindow = 8;
constexpr int kTile = kThreads * kWindow;

// Windows that a thread has in flight: 64 bytes in all, as much as hides the memory's latency at three blocks a
// multiprocessor.
template <class S, class T>
constexpr int kFlight = sizeof(S) + sizeof(T) > 4 ? 1 : 2;

// The next value to be worked on comes to the front: a loop over eight registers without eight copies of its body,
// and without an index that only memory has.
__device__ __forceinline__ void rotate(float (&x)[kWindow], float last) {
#pragma unroll
  for (int i = 0; i + 1 < kWindow; ++i) x[i] = x[i + 1];
  x[kWindow - 1] = last;
}

template <class T>
__device__ __forceinline__ bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <class T>
struct Window {
  static constexpr int kVectors = kWindow * sizeof(T) / 16;
  uint4 raw[kVectors];

  // Columns [column, end) of a row, up to eight; what is missing reads as padding. `vectors`: the eight columns are all
  // there, and 16-byte aligned.
  template <bool last_use>
  __device__ __forceinline__ void load(const T* row, int column, int end, bool vectors) {
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const T* p = row + column + i * (16 / sizeof(T));
        raw[i] = last_use ? load_once(p) : load_vector(p);
      }
    } else {
      uint32_t words[4 * kVectors];
      constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
      for (int i = 0; i < 4 * kVectors; ++i) {
        words[i] = bits_at(row, column + i * kPerWord, end);
        if constexpr (kPerWord == 2) words[i] |= bits_at(row, column + 2 * i + 1, end) << 16;
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        raw[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  }

  __device__ __forceinline__ void unpack(float (&x)[kWindow]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 2) {
          x[2 * j] = float_from_bits(words[j] << 16);
          x[2 * j + 1] = float_from_bits(words[j] & 0xffff0000u);
        } else {
          x[4 * i + j] = float_from_bits(words[j]);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t bits_at(const T* row, int column, int end) {
    if constexpr (sizeof(T) == 2) {
      return column < end ? row[column].bits : 0xff80u;
    } else {
      return __float_as_uint(column < end ? row[column] : minus_infinity());
    }
  }
};

template <class T>
__device__ __forceinline__ void store_window(T* p, const float (&x)[kWindow]) {
  if constexpr (sizeof(T) == 2) {
    store_vector(
        p, make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])));
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      store_vector(p + 4 * i, make_uint4(__float_as_uint(x[4 * i]), __float_as_uint(x[4 * i + 1]),
                                         __float_as_uint(x[4 * i + 2]), __float_as_uint(x[4 * i + 3])));
  }
}

// cap * tanh(scale * (x + bias) / cap); minus infinity stays: it is padding, not a logit of -cap.
__device__ __forceinline__ float shape(float x, int column, const KdParams& p) {
  if (p.call.bias != nullptr) x += p.call.bias[column];
  x *= p.scale;
  return p.cap == 0.0f || x == minus_infinity() ? x : p.cap * tanhf(x / p.cap);
}
__device__ __forceinline__ void shape_window(float (&x)[kWindow], int column, int end, const KdParams& p) {
  if (!p.shaped) return;
#pragma unroll 1
  for (int i = 0; i < kWindow; ++i) rotate(x, column + i < end ? shape(x[0], column + i, p) : x[0]);
}

// d shape(x) / d x, given s = shape(x).
__device__ __forceinline__ float slope(float s, const KdParams& p) {
  if (p.cap == 0.0f) return p.scale;
  const float part = s / p.cap;
  return s == minus_infinity() ? 0.0f : p.scale * (1.0f - part * part);
}

}  // namespace latentforge::cuda
