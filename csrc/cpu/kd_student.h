// What the kernels for fp32 rows share: the student's half of a row, for whichever Simd was included before this
// header. These kernels take every row: any width, minus infinity, NaN.
//
// A row is read twice: once for its sums, once (from cache) for its gradient. The sums are taken relative to a
// reference that is guessed from the first block instead of a maximum that would cost a third sweep; a block whose sum
// shows that the guess lies far below it is done again with its own maximum. Sums of a block are fp32 lanes, sums of a
// row are doubles. Single entries (the label, the top-k) are computed in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "exponent.h"
#include "kd.h"

namespace latentforge {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int64_t kStep = 2 * Simd::width;
// A block's sum from which its reference is too low. Squared (for temperature 1
// beside 2) it still is an fp32 number.
constexpr double kTooLow = 0x1p60;

// How the exponential at temperature 1, which the cross-entropy needs, follows
// from the one at the KD temperature.
enum class Ce { same, square, separate };

inline bool usable(double sum) { return sum > 0.0 && sum < std::numeric_limits<double>::infinity(); }

// Asks for what the same step of another row needs, into the second-level
// cache.
template <class T>
void fetch_step(const T* p, int64_t count) {
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(T)); byte += 64)
    Simd::prefetch(reinterpret_cast<const char*>(p) + byte);
}

inline float highest(const float* p, int64_t n) {
  Simd::V best = Simd::set(-kInfinity), a, b;
  for (int64_t i = 0; i < n; i += kStep) {
    Simd::load2(p + i, a, b);
    best = Simd::max(Simd::max(best, a), b);
  }
  return Simd::highest(best);
}

// The student's half of a row: sums at the KD temperature and at temperature 1
// over one shared reference.
template <Ce ce>
struct Student {
  using V = Simd::V;

  Student(const KdCall& call, const Row& row)
      : at_t(call.temperature / row.logit_scale), at_one(1.0 / row.logit_scale), logit_scale(row.logit_scale) {}

  V ce_exponential(V x, V e) const {
    if constexpr (ce == Ce::same) return e;
    if constexpr (ce == Ce::square) return Simd::mul(e, e);
    return at_one(x);
  }

  // Moves the reference, and the sums with it.
  void move_to(float reference) {
    const double before = at_t.origin, before_one = at_one.origin;
    at_t.move_to(reference);
    at_one.move_to(reference);
    if (sum != 0.0) sum *= std::exp2(before - at_t.origin);
    if (sum_one != 0.0) sum_one *= std::exp2(before_one - at_one.origin);
  }

  double ce_sum() const { return ce == Ce::same ? sum : sum_one; }
  // -log softmax at temperature 1 of a logit.
  double cross_entropy(double x) const {
    return kLn2 * std::log2(ce_sum()) + logit_scale * (static_cast<double>(at_one.m) - x);
  }

  Exponent at_t, at_one;
  double logit_scale;
  bool placed = false;  // whether the reference was taken from a finite logit
  double sum = 0.0, sum_one = 0.0;
};

// The slope of the cap at the capped logit s, 1 - (s / cap)^2; none at minus infinity, which is padding.
inline Simd::V slope(Simd::V s, Simd::V inverse_cap) {
  const Simd::V u = Simd::mul(s, inverse_cap);
  return Simd::max(Simd::fnma(u, u, Simd::set(1.0f)), Simd::set(0.0f));
}
inline double slope(double s, double cap) {
  return cap == 0.0 ? 1.0 : std::isinf(s) ? 0.0 : std::max(0.0, 1.0 - (s / cap) * (s / cap));
}

inline void store_step(float* p, Simd::V a, Simd::V b) { Simd::store2(p, a, b); }
inline void store_step(uint16_t* p, Simd::V a, Simd::V b) { Simd::store2_ordered(p, a, b); }

template <class G>
void fill_row(G* g, int64_t n, double value) {
  G filler;
  narrow(value, &filler);
  std::fill(g, g + n, filler);
}

// A row that has no distribution: its losses and all of its gradient are NaN.
template <class G>
void refuse_row(const KdCall& call, const Row& row) {
  call.ce_rows[row.index] = call.kd_rows[row.index] = kNaN;
  if (row.gradient != nullptr) fill_row(static_cast<G*>(row.gradient), call.vocab, kNaN);
}

}  // namespace
}  // namespace latentforge
