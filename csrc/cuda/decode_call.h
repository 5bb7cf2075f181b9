// One call of latent_decode on a CUDA device: device addresses, sizes, strides.
#pragma once

#include <cstdint>

namespace latentforge::cuda {

enum class WeightType : int { f32 = 0, bf16 = 1, int8 = 2 };

// The hidden states are fp32, rows `hidden_stride` apart, a multiple of kHiddenStep; what lies beyond `width` is zero.
struct DecodeCall {
  int64_t rows = 0;
  int64_t width = 0;
  int64_t vocab = 0;
  const float* hidden = nullptr;
  int64_t hidden_stride = 0;
  const void* weight = nullptr;
  int64_t weight_stride = 0;
  WeightType weight_type = WeightType::bf16;
  const float* scales = nullptr;   // [vocab], int8 only
  const float* bias = nullptr;     // [vocab]
  const int64_t* seeds = nullptr;  // null: greedy
  const int64_t* positions = nullptr;
  double temperature = 0.0;
  double logit_scale = 1.0;
  double soft_cap = 0.0;  // 0: none
  int64_t top_k = 0;      // 0: all
  double top_p = 1.0;
  int64_t* ids = nullptr;
  float* logprobs = nullptr;
  void* workspace = nullptr;
};

constexpr int kHiddenStep = 512;  // columns that a warp takes at once, at most
constexpr int kRowsAtOnce = 64;   // rows of one walk through the weight
constexpr int kMaxBlocks = 1024;

}  // namespace latentforge::cuda
