// Token ids from hidden rows and a vocabulary matrix: what a caller hands in, and the variants that do it.
//
// The vocabulary is cut into segments of a fixed size. A segment is computed by one thread, block by block, and leaves
// one Partial for each row; these are merged in the segments' order. So the bits depend neither on the threads nor on
// which rows are computed together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace latentforge {

enum class WeightKind : int { bf16 = 0, f32 = 1, int8 = 2 };

struct DecodeCall {
  int64_t rows = 0;
  int64_t width = 0;  // of the hidden rows and of the weight's
  int64_t vocab = 0;  // the weight's rows that count
  const void* hidden = nullptr;
  int64_t hidden_stride = 0;  // elements between rows; columns are contiguous
  bool hidden_bf16 = false;
  const void* weight = nullptr;
  int64_t weight_stride = 0;
  WeightKind weight_kind = WeightKind::bf16;
  const float* scales = nullptr;  // [vocab], of an int8 weight
  const void* bias = nullptr;     // [vocab] or null
  bool bias_bf16 = false;
  float logit_scale = 1.0f;
  float soft_cap = 0.0f;     // 0: none
  double temperature = 0.0;  // 0: greedy
  int64_t top_k = 0;         // 0: none
  double top_p = 1.0;        // 1: none
  const int64_t* seeds = nullptr;
  const int64_t* positions = nullptr;
  int64_t* ids = nullptr;  // -1 where a row has no answer
  float* logprobs = nullptr;

  float inverse_temperature() const { return temperature == 0.0 ? 1.0f : static_cast<float>(1.0 / temperature); }
};

constexpr int64_t kBlock = 64;     // tokens whose logits are held at once
constexpr int64_t kSegment = 512;  // tokens of one Partial
constexpr int kBuckets = 2048;     // of a histogram

// What a segment of the vocabulary says about a row; s is z / T.
struct Partial {
  float highest = -std::numeric_limits<float>::infinity();  // s
  float best_score = -std::numeric_limits<float>::infinity();
  double mass = 0.0;  // sum of exp(s - highest)
  float best_z = 0.0f;
  int32_t best_id = -1;
  bool impossible = false;  // NaN or plus infinity among s
};

// Which bucket of a histogram a token falls into: the order of buckets is that of the tokens.
struct Buckets {
  enum class Kind { linear, keys, ids } kind = Kind::linear;
  float high = 0.0f, per_logit = 0.0f;  // linear: from `high` down; the last bucket has no end
  int32_t highest_key = 0, lowest_key = 0;
  int shift = 0;  // keys: of the distance; ids: of the id, among tokens with the highest key
};

struct Bucket {
  uint64_t mass = 0, count = 0;
  int32_t highest_key = std::numeric_limits<int32_t>::min(), lowest_key = std::numeric_limits<int32_t>::max();
};

// A row of a sweep.
struct SweepRow {
  int64_t row = 0;      // of the call
  float highest = 0.0;  // s, known after the first sweep
  uint64_t cut = 0;     // sample: the last allowed token, as rank() has it
  Buckets buckets;      // histogram, collect
  int bucket = 0;       // collect: this one
};

// What one thread keeps of a row during a sweep.
struct RowMemory {
  uint64_t threshold = 0;
  std::vector<uint64_t> held;  // ranks of candidates
  std::vector<Bucket> histogram;
};

// Hidden rows in groups, in the order in which a variant's products read them.
struct PackedRows {
  struct Group {
    int64_t first = 0;
    int size = 0;
    size_t offset = 0;  // bytes
  };
  struct Scale {
    double unit = 1.0, offset = 0.0;  // int8: logit = (sum - offset) * unit * the token's scale
  };
  std::vector<Group> groups;
  std::vector<Scale> scales;
  std::vector<unsigned char> bytes;
  unsigned char* data = nullptr;  // aligned to 64
};

enum class Task { greedy, sample, candidates, histogram, collect };

struct Sweep {
  const DecodeCall* call = nullptr;
  Task task = Task::greedy;
  std::vector<SweepRow> rows;
  int64_t keep = 0;  // candidates: how many of the largest
  PackedRows packed;
  std::vector<Partial> partials;  // [rows, segments]
  int64_t segments() const { return (call->vocab + kSegment - 1) / kSegment; }
};

// out[i] = the Gumbel noise of (seed, position, first + i), as csrc/gumbel.h defines it.
using NoiseKernel = void (*)(int64_t seed, int64_t position, int64_t first, int64_t count, float* out);
using PackKernel = void (*)(Sweep& sweep);
using SegmentKernel = void (*)(Sweep& sweep, int64_t segment, std::vector<RowMemory>& memory);

struct Product {
  PackKernel pack;
  SegmentKernel segment;
};

// What one instruction set brings; each table lies in its own translation unit.
struct DecodeKernels {
  NoiseKernel noise;
  Product bf16_pair;  // hidden and weight are both bf16
  Product bf16, f32, int8;
};
const DecodeKernels& baseline_decode_kernels();
const DecodeKernels& avx2_decode_kernels();
const DecodeKernels& avx512_decode_kernels();
const DecodeKernels& avx512_vnni_decode_kernels();
const DecodeKernels& avx512_bf16_decode_kernels();
const DecodeKernels& neon_decode_kernels();
const DecodeKernels& neon_bf16_decode_kernels();

// Instruction-set variants of decoding that this machine can run, best first.
std::vector<std::string> decode_variants();
// Throws std::invalid_argument for a variant that this machine lacks.
const DecodeKernels& find_decode_kernels(const std::string& variant);

void decode_rows(const DecodeCall& call, const std::string& variant, int threads);

}  // namespace latentforge
