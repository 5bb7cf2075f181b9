// First pass: the sums of one slice of one row.
#pragma once

#include "kd_window.cuh"

namespace latentforge::cuda {

// What a kernel is compiled for beside dense teachers of type Bf16 or float.
struct NoTeacher {};
struct TopK {};
template <class T>
constexpr bool kDense = false;
template <>
inline constexpr bool kDense<Bf16> = true;
template <>
inline constexpr bool kDense<float> = true;
template <class T>
constexpr bool kTopK = false;
template <>
inline constexpr bool kTopK<TopK> = true;

__device__ __forceinline__ bool ignored(const KdParams& p, int64_t row) {
  return p.call.labels != nullptr && p.call.labels[row] == p.call.ignore_index;
}

template <class Exp>
__device__ __forceinline__ void add_half(Half& a, const float (&s)[kWindow], const KdParams& p) {
  float high = s[0];
#pragma unroll
  for (int i = 1; i < kWindow; ++i) high = fmaxf(high, s[i]);
  if (high > a.top) move_half<Exp>(a, high, p);
  const bool nothing = a.top == minus_infinity();  // then there are only minus infinity and NaN
#pragma unroll
  for (int i = 0; i < kWindow; ++i) {
    const float d = s[i] - a.top;
    const float e = nothing ? (s[i] == minus_infinity() ? 0.0f : s[i]) : Exp::of(d, p.student);
    a.sum += e;
    a.sum_one += at_one<Exp>(e, nothing ? e : d, p);
  }
}

template <class Exp>
__device__ __forceinline__ void add_both(Sums& a, float (&s)[kWindow], float (&t)[kWindow], const KdParams& p) {
  float high_s = s[0], high_t = t[0], low = fminf(s[0], t[0]);
#pragma unroll
  for (int i = 1; i < kWindow; ++i) {
    high_s = fmaxf(high_s, s[i]);
    high_t = fmaxf(high_t, t[i]);
    low = fminf(low, fminf(s[i], t[i]));
  }
  if (high_s > a.student.top || high_t > a.teacher_top)
    move_sums<Exp>(a, fmaxf(a.student.top, high_s), fmaxf(a.teacher_top, high_t), p);
  if (low > kVeryLow) {
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      const float ds = s[i] - a.student.top, dt = t[i] - a.teacher_top;
      const float es = Exp::of(ds, p.student), et = Exp::of(dt, p.teacher);
      a.student.sum += es;
      a.student.sum_one += at_one<Exp>(es, ds, p);
      a.teacher_sum += et;
      const float gap = dt * p.teacher.high - ds * p.student.high;
      a.gap += p.call.reverse ? es * -gap : et * gap;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kWindow; ++i) {
      add_any<Exp>(a, s[0], t[0], p);
      rotate(s, s[0]);
      rotate(t, t[0]);
    }
  }
}

__device__ __forceinline__ int64_t entry_id(const KdParams& p, int64_t entry) {
  return p.call.ids_are_64_bit ? static_cast<const int64_t*>(p.call.topk_ids)[entry]
                               : static_cast<const int32_t*>(p.call.topk_ids)[entry];
}

// A bit for each column of the slice that is among the row's top-k; one word more, so that a window may straddle.
struct Listed {
  uint32_t words[kSlice / 32 + 1];

  __device__ __forceinline__ void mark(const KdParams& p, int64_t row, int begin, int end) {
    for (int i = threadIdx.x; i <= kSlice / 32; i += kThreads) words[i] = 0;
    __syncthreads();
    for (int64_t j = threadIdx.x; j < p.call.k; j += kThreads) {
      const int64_t id = entry_id(p, row * p.call.k + j);
      if (id >= begin && id < end) atomicOr(&words[(id - begin) / 32], 1u << ((id - begin) % 32));
    }
    __syncthreads();
  }
  // Bits of the eight columns from `offset` on.
  __device__ __forceinline__ uint32_t window(int offset) const {
    const uint64_t both = static_cast<uint64_t>(words[offset / 32 + 1]) << 32 | words[offset / 32];
    return static_cast<uint32_t>(both >> (offset % 32)) & 0xffu;
  }
};

// S: the student's type; T: the teacher's, NoTeacher or TopK.
template <class S, class T>
__device__ __forceinline__ void sum_slice(const KdParams& p, int64_t row, int slice, Listed& listed) {
  using Exp = typename ExpFor<S>::type;
  constexpr int kAtOnce = kFlight<S, T>;
  if (ignored(p, row)) return;
  const S* student = static_cast<const S*>(p.call.student.data) + row * p.call.student.row_stride;
  const int begin = slice * kSlice;
  const int end = static_cast<int>(p.call.vocab - begin < kSlice ? p.call.vocab : begin + kSlice);
  const bool student_aligned = aligned(student + begin);
  Partial a;
  if constexpr (kTopK<T>) listed.mark(p, row, begin, end);
  // Which thread sums which columns depends on nothing but the column: an address or a batch must not change a bit.
  for (int first = begin + static_cast<int>(threadIdx.x) * kWindow; first < end; first += kAtOnce * kTile) {
    Window<S> ws[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int column = first + u * kTile;
      ws[u].template load<false>(student, column, end, student_aligned && column + kWindow <= end);
    }
    float s[kWindow];
    if constexpr (kDense<T>) {
      const T* teacher = static_cast<const T*>(p.call.teacher.data) + row * p.call.teacher.row_stride;
      const bool teacher_aligned = aligned(teacher + begin);
      Window<T> wt[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int column = first + u * kTile;
        wt[u].template load<false>(teacher, column, end, teacher_aligned && column + kWindow <= end);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        float t[kWindow];
        ws[u].unpack(s);
        wt[u].unpack(t);
        shape_window(s, first + u * kTile, end, p);
        add_both<Exp>(a.sums, s, t, p);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int column = first + u * kTile;
        ws[u].unpack(s);
        shape_window(s, column, end, p);
        if constexpr (kTopK<T>) {
          const uint32_t entries = column < end ? listed.window(column - begin) : 0u;
          if (entries != 0) {
#pragma unroll
            for (int i = 0; i < kWindow; ++i)
              if (entries >> i & 1u) s[i] = minus_infinity();
          }
          add_half<Exp>(a.outside, s, p);
        } else {
          add_half<Exp>(a.sums.student, s, p);
        }
      }
    }
  }
  if constexpr (kTopK<T>) {
    for (int64_t j = threadIdx.x; j < p.call.k; j += kThreads) {
      const int64_t id = entry_id(p, row * p.call.k + j);
      if (id < begin || id >= end) continue;
      const float s = shape(to_float(student[id]), static_cast<int>(id), p);
      const float t = p.call.topk_logprobs[row * p.call.k + j];
      if (s > a.sums.student.top || t > a.sums.teacher_top)
        move_sums<Exp>(a.sums, fmaxf(a.sums.student.top, s), fmaxf(a.sums.teacher_top, t), p);
      add_any<Exp>(a.sums, s, t, p);
    }
  }
  if (threadIdx.x == 0 && p.call.labels != nullptr) {
    const int64_t label = p.call.labels[row];
    if (label >= begin && label < end) a.label = shape(to_float(student[label]), static_cast<int>(label), p);
  }
  merge_block<Exp, kTopK<T>>(a, p);
  if (threadIdx.x == 0) *reinterpret_cast<Partial*>(p.call.workspace + (row * p.slices + slice) * kPartialSize) = a;
}

}  // namespace latentforge::cuda
