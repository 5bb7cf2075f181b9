// Knowledge-distillation loss and gradient over rows of logits: what a caller
// hands in, and the variants that do it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace latentforge {

enum class Dtype : int { f32 = 0, bf16 = 1 };
enum class Direction : int { forward = 0, reverse = 1, jsd = 2 };

// A matrix of logits; strides count elements and may be anything.
struct Logits {
  void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 1;
  Dtype dtype = Dtype::f32;

  // Whether a row can be read where it lies.
  bool plain(Dtype type) const { return dtype == type && column_stride == 1; }
};

// One call. The teacher is given as dense logits, as top-k rows with an exact
// tail, or not at all (both null: only the cross-entropy). Sums per row are
// neither weighted nor divided; the divergence is without its factor of T
// squared. The definition is latentforge/kernels/reference/kd.py.
struct KdCall {
  int64_t rows = 0;
  int64_t vocab = 0;
  Logits student;
  Logits teacher;
  Logits gradient;                    // null: not wanted; the student's own: it is overwritten
  const int64_t* topk_ids = nullptr;  // [rows, k]; -1 at a row's end: absent, the row has fewer
  const float* topk_logprobs = nullptr;
  const float* topk_tail = nullptr;
  int64_t k = 0;
  const int64_t* labels = nullptr;  // null: no cross-entropy, every row counts
  int64_t ignore_index = -100;
  Direction direction = Direction::forward;
  double beta = 0.5;
  double temperature = 1.0;
  double teacher_temperature = 1.0;
  double ce_scale = 0.0;        // ce_weight / denominator, in the gradient
  double kd_scale = 0.0;        // kd_weight * T * T / denominator, in the gradient
  const float* bias = nullptr;  // [vocab]; the student's s = cap * tanh(scale * (x + bias) / cap)
  double logit_scale = 1.0;
  double soft_cap = 0.0;  // 0: none
  double* ce_rows = nullptr;
  double* kd_rows = nullptr;
};

// One row as a kernel sees it: contiguous, in the types that the kernel was
// compiled for. Bias and cap are already in the student's numbers (then `cap`
// tells the slope that the gradient needs); a scale is not, unless there is a
// cap: it is one more temperature.
struct Row {
  int64_t index = 0;
  const void* student = nullptr;
  const void* teacher = nullptr;
  void* gradient = nullptr;  // may be the student's own address
  const void* student_ahead = nullptr;
  const void* teacher_ahead = nullptr;  // the row pair that this thread takes next
  double logit_scale = 1.0;             // still to be applied
  double chain = 1.0;                   // factor of the gradient: d (numbers of the row) / d x, but for the cap's slope
  double cap = 0.0;
};

// Per-thread working memory of the row kernels.
struct Scratch {
  std::vector<float> student, teacher, gradient;           // rows that cannot be used where they lie
  std::vector<uint16_t> student16, teacher16, gradient16;  // the same in bf16
  std::vector<float> lowest;                               // of each block, both sides
  std::vector<int32_t> block_head, entry_next;
  std::vector<float> raw;
  std::vector<double> gaps, student_share, one_share, teacher_share, derivative;
};

// Computes one row. Each variant in its own translation unit, compiled for its
// own instruction set. `ahead` is the row that this thread takes next, or -1.
using RowDriver = void (*)(const KdCall& call, int64_t row, int64_t ahead, Scratch& scratch);
void baseline_kd_row(const KdCall& call, int64_t row, int64_t ahead, Scratch& scratch);
void avx2_kd_row(const KdCall& call, int64_t row, int64_t ahead, Scratch& scratch);
void avx512_kd_row(const KdCall& call, int64_t row, int64_t ahead, Scratch& scratch);
void neon_kd_row(const KdCall& call, int64_t row, int64_t ahead, Scratch& scratch);
void neon_bf16_kd_row(const KdCall& call, int64_t row, int64_t ahead, Scratch& scratch);

// Instruction-set variants that this machine can run, best first.
std::vector<std::string> cpu_variants();

// What is wrong with the indices of a call; kind is empty where nothing is.
struct BadIndex {
  std::string kind;  // "label", "id", "duplicate", "absent with a logprob", "absent before present", "silent"
  int64_t row = 0;
  int64_t value = 0;  // the label or id; of an absent entry its column
};
BadIndex check_indices(const KdCall& call);

// Runs every row on `threads` threads. Each row is computed by one thread from
// its own numbers only, so the bits do not depend on how many there are. Throws
// std::invalid_argument for a variant that this machine lacks.
void run_rows(const KdCall& call, const std::string& variant, int threads);

}  // namespace latentforge
