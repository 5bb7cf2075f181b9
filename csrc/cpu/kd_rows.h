// Which kernel a row gets, for whichever Simd was included before this header: bf16 rows that lie ready go to the bf16
// kernels; what these decline, and everything else, goes to the fp32 kernels, from a copy of the row where it has to be
// widened, gathered or shaped.
#pragma once

#include "kd_bf16.h"
#include "kd_bf16_sparse.h"
#include "kd_dense.h"
#include "kd_shape.h"
#include "kd_sparse.h"

namespace latentforge {
namespace {

// Runs body.operator()<ce>() for what the cross-entropy of this call needs.
template <class Body>
auto with_ce(const KdCall& call, Body body) {
  if (call.temperature == 1.0 || call.labels == nullptr) return body.template operator()<Ce::same>();
  if (call.temperature == 2.0) return body.template operator()<Ce::square>();
  return body.template operator()<Ce::separate>();
}

inline bool bf16_row(const KdCall& call, const Row& row, Scratch& scratch) {
  return with_ce(call, [&]<Ce ce>() {
    if (call.teacher.data == nullptr) return bf16_sparse_row<ce>(call, row, scratch);
    return call.direction == Direction::reverse ? bf16_dense_row<ce, true>(call, row, scratch)
                                                : bf16_dense_row<ce, false>(call, row, scratch);
  });
}

template <class G>
void f32_row(const KdCall& call, const Row& row, Scratch& scratch) {
  with_ce(call, [&]<Ce ce>() {
    call.teacher.data == nullptr ? sparse_row<ce, G>(call, row, scratch) : dense_row<ce, G>(call, row);
  });
}

inline void kd_row(const KdCall& call, int64_t index, int64_t ahead, Scratch& scratch) {
  const bool dense = call.teacher.data != nullptr, wanted = call.gradient.data != nullptr;
  if (call.labels != nullptr && call.labels[index] == call.ignore_index) {
    call.ce_rows[index] = call.kd_rows[index] = 0.0;
    if (wanted) scatter_row(nullptr, call.gradient, index, call.vocab);
    return;
  }
  const bool shaped = call.bias != nullptr || call.soft_cap != 0.0;
  Row row;
  row.index = index;
  row.cap = call.soft_cap;
  row.chain = call.logit_scale;
  row.logit_scale = call.soft_cap == 0.0 ? call.logit_scale : 1.0;
  const auto address = [](const Logits& logits, int64_t at) {
    return logits.data == nullptr || at < 0 ? nullptr : row_address(logits, at);
  };
  row.gradient = const_cast<void*>(address(call.gradient, index));
  const bool direct = !shaped && call.direction != Direction::jsd && call.student.plain(Dtype::bf16) &&
                      (!dense || call.teacher.plain(Dtype::bf16)) && (!wanted || call.gradient.plain(Dtype::bf16));
  if (direct || (call.student.plain(Dtype::f32) && !shaped)) row.student_ahead = address(call.student, ahead);
  if (direct || call.teacher.plain(Dtype::f32)) row.teacher_ahead = address(call.teacher, ahead);
  if (direct) {
    row.student = address(call.student, index);
    row.teacher = address(call.teacher, index);
    if (bf16_row(call, row, scratch)) return;
    row.student_ahead = row.teacher_ahead = nullptr;
  }
  const auto in_fp32 = [&](const Logits& logits, bool copied, std::vector<float>& copy) -> const void* {
    if (!copied && logits.plain(Dtype::f32)) return row_address(logits, index);
    copy.resize(static_cast<size_t>(call.vocab));
    gather_row(logits, index, copy.data(), call.vocab);
    return copy.data();
  };
  row.student = in_fp32(call.student, shaped, scratch.student);
  if (shaped) shape_row(scratch.student.data(), call.vocab, call.bias, call.logit_scale, call.soft_cap);
  if (dense) row.teacher = in_fp32(call.teacher, false, scratch.teacher);
  if (!wanted || call.gradient.column_stride == 1) {
    call.gradient.dtype == Dtype::bf16 ? f32_row<uint16_t>(call, row, scratch) : f32_row<float>(call, row, scratch);
    return;
  }
  scratch.gradient.resize(static_cast<size_t>(call.vocab));
  row.gradient = scratch.gradient.data();
  f32_row<float>(call, row, scratch);
  scatter_row(scratch.gradient.data(), call.gradient, index, call.vocab);
}

}  // namespace
}  // namespace latentforge
