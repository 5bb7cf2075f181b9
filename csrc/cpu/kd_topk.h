// A top-k row folded to k + 1 entries: the top-k tokens, and one for all others together. In double precision, from
// powers of two; for whichever kernel has swept the tokens outside.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kd_jsd.h"

namespace latentforge {
namespace {

// 2^x for arrays, to the last digits of a double, in a loop that compilers turn into vectors. What is below 2^-1020 is
// 0; NaN stays.
inline void exp2_each(const double* x, double shift, double* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double z = x[i] - shift, bounded = z > -1020.0 ? (z < 1020.0 ? z : 1020.0) : -1020.0;
    const double magic = 0x1.8p52, shifted = bounded + magic, f = (bounded - (shifted - magic)) * kLn2;
    double p = 1.0 / 479001600.0;
    p = p * f + 1.0 / 39916800.0;
    p = p * f + 1.0 / 3628800.0;
    p = p * f + 1.0 / 362880.0;
    p = p * f + 1.0 / 40320.0;
    p = p * f + 1.0 / 5040.0;
    p = p * f + 1.0 / 720.0;
    p = p * f + 1.0 / 120.0;
    p = p * f + 1.0 / 24.0;
    p = p * f + 1.0 / 6.0;
    p = p * f + 0.5;
    p = p * f + 1.0;
    p = p * f + 1.0;
    int64_t bits, power;
    __builtin_memcpy(&bits, &p, sizeof bits);
    __builtin_memcpy(&power, &shifted, sizeof power);
    bits = static_cast<int64_t>(static_cast<uint64_t>(bits) + (static_cast<uint64_t>(power) << 52));
    __builtin_memcpy(&p, &bits, sizeof p);
    out[i] = z > -1020.0 ? p : z == z ? 0.0 : z;
  }
}

// log2 of the sum of 2^values[i] and 2^extra; weights[i] becomes 2^values[i] over that sum.
inline double log2_shares(const double* values, int64_t n, double extra, double* weights) {
  double best = extra;
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] != values[i]) return kNaN;
    best = std::max(best, values[i]);
  }
  if (extra != extra) return kNaN;
  if (std::isinf(best)) return best;
  exp2_each(values, best, weights, n);
  double sum = std::exp2(extra - best);
  for (int64_t i = 0; i < n; ++i) sum += weights[i];
  for (int64_t i = 0; i < n; ++i) weights[i] /= sum;
  return best + std::log2(sum);
}

// The student's numbers are powers of two, `at_t` and `at_one` those of one unit of its logits, counted from
// `reference`.
struct Units {
  double at_t, at_one;
  double reference = 0.0;
};

// How many entries a row has: what is absent (id -1) stands at its end, and counts to the tokens outside.
inline int64_t entries_of(const KdCall& call, int64_t row) {
  const int64_t* ids = call.topk_ids + row * call.k;
  int64_t count = call.k;
  while (count > 0 && ids[count - 1] < 0) --count;
  return count;
}

struct Folded {
  bool usable = false;
  double all = 0.0, one_all = 0.0;  // log2 of the student's mass at T and at temperature 1
  double kd = 0.0;
  double outside = 0.0;  // T * d kd / d s of all tokens outside the top-k together; each has its share of it

  // `raw` [count] the student's logits of the row's entries; log2_outside and one_outside its mass outside them. Fills
  // scratch.derivative with T * d kd / d s of the top-k, scratch.student_share and one_log2 with their probabilities at
  // T and at temperature 1.
  void fold(const KdCall& call, int64_t row, int64_t count, const Units& units, double log2_outside, double one_outside,
            Scratch& scratch) {
    const auto k = static_cast<size_t>(count);
    auto& q = scratch.student_share;
    auto& one = scratch.one_share;
    auto& p = scratch.teacher_share;
    auto& d = scratch.derivative;
    auto& z = scratch.gaps;
    for (auto* each : {&q, &one, &p, &d, &z}) each->resize(k);
    for (size_t j = 0; j < k; ++j) z[j] = (scratch.raw[j] - units.reference) * units.at_one;
    one_all = log2_shares(z.data(), count, one_outside, one.data());
    for (size_t j = 0; j < k; ++j) z[j] = (scratch.raw[j] - units.reference) * units.at_t;
    all = log2_shares(z.data(), count, log2_outside, q.data());
    if (!std::isfinite(all) || !std::isfinite(one_all)) return;
    if (call.topk_tail == nullptr) {
      usable = true;
      std::fill(d.begin(), d.end(), 0.0);
      return;
    }
    const double tail = call.topk_tail[row] * kLog2e;
    for (size_t j = 0; j < k; ++j)
      d[j] = call.topk_logprobs[row * call.k + static_cast<int64_t>(j)] * (kLog2e / call.teacher_temperature);
    const double teacher_all = log2_shares(d.data(), count, tail, p.data());
    if (!std::isfinite(teacher_all)) return;
    usable = true;
    // From here z is ln(q / p).
    for (size_t j = 0; j < k; ++j) z[j] = kLn2 * ((z[j] - all) - (d[j] - teacher_all));
    const double p_tail = std::exp2(tail - teacher_all), q_tail = std::exp2(log2_outside - all);
    const double gap_tail = kLn2 * ((log2_outside - all) - (tail - teacher_all));
    switch (call.direction) {
      case Direction::forward:
        kd = p_tail > 0.0 ? -p_tail * gap_tail : 0.0;
        for (size_t j = 0; j < k; ++j) kd -= p[j] > 0.0 ? p[j] * z[j] : 0.0;
        for (size_t j = 0; j < k; ++j) d[j] = q[j] - p[j];
        outside = q_tail - p_tail;
        break;
      case Direction::reverse:
        kd = q_tail > 0.0 ? q_tail * gap_tail : 0.0;
        for (size_t j = 0; j < k; ++j) kd += q[j] > 0.0 ? q[j] * z[j] : 0.0;
        for (size_t j = 0; j < k; ++j) d[j] = q[j] > 0.0 ? q[j] * (z[j] - kd) : 0.0;
        outside = q_tail > 0.0 ? q_tail * (gap_tail - kd) : 0.0;
        break;
      case Direction::jsd: {
        const double beta = call.beta;
        double to_student = against_mixture(q_tail, p_tail, beta),
               to_teacher = against_mixture(p_tail, q_tail, 1.0 - beta);
        for (size_t j = 0; j < k; ++j) d[j] = against_mixture(q[j], p[j], beta);
        for (size_t j = 0; j < k; ++j) to_student += d[j], to_teacher += against_mixture(p[j], q[j], 1.0 - beta);
        kd = beta * to_teacher + (1.0 - beta) * to_student;
        outside = (1.0 - beta) * (against_mixture(q_tail, p_tail, beta) - q_tail * to_student);
        for (size_t j = 0; j < k; ++j) d[j] = (1.0 - beta) * (d[j] - q[j] * to_student);
        break;
      }
    }
    if (call.kd_scale != 0.0) return;
    // A divergence without weight has no gradient, not even where it is infinite.
    std::fill(d.begin(), d.end(), 0.0);
    outside = 0.0;
  }

  // The teacher excludes what the student does not, under reverse KL: the loss is infinite and has no gradient.
  bool without_gradient(const KdCall& call) const {
    return call.direction == Direction::reverse && call.kd_scale != 0.0 && std::isinf(kd);
  }
};

}  // namespace
}  // namespace latentforge
