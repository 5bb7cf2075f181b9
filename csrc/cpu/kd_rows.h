// Which kernel a row gets, for whichever Simd was included before this header: rows of bf16 alone go to the bf16
// kernels, from a copy where their columns lie apart; what these decline, and everything else, goes to the fp32
// kernels, from a copy of the row where it has to be widened, gathered or shaped.
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

// A row by the fp32 kernels, from a copy where it has to be widened, gathered or shaped.
template <class G>
void fp32_row(const KdCall& call, Row& row, Scratch& scratch) {
  const bool shaped = call.bias != nullptr || call.soft_cap != 0.0;
  const auto in_fp32 = [&](const Logits& logits, bool copied, std::vector<float>& copy) -> const void* {
    if (!copied && logits.plain(Dtype::f32)) return row_address(logits, row.index);
    copy.resize(static_cast<size_t>(call.vocab));
    gather_row(logits, row.index, copy.data(), call.vocab);
    return copy.data();
  };
  row.student = in_fp32(call.student, shaped, scratch.student);
  if (shaped) shape_row(scratch.student.data(), call.vocab, call.bias, call.logit_scale, call.soft_cap);
  if (call.teacher.data != nullptr) row.teacher = in_fp32(call.teacher, false, scratch.teacher);
  f32_row<G>(call, row, scratch);
}

template <class G>
void kd_row_into(const KdCall& call, int64_t index, int64_t ahead, Scratch& scratch, std::vector<G>& copy) {
  const bool dense = call.teacher.data != nullptr, wanted = call.gradient.data != nullptr;
  if (call.labels != nullptr && call.labels[index] == call.ignore_index) {
    call.ce_rows[index] = call.kd_rows[index] = 0.0;
    if (wanted) scatter_row<G>(nullptr, call.gradient, index, call.vocab);
    return;
  }
  const bool shaped = call.bias != nullptr || call.soft_cap != 0.0;
  Row row;
  row.index = index;
  row.cap = call.soft_cap;
  row.chain = call.logit_scale;
  row.logit_scale = call.soft_cap == 0.0 ? call.logit_scale : 1.0;
  const bool direct = !shaped && call.direction != Direction::jsd && call.student.dtype == Dtype::bf16 &&
                      (!dense || call.teacher.dtype == Dtype::bf16) && (!wanted || call.gradient.dtype == Dtype::bf16);
  const auto to_come = [&](const Logits& logits, bool used) -> const void* {
    return used && logits.data != nullptr && logits.column_stride == 1 && ahead >= 0 ? row_address(logits, ahead)
                                                                                     : nullptr;
  };
  row.student_ahead = to_come(call.student, direct || (call.student.dtype == Dtype::f32 && !shaped));
  row.teacher_ahead = to_come(call.teacher, direct || call.teacher.dtype == Dtype::f32);
  // The same kernel as for columns side by side, so that a row has the same bits wherever it lies.
  const bool scattered = wanted && call.gradient.column_stride != 1;
  if (scattered) copy.resize(static_cast<size_t>(call.vocab));
  if (wanted) row.gradient = scattered ? copy.data() : const_cast<void*>(row_address(call.gradient, index));
  bool done = false;
  if (direct) {
    row.student = beside(call.student, index, scratch.student16, call.vocab);
    if (dense) row.teacher = beside(call.teacher, index, scratch.teacher16, call.vocab);
    done = bf16_row(call, row, scratch);
    if (!done) row.student_ahead = row.teacher_ahead = nullptr;
  }
  if (!done) fp32_row<G>(call, row, scratch);
  if (scattered) scatter_row<G>(copy.data(), call.gradient, index, call.vocab);
}

inline void kd_row(const KdCall& call, int64_t index, int64_t ahead, Scratch& scratch) {
  call.gradient.dtype == Dtype::bf16 ? kd_row_into<uint16_t>(call, index, ahead, scratch, scratch.gradient16)
                                     : kd_row_into<float>(call, index, ahead, scratch, scratch.gradient);
}

}  // namespace
}  // namespace latentforge
