// fp32 rows whose teacher is its top-k with an exact tail, or that have no teacher (k = 0).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "kd_student.h"
#include "kd_topk.h"

namespace latentforge {
namespace {

// Which block of the row each top-k entry falls into, as lists; and the student's logits there.
struct Entries {
  const int64_t* ids;
  int64_t k;
  Scratch& scratch;

  template <class S>
  Entries(const KdCall& call, const Row& row, const S* s, Scratch& working)
      : ids(call.topk_ids + row.index * call.k), k(entries_of(call, row.index)), scratch(working) {
    scratch.block_head.assign(static_cast<size_t>((call.vocab + kBlock - 1) / kBlock), -1);
    scratch.entry_next.resize(static_cast<size_t>(k));
    scratch.raw.resize(static_cast<size_t>(k));
    for (int64_t j = 0; j < k; ++j) {
      auto& first = scratch.block_head[static_cast<size_t>(ids[j] / kBlock)];
      scratch.entry_next[static_cast<size_t>(j)] = first;
      first = static_cast<int32_t>(j);
      scratch.raw[static_cast<size_t>(j)] = widen(s[ids[j]]);
    }
  }

  template <class Body>
  void in_block(int64_t block, Body body) const {
    for (int32_t j = scratch.block_head[static_cast<size_t>(block)]; j >= 0;
         j = scratch.entry_next[static_cast<size_t>(j)])
      body(j, ids[j]);
  }
  bool any_in(int64_t block) const { return scratch.block_head[static_cast<size_t>(block)] >= 0; }
};

template <Ce ce>
struct SparseRow {
  using V = Simd::V;
  Student<ce> student;

  SparseRow(const KdCall& call, const Row& row) : student(call, row) {}

  void take(const float* s, int64_t n) {
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
          const V e = student.at_t(x[j]);
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

template <bool capped, Ce ce, class G>
void sparse_gradient(const float* s, G* g, int64_t n, const Student<ce>& student, float kd, float one,
                     float inverse_cap, const float* ahead) {
  using V = Simd::V;
  const V kd_factor = Simd::set(kd), one_factor = Simd::set(one), icap = Simd::set(inverse_cap);
  for (int64_t i = 0; i < n; i += kStep) {
    V x[2], out[2];
    Simd::load2(s + i, x[0], x[1]);
    if (ahead != nullptr) fetch_step(ahead + i, kStep);
    for (int j = 0; j < 2; ++j) {
      const V e = student.at_t(x[j]);
      out[j] = Simd::mul(e, kd_factor);
      if constexpr (ce != Ce::same) out[j] = Simd::fma(student.ce_exponential(x[j], e), one_factor, out[j]);
      if constexpr (capped) out[j] = Simd::mul(out[j], slope(x[j], icap));
    }
    store_step(g + i, out[0], out[1]);
  }
}

// The label's and the top-k's gradients, which are computed singly. `shares` gives what a token outside the top-k has
// of the mass there at T, and of the whole at temperature 1.
template <class S, class G, class Shares>
void write_entries(const KdCall& call, const Row& row, const Folded& folded, const Entries& entries, G* g,
                   S label_logit, int64_t label, Shares shares) {
  const double kd_scale = row.chain * call.kd_scale / call.temperature, ce_scale = row.chain * call.ce_scale;
  auto& scratch = entries.scratch;
  bool label_inside = false;
  for (int64_t j = 0; j < entries.k; ++j) {
    const auto e = static_cast<size_t>(j);
    const double hit = entries.ids[j] == label ? 1.0 : 0.0;
    label_inside = label_inside || hit != 0.0;
    const double pull = kd_scale * scratch.derivative[e] + ce_scale * (scratch.one_share[e] - hit);
    narrow(pull * slope(scratch.raw[e], row.cap), g + entries.ids[j]);
  }
  if (label < 0 || label_inside) return;
  const double x = widen(label_logit);
  const auto [q, one] = shares(x);
  narrow((kd_scale * q * folded.outside + ce_scale * (one - 1.0)) * slope(x, row.cap), g + label);
}

template <Ce ce, class G>
void sparse_row(const KdCall& call, const Row& row, Scratch& scratch) {
  const auto* s = static_cast<const float*>(row.student);
  auto* g = static_cast<G*>(row.gradient);
  const int64_t vocab = call.vocab;

  // The top-k entries are kept out of the sweep, so that the mass outside them is a sum and not a difference. A block
  // that has some is swept from a copy in which they are minus infinity.
  const Entries entries(call, row, s, scratch);
  SparseRow<ce> sums(call, row);
  float copy[kBlock];
  for (int64_t b = 0; b * kBlock < vocab; ++b) {
    const int64_t start = b * kBlock, n = std::min(kBlock, vocab - start), padded = (n + kStep - 1) / kStep * kStep;
    if (!entries.any_in(b) && padded == n) {
      sums.take(s + start, n);
      continue;
    }
    std::copy(s + start, s + start + n, copy);
    std::fill(copy + n, copy + padded, -kInfinity);
    entries.in_block(b, [&](int32_t, int64_t id) { copy[id - start] = -kInfinity; });
    sums.take(copy, padded);
  }

  const auto& student = sums.student;
  const double minus_infinite = -std::numeric_limits<double>::infinity();
  // Counted from the highest logit: two of 1e30 are told apart as logits, not as powers of two. NaN in a sum survives:
  // only an exact zero becomes minus infinity.
  double reference = student.at_t.m;
  for (int64_t j = 0; j < entries.k; ++j)
    reference = std::max(reference, static_cast<double>(scratch.raw[static_cast<size_t>(j)]));
  const double moved = reference - student.at_t.m;
  const Units units{student.at_t.per_logit, student.at_one.per_logit, reference};
  const double outside = student.sum == 0.0 ? minus_infinite : std::log2(student.sum) - moved * units.at_t;
  const double one_sum = student.ce_sum();
  const double one_outside = one_sum == 0.0 ? minus_infinite : std::log2(one_sum) - moved * units.at_one;
  Folded folded;
  folded.fold(call, row.index, entries.k, units, outside, one_outside, scratch);
  if (!folded.usable) return refuse_row<G>(call, row);
  call.kd_rows[row.index] = folded.kd;
  const int64_t label = call.labels == nullptr ? -1 : call.labels[row.index];
  const float s_label = label < 0 ? 0.0f : s[label];
  call.ce_rows[row.index] = label < 0 ? 0.0 : kLn2 * folded.one_all + student.logit_scale * (reference - s_label);
  if (g == nullptr) return;
  if (folded.without_gradient(call)) return fill_row(g, vocab, kNaN);

  // One factor for all tokens outside the top-k.
  const double of_student =
      student.sum > 0.0 ? row.chain * call.kd_scale / call.temperature * folded.outside / student.sum : 0.0;
  const double of_one =
      one_sum > 0.0 ? row.chain * call.ce_scale * std::exp2(-moved * units.at_one - folded.one_all) : 0.0;
  const float kd = static_cast<float>(of_student + (ce == Ce::same ? of_one : 0.0)), one = static_cast<float>(of_one);
  const float inverse_cap = row.cap == 0.0 ? 0.0f : static_cast<float>(1.0 / row.cap);
  const int64_t whole = vocab - vocab % kStep, rest = vocab - whole;
  const auto sweep = [&](auto kernel) {
    if (rest != 0) {
      std::fill(copy, copy + kStep, -kInfinity);
      std::copy(s + whole, s + vocab, copy);
    }
    kernel(s, g, whole, student, kd, one, inverse_cap, static_cast<const float*>(row.student_ahead));
    if (rest == 0) return;
    G g_rest[kStep];
    kernel(copy, g_rest, kStep, student, kd, one, inverse_cap, nullptr);
    std::copy(g_rest, g_rest + rest, g + whole);
  };
  row.cap == 0.0 ? sweep(sparse_gradient<false, ce, G>) : sweep(sparse_gradient<true, ce, G>);
  write_entries(call, row, folded, entries, g, s_label, label, [&](double x) {
    // A label of minus infinity has no share, even where nothing outside the top-k has any.
    if (std::isinf(x)) return std::pair{0.0, 0.0};
    return std::pair{std::exp2((x - reference) * units.at_t - outside),
                     std::exp2((x - reference) * units.at_one - folded.one_all)};
  });
}

}  // namespace
}  // namespace latentforge
