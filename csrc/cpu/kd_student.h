// What the row kernels share: the student's half of a row, for whichever Simd was included before this header.
//
// A row is read twice: once for its sums, once (from cache) for its gradient, which overwrites the student's logits.
// The sums are taken relative to a reference that is guessed from the first block instead of a maximum that would cost
// a third sweep; a block whose sum shows that the guess lies far below it is done again with its own maximum. Sums of a
// block are fp32 lanes, sums of a row are doubles. Single entries (the label, the top-k) are computed in double
// precision.
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
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// How the exponential at temperature 1, which the cross-entropy needs, follows
// from the one at the KD temperature.
enum class Ce { same, square, separate };

inline bool usable(double sum) { return sum > 0.0 && sum < std::numeric_limits<double>::infinity(); }

// Two rows that are walked together must come in one order of columns; the
// cheap bf16 order is only for equal types.
template <bool ordered, class T>
void load2(const T* p, Simd::V (&x)[2]) {
  if constexpr (ordered) {
    Simd::load2_ordered(p, x[0], x[1]);
  } else {
    Simd::load2(p, x[0], x[1]);
  }
}

// Asks for what the same step of another row needs, into the second-level
// cache.
template <class T>
void fetch_step(const T* p) {
  for (int64_t byte = 0; byte < kStep * static_cast<int64_t>(sizeof(T)); byte += 64)
    Simd::prefetch(reinterpret_cast<const char*>(p) + byte);
}

template <class T>
T* row_of(const Logits& logits, int64_t row) {
  return static_cast<T*>(logits.data) + row * logits.row_stride;
}

template <class T>
float highest(const T* p, int64_t n) {
  Simd::V best = Simd::set(-kInfinity), a, b;
  for (int64_t i = 0; i < n; i += kStep) {
    Simd::load2(p + i, a, b);
    best = Simd::max(Simd::max(best, a), b);
  }
  return Simd::highest(best);
}

// The student's half of a row: sums at the KD temperature and at temperature 1
// over one shared reference.
template <class S, Ce ce, bool accurate>
struct Student {
  using V = Simd::V;

  explicit Student(double temperature) : at_t(temperature), at_one(1.0) {}

  V ce_exponential(V x, V e) const {
    if constexpr (ce == Ce::same) return e;
    if constexpr (ce == Ce::square) return Simd::mul(e, e);
    return at_one(x, at_one.power(x));
  }

  // Moves the reference; returns by how many powers of two the row's
  // exponentials at temperature T change.
  double move_to(float reference) {
    const double before = at_t.origin, before_one = at_one.origin;
    at_t.move_to(reference);
    at_one.move_to(reference);
    const double shift = before - at_t.origin;
    if (sum != 0.0) sum *= std::exp2(shift);
    if constexpr (ce == Ce::square) {
      if (sum_one != 0.0) sum_one *= std::exp2(2.0 * shift);
    } else if constexpr (ce == Ce::separate) {
      if (sum_one != 0.0) sum_one *= std::exp2(before_one - at_one.origin);
    }
    return shift;
  }

  // The temperature-1 quantities, in the units of the exponential that was used
  // for them.
  double ce_per_logit() const {
    if constexpr (ce == Ce::same) return at_t.per_logit;
    if constexpr (ce == Ce::square) return 2.0 * at_t.per_logit;
    return at_one.per_logit;
  }
  double ce_origin() const {
    if constexpr (ce == Ce::same) return at_t.origin;
    if constexpr (ce == Ce::square) return 2.0 * at_t.origin;
    return at_one.origin;
  }
  double ce_reference() const { return ce == Ce::separate ? at_one.reference() : at_t.reference(); }
  bool coarse() const { return at_t.coarse() || (ce == Ce::separate && at_one.coarse()); }
  double ce_sum() const { return ce == Ce::same ? sum : sum_one; }

  Exponent<accurate> at_t, at_one;
  bool placed = false;  // whether the reference was taken from a finite logit
  double sum = 0.0, sum_one = 0.0;
};

template <class S>
void fill_row(S* s, int64_t n, double value) {
  S filler;
  narrow(value, &filler);
  std::fill(s, s + n, filler);
}

}  // namespace
}  // namespace latentforge
