// Rows whose teacher is dense logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kd_student.h"

namespace latentforge {
namespace {

struct DenseSums {
  double student, student_one, teacher, cross;
};

// `careful` keeps logits of minus infinity out of the cross term, where 0 *
// infinity would be NaN.
template <bool careful, class S, class T, Ce ce, bool accurate>
DenseSums dense_sums(const S* s, const T* t, int64_t n, const Student<S, ce, accurate>& student,
                     const Exponent<accurate>& teacher) {
  using V = Simd::V;
  constexpr bool mixed = !std::is_same_v<S, T>;
  const V zero = Simd::set(0.0f);
  V student_sum[2] = {zero, zero}, one_sum[2] = {zero, zero}, teacher_sum[2] = {zero, zero}, cross[2] = {zero, zero};
  for (int64_t i = 0; i < n; i += kStep) {
    V x[2], y[2];
    load2<mixed>(s + i, x);
    load2<mixed>(t + i, y);
    for (int j = 0; j < 2; ++j) {
      const V zs = student.at_t.power(x[j]), zt = teacher.power(y[j]);
      const V es = student.at_t(x[j], zs), et = teacher(y[j], zt);
      student_sum[j] = Simd::add(student_sum[j], es);
      if constexpr (ce != Ce::same) one_sum[j] = Simd::add(one_sum[j], student.ce_exponential(x[j], es));
      teacher_sum[j] = Simd::add(teacher_sum[j], et);
      const V gap = Simd::sub(zt, zs);
      if constexpr (careful) {
        cross[j] = Simd::add(cross[j], Simd::where_positive(et, Simd::mul(et, gap)));
      } else {
        cross[j] = Simd::fma(et, gap, cross[j]);
      }
    }
  }
  const auto total = [](const V(&v)[2]) { return static_cast<double>(Simd::sum(Simd::add(v[0], v[1]))); };
  return {total(student_sum), total(one_sum), total(teacher_sum), total(cross)};
}

template <class S, class T, Ce ce, bool accurate>
struct DenseRow {
  Student<S, ce, accurate> student;
  Exponent<accurate> teacher;
  bool teacher_placed = false;
  double teacher_sum = 0.0;
  double cross = 0.0;  // sum of e_t * (z_t - z_s)

  DenseRow(double temperature, double teacher_temperature) : student(temperature), teacher(teacher_temperature) {}

  void move_student(float reference) {
    const double shift = student.move_to(reference);
    if (teacher_sum != 0.0) cross -= teacher_sum * shift;
  }
  void move_teacher(float reference) {
    const double before = teacher.origin;
    teacher.move_to(reference);
    if (teacher_sum == 0.0) return;
    const double shift = before - teacher.origin, factor = std::exp2(shift);
    if (!std::isinf(cross)) cross = factor == 0.0 ? 0.0 : factor * (cross + teacher_sum * shift);
    teacher_sum *= factor;
  }

  void take(const S* s, const T* t, int64_t n, bool careful) {
    if (!student.placed) {
      const float best = highest(s, n);
      student.placed = best > -kInfinity;
      move_student(student.placed ? best : 0.0f);
    }
    if (!teacher_placed) {
      const float best = highest(t, n);
      teacher_placed = best > -kInfinity;
      move_teacher(teacher_placed ? best : 0.0f);
    }
    for (;;) {
      const DenseSums sums =
          careful ? dense_sums<true>(s, t, n, student, teacher) : dense_sums<false>(s, t, n, student, teacher);
      // NaN fails these comparisons too; where no higher reference is to be
      // had, it stays.
      bool moved = false;
      if (!(sums.student < kTooLow && sums.student_one < kTooLow * kTooLow)) {
        const float best = highest(s, n);
        if (best > student.at_t.m) {
          move_student(best);
          moved = true;
        }
      }
      if (!(sums.teacher < kTooLow)) {
        const float best = highest(t, n);
        if (best > teacher.m) {
          move_teacher(best);
          moved = true;
        }
      }
      if (moved) continue;
      if (!careful && sums.cross != sums.cross) {
        careful = true;
        continue;
      }
      student.sum += sums.student;
      student.sum_one += sums.student_one;
      teacher_sum += sums.teacher;
      cross += sums.cross;
      return;
    }
  }
};

template <class S, class T, Ce ce, bool accurate>
void dense_gradient(S* s, const T* t, int64_t n, const Student<S, ce, accurate>& student,
                    const Exponent<accurate>& teacher, float kd, float one, float minus_teacher, const S* ahead,
                    const T* teacher_ahead) {
  using V = Simd::V;
  constexpr bool mixed = !std::is_same_v<S, T>;
  const V kd_factor = Simd::set(kd), one_factor = Simd::set(one), teacher_factor = Simd::set(minus_teacher);
  for (int64_t i = 0; i < n; i += kStep) {
    V x[2], y[2], g[2];
    load2<mixed>(s + i, x);
    load2<mixed>(t + i, y);
    if (ahead != nullptr) {
      fetch_step(ahead + i);
      fetch_step(teacher_ahead + i);
    }
    for (int j = 0; j < 2; ++j) {
      const V es = student.at_t(x[j], student.at_t.power(x[j])), et = teacher(y[j], teacher.power(y[j]));
      g[j] = Simd::fma(et, teacher_factor, Simd::mul(es, kd_factor));
      if constexpr (ce != Ce::same) g[j] = Simd::fma(student.ce_exponential(x[j], es), one_factor, g[j]);
    }
    if constexpr (mixed) {
      Simd::store2_ordered(s + i, g[0], g[1]);
    } else {
      Simd::store2(s + i, g[0], g[1]);
    }
  }
}

template <class S, class T, Ce ce, bool accurate>
void dense_row(const KdCall& call, int64_t row, Scratch& scratch) {
  S* s = row_of<S>(call.student, row);
  const T* t = row_of<T>(call.teacher, row);
  const int64_t vocab = call.vocab, whole = vocab - vocab % kStep, rest = vocab - whole;

  S s_rest[kStep];
  T t_rest[kStep];
  std::fill(s_rest, s_rest + kStep, minus_infinity(S{}));
  std::fill(t_rest, t_rest + kStep, minus_infinity(T{}));
  std::copy(s + whole, s + vocab, s_rest);
  std::copy(t + whole, t + vocab, t_rest);

  DenseRow<S, T, ce, accurate> sums(call.temperature, call.teacher_temperature);
  for (int64_t i = 0; i < whole; i += kBlock) sums.take(s + i, t + i, std::min(kBlock, whole - i), false);
  if (rest != 0) sums.take(s_rest, t_rest, kStep, true);

  const auto& student = sums.student;
  if constexpr (!accurate) {
    if (student.coarse() || sums.teacher.coarse()) return dense_row<S, T, ce, true>(call, row, scratch);
  }
  const double student_sum = student.sum, one_sum = student.ce_sum(), teacher_sum = sums.teacher_sum;
  if (!usable(student_sum) || !usable(one_sum) || !usable(teacher_sum)) {
    call.ce_rows[row] = call.kd_rows[row] = kNaN;
    if (call.write_gradient) fill_row(s, vocab, kNaN);
    return;
  }
  call.kd_rows[row] = kLn2 * (sums.cross / teacher_sum - std::log2(teacher_sum) + std::log2(student_sum));
  const int64_t label = call.labels == nullptr ? -1 : call.labels[row];
  const double s_label = label < 0 ? 0.0 : widen(s[label]);
  const double one_unit = student.ce_per_logit();
  call.ce_rows[row] = label < 0 ? 0.0 : std::log2(one_sum) / one_unit + (student.ce_reference() - s_label);
  if (!call.write_gradient) return;

  const double kd_scale = call.kd_scale / call.temperature;
  const double of_student = kd_scale / student_sum, of_one = call.ce_scale / one_sum,
               of_teacher = kd_scale / teacher_sum;
  double g_label = 0.0;
  if (label >= 0) {
    const double z = student.at_t.log2_of(s_label), z_teacher = sums.teacher.log2_of(widen(t[label]));
    g_label = of_student * std::exp2(z - student.at_t.origin) +
              of_one * std::exp2(s_label * one_unit - student.ce_origin()) -
              of_teacher * std::exp2(z_teacher - sums.teacher.origin) - call.ce_scale;
  }
  // The next row pair is fetched while this one is computed, so that its first
  // sweep finds it in cache.
  const S* ahead = scratch.upcoming >= 0 ? row_of<S>(call.student, scratch.upcoming) : nullptr;
  const T* teacher_ahead = scratch.upcoming >= 0 ? row_of<T>(call.teacher, scratch.upcoming) : nullptr;
  const auto sweep = [&](const auto& form, float kd, float one) {
    const float minus_teacher = static_cast<float>(-of_teacher);
    dense_gradient(s, t, whole, form, sums.teacher, kd, one, minus_teacher, ahead, teacher_ahead);
    if (rest == 0) return;
    dense_gradient(s_rest, t_rest, kStep, form, sums.teacher, kd, one, minus_teacher, static_cast<const S*>(nullptr),
                   static_cast<const T*>(nullptr));
    std::copy(s_rest, s_rest + rest, s + whole);
  };
  if (ce == Ce::same || call.ce_scale == 0.0) {
    // One exponential serves both terms, or the cross-entropy has no weight.
    Student<S, Ce::same, accurate> form(call.temperature);
    form.move_to(student.at_t.m);
    sweep(form, static_cast<float>(of_student + (ce == Ce::same ? of_one : 0.0)), 0.0f);
  } else {
    sweep(student, static_cast<float>(of_student), static_cast<float>(of_one));
  }
  if (label >= 0) narrow(g_label, s + label);
}

}  // namespace
}  // namespace latentforge
