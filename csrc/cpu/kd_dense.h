// fp32 rows whose teacher is dense logits.
//
// The gap of a token is (x - m_s) - rho (y - m_t) with rho = T / T_t: T times log q / p, but for a constant. Its mean
// under p (forward) or q (reverse) is all that the loss needs beside both sums; reverse KL's gradient is
// q (gap - mean) / T^2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kd_jsd.h"
#include "kd_student.h"

namespace latentforge {
namespace {

struct DenseSums {
  double student, student_one, teacher, cross;
};

template <Ce ce>
struct DenseRow {
  Student<ce> student;
  Exponent teacher;
  bool by_student;  // whose probabilities weigh the gap
  float ratio;
  bool teacher_placed = false;
  double teacher_sum = 0.0;
  double cross = 0.0;  // sum of e * gap

  DenseRow(const KdCall& call, const Row& row)
      : student(call, row),
        teacher(call.teacher_temperature),
        by_student(call.direction == Direction::reverse),
        ratio(static_cast<float>(call.temperature / row.logit_scale / call.teacher_temperature)) {}

  Simd::V gap(Simd::V x, Simd::V y) const {
    const Simd::V above = Simd::sub(y, Simd::set(teacher.m));
    return Simd::fnma(above, Simd::set(ratio), Simd::sub(x, Simd::set(student.at_t.m)));
  }
  // Of one pair, with the same roundings as in the sums: the mean that is taken off it has them.
  double gap_of(float x, float y) const { return Simd::highest(gap(Simd::set(x), Simd::set(y))); }

  // Moving a reference moves the gaps.
  void move_student(float reference) {
    const double before = student.at_t.origin, moved = static_cast<double>(reference) - student.at_t.m;
    student.move_to(reference);
    if (by_student) scale_cross(std::exp2(before - student.at_t.origin));
    move_gaps(moved);
  }
  void move_teacher(float reference) {
    const double factor = std::exp2(teacher.origin - static_cast<double>(reference) * teacher.per_logit);
    const double moved = static_cast<double>(reference) - teacher.m;
    teacher.move_to(reference);
    if (teacher_sum != 0.0) teacher_sum *= factor;
    if (!by_student) scale_cross(factor);
    move_gaps(-static_cast<double>(ratio) * moved);
  }
  // What falls this far behind has no probability left, and an infinite gap there costs nothing.
  void scale_cross(double factor) { cross = factor < 0x1p-149 ? 0.0 : cross == 0.0 ? 0.0 : cross * factor; }
  void move_gaps(double by) {
    const double mass = by_student ? student.sum : teacher_sum;
    if (mass != 0.0) cross -= mass * by;
  }

  // `careful` keeps logits of minus infinity out of the cross term, where 0 * infinity would be NaN.
  template <bool careful, bool by_q>
  DenseSums sums(const float* s, const float* t, int64_t n) const {
    using V = Simd::V;
    const V zero = Simd::set(0.0f);
    V student_sum[2] = {zero, zero}, one_sum[2] = {zero, zero}, teacher_sums[2] = {zero, zero},
      crosses[2] = {zero, zero};
    for (int64_t i = 0; i < n; i += kStep) {
      V x[2], y[2];
      Simd::load2(s + i, x[0], x[1]);
      Simd::load2(t + i, y[0], y[1]);
      for (int j = 0; j < 2; ++j) {
        const V es = student.at_t(x[j]), et = teacher(y[j]);
        student_sum[j] = Simd::add(student_sum[j], es);
        if constexpr (ce != Ce::same) one_sum[j] = Simd::add(one_sum[j], student.ce_exponential(x[j], es));
        teacher_sums[j] = Simd::add(teacher_sums[j], et);
        const V weight = by_q ? es : et;
        if constexpr (careful) {
          crosses[j] = Simd::add(crosses[j], Simd::where_positive(weight, Simd::mul(weight, gap(x[j], y[j]))));
        } else {
          crosses[j] = Simd::fma(weight, gap(x[j], y[j]), crosses[j]);
        }
      }
    }
    const auto total = [](const V(&v)[2]) { return static_cast<double>(Simd::sum(Simd::add(v[0], v[1]))); };
    return {total(student_sum), total(one_sum), total(teacher_sums), total(crosses)};
  }

  void take(const float* s, const float* t, int64_t n, bool careful) {
    if (!student.placed || !teacher_placed) {
      const float best = student.placed ? student.at_t.m : highest(s, n);
      const float best_teacher = teacher_placed ? teacher.m : highest(t, n);
      student.placed = best > -kInfinity;
      teacher_placed = best_teacher > -kInfinity;
      move_student(student.placed ? best : 0.0f);
      move_teacher(teacher_placed ? best_teacher : 0.0f);
    }
    for (;;) {
      const DenseSums found = by_student ? (careful ? sums<true, true>(s, t, n) : sums<false, true>(s, t, n))
                                         : (careful ? sums<true, false>(s, t, n) : sums<false, false>(s, t, n));
      // NaN fails these comparisons too; where no higher reference is to be had, it stays.
      bool moved = false;
      if (!(found.student < kTooLow && found.student_one < kTooLow * kTooLow)) {
        const float best = highest(s, n);
        if (best > student.at_t.m) {
          move_student(best);
          moved = true;
        }
      }
      if (!(found.teacher < kTooLow)) {
        const float best = highest(t, n);
        if (best > teacher.m) {
          move_teacher(best);
          moved = true;
        }
      }
      if (moved) continue;
      if (!careful && found.cross != found.cross) {
        careful = true;
        continue;
      }
      student.sum += found.student;
      student.sum_one += found.student_one;
      teacher_sum += found.teacher;
      cross += found.cross;
      return;
    }
  }

  // KL(p || q) or KL(q || p), from natural logarithms over the student's units.
  double divergence(const KdCall& call, const Row& row) const {
    const double mean = cross / (by_student ? student.sum : teacher_sum);
    const double unit = row.logit_scale / call.temperature;
    const double constant = kLn2 * (std::log2(teacher_sum) - std::log2(student.sum));
    return by_student ? unit * mean + constant : -unit * mean - constant;
  }
};

// Factors of the gradient, the same for all tokens of a row: e_s * student + e_t * teacher for forward KL,
// e_s * (gap - mean) * student for reverse, beside e_one * one.
struct DenseFactors {
  double student, one, teacher, mean;
};

template <Direction direction, bool capped, Ce ce, class G>
void dense_gradient(const float* s, const float* t, G* g, int64_t n, const DenseRow<ce>& sums,
                    const DenseFactors& factors, float inverse_cap, const float* ahead, const float* teacher_ahead) {
  using V = Simd::V;
  const V of_student = Simd::set(static_cast<float>(factors.student)),
          of_one = Simd::set(static_cast<float>(factors.one)),
          of_teacher = Simd::set(static_cast<float>(factors.teacher)),
          mean = Simd::set(static_cast<float>(factors.mean)), icap = Simd::set(inverse_cap);
  for (int64_t i = 0; i < n; i += kStep) {
    V x[2], y[2], out[2];
    Simd::load2(s + i, x[0], x[1]);
    Simd::load2(t + i, y[0], y[1]);
    if (ahead != nullptr) fetch_step(ahead + i, kStep);
    if (teacher_ahead != nullptr) fetch_step(teacher_ahead + i, kStep);
    for (int j = 0; j < 2; ++j) {
      const V es = sums.student.at_t(x[j]);
      if constexpr (direction == Direction::reverse) {
        const V of_gap = Simd::mul(Simd::mul(es, of_student), Simd::sub(sums.gap(x[j], y[j]), mean));
        // No probability, no pull, however far the teacher is.
        out[j] = Simd::where_positive(es, of_gap);
        out[j] = Simd::fma(sums.student.ce_exponential(x[j], es), of_one, out[j]);
      } else {
        const V et = sums.teacher(y[j]);
        out[j] = Simd::fma(et, of_teacher, Simd::mul(es, of_student));
        if constexpr (ce != Ce::same) out[j] = Simd::fma(sums.student.ce_exponential(x[j], es), of_one, out[j]);
      }
      if constexpr (capped) out[j] = Simd::mul(out[j], slope(x[j], icap));
    }
    store_step(g + i, out[0], out[1]);
  }
}

template <Ce ce, class G>
void dense_row(const KdCall& call, const Row& row) {
  const auto* s = static_cast<const float*>(row.student);
  const auto* t = static_cast<const float*>(row.teacher);
  auto* g = static_cast<G*>(row.gradient);
  const int64_t vocab = call.vocab, whole = vocab - vocab % kStep, rest = vocab - whole;

  float s_rest[kStep], t_rest[kStep];
  std::fill(s_rest, s_rest + kStep, -kInfinity);
  std::fill(t_rest, t_rest + kStep, -kInfinity);
  std::copy(s + whole, s + vocab, s_rest);
  std::copy(t + whole, t + vocab, t_rest);

  DenseRow<ce> sums(call, row);
  for (int64_t i = 0; i < whole; i += kBlock) sums.take(s + i, t + i, std::min(kBlock, whole - i), false);
  if (rest != 0) sums.take(s_rest, t_rest, kStep, true);

  const auto& student = sums.student;
  const double student_sum = student.sum, one_sum = student.ce_sum(), teacher_sum = sums.teacher_sum;
  if (!usable(student_sum) || !usable(one_sum) || !usable(teacher_sum)) return refuse_row<G>(call, row);
  const int64_t label = call.labels == nullptr ? -1 : call.labels[row.index];
  call.ce_rows[row.index] = label < 0 ? 0.0 : student.cross_entropy(s[label]);

  const double of_one = row.chain * call.ce_scale / one_sum;
  if (call.direction == Direction::jsd) {
    JsdRow<ce, G> jsd{call, row, student, sums.teacher, teacher_sum, of_one};
    jsd.run(s, t, whole, s_rest, t_rest, rest, label);
    return;
  }
  call.kd_rows[row.index] = sums.divergence(call, row);
  if (g == nullptr) return;
  // A divergence without weight has no gradient, not even where it is infinite.
  const bool reverse = sums.by_student && call.kd_scale != 0.0;
  if (reverse && std::isinf(call.kd_rows[row.index])) return fill_row(g, vocab, kNaN);

  const double kd_scale = row.chain * call.kd_scale / call.temperature, mean = sums.cross / student_sum;
  const double of_student = kd_scale / student_sum * (reverse ? row.logit_scale / call.temperature : 1.0);
  const double of_teacher = reverse ? 0.0 : kd_scale / teacher_sum;
  double g_label = 0.0;
  if (label >= 0) {
    const float x = s[label], y = t[label];
    const double e = student.at_t.exactly(x);
    const double pull = !reverse  ? of_student * e - of_teacher * sums.teacher.exactly(y)
                        : e > 0.0 ? of_student * e * (sums.gap_of(x, y) - mean)
                                  : 0.0;
    g_label = (pull + of_one * student.at_one.exactly(x) - row.chain * call.ce_scale) * slope(x, row.cap);
  }
  // One exponential serves both terms of forward KL where the temperature is 1.
  const bool one_apart = ce != Ce::same || reverse;
  const DenseFactors factors{of_student + (one_apart ? 0.0 : of_one), one_apart ? of_one : 0.0, -of_teacher, mean};
  const float inverse_cap = row.cap == 0.0 ? 0.0f : static_cast<float>(1.0 / row.cap);
  const auto* ahead = static_cast<const float*>(row.student_ahead);
  const auto* teacher_ahead = static_cast<const float*>(row.teacher_ahead);
  const auto sweep = [&](auto kernel) {
    kernel(s, t, g, whole, sums, factors, inverse_cap, ahead, teacher_ahead);
    if (rest == 0) return;
    G g_rest[kStep];
    kernel(s_rest, t_rest, g_rest, kStep, sums, factors, inverse_cap, nullptr, nullptr);
    std::copy(g_rest, g_rest + rest, g + whole);
  };
  if (reverse) {
    row.cap == 0.0 ? sweep(dense_gradient<Direction::reverse, false, ce, G>)
                   : sweep(dense_gradient<Direction::reverse, true, ce, G>);
  } else {
    row.cap == 0.0 ? sweep(dense_gradient<Direction::forward, false, ce, G>)
                   : sweep(dense_gradient<Direction::forward, true, ce, G>);
  }
  if (label >= 0) narrow(g_label, g + label);
}

}  // namespace
}  // namespace latentforge
