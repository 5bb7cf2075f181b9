// Generalised Jensen-Shannon divergence of dense fp32 rows: beta KL(p || m) + (1 - beta) KL(q || m) with
// m = beta p + (1 - beta) q, once the sums of both softmaxes are known. Two more sweeps: one for the divergences, one
// for the gradient. Blocks of probabilities are laid in arrays and worked on by plain loops, which every compiler turns
// into its own vectors: this header asks nothing more of Simd.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kd_student.h"

namespace latentforge {
namespace {

// Natural logarithm of a = 1 + d, a positive normal number; near 1 as exact as d is, far from it as a is (Cephes'
// polynomial).
inline float log_of(float a, float d) {
  int32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // a = 2^exponent * [sqrt(1/2), sqrt(2))
  const int32_t reduced = bits - exponent * (1 << 23);
  float mantissa;
  __builtin_memcpy(&mantissa, &reduced, sizeof mantissa);
  const float f = exponent == 0 ? d : mantissa - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f, n = static_cast<float>(exponent);
  return f + (p * f * square - 0.5f * square + n * 1.42860677e-6f) + n * 0.693145751953125f;
}

// weight * log(weight / (share * other + (1 - share) * weight)); what has no probability costs nothing.
inline float against_mixture(float weight, float other, float share) {
  const float mixture = share * other + (1.0f - share) * weight;
  const float safe = mixture > 0.0f ? mixture : 1.0f;
  const float cost = weight * log_of(weight / safe, share * (weight - other) / safe);
  return weight > 0.0f ? cost : 0.0f;
}
inline double against_mixture(double weight, double other, double share) {
  if (!(weight > 0.0)) return 0.0;
  const double mixture = share * other + (1.0 - share) * weight;
  if (!(mixture > 0.0)) return 0.0;  // too small a number for its parts
  const double ratio = weight / mixture;
  return weight * (ratio > 0.5 ? std::log1p(share * (weight - other) / mixture) : std::log(ratio));
}

template <Ce ce, class G>
struct JsdRow {
  using V = Simd::V;
  static constexpr int kLanes = 16;

  const KdCall& call;
  const Row& row;
  const Student<ce>& student;
  const Exponent& teacher;
  double teacher_sum, of_one;

  float p[kBlock] = {}, q[kBlock] = {}, one[kBlock] = {};

  // Probabilities of n tokens, n a multiple of kStep.
  void probabilities(const float* s, const float* t, int64_t n) {
    const V of_q = Simd::set(static_cast<float>(1.0 / student.sum)),
            of_p = Simd::set(static_cast<float>(1.0 / teacher_sum)), of_e = Simd::set(static_cast<float>(of_one));
    for (int64_t i = 0; i < n; i += kStep) {
      V x[2], y[2], e[2], a[2], b[2];
      Simd::load2(s + i, x[0], x[1]);
      Simd::load2(t + i, y[0], y[1]);
      for (int j = 0; j < 2; ++j) {
        const V es = student.at_t(x[j]);
        a[j] = Simd::mul(es, of_q);
        b[j] = Simd::mul(teacher(y[j]), of_p);
        e[j] = Simd::mul(student.ce_exponential(x[j], es), of_e);
      }
      Simd::store2(q + i, a[0], a[1]);
      Simd::store2(p + i, b[0], b[1]);
      Simd::store2(one + i, e[0], e[1]);
    }
  }

  void add(const float* s, const float* t, int64_t n, double& of_student, double& of_teacher) {
    probabilities(s, t, n);
    const float beta = static_cast<float>(call.beta), rest = static_cast<float>(1.0 - call.beta);
    float lanes_q[kLanes] = {}, lanes_p[kLanes] = {};
    for (int64_t i = n; i < (n + kLanes - 1) / kLanes * kLanes; ++i) p[i] = q[i] = 0.0f;
    for (int64_t i = 0; i < n; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes_q[j] += against_mixture(q[i + j], p[i + j], beta);
      for (int j = 0; j < kLanes; ++j) lanes_p[j] += against_mixture(p[i + j], q[i + j], rest);
    }
    for (int j = 0; j < kLanes; ++j) {
      of_student += lanes_q[j];
      of_teacher += lanes_p[j];
    }
  }

  void write(const float* s, const float* t, G* g, int64_t n, float factor, float mean) {
    probabilities(s, t, n);
    const float beta = static_cast<float>(call.beta);
    for (int64_t i = 0; i < n; ++i) one[i] += factor * (against_mixture(q[i], p[i], beta) - q[i] * mean);
    const V icap = Simd::set(row.cap == 0.0 ? 0.0f : static_cast<float>(1.0 / row.cap));
    for (int64_t i = 0; i < n; i += kStep) {
      V a, b, x, y;
      Simd::load2(one + i, a, b);
      if (row.cap != 0.0) {
        Simd::load2(s + i, x, y);
        a = Simd::mul(a, slope(x, icap));
        b = Simd::mul(b, slope(y, icap));
      }
      store_step(g + i, a, b);
    }
  }

  void run(const float* s, const float* t, int64_t whole, const float* s_rest, const float* t_rest, int64_t rest,
           int64_t label) {
    double of_student = 0.0, of_teacher = 0.0;
    for (int64_t i = 0; i < whole; i += kBlock) add(s + i, t + i, std::min(kBlock, whole - i), of_student, of_teacher);
    if (rest != 0) add(s_rest, t_rest, kStep, of_student, of_teacher);
    call.kd_rows[row.index] = call.beta * of_teacher + (1.0 - call.beta) * of_student;
    if (row.gradient == nullptr) return;

    auto* g = static_cast<G*>(row.gradient);
    const double factor = row.chain * call.kd_scale / call.temperature * (1.0 - call.beta);
    double g_label = 0.0;
    if (label >= 0) {
      const double x = s[label], qx = student.at_t.exactly(x) / student.sum,
                   px = teacher.exactly(t[label]) / teacher_sum;
      const double pull = factor * (against_mixture(qx, px, call.beta) - qx * of_student);
      g_label = (pull + of_one * student.at_one.exactly(x) - row.chain * call.ce_scale) * slope(x, row.cap);
    }
    const float mean = static_cast<float>(of_student), factor32 = static_cast<float>(factor);
    for (int64_t i = 0; i < whole; i += kBlock) write(s + i, t + i, g + i, std::min(kBlock, whole - i), factor32, mean);
    if (rest != 0) {
      G g_rest[kStep];
      write(s_rest, t_rest, g_rest, kStep, factor32, mean);
      std::copy(g_rest, g_rest + rest, g + whole);
    }
    if (label >= 0) narrow(g_label, g + label);
  }
};

}  // namespace
}  // namespace latentforge
