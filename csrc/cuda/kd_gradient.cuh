// Second pass: the gradient of one slice of one row, over the student's logits; slice 0 also writes the row's losses.
#pragma once

#include "kd_terms.cuh"

namespace latentforge::cuda {

template <class S>
__device__ __forceinline__ void fill(S* row, int begin, int end, float value) {
  float x[kWindow];
#pragma unroll
  for (int i = 0; i < kWindow; ++i) x[i] = value;
  const bool vectors = aligned(row + begin);
  for (int column = begin + static_cast<int>(threadIdx.x) * kWindow; column < end; column += kTile) {
    if (vectors && column + kWindow <= end) {
      store_window(row + column, x);
    } else {
      for (int i = column; i < end && i < column + kWindow; ++i) from_float(value, row + i);
    }
  }
}

template <class Exp>
__device__ __forceinline__ float gradient_without_teacher(float s, float top, float kd, float ce, const KdParams& p) {
  const float d = s - top;
  const float e = Exp::of(d, p.student);
  return e * kd + ce * at_one<Exp>(e, d, p);
}

// `t` is the teacher's logit relative to its maximum, in powers of two; `et` its exponential.
template <class Exp>
__device__ __forceinline__ float gradient_with_teacher(float s, float t, float et, const RowTerms& r,
                                                       const KdParams& p) {
  const float d = s - r.top;
  const float e = Exp::of(d, p.student), q = e * r.over_sum;
  float g;
  if (p.call.reverse) {
    const float gap = fminf(d * p.student.high - t, kHuge) - r.log_ratio;
    g = q > 0.0f && p.kd_factor != 0.0f ? p.kd_factor * (q * (in_nats(gap) - r.kd)) : 0.0f;
  } else {
    g = p.kd_factor * (q - et * r.over_teacher);
  }
  return g + r.ce_over_sum * at_one<Exp>(e, d, p);
}

template <class Exp, bool topk>
__device__ __forceinline__ RowTerms terms_of(const KdParams& p, int64_t row, bool teacher) {
  const int lane = threadIdx.x % kWarp;
  Partial a;
  if (lane < p.slices) a = *reinterpret_cast<const Partial*>(p.call.workspace + (row * p.slices + lane) * kPartialSize);
  merge<Exp, topk>(a, p);
  if constexpr (topk) return finish_topk<Exp>(a.sums, a.outside, a.label, p.call.topk_tail[row], p);
  return finish_dense(a.sums, a.label, teacher, p);
}

template <class S, class T>
__device__ __forceinline__ void write_slice(const KdParams& p, int64_t row, int slice, Listed& listed) {
  using Exp = typename ExpFor<S>::type;
  constexpr int kAtOnce = kFlight<S, T>;
  __shared__ RowTerms shared;
  S* student = static_cast<S*>(p.call.student.data) + row * p.call.student.row_stride;
  const int begin = slice * kSlice;
  const int end = static_cast<int>(p.call.vocab - begin < kSlice ? p.call.vocab : begin + kSlice);
  const bool skipped = ignored(p, row);
  if (!skipped && threadIdx.x < kWarp) {
    const RowTerms r = terms_of<Exp, kTopK<T>>(p, row, kDense<T>);
    if (threadIdx.x == 0) shared = r;
  }
  if (slice == 0 && threadIdx.x == 0) {
    p.call.ce_rows[row] = skipped ? 0.0f : shared.ce;
    p.call.kd_rows[row] = skipped ? 0.0f : shared.kd;
  }
  if (!p.call.write_gradient) return;
  if (skipped) return fill(student, begin, end, 0.0f);
  __syncthreads();
  const RowTerms r = shared;
  if (r.poisoned) return fill(student, begin, end, not_a_number());
  if constexpr (kTopK<T>) listed.mark(p, row, begin, end);
  const int label = p.call.labels == nullptr || p.ce_factor == 0.0f ? -1 : static_cast<int>(p.call.labels[row]);

  // Window 0 is what lies before the first aligned address, if anything; each column's gradient depends on its own
  // logits and the row's terms, so here the address may decide who does what.
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(student + begin) % 16 / sizeof(S));
  const int head = misaligned == 0 ? 0 : 16 / static_cast<int>(sizeof(S)) - misaligned;
  const int body = begin + (head < end - begin ? head : end - begin);
  const int before = head != 0 ? 1 : 0;
  const int windows = before + (end - body + kWindow - 1) / kWindow;
  for (int first = static_cast<int>(threadIdx.x); first < windows; first += kAtOnce * kThreads) {
    int column[kAtOnce], stop[kAtOnce];
    Window<S> ws[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int w = first + u * kThreads;
      column[u] = w < before ? begin : body + (w - before) * kWindow;
      const int next = w < before ? body : column[u] + kWindow;
      stop[u] = next < end ? next : end;
      ws[u].template load<true>(student, column[u], stop[u], stop[u] - column[u] == kWindow);
    }
    const auto finish = [&](int u, float (&g)[kWindow], const float (&s)[kWindow], uint32_t entries) {
      const unsigned at = static_cast<unsigned>(label - column[u]);
      if (at < kWindow) {
#pragma unroll
        for (int i = 0; i < kWindow; ++i)
          if (at == static_cast<unsigned>(i)) g[i] -= p.ce_factor;
      }
      if (p.shaped) {
#pragma unroll
        for (int i = 0; i < kWindow; ++i) g[i] *= slope(s[i], p);
      }
      if (stop[u] - column[u] == kWindow && entries == 0) {
        store_window(student + column[u], g);
      } else {
#pragma unroll
        for (int i = 0; i < kWindow; ++i)
          if (column[u] + i < stop[u] && !(entries >> i & 1u)) from_float(g[i], student + column[u] + i);
      }
    };
    float s[kWindow], g[kWindow];
    if constexpr (kDense<T>) {
      const T* teacher = static_cast<const T*>(p.call.teacher.data) + row * p.call.teacher.row_stride;
      const bool vectors = aligned(teacher + body);
      Window<T> wt[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        wt[u].template load<true>(teacher, column[u], stop[u], vectors && stop[u] - column[u] == kWindow);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        ws[u].unpack(s);
        wt[u].unpack(g);
        shape_window(s, column[u], stop[u], p);
#pragma unroll
        for (int i = 0; i < kWindow; ++i) {
          const float d = g[i] - r.teacher_top;
          g[i] =
              gradient_with_teacher<Exp>(s[i], d * p.teacher.high, p.call.reverse ? 0.0f : Exp::of(d, p.teacher), r, p);
        }
        finish(u, g, s, 0u);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        ws[u].unpack(s);
        shape_window(s, column[u], stop[u], p);
        uint32_t entries = 0;
        if constexpr (kTopK<T>) entries = column[u] < stop[u] ? listed.window(column[u] - begin) : 0u;
        if constexpr (kTopK<T>) {
          // Where there is no logit outside the top-k, there is nothing to move.
          const bool nothing = r.outside_top == minus_infinity();
#pragma unroll
          for (int i = 0; i < kWindow; ++i)
            g[i] = nothing ? 0.0f : gradient_without_teacher<Exp>(s[i], r.outside_top, r.outside_kd, r.outside_ce, p);
        } else {
#pragma unroll
          for (int i = 0; i < kWindow; ++i) g[i] = gradient_without_teacher<Exp>(s[i], r.top, 0.0f, r.ce_over_sum, p);
        }
        finish(u, g, s, entries);
      }
    }
  }
  if constexpr (kTopK<T>) {
    // The sweep neither uses nor writes the entries' columns, so there is nothing to wait for.
    for (int64_t j = threadIdx.x; j < p.call.k; j += kThreads) {
      const int64_t id = entry_id(p, row * p.call.k + j);
      if (id < begin || id >= end) continue;
      const float s = shape(to_float(student[id]), static_cast<int>(id), p);
      const float t = p.call.topk_logprobs[row * p.call.k + j] * p.teacher.high - r.teacher_top;
      const float et = p.call.reverse ? 0.0f : ExactExp::power(t);
      float g = gradient_with_teacher<Exp>(s, t, et, r, p);
      if (id == label) g -= p.ce_factor;
      if (p.shaped) g *= slope(s, p);
      from_float(g, student + id);
    }
  }
}

}  // namespace latentforge::cuda
