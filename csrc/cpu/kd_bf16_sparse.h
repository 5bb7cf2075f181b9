// bf16 rows as they usually are whose teacher is its top-k, or that have no teacher: see kd_bf16.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kd_bf16.h"
#include "kd_sparse.h"

namespace latentforge {
namespace {

// Below this the mass outside the top-k is not far enough above what stands in for the top-k (2^-112 each).
constexpr double kLeastOutside = 0x1p-70;

template <Ce ce>
struct Bf16Sparse {
  using V = Simd::V;
  Bf16Student<ce> student;

  Bf16Sparse(const KdCall& call, const Row& row) : student(call, row) {}

  // Sums of n logits, n a multiple of kLine up to kBlock; the lines whose bit is set in `patched` come from `patch`.
  struct Sums {
    double student, one;
    // Whether the reference was high enough and no logit was plus infinity or NaN.
    bool ordinary() const { return student < kTooLow && one < kTooLow * kTooLow; }
  };

  template <bool safe>
  Sums sums_of(const uint16_t* s, int64_t n, uint32_t patched, const uint16_t* patch) const {
    const V zero = Simd::set(0.0f);
    V sums[2] = {zero, zero}, ones[2] = {zero, zero};
    const auto sweep = [&](const uint16_t* p, int64_t count) {
      for (int64_t i = 0; i < count; i += kStep) {
        V x[2];
        Simd::load2(p + i, x[0], x[1]);
        // The next block, where it is looked through first.
        if constexpr (!Simd::scales) __builtin_prefetch(p + i + kBlock, 0, 3);
        for (int j = 0; j < 2; ++j) {
          const V e = student.at_t.template at<safe>(x[j]);
          sums[j] = Simd::add(sums[j], e);
          if constexpr (ce == Ce::square) ones[j] = Simd::fma(e, e, ones[j]);
          if constexpr (ce == Ce::separate) ones[j] = Simd::add(ones[j], student.template ce_exponential<safe>(x[j]));
        }
      }
    };
    int64_t at = 0;
    for (; patched != 0; patched &= patched - 1) {
      const int64_t line = __builtin_ctz(patched) * kLine;
      sweep(s + at, line - at);
      sweep(patch + line, kLine);
      at = line + kLine;
    }
    sweep(s + at, n - at);
    return {static_cast<double>(Simd::sum(Simd::add(sums[0], sums[1]))),
            static_cast<double>(Simd::sum(Simd::add(ones[0], ones[1])))};
  }
  void add(const Sums& sums) {
    student.sum += sums.student;
    student.sum_one += sums.one;
  }
};

template <bool safe, Ce ce>
void bf16_sparse_gradient(const uint16_t* s, uint16_t* g, int64_t n, const Bf16Student<ce>& student, float kd,
                          float one, const uint16_t* ahead) {
  using V = Simd::V;
  const V kd_factor = Simd::set(kd), one_factor = Simd::set(one);
  for (int64_t i = 0; i < n; i += kStep) {
    V x[2], out[2];
    Simd::load2(s + i, x[0], x[1]);
    if (ahead != nullptr) fetch_step(ahead + i, kStep);
    for (int j = 0; j < 2; ++j) {
      const V e = student.at_t.template at<safe>(x[j]);
      if constexpr (ce == Ce::same) out[j] = Simd::mul(e, kd_factor);
      if constexpr (ce == Ce::square) out[j] = Simd::mul(e, Simd::fma(e, one_factor, kd_factor));
      if constexpr (ce == Ce::separate)
        out[j] = Simd::fma(student.template ce_exponential<safe>(x[j]), one_factor, Simd::mul(e, kd_factor));
    }
    Simd::store2(g + i, out[0], out[1]);
  }
}

// The bf16 at or just above a logit.
inline uint16_t at_least(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const auto upper = static_cast<uint16_t>(bits >> 16);  // towards zero
  return x > 0.0f ? static_cast<uint16_t>(upper + 1) : upper;
}

template <Ce ce>
bool bf16_sparse_row(const KdCall& call, const Row& row, Scratch& scratch) {
  const auto* s = static_cast<const uint16_t*>(row.student);
  auto* g = static_cast<uint16_t*>(row.gradient);
  const Rest rest(s, call.vocab);
  const int64_t whole = rest.start, blocks = (whole + kBlock - 1) / kBlock;
  const Entries entries(call, row, s, scratch);
  scratch.lowest.resize(static_cast<size_t>(blocks + 1));
  float* lows = scratch.lowest.data();

  // The mass outside the top-k is a sum and not a difference: lines of a block that hold some of the top-k are swept
  // from a copy in which those are as low as this kernel can go, or minus infinity.
  Bf16Sparse<ce> sums(call, row);
  auto& student = sums.student;
  uint16_t patch[kBlock];
  const auto patch_block = [&](const uint16_t* p, int64_t start, int64_t n) {
    uint32_t patched = 0;
    // Where two temperatures are apart, what is as low as this kernel can go at one of them is not low at the other.
    const uint16_t least = ce == Ce::separate ? uint16_t{0xff80} : at_least(student.lowest());
    entries.in_block(start / kBlock, [&](int32_t, int64_t id) {
      const int64_t offset = id - start;
      if (offset < 0 || offset >= n) return;
      const int64_t line = offset / kLine;
      if ((patched >> line & 1u) == 0) std::copy(p + line * kLine, p + (line + 1) * kLine, patch + line * kLine);
      patched |= 1u << line;
      patch[offset] = least;
    });
    return patched;
  };
  const auto take = [&](const uint16_t* p, int64_t start, int64_t n, float& low, bool has_entries) {
    if constexpr (Simd::scales) {
      if (start != 0) {
        const auto found = sums.template sums_of<false>(p, n, has_entries ? patch_block(p, start, n) : 0u, patch);
        if (found.ordinary()) {
          low = kInfinity;
          sums.add(found);
          return true;
        }
      }
    }
    const Extremes found = extremes(p, n);
    if (found.odd || (start == 0 && found.high == -kInfinity)) return false;
    student.reach(found.high, start == 0);
    if (!student.reachable()) return false;
    low = found.low;
    const uint32_t patched = has_entries ? patch_block(p, start, n) : 0u;
    const bool excluded = ce == Ce::separate && patched != 0;
    sums.add(low < student.lowest() || excluded ? sums.template sums_of<true>(p, n, patched, patch)
                                                : sums.template sums_of<false>(p, n, patched, patch));
    return true;
  };
  for (int64_t b = 0; b < blocks; ++b)
    if (!take(s + b * kBlock, b * kBlock, std::min(kBlock, whole - b * kBlock), lows[b], entries.any_in(b)))
      return false;
  if (rest.count != 0 && !take(rest.line, whole, kLine, lows[blocks], entries.any_in(whole / kBlock))) return false;

  const double one_sum = student.one_sum();
  if (!(student.sum > kLeastOutside) || !usable(student.sum) || !(one_sum > kLeastOutside * kLeastOutside * 0x1p40) ||
      !usable(one_sum))
    return false;
  const double outside = student.at_t.origin + std::log2(student.sum);
  const double one_outside = student.one_origin() + std::log2(one_sum);
  Folded folded;
  folded.fold(call, row.index, entries.k, {student.at_t.per_logit, student.one_per_logit()}, outside, one_outside,
              scratch);
  if (!folded.usable || folded.without_gradient(call)) return false;
  call.kd_rows[row.index] = folded.kd;
  const int64_t label = call.labels == nullptr ? -1 : call.labels[row.index];
  const uint16_t s_label = label < 0 ? uint16_t{0} : s[label];
  call.ce_rows[row.index] = label < 0 ? 0.0 : student.cross_entropy(folded.one_all, widen(s_label));
  if (g == nullptr) return true;

  // One factor for all tokens outside the top-k.
  const double of_student = row.chain * call.kd_scale / call.temperature * folded.outside / student.sum;
  const double of_one = row.chain * call.ce_scale * std::exp2(student.one_origin() - folded.one_all);
  const auto* ahead = static_cast<const uint16_t*>(row.student_ahead);
  const auto sweep = [&](const auto& form, double kd, double one) {
    constexpr Ce kind = std::decay_t<decltype(form)>::kind;
    const float factor = static_cast<float>(kd), one_factor = static_cast<float>(one);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t i = b * kBlock, n = std::min(kBlock, whole - i);
      const auto kernel =
          lows[b] < form.lowest() ? bf16_sparse_gradient<true, kind> : bf16_sparse_gradient<false, kind>;
      kernel(s + i, g + i, n, form, factor, one_factor, ahead == nullptr ? nullptr : ahead + i);
    }
    if (rest.count == 0) return;
    uint16_t line[kLine];
    bf16_sparse_gradient<true, kind>(rest.line, line, kLine, form, factor, one_factor, nullptr);
    std::copy(line, line + rest.count, g + whole);
  };
  if (ce == Ce::same || call.ce_scale == 0.0) {
    sweep(Bf16Student<Ce::same>(student), of_student + (ce == Ce::same ? of_one : 0.0), 0.0);
  } else {
    sweep(student, of_student, of_one);
  }
  write_entries(call, row, folded, entries, g, s_label, label, [&](double x) {
    return std::pair{std::exp2(x * student.at_t.per_logit - outside),
                     std::exp2(x * student.one_per_logit() - folded.one_all)};
  });
  return true;
}

}  // namespace
}  // namespace latentforge
