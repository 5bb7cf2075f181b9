// Rows whose teacher is its top-k with an exact tail, or that have no teacher (k = 0).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kd_student.h"

namespace latentforge {
namespace {

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
  if constexpr (!accurate) {
    if (student.coarse()) return sparse_row<S, ce, true>(call, row, scratch);
  }
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

}  // namespace
}  // namespace latentforge
