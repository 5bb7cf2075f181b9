// Rows that no kernel can use where they lie: gathered from any stride, widened to fp32, given their bias and cap; and
// gradients that go back to any stride. Plain loops over one row of scratch: nothing of size [N, V].
#pragma once

#include <cmath>
#include <cstdint>

#include "exponent.h"
#include "kd.h"

namespace latentforge {
namespace {

inline const void* row_address(const Logits& logits, int64_t row) {
  const int64_t width = logits.dtype == Dtype::bf16 ? 2 : 4;
  return static_cast<const char*>(logits.data) + row * logits.row_stride * width;
}

template <class T>
void gather(const T* p, int64_t stride, float* out, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = widen(p[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = widen(p[i * stride]);
  }
}

inline void gather_row(const Logits& logits, int64_t row, float* out, int64_t n) {
  const void* p = row_address(logits, row);
  if (logits.dtype == Dtype::bf16) {
    gather(static_cast<const uint16_t*>(p), logits.column_stride, out, n);
  } else {
    gather(static_cast<const float*>(p), logits.column_stride, out, n);
  }
}

// A row of a matrix of T: where it lies, or copied side by side.
template <class T>
const T* beside(const Logits& logits, int64_t row, std::vector<T>& copy, int64_t n) {
  const T* p = static_cast<const T*>(row_address(logits, row));
  if (logits.column_stride == 1) return p;
  copy.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) copy[static_cast<size_t>(i)] = p[i * logits.column_stride];
  return copy.data();
}

// Puts `row` [n], or zeros where that is null, into a row of a matrix of T.
template <class T>
void scatter_row(const T* row, const Logits& logits, int64_t index, int64_t n) {
  T* p = static_cast<T*>(const_cast<void*>(row_address(logits, index)));
  for (int64_t i = 0; i < n; ++i) p[i * logits.column_stride] = row == nullptr ? T{0} : row[i];
}

// tanh to about one unit in the last place: an odd polynomial near zero, one exponential beyond (Cephes).
inline float tanh_of(float x) {
  const float magnitude = std::fabs(x), square = x * x;
  float near = -5.70498872745e-3f;
  near = near * square + 2.06390887954e-2f;
  near = near * square - 5.37397155531e-2f;
  near = near * square + 1.33314422036e-1f;
  near = near * square - 3.33332819422e-1f;
  near = near * square * x + x;
  // e^(2 |x|): beyond 10 tanh is 1 in fp32.
  const float z = (magnitude < 10.0f ? magnitude : 10.0f) * 2.885390082f;
  const float shifted = z + 12582912.0f, f = (z - (shifted - 12582912.0f)) * 0.69314718056f;
  float p = 1.3888889e-3f;
  p = p * f + 8.3333333e-3f;
  p = p * f + 4.1666667e-2f;
  p = p * f + 1.6666667e-1f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  uint32_t bits, power;
  __builtin_memcpy(&bits, &p, sizeof bits);
  __builtin_memcpy(&power, &shifted, sizeof power);
  bits += power << 23;
  __builtin_memcpy(&p, &bits, sizeof p);
  const float far = 1.0f - 2.0f / (p + 1.0f), size = magnitude < 0.625f ? std::fabs(near) : far;
  const float signed_size = std::copysign(size, x);
  return x == x ? signed_size : x;
}

// s = cap tanh(scale (x + bias) / cap), or x + bias where there is no cap. Minus infinity stays: it is padding, not a
// logit of minus the cap.
inline void shape_row(float* s, int64_t n, const float* bias, double scale, double cap) {
  if (bias != nullptr)
    for (int64_t i = 0; i < n; ++i) s[i] += bias[i];
  if (cap == 0.0) return;
  const float limit = static_cast<float>(cap), factor = static_cast<float>(scale),
              inverse = static_cast<float>(1.0 / cap);
  for (int64_t i = 0; i < n; ++i) {
    const float x = s[i], capped = limit * tanh_of(factor * x * inverse);
    s[i] = x == -kInfinity ? x : capped;
  }
}

}  // namespace
}  // namespace latentforge
