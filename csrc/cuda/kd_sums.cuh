// The sums of a part of a row, and how two parts become one.
//
// Exponentials are relative to the largest logit seen so far (online softmax, Milakov and Gimelshein 2018,
// arXiv:1805.02867), so no sweep is spent on the maximum. The divergence is carried the same way: `gap` sums
// weight * (log2 of teacher's over student's exponential), relative to both maxima; it is rescaled with them.
#pragma once

#include "exponent.cuh"
#include "kd_call.h"

namespace latentforge::cuda {

// Logits under this are handled like minus infinity where they could make 0 * infinity.
constexpr float kVeryLow = -1e30f;
constexpr float kHuge = 1e30f;

// How the exponential at temperature 1, which the cross-entropy needs, follows from the one at temperature T.
enum class CrossEntropy : int { same, square, separate };

// What the kernels get: the call, and what follows from it once.
struct KdParams {
  KdCall call;
  Factor student;          // log2(e) / T
  Factor teacher;          // log2(e) / T_t
  Factor one;              // log2(e)
  float kd_factor = 0.0f;  // kd_scale / T
  float ce_factor = 0.0f;
  float scale = 1.0f;
  float cap = 0.0f;
  CrossEntropy cross_entropy = CrossEntropy::same;
  bool shaped = false;
  int slices = 0;
};

// The student's half: the largest logit, the sum at temperature T and the sum at temperature 1.
struct Half {
  float top = minus_infinity();
  float sum = 0.0f;
  float sum_one = 0.0f;
};

struct Sums {
  Half student;
  float teacher_top = minus_infinity();
  float teacher_sum = 0.0f;
  float gap = 0.0f;
  // The largest logit of the side that weighs, where the other side excludes the token: if it has any probability
  // in the end, the divergence is infinite.
  float excluded = minus_infinity();
};

// By how many powers of two a maximum moves; nothing has been summed where it was minus infinity.
__device__ __forceinline__ float shift_of(float from, float to, Factor c) {
  return from == minus_infinity() ? 0.0f : fminf((to - from) * c.high, kHuge);
}
template <class Exp>
__device__ __forceinline__ float shrink(float from, float to, Factor c) {
  return from == minus_infinity() ? 0.0f : Exp::of(from - to, c);
}

template <class Exp>
__device__ __forceinline__ float at_one(float e, float d, const KdParams& p) {
  if (p.cross_entropy == CrossEntropy::same) return e;
  if (p.cross_entropy == CrossEntropy::square) return e * e;
  return Exp::of(d, p.one);
}

// Moves the reference of the student's sums; returns the factor on the sum at temperature T.
template <class Exp>
__device__ __forceinline__ float move_half(Half& a, float top, const KdParams& p) {
  const float factor = shrink<Exp>(a.top, top, p.student);
  a.sum_one *= a.top == minus_infinity() ? 0.0f : at_one<Exp>(factor, a.top - top, p);
  a.sum *= factor;
  a.top = top;
  return factor;
}

template <class Exp>
__device__ __forceinline__ void move_sums(Sums& a, float student_top, float teacher_top, const KdParams& p) {
  const float ds = shift_of(a.student.top, student_top, p.student);
  const float dt = shift_of(a.teacher_top, teacher_top, p.teacher);
  const float student_before = a.student.sum;
  const float student_factor = move_half<Exp>(a.student, student_top, p);
  const float teacher_factor = shrink<Exp>(a.teacher_top, teacher_top, p.teacher);
  if (p.call.reverse) {
    a.gap = student_factor * (a.gap + student_before * (dt - ds));
  } else {
    a.gap = teacher_factor * (a.gap + a.teacher_sum * (ds - dt));
  }
  a.teacher_sum *= teacher_factor;
  a.teacher_top = teacher_top;
}

// One token of both sides, whatever its logits are. NaN on a side makes that side's sum NaN.
template <class Exp>
__device__ __forceinline__ void add_any(Sums& a, float s, float t, const KdParams& p) {
  const float ds = s - a.student.top, dt = t - a.teacher_top;
  const float es = s == minus_infinity() ? 0.0f : Exp::of(ds, p.student);
  const float et = t == minus_infinity() ? 0.0f : Exp::of(dt, p.teacher);
  a.student.sum += es;
  if (es != 0.0f) a.student.sum_one += at_one<Exp>(es, ds, p);
  a.teacher_sum += et;
  const float weight = p.call.reverse ? es : et;
  const float other = p.call.reverse ? t : s;
  if (weight > 0.0f) {
    if (other == minus_infinity()) {
      a.excluded = fmaxf(a.excluded, p.call.reverse ? s : t);
    } else {
      const float gap = dt * p.teacher.high - ds * p.student.high;
      a.gap += weight * fminf(fmaxf(p.call.reverse ? -gap : gap, -kHuge), kHuge);
    }
  }
}

// A part's sums over the warp's lanes; every lane ends with all of it.
template <class Exp>
__device__ __forceinline__ void merge_half(Half& a, const KdParams& p) {
  move_half<Exp>(a, warp_max(a.top), p);
  a.sum = warp_sum(a.sum);
  a.sum_one = warp_sum(a.sum_one);
}
template <class Exp>
__device__ __forceinline__ void merge_sums(Sums& a, const KdParams& p) {
  move_sums<Exp>(a, warp_max(a.student.top), warp_max(a.teacher_top), p);
  a.student.sum = warp_sum(a.student.sum);
  a.student.sum_one = warp_sum(a.student.sum_one);
  a.teacher_sum = warp_sum(a.teacher_sum);
  a.gap = warp_sum(a.gap);
  a.excluded = warp_max(a.excluded);
}

// What a slice leaves for its row: the sums over its tokens (for top-k: over its entries), for top-k those over the
// tokens outside, and the label's logit.
struct Partial {
  Sums sums;
  Half outside;
  float label = minus_infinity();
};
static_assert(sizeof(Partial) <= kPartialSize * sizeof(float), "a slice's workspace is too small");

template <class Exp, bool topk>
__device__ __forceinline__ void merge(Partial& a, const KdParams& p) {
  merge_sums<Exp>(a.sums, p);
  if constexpr (topk) merge_half<Exp>(a.outside, p);
  a.label = warp_max(a.label);
}

// The block's threads' parts into one, complete in warp 0.
template <class Exp, bool topk>
__device__ __forceinline__ void merge_block(Partial& a, const KdParams& p) {
  __shared__ float shared[kThreads / kWarp][kPartialSize];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  merge<Exp, topk>(a, p);
  if (lane == 0) *reinterpret_cast<Partial*>(shared[warp]) = a;
  __syncthreads();
  if (warp == 0) {
    a = Partial();
    if (lane < kThreads / kWarp) a = *reinterpret_cast<const Partial*>(shared[lane]);
    merge<Exp, topk>(a, p);
  }
}

}  // namespace latentforge::cuda
