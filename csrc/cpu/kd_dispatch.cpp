// Which variant runs, on how many threads, and what is refused before anything
// is written.
#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>

#include "arm_features.h"
#include "kd.h"
#include "threads.h"

namespace latentforge {

namespace {

RowDriver find_driver(const std::string& variant) {
  const auto available = cpu_variants();
  if (std::find(available.begin(), available.end(), variant) == available.end())
    throw std::invalid_argument("this machine has no '" + variant + "' variant");
#if defined(__x86_64__)
  if (variant == "avx512") return avx512_kd_row;
  if (variant == "avx2") return avx2_kd_row;
#elif defined(__aarch64__)
  if (variant == "neon_bf16") return neon_bf16_kd_row;
  if (variant == "neon") return neon_kd_row;
#endif
  return baseline_kd_row;
}

}  // namespace

std::vector<std::string> cpu_variants() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.emplace_back("avx512");
  if (avx2) found.emplace_back("avx2");
#elif defined(__aarch64__)
  if (has_bf16_and_dot_products()) found.emplace_back("neon_bf16");
  found.emplace_back("neon");
#endif
  found.emplace_back("baseline");
  return found;
}

BadIndex check_indices(const KdCall& call) {
  if (call.labels != nullptr)
    for (int64_t row = 0; row < call.rows; ++row) {
      const int64_t label = call.labels[row];
      if (label != call.ignore_index && (label < 0 || label >= call.vocab)) return {"label", row, label};
    }
  if (call.topk_ids == nullptr) return {};
  std::vector<bool> seen(static_cast<size_t>(call.vocab), false);
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t* ids = call.topk_ids + row * call.k;
    const float* logprobs = call.topk_logprobs + row * call.k;
    int64_t count = 0;
    while (count < call.k && ids[count] != -1) ++count;
    for (int64_t j = count; j < call.k; ++j) {
      if (ids[j] < -1 || ids[j] >= call.vocab) return {"id", row, ids[j]};
      if (ids[j] != -1) return {"absent before present", row, j - 1};
      if (logprobs[j] != -std::numeric_limits<float>::infinity()) return {"absent with a logprob", row, j};
    }
    const bool counts = call.labels == nullptr || call.labels[row] != call.ignore_index;
    if (count == 0 && counts && call.topk_tail[row] == -std::numeric_limits<float>::infinity())
      return {"silent", row, 0};
    for (int64_t j = 0; j < count; ++j) {
      if (ids[j] < 0 || ids[j] >= call.vocab) return {"id", row, ids[j]};
      if (seen[static_cast<size_t>(ids[j])]) return {"duplicate", row, ids[j]};
      seen[static_cast<size_t>(ids[j])] = true;
    }
    for (int64_t j = 0; j < count; ++j) seen[static_cast<size_t>(ids[j])] = false;
  }
  return {};
}

void run_rows(const KdCall& call, const std::string& variant, int threads) {
  const RowDriver driver = find_driver(variant);
  // A thread is worth its start from about a quarter of a million logits.
  const int64_t useful = std::max<int64_t>(1, call.rows * call.vocab / (1 << 18));
  const int count =
      static_cast<int>(std::min<int64_t>({std::max(threads, 1), useful, std::max<int64_t>(call.rows, 1)}));
  std::atomic<int64_t> next{0};
  on_threads(count, [&](int) {
    const FlushDenormals flush;
    Scratch scratch;
    int64_t row = next.fetch_add(1);
    while (row < call.rows) {
      const int64_t ahead = next.fetch_add(1);
      driver(call, row, ahead < call.rows ? ahead : -1, scratch);
      row = ahead;
    }
  });
}

}  // namespace latentforge
