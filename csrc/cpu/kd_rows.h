// Which row kernel a call needs, for whichever Simd was included before this header.
#pragma once

#include "kd_dense.h"
#include "kd_sparse.h"

namespace latentforge {
namespace {

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
