// What a row's sums mean: its losses, and the few numbers that its gradient needs.
#pragma once

#include "kd_sweep.cuh"

namespace latentforge::cuda {

struct RowTerms {
  float ce = 0.0f;
  float kd = 0.0f;
  bool poisoned = false;  // the whole gradient is NaN
  // q = exp2(student * (s - top)) * over_sum; p likewise.
  float top = 0.0f, over_sum = 0.0f;
  float teacher_top = 0.0f, over_teacher = 0.0f;
  float log_ratio = 0.0f;  // log2 of the student's sum over the teacher's
  float ce_over_sum = 0.0f;
  // Tokens outside the top-k: gradient = exp2(student * (s - outside_top)) * outside_kd + its cross-entropy.
  float outside_top = 0.0f, outside_kd = 0.0f, outside_ce = 0.0f;
};

// A logit `excluded` in log2 units under the sum: has it any probability in double precision?
__device__ __forceinline__ bool has_probability(float log2_relative) { return log2_relative > -1074.0f; }

__device__ __forceinline__ float in_nats(float log2) { return log2 * static_cast<float>(kLn2); }

// The cross-entropy's half and the flag of a bad row; `sum_one` is relative to `top`.
__device__ __forceinline__ void finish_student(RowTerms& r, float sum, float sum_one, float label, const KdParams& p) {
  r.poisoned = !(sum > 0.0f) || isnan(r.kd);
  r.over_sum = 1.0f / sum;
  r.ce_over_sum = p.ce_factor / sum_one;
  r.ce = p.call.labels == nullptr ? 0.0f : (r.top - label) + in_nats(log2f(sum_one));
  if (r.poisoned) {
    r.ce = not_a_number();
    r.kd = not_a_number();
  }
  // A divergence that is infinite because the teacher excludes what the student does not has no gradient.
  if (p.call.reverse && isinf(r.kd) && p.kd_factor != 0.0f) r.poisoned = true;
}

__device__ __forceinline__ RowTerms finish_dense(const Sums& a, float label, bool teacher, const KdParams& p) {
  RowTerms r;
  r.top = a.student.top;
  if (teacher) {
    r.teacher_top = a.teacher_top;
    r.over_teacher = 1.0f / a.teacher_sum;
    r.log_ratio = log2f(a.student.sum) - log2f(a.teacher_sum);
    r.kd = in_nats(p.call.reverse ? a.gap / a.student.sum - r.log_ratio : a.gap / a.teacher_sum + r.log_ratio);
    const float weighing =
        p.call.reverse ? (a.excluded - a.student.top) * p.student.high : (a.excluded - a.teacher_top) * p.teacher.high;
    if (!(a.teacher_sum > 0.0f)) {
      r.kd = not_a_number();
    } else if (!isnan(r.kd) && has_probability(weighing)) {
      r.kd = -minus_infinity();
    }
  }
  finish_student(r, a.student.sum, a.student.sum_one, label, p);
  return r;
}

// The entries are the top-k and, as one more, the tail; `teacher_top` is in powers of two here.
template <class Exp>
__device__ __forceinline__ RowTerms finish_topk(const Sums& a, const Half& outside, float label, float tail,
                                                const KdParams& p) {
  RowTerms r;
  // The student: entries and tokens outside on one reference.
  r.top = fmaxf(a.student.top, outside.top);
  const float entries_at = -shift_of(a.student.top, r.top, p.student);
  const float outside_at = -shift_of(outside.top, r.top, p.student);
  const float entries_factor = shrink<Exp>(a.student.top, r.top, p.student);
  Half in = a.student, out = outside;
  move_half<Exp>(in, r.top, p);
  move_half<Exp>(out, r.top, p);
  const float sum = in.sum + out.sum, sum_one = in.sum_one + out.sum_one, log_sum = log2f(sum);
  const float q_tail = out.sum / sum, log_q_tail = outside_at + log2f(outside.sum) - log_sum;

  // The teacher: entries and tail.
  const float tail_log = tail * static_cast<float>(kLog2e);
  const float entries_log = a.teacher_top == minus_infinity() ? minus_infinity() : a.teacher_top * p.teacher.high;
  r.teacher_top = fmaxf(entries_log, tail_log);
  const float teacher_at = entries_log == minus_infinity() ? 0.0f : entries_log - r.teacher_top;
  const float teacher_factor = entries_log == minus_infinity() ? 0.0f : ExactExp::power(teacher_at);
  const float tail_factor = tail_log == minus_infinity() ? 0.0f : ExactExp::power(tail_log - r.teacher_top);
  const float teacher_sum = a.teacher_sum * teacher_factor + tail_factor, log_teacher = log2f(teacher_sum);
  const float p_tail = tail_factor / teacher_sum, log_p_tail = (tail_log - r.teacher_top) - log_teacher;

  // log2(p / q) of an entry is its gap and this.
  const float lack = (teacher_at - log_teacher) - (entries_at - log_sum);
  const bool student_has_tail = outside.sum > 0.0f, teacher_has_tail = tail_log > minus_infinity();
  float d_tail = 0.0f;
  bool infinite;
  if (p.call.reverse) {
    r.kd = entries_factor / sum * (a.gap - a.student.sum * lack);
    infinite = has_probability((a.excluded - r.top) * p.student.high);
    if (student_has_tail) {
      if (teacher_has_tail) {
        r.kd += q_tail * (log_q_tail - log_p_tail);
        d_tail = q_tail * in_nats((log_q_tail - log_p_tail) - r.kd);
      } else {
        infinite = infinite || has_probability(log_q_tail);
      }
    }
  } else {
    r.kd = teacher_factor / teacher_sum * (a.gap + a.teacher_sum * lack);
    infinite = has_probability(a.excluded * p.teacher.high - r.teacher_top);
    if (teacher_has_tail) {
      if (student_has_tail) {
        r.kd += p_tail * (log_p_tail - log_q_tail);
      } else {
        infinite = infinite || has_probability(tail_log - r.teacher_top);
      }
    }
    d_tail = q_tail - p_tail;
  }
  r.kd = in_nats(r.kd);
  if (!(teacher_sum > 0.0f)) {
    r.kd = not_a_number();
  } else if (!isnan(r.kd) && infinite) {
    r.kd = -minus_infinity();
  }
  finish_student(r, sum, sum_one, label, p);
  r.over_teacher = 1.0f / teacher_sum;
  r.log_ratio = log_sum - log_teacher;
  r.outside_top = outside.top;
  r.outside_kd = student_has_tail ? p.kd_factor * d_tail / outside.sum : 0.0f;
  const float down = outside.top - r.top;
  r.outside_ce = student_has_tail ? r.ce_over_sum * at_one<Exp>(Exp::of(down, p.student), down, p) : 0.0f;
  return r;
}

}  // namespace latentforge::cuda
