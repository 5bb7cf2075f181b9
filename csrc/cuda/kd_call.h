// One call of the KD loss on a CUDA device, as the host hands it over: device addresses, sizes, strides.
#pragma once

#include <cstdint>

namespace latentforge::cuda {

struct Logits {
  void* data = nullptr;
  int64_t row_stride = 0;
  bool bf16 = false;
};

// Columns are contiguous. The teacher is dense logits, top-k rows with an exact tail, or nothing (both null). Sums per
// row are neither weighted nor divided; the divergence is without its factor of T squared.
struct KdCall {
  int64_t rows = 0;
  int64_t vocab = 0;
  Logits student;
  Logits teacher;
  const void* topk_ids = nullptr;  // [rows, k], int64 or int32; -1 is absent: in no slice of the row
  bool ids_are_64_bit = true;
  const float* topk_logprobs = nullptr;
  const float* topk_tail = nullptr;
  int64_t k = 0;
  const int64_t* labels = nullptr;  // null: no cross-entropy, every row counts
  int64_t ignore_index = -100;
  const float* bias = nullptr;  // [vocab]
  double temperature = 1.0;
  double teacher_temperature = 1.0;
  double ce_scale = 0.0;
  double kd_scale = 0.0;
  double logit_scale = 1.0;
  double soft_cap = 0.0;  // 0: none
  bool reverse = false;
  bool write_gradient = false;  // over the student's logits
  float* ce_rows = nullptr;
  float* kd_rows = nullptr;
  float* workspace = nullptr;  // kd_workspace_bytes(call)
};

constexpr int kSlice = 16384;     // columns of one block: depends on nothing, so that no bit does
constexpr int kMaxSlices = 32;    // one lane each when they are put together
constexpr int kPartialSize = 12;  // floats that a slice leaves for its row

inline int64_t slices_of(int64_t vocab) { return (vocab + kSlice - 1) / kSlice; }
inline int64_t kd_workspace_bytes(const KdCall& call) {
  return call.rows * slices_of(call.vocab) * kPartialSize * static_cast<int64_t>(sizeof(float));
}

}  // namespace latentforge::cuda
