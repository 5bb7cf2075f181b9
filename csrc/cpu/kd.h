// Knowledge-distillation loss and gradient over rows of logits: what a caller
// hands in, and the variants that do it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace latentforge {

enum class Dtype : int { f32 = 0, bf16 = 1 };

// Row-major logits whose columns are contiguous; rows may be further apart than
// they are wide.
struct Logits {
  void* data = nullptr;
  int64_t row_stride = 0;
  Dtype dtype = Dtype::f32;
};

// One call. The teacher is given as dense logits, as top-k rows with an exact
// tail, or not at all (both null: only the cross-entropy). Sums per row are
// neither weighted nor divided; the KL is without its factor of T squared.
struct KdCall {
  int64_t rows = 0;
  int64_t vocab = 0;
  Logits student;
  Logits teacher;
  const int64_t* topk_ids = nullptr;  // [rows, k]
  const float* topk_logprobs = nullptr;
  const float* topk_tail = nullptr;
  int64_t k = 0;
  const int64_t* labels = nullptr;  // null: no cross-entropy, every row counts
  int64_t ignore_index = -100;
  double temperature = 1.0;
  double teacher_temperature = 1.0;
  double ce_scale = 0.0;        // ce_weight / denominator, in the gradient
  double kd_scale = 0.0;        // kd_weight * T * T / denominator, in the gradient
  bool write_gradient = false;  // over the student's logits
  double* ce_rows = nullptr;
  double* kd_rows = nullptr;
};

// Per-thread working memory of the row kernels.
struct Scratch {
  int64_t upcoming = -1;  // the row that comes after this one on this thread, if any
  std::vector<int64_t> block_head;
  std::vector<int64_t> entry_next;
  std::vector<double> student_log2;
  std::vector<double> teacher_log2;
  std::vector<float> raw;
};

using RowKernel = void (*)(const KdCall& call, int64_t row, Scratch& scratch);

// Each in its own translation unit, compiled for its own instruction set.
RowKernel baseline_row_kernel(const KdCall& call);
RowKernel avx2_row_kernel(const KdCall& call);
RowKernel avx512_row_kernel(const KdCall& call);
RowKernel neon_row_kernel(const KdCall& call);
RowKernel neon_bf16_row_kernel(const KdCall& call);

// Instruction-set variants that this machine can run, best first.
std::vector<std::string> cpu_variants();

// What is wrong with the indices of a call; kind is empty where nothing is.
struct BadIndex {
  std::string kind;  // "label", "id", "duplicate", "tail"
  int64_t row = 0;
  int64_t value = 0;
};
BadIndex check_indices(const KdCall& call);

// Runs every row on `threads` threads. Each row is computed by one thread from
// its own numbers only, so the bits do not depend on how many there are. Throws
// std::invalid_argument for a variant that this machine lacks.
void run_rows(const KdCall& call, const std::string& variant, int threads);

}  // namespace latentforge
