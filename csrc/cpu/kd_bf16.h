// bf16 rows as they usually are, for whichever Simd was included before this header: forward or reverse KL, nothing
// added to the logits. The kernels here decline every other row before they write anything, and the fp32 kernels take
// it: a row with NaN or plus infinity, a first block without a finite logit, sums that leave the range of fp32.
//
// A row is read twice, for its sums and (from cache) for its gradient. A block is first looked through as 16-bit
// integers, which costs one instruction for 32 logits on each side of zero: so the exponential can do without any
// clamping, except in blocks that hold something far below the reference (padding), where it has it. Where instructions
// scale by a power of two (AVX-512) nothing is clamped anyway: there only the first block is looked through, and any
// other whose sums show that its reference is too low or that there is infinity or NaN in it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kd_dense.h"
#include "kd_student.h"

namespace latentforge {
namespace {

// Columns that are handled between two looks at a pointer; a multiple of kStep in every variant.
constexpr int64_t kLine = 32;
constexpr double kFloor = -120.0, kCeiling = 40.0;  // powers of two around the reference that need no care

// 2^(c x - origin), relative error at most 3.7e-6, 1/1000 of what the gradient loses when it is rounded to bf16.
//
// Where instructions split a number and scale by a power of two (AVX-512), they do, and whatever is far below becomes 0
// by itself. Elsewhere an addition of a large number rounds c x to a whole number, which lands in the low bits, where
// shift and add make an exponent of it; what is left of c x is put into [1, 2), where the best quartic has no cubic
// term, and its leading coefficient is left out, as everything is divided by a sum of the same.
struct Power {
  using V = Simd::V;
  static constexpr double kMagic = 12582912.0;
  static constexpr double kLeading = Simd::scales ? 0.0 : 5.2448676053135515 + 1.5;

  explicit Power(double temperature) : c(static_cast<float>(kLog2e / temperature)), per_logit(c) {}

  void move_to(double whole) {
    base = whole;
    addend = static_cast<float>(kMagic - whole);
    lowest = static_cast<float>((whole + kFloor) / per_logit);
    highest = static_cast<float>((whole + kCeiling) / per_logit);
    origin = whole - kLeading;
  }
  // The reference that a block with this maximum asks for.
  double wanted(float best) const { return std::floor(best * per_logit); }

  template <bool safe>
  V at(V x) const {
    if constexpr (Simd::scales) {
      const V z = Simd::fma(x, Simd::set(c), Simd::set(static_cast<float>(-base))), f = Simd::fraction(z);
      V p = Simd::fma(f, Simd::set(0.013534168062f), Simd::set(0.052011460299f));
      p = Simd::fma(p, f, Simd::set(0.2414427571f));
      p = Simd::fma(p, f, Simd::set(0.69300383443f));
      p = Simd::fma(p, f, Simd::set(1.0000025934f));
      return Simd::scale(p, z);
    } else {
      const V bounded = safe ? Simd::max(Simd::set(lowest), x) : x;
      const V whole = Simd::fma(bounded, Simd::set(c), Simd::set(addend));
      const V rest = Simd::fma(bounded, Simd::set(c), Simd::sub(Simd::set(addend), whole));
      const V f = Simd::add(rest, Simd::set(1.5f));
      V p = Simd::fma(f, f, Simd::set(12.273134951714734f));
      p = Simd::fma(p, f, Simd::set(24.019276372391463f));
      p = Simd::fma(p, f, Simd::set(38.54630290392402f));
      p = Simd::add_exponent(p, whole);
      return safe ? Simd::where_positive(Simd::sub(x, Simd::set(lowest)), p) : p;
    }
  }
  double exactly(double x) const { return std::exp2(x * per_logit - origin); }

  float c, addend = 0.0f, lowest = 0.0f, highest = 0.0f;
  double per_logit;  // powers of two per logit, as this kernel's arithmetic has it
  double base = 0.0, origin = 0.0;
};

// Bounds of n logits from their bits alone: not above `high`, not below `low`; `odd` where there is NaN or infinity.
struct Extremes {
  float low, high;
  bool odd;
};

// The largest of n 16-bit numbers, as unsigned and as signed ones; by Simd where it has a way of its own.
template <class Machine>
void bounds(const uint16_t* p, int64_t n, uint16_t& lowest, int16_t& highest) {
  if constexpr (requires { Machine::bounds(p, n, lowest, highest); }) {
    Machine::bounds(p, n, lowest, highest);
  } else {
    lowest = 0;
    highest = -32768;
    for (int64_t i = 0; i < n; ++i) {
      const auto bits = static_cast<int16_t>(p[i]);
      lowest = p[i] > lowest ? p[i] : lowest;
      highest = bits > highest ? bits : highest;
    }
  }
}

inline Extremes extremes(const uint16_t* p, int64_t n) {
  // As unsigned numbers negative logits come last, the lowest at the end; as signed ones the highest positive.
  uint16_t lowest;
  int16_t highest;
  bounds<Simd>(p, n, lowest, highest);
  Extremes found{lowest >= 0x8000 ? widen(lowest) : 0.0f, 0.0f, lowest > 0xff80 || highest >= 0x7f80};
  if (highest >= 0) {
    found.high = widen(static_cast<uint16_t>(highest));
  } else {  // all negative: the smallest of the magnitudes
    uint16_t best = 0xffff;
    for (int64_t i = 0; i < n; ++i) best = p[i] < best ? p[i] : best;
    found.high = widen(best);
  }
  return found;
}

// The student's half of a row.
template <Ce ce>
struct Bf16Student {
  using V = Simd::V;
  static constexpr Ce kind = ce;

  Bf16Student(const KdCall& call, const Row& row)
      : at_t(call.temperature / row.logit_scale), at_one(1.0 / row.logit_scale), logit_scale(row.logit_scale) {}

  template <Ce other>
  explicit Bf16Student(const Bf16Student<other>& from)
      : at_t(from.at_t), at_one(from.at_one), logit_scale(from.logit_scale) {}

  template <bool safe>
  V ce_exponential(V x) const {
    return at_one.at<safe>(x);
  }
  // Moves the references so that `high` is within reach; the sums follow. Returns the power of two that the sum at T
  // lost.
  double reach(float high, bool first) {
    double lost = 0.0;
    if (first || high > at_t.highest) {
      const double before = at_t.base;
      at_t.move_to(at_t.wanted(high));
      if (!first) {
        lost = at_t.base - before;
        sum *= std::exp2(-lost);
        if (ce == Ce::square) sum_one *= std::exp2(-2.0 * lost);
      }
    }
    if (ce == Ce::separate && (first || high > at_one.highest)) {
      const double before = at_one.base;
      at_one.move_to(at_one.wanted(high));
      if (!first) sum_one *= std::exp2(before - at_one.base);
    }
    return lost;
  }
  // Far from zero, c x and the gaps have few digits left behind the point; without fused multiply-add fewer.
  static constexpr double kFarthest = Simd::fused ? 256.0 : 64.0;
  bool reachable() const {
    return std::fabs(at_t.base) < kFarthest && (ce != Ce::separate || std::fabs(at_one.base) < kFarthest);
  }
  float lowest() const { return ce == Ce::separate ? std::max(at_t.lowest, at_one.lowest) : at_t.lowest; }

  // The temperature-1 quantities, in the units of the exponential that was used for them.
  double one_per_logit() const {
    return ce == Ce::separate ? at_one.per_logit : ce == Ce::same ? at_t.per_logit : 2.0 * at_t.per_logit;
  }
  double one_origin() const {
    return ce == Ce::separate ? at_one.origin : ce == Ce::same ? at_t.origin : 2.0 * at_t.origin;
  }
  double one_sum() const { return ce == Ce::same ? sum : sum_one; }
  double one_exactly(double x) const { return std::exp2(x * one_per_logit() - one_origin()); }
  // log2 of a mass at temperature 1 and a logit, as natural logarithms in the caller's own units.
  double cross_entropy(double log2_mass, double x) const { return logit_scale * (log2_mass / one_per_logit() - x); }

  Power at_t, at_one;
  double logit_scale;
  double sum = 0.0, sum_one = 0.0;
};

template <Ce ce>
struct Bf16Dense {
  using V = Simd::V;
  Bf16Student<ce> student;
  Power teacher;
  double teacher_sum = 0.0, cross = 0.0;
  float ratio;

  static constexpr Ce kind = ce;

  Bf16Dense(const KdCall& call, const Row& row)
      : student(call, row),
        teacher(call.teacher_temperature),
        ratio(static_cast<float>(call.temperature / row.logit_scale / call.teacher_temperature)) {}

  template <Ce other>
  explicit Bf16Dense(const Bf16Dense<other>& from) : student(from.student), teacher(from.teacher), ratio(from.ratio) {}

  // T * log q / p of a token, but for a constant.
  V gap(V x, V y) const { return Simd::fnma(y, Simd::set(ratio), x); }

  struct Sums {
    double student, one, teacher, cross;
    // Whether the references were high enough and every logit was finite.
    bool ordinary() const {
      return student < kTooLow && one < kTooLow * kTooLow && teacher < kTooLow && std::isfinite(cross);
    }
  };

  // Where blocks are looked through first, the one after this is asked for meanwhile: the look would wait for every
  // line of it.
  template <bool safe, bool by_q>
  Sums sums_of(const uint16_t* s, const uint16_t* t, int64_t n) const {
    const V zero = Simd::set(0.0f);
    V sums[2] = {zero, zero}, ones[2] = {zero, zero}, teachers[2] = {zero, zero}, crosses[2] = {zero, zero};
    for (int64_t i = 0; i < n; i += kStep) {
      V x[2], y[2];
      Simd::load2(s + i, x[0], x[1]);
      Simd::load2(t + i, y[0], y[1]);
      if constexpr (!Simd::scales) {
        __builtin_prefetch(s + i + kBlock, 0, 3);
        __builtin_prefetch(t + i + kBlock, 0, 3);
      }
      for (int j = 0; j < 2; ++j) {
        const V es = student.at_t.template at<safe>(x[j]), et = teacher.template at<safe>(y[j]);
        sums[j] = Simd::add(sums[j], es);
        if constexpr (ce == Ce::square) ones[j] = Simd::fma(es, es, ones[j]);
        if constexpr (ce == Ce::separate) ones[j] = Simd::add(ones[j], student.template ce_exponential<safe>(x[j]));
        teachers[j] = Simd::add(teachers[j], et);
        const V weight = by_q ? es : et;
        if constexpr (safe) {
          crosses[j] = Simd::add(crosses[j], Simd::where_positive(weight, Simd::mul(weight, gap(x[j], y[j]))));
        } else {
          crosses[j] = Simd::fma(weight, gap(x[j], y[j]), crosses[j]);
        }
      }
    }
    const auto total = [](const V(&v)[2]) { return static_cast<double>(Simd::sum(Simd::add(v[0], v[1]))); };
    return {total(sums), total(ones), total(teachers), total(crosses)};
  }
  void add(const Sums& sums) {
    student.sum += sums.student;
    student.sum_one += sums.one;
    teacher_sum += sums.teacher;
    cross += sums.cross;
  }

  // One block; false where this row is not for this kernel.
  template <bool by_q>
  bool take(const uint16_t* s, const uint16_t* t, int64_t n, bool first, float* lows) {
    if constexpr (Simd::scales) {
      if (!first) {
        const Sums sums = sums_of<false, by_q>(s, t, n);
        if (sums.ordinary()) {
          lows[0] = lows[1] = kInfinity;
          add(sums);
          return true;
        }
      }
    }
    const Extremes of_student = extremes(s, n), of_teacher = extremes(t, n);
    if (of_student.odd || of_teacher.odd) return false;
    if (first && (of_student.high == -kInfinity || of_teacher.high == -kInfinity)) return false;
    const double lost = student.reach(of_student.high, first);
    if (by_q && lost != 0.0) cross *= std::exp2(-lost);
    if (first || of_teacher.high > teacher.highest) {
      const double before = teacher.base;
      teacher.move_to(teacher.wanted(of_teacher.high));
      if (!first) {
        teacher_sum *= std::exp2(before - teacher.base);
        if (!by_q) cross *= std::exp2(before - teacher.base);
      }
    }
    if (!student.reachable() || !(std::fabs(teacher.base) < student.kFarthest)) return false;
    lows[0] = of_student.low;
    lows[1] = of_teacher.low;
    add(safe_block(lows) ? sums_of<true, by_q>(s, t, n) : sums_of<false, by_q>(s, t, n));
    return true;
  }
  // Whether the exponentials of a block with these bounds need clamping.
  bool safe_block(const float* lows) const { return lows[0] < student.lowest() || lows[1] < teacher.lowest; }
};

template <bool safe, Direction direction, Ce ce>
void bf16_gradient(const uint16_t* s, const uint16_t* t, uint16_t* g, int64_t n, const Bf16Dense<ce>& sums,
                   const DenseFactors& factors, const uint16_t* ahead, const uint16_t* teacher_ahead) {
  using V = Simd::V;
  const V of_student = Simd::set(static_cast<float>(factors.student)),
          of_one = Simd::set(static_cast<float>(factors.one)),
          of_teacher = Simd::set(static_cast<float>(factors.teacher)),
          mean = Simd::set(static_cast<float>(factors.mean));
  for (int64_t i = 0; i < n; i += kStep) {
    V x[2], y[2], out[2];
    Simd::load2(s + i, x[0], x[1]);
    Simd::load2(t + i, y[0], y[1]);
    if (ahead != nullptr) {
      fetch_step(ahead + i, kStep);
      fetch_step(teacher_ahead + i, kStep);
    }
    for (int j = 0; j < 2; ++j) {
      const V es = sums.student.at_t.template at<safe>(x[j]);
      V factor = of_student, rest;
      if constexpr (direction == Direction::reverse) {
        factor = Simd::mul(Simd::sub(sums.gap(x[j], y[j]), mean), of_student);
        if constexpr (safe) factor = Simd::where_positive(es, factor);
      }
      if constexpr (ce == Ce::square) factor = Simd::fma(es, of_one, factor);
      if constexpr (direction == Direction::reverse && ce == Ce::same) factor = Simd::add(factor, of_one);
      if constexpr (direction == Direction::forward) rest = Simd::mul(sums.teacher.template at<safe>(y[j]), of_teacher);
      if constexpr (direction == Direction::reverse) rest = Simd::set(0.0f);
      if constexpr (ce == Ce::separate)
        rest = Simd::fma(sums.student.template ce_exponential<safe>(x[j]), of_one, rest);
      out[j] = Simd::fma(es, factor, rest);
    }
    Simd::store2(g + i, out[0], out[1]);
  }
}

// Columns beyond the last whole line, in lines of their own filled with minus infinity.
struct Rest {
  explicit Rest(const uint16_t* p, int64_t vocab) : count(vocab % kLine), start(vocab - vocab % kLine) {
    std::fill(line, line + kLine, uint16_t{0xff80});
    std::copy(p + start, p + vocab, line);
  }
  int64_t count, start;
  uint16_t line[kLine];
};

template <Ce ce, bool reverse>
bool bf16_dense_row(const KdCall& call, const Row& row, Scratch& scratch) {
  constexpr Direction direction = reverse ? Direction::reverse : Direction::forward;
  const auto* s = static_cast<const uint16_t*>(row.student);
  const auto* t = static_cast<const uint16_t*>(row.teacher);
  auto* g = static_cast<uint16_t*>(row.gradient);
  const Rest s_rest(s, call.vocab), t_rest(t, call.vocab);
  const int64_t whole = s_rest.start, blocks = (whole + kBlock - 1) / kBlock;

  Bf16Dense<ce> sums(call, row);
  scratch.lowest.resize(static_cast<size_t>(2 * blocks + 2));
  float* lows = scratch.lowest.data();
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t i = b * kBlock;
    if (!sums.template take<reverse>(s + i, t + i, std::min(kBlock, whole - i), b == 0, lows + 2 * b)) return false;
  }
  if (s_rest.count != 0 && !sums.template take<reverse>(s_rest.line, t_rest.line, kLine, whole == 0, lows + 2 * blocks))
    return false;

  const auto& student = sums.student;
  const double student_sum = student.sum, one_sum = student.one_sum(), teacher_sum = sums.teacher_sum;
  if (!usable(student_sum) || !usable(one_sum) || !usable(teacher_sum) || !std::isfinite(sums.cross)) return false;
  // log q and log p of a token are its powers of two less these.
  const double q_all = std::log2(student_sum) + student.at_t.origin,
               p_all = std::log2(teacher_sum) + sums.teacher.origin;
  const double mean = sums.cross / (reverse ? student_sum : teacher_sum);
  const double divergence = student.at_t.per_logit * mean + p_all - q_all;
  call.kd_rows[row.index] = kLn2 * (reverse ? divergence : -divergence);
  const int64_t label = call.labels == nullptr ? -1 : call.labels[row.index];
  const double x = label < 0 ? 0.0 : widen(s[label]);
  call.ce_rows[row.index] = label < 0 ? 0.0 : student.cross_entropy(std::log2(one_sum) + student.one_origin(), x);
  if (g == nullptr) return true;

  const double kd_scale = row.chain * call.kd_scale / call.temperature;
  const double of_student = kd_scale / student_sum * (reverse ? row.logit_scale / call.temperature : 1.0);
  const double of_one = row.chain * call.ce_scale / one_sum, of_teacher = reverse ? 0.0 : kd_scale / teacher_sum;
  double g_label = 0.0;
  if (label >= 0) {
    const double e = student.at_t.exactly(x), y = widen(t[label]);
    const double pull = !reverse  ? of_student * e - of_teacher * sums.teacher.exactly(y)
                        : e > 0.0 ? of_student * e * (x - static_cast<double>(sums.ratio) * y - mean)
                                  : 0.0;
    g_label = pull + of_one * student.one_exactly(x) - row.chain * call.ce_scale;
  }
  const auto* ahead = static_cast<const uint16_t*>(row.student_ahead);
  const auto* teacher_ahead = static_cast<const uint16_t*>(row.teacher_ahead);
  const auto sweep = [&](const auto& form, const DenseFactors& factors) {
    constexpr Ce kind = std::decay_t<decltype(form)>::kind;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t i = b * kBlock, n = std::min(kBlock, whole - i);
      const auto kernel =
          form.safe_block(lows + 2 * b) ? bf16_gradient<true, direction, kind> : bf16_gradient<false, direction, kind>;
      kernel(s + i, t + i, g + i, n, form, factors, ahead == nullptr ? nullptr : ahead + i,
             ahead == nullptr ? nullptr : teacher_ahead + i);
    }
    if (s_rest.count == 0) return;
    uint16_t line[kLine];
    bf16_gradient<true, direction, kind>(s_rest.line, t_rest.line, line, kLine, form, factors, nullptr, nullptr);
    std::copy(line, line + s_rest.count, g + whole);
  };
  if (ce == Ce::same || call.ce_scale == 0.0) {
    // One exponential serves both terms, or the cross-entropy has no weight.
    const double one = ce == Ce::same ? of_one : 0.0;
    sweep(Bf16Dense<Ce::same>(sums), {of_student + (reverse ? 0.0 : one), reverse ? one : 0.0, -of_teacher, mean});
  } else {
    sweep(sums, {of_student, of_one, -of_teacher, mean});
  }
  if (label >= 0) narrow(g_label, g + label);
  return true;
}

}  // namespace
}  // namespace latentforge
