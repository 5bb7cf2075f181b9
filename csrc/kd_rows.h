// Loss and gradient of one row, for whichever Simd was included before this
// header.
//
// A row is read twice: once for its sums, once (from cache) for its gradient,
// which overwrites the student's logits. The sums are taken relative to a
// reference that is guessed from the first block instead of a maximum that
// would cost a third sweep; a block whose sum shows that the guess lies far
// below it is done again with its own maximum. Sums of a block are fp32 lanes,
// sums of a row are doubles. Single entries (the label, the top-k) are computed
// in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

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

// ----------------------------------------------------------------------------------------------
// dense teacher

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
  call.ce_rows[row] = label < 0 ? 0.0 : std::log2(one_sum) / one_unit + (student.ce_origin() / one_unit - s_label);
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

// -------------------------------------------------------------------------
// top-k teacher, or no teacher (k = 0)

template <class S, Ce ce, bool accurate>
struct SparseRow {
  using V = Simd::V;
  Student<S, ce, accurate> student;

  explicit SparseRow(double temperature) : student(temperature) {}

  void take(const S* s, int64_t n) {
    if (!student.placed) {
      const float best = highest(s, n);
      student.placed = best > -kInfinity;
      student.move_to(student.placed ? best : 0.0f);
    }
    for (;;) {
      const V zero = Simd::set(0.0f);
      V sum[2] = {zero, zero}, one[2] = {zero, zero};
      for (int64_t i = 0; i < n; i += kStep) {
        V x[2];
        Simd::load2(s + i, x[0], x[1]);
        for (int j = 0; j < 2; ++j) {
          const V e = student.at_t(x[j], student.at_t.power(x[j]));
          sum[j] = Simd::add(sum[j], e);
          if constexpr (ce != Ce::same) one[j] = Simd::add(one[j], student.ce_exponential(x[j], e));
        }
      }
      const double block = Simd::sum(Simd::add(sum[0], sum[1])), block_one = Simd::sum(Simd::add(one[0], one[1]));
      if (!(block < kTooLow && block_one < kTooLow * kTooLow)) {
        const float best = highest(s, n);
        if (best > student.at_t.m) {
          student.move_to(best);
          continue;
        }
      }
      student.sum += block;
      student.sum_one += block_one;
      return;
    }
  }
};

template <class S, Ce ce, bool accurate>
void sparse_gradient(S* s, int64_t n, const Student<S, ce, accurate>& student, float kd, float one, const S* ahead) {
  using V = Simd::V;
  const V kd_factor = Simd::set(kd), one_factor = Simd::set(one);
  for (int64_t i = 0; i < n; i += kStep) {
    V x[2], g[2];
    Simd::load2(s + i, x[0], x[1]);
    if (ahead != nullptr) fetch_step(ahead + i);
    for (int j = 0; j < 2; ++j) {
      const V e = student.at_t(x[j], student.at_t.power(x[j]));
      g[j] = Simd::mul(e, kd_factor);
      if constexpr (ce != Ce::same) g[j] = Simd::fma(student.ce_exponential(x[j], e), one_factor, g[j]);
    }
    Simd::store2(s + i, g[0], g[1]);
  }
}

// log2 of the sum of 2^values[i] and 2^extra.
inline double log2_sum(const double* values, int64_t n, double extra) {
  double best = extra;
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] != values[i]) return kNaN;
    best = std::max(best, values[i]);
  }
  if (extra != extra) return kNaN;
  if (std::isinf(best)) return best;
  double sum = std::exp2(extra - best);
  for (int64_t i = 0; i < n; ++i) sum += std::exp2(values[i] - best);
  return best + std::log2(sum);
}

template <class S, Ce ce, bool accurate>
void sparse_row(const KdCall& call, int64_t row, Scratch& scratch) {
  S* s = row_of<S>(call.student, row);
  const int64_t vocab = call.vocab, k = call.k;
  const int64_t* ids = call.topk_ids + row * k;
  const float* logprobs = call.topk_logprobs + row * k;

  // The top-k entries are kept out of the sweep, so that the mass outside them
  // is a sum and not a difference. A block that has some is swept from a copy
  // in which they are minus infinity: the student's logits are only read here.
  const int64_t blocks = (vocab + kBlock - 1) / kBlock;
  auto& head = scratch.block_head;
  auto& next = scratch.entry_next;
  head.assign(static_cast<size_t>(blocks), -1);
  next.resize(static_cast<size_t>(k));
  scratch.raw.resize(static_cast<size_t>(k));
  for (int64_t j = 0; j < k; ++j) {
    auto& first = head[static_cast<size_t>(ids[j] / kBlock)];
    next[static_cast<size_t>(j)] = first;
    first = j;
    scratch.raw[static_cast<size_t>(j)] = widen(s[ids[j]]);
  }
  SparseRow<S, ce, accurate> sums(call.temperature);
  S copy[kBlock];
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t start = b * kBlock, n = std::min(kBlock, vocab - start), padded = (n + kStep - 1) / kStep * kStep;
    if (head[static_cast<size_t>(b)] < 0 && padded == n) {
      sums.take(s + start, n);
      continue;
    }
    std::copy(s + start, s + start + n, copy);
    std::fill(copy + n, copy + padded, minus_infinity(S{}));
    for (int64_t j = head[static_cast<size_t>(b)]; j >= 0; j = next[static_cast<size_t>(j)])
      copy[ids[j] - start] = minus_infinity(S{});
    sums.take(copy, padded);
  }

  const auto& student = sums.student;
  const double one_unit = student.ce_per_logit(), one_origin = student.ce_origin(), one_sum = student.ce_sum();
  const double minus_infinite = -std::numeric_limits<double>::infinity();
  // NaN in a sum survives: only an exact zero becomes minus infinity.
  const double outside = student.sum == 0.0 ? minus_infinite : student.at_t.origin + std::log2(student.sum);
  const double one_outside = one_sum == 0.0 ? minus_infinite : one_origin + std::log2(one_sum);
  auto& zs = scratch.student_log2;
  auto& zt = scratch.teacher_log2;
  zs.resize(static_cast<size_t>(k));
  zt.resize(static_cast<size_t>(k));
  for (int64_t j = 0; j < k; ++j) zs[static_cast<size_t>(j)] = scratch.raw[static_cast<size_t>(j)] * one_unit;
  const double one_all = log2_sum(zs.data(), k, one_outside);
  for (int64_t j = 0; j < k; ++j)
    zs[static_cast<size_t>(j)] = student.at_t.log2_of(scratch.raw[static_cast<size_t>(j)]);
  const double all = log2_sum(zs.data(), k, outside);

  double tail = 0.0, teacher_all = 0.0, p_tail = 0.0;
  const bool has_teacher = call.topk_tail != nullptr;
  if (has_teacher) {
    tail = call.topk_tail[row] * kLog2e;
    for (int64_t j = 0; j < k; ++j) zt[static_cast<size_t>(j)] = logprobs[j] * (kLog2e / call.teacher_temperature);
    teacher_all = log2_sum(zt.data(), k, tail);
    p_tail = std::exp2(tail - teacher_all);
  }
  if (!std::isfinite(all) || !std::isfinite(one_all) || !std::isfinite(teacher_all)) {
    call.ce_rows[row] = call.kd_rows[row] = kNaN;
    if (call.write_gradient) fill_row(s, vocab, kNaN);
    return;
  }
  double kd = p_tail > 0.0 ? p_tail * ((tail - teacher_all) - (outside - all)) : 0.0;
  for (int64_t j = 0; j < k; ++j) {
    const double log_p = zt[static_cast<size_t>(j)] - teacher_all, p = std::exp2(log_p);
    if (p > 0.0) kd += p * (log_p - (zs[static_cast<size_t>(j)] - all));
    zt[static_cast<size_t>(j)] = p;
  }
  call.kd_rows[row] = kLn2 * kd;
  const int64_t label = call.labels == nullptr ? -1 : call.labels[row];
  const double s_label = label < 0 ? 0.0 : widen(s[label]);
  call.ce_rows[row] = label < 0 ? 0.0 : one_all / one_unit - s_label;
  if (!call.write_gradient) return;

  const double kd_scale = call.kd_scale / call.temperature;
  const double of_all = kd_scale * std::exp2(student.at_t.origin - all);
  const double of_tail = student.sum > 0.0 ? kd_scale * p_tail / student.sum : 0.0;
  const double of_one = call.ce_scale * std::exp2(one_origin - one_all);
  // (1 - p_tail / q_tail) q_i outside the top-k: one factor for the whole row.
  const double of_student = student.sum > 0.0 ? of_all - of_tail : 0.0;
  const double of_one_outside = one_sum > 0.0 ? of_one : 0.0;
  const auto probability_term = [&](double x, double p) {
    return kd_scale * (std::exp2(student.at_t.log2_of(x) - all) - p) +
           call.ce_scale * std::exp2(x * one_unit - one_all);
  };
  double g_label = 0.0;
  if (label >= 0) {
    double p = student.sum > 0.0 ? p_tail * std::exp2(student.at_t.log2_of(s_label) - outside) : 0.0;
    for (int64_t j = head[static_cast<size_t>(label / kBlock)]; j >= 0; j = next[static_cast<size_t>(j)])
      if (ids[j] == label) p = zt[static_cast<size_t>(j)];
    g_label = probability_term(s_label, p) - call.ce_scale;
  }
  const int64_t whole = vocab - vocab % kStep, rest = vocab - whole;
  // The next row is fetched while this one is computed.
  const S* ahead = scratch.upcoming >= 0 ? row_of<S>(call.student, scratch.upcoming) : nullptr;
  const auto sweep = [&](const auto& form, double factor, double one) {
    sparse_gradient(s, whole, form, static_cast<float>(factor), static_cast<float>(one), ahead);
    if (rest == 0) return;
    std::fill(copy, copy + kStep, minus_infinity(S{}));
    std::copy(s + whole, s + vocab, copy);
    sparse_gradient(copy, kStep, form, static_cast<float>(factor), static_cast<float>(one),
                    static_cast<const S*>(nullptr));
    std::copy(copy, copy + rest, s + whole);
  };
  if (ce == Ce::same || call.ce_scale == 0.0) {
    Student<S, Ce::same, accurate> form(call.temperature);
    form.move_to(student.at_t.m);
    sweep(form, of_student + (ce == Ce::same ? of_one_outside : 0.0), 0.0);
  } else {
    sweep(student, of_student, of_one_outside);
  }
  for (int64_t j = 0; j < k; ++j)
    narrow(probability_term(scratch.raw[static_cast<size_t>(j)], zt[static_cast<size_t>(j)]), s + ids[j]);
  if (label >= 0) narrow(g_label, s + label);
}

// -------------------------------------------------------------------------------------------------
// selection

template <class S, class T, bool accurate>
RowKernel select_dense(double temperature) {
  if (temperature == 1.0) return dense_row<S, T, Ce::same, accurate>;
  if (temperature == 2.0) return dense_row<S, T, Ce::square, accurate>;
  return dense_row<S, T, Ce::separate, accurate>;
}

template <class S, bool accurate>
RowKernel select_sparse(double temperature) {
  if (temperature == 1.0) return sparse_row<S, Ce::same, accurate>;
  if (temperature == 2.0) return sparse_row<S, Ce::square, accurate>;
  return sparse_row<S, Ce::separate, accurate>;
}

inline RowKernel select_row_kernel(const KdCall& call) {
  const bool student_bf16 = call.student.dtype == Dtype::bf16, teacher_bf16 = call.teacher.dtype == Dtype::bf16;
  if (call.teacher.data == nullptr)
    return student_bf16 ? select_sparse<uint16_t, false>(call.temperature)
                        : select_sparse<float, true>(call.temperature);
  if (student_bf16)
    return teacher_bf16 ? select_dense<uint16_t, uint16_t, false>(call.temperature)
                        : select_dense<uint16_t, float, true>(call.temperature);
  return teacher_bf16 ? select_dense<float, uint16_t, true>(call.temperature)
                      : select_dense<float, float, true>(call.temperature);
}

}  // namespace
}  // namespace latentforge
