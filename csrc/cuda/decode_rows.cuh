// From products to tokens: running sums and candidates, and the exact cut of top-k and top-p.
//
// Tokens are ranked by one integer, the logit's bits in an order of integers and below them the id turned round, so
// that of equals the lower id comes first. The cut is a threshold on that integer, found eleven bits at a time: a walk
// through the weight counts the tokens, and their mass in units of 2^-40, for each value of the next eleven bits.
// Counts and masses are integers, so the order of the additions does not matter.
#pragma once

#include "../gumbel.h"
#include "decode_products.cuh"

namespace latentforge::cuda {

constexpr int kWalkThreads = 128;
constexpr int kIdBits = 21;
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kLastDigit = 4;  // of 32 + 21 bits; it has nine

__device__ __forceinline__ int shift_of_digit(int digit) { return digit == kLastDigit ? 0 : 42 - kDigitBits * digit; }

// Running sums over some tokens of a row, and the best of them.
struct Running {
  float top;     // of z / T
  float sum;     // of exp(z / T - top); NaN where a z / T is NaN or plus infinity
  float score;   // of the best
  float scaled;  // its z / T
  int id;        // -1: none yet
};

// What is known of a row's cut.
struct Cut {
  uint64_t at_least;  // the threshold, as far as it is known
  uint64_t top_k_at;  // that of top-k, once top-p is sought
  uint64_t need;      // tokens of top-k still to be found
  uint64_t inside;    // mass above the digit that is sought
  uint64_t wanted;    // mass of top-p
  uint32_t resolved;
};

enum class Walk : int { sums, count, choose };

struct DecodeParams {
  DecodeCall call;
  int64_t first_row = 0;
  int rows = 0;  // of this walk
  int blocks = 0;
  float temperature = 1.0f;
  float scale = 1.0f;
  float cap = 0.0f;
  bool draws = false;
  bool cuts = false;
  Running* partial = nullptr;  // [blocks, rows]
  Running* total = nullptr;    // [rows]
  Cut* cut = nullptr;          // [rows]
  uint32_t* counts = nullptr;  // [rows, kDigits]
  unsigned long long* masses = nullptr;
};

inline int decode_blocks(int multiprocessors) {
  const int blocks = 3 * multiprocessors;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}
inline int64_t decode_workspace_bytes() {
  return static_cast<int64_t>(sizeof(Running)) * kRowsAtOnce * (kMaxBlocks + 1) +
         static_cast<int64_t>(sizeof(Cut)) * kRowsAtOnce + 12ll * kRowsAtOnce * kDigits + 64;
}

__device__ __forceinline__ Running nothing() { return {minus_infinity(), 0.0f, minus_infinity(), 0.0f, -1}; }

__device__ __forceinline__ bool better(float score, int id, const Running& than) {
  return id >= 0 && (than.id < 0 || score > than.score || (score == than.score && id < than.id));
}

__device__ __forceinline__ Running together(const Running& a, const Running& b) {
  Running r = better(b.score, b.id, a) ? b : a;
  r.top = fmaxf(a.top, b.top);
  const float of_a = a.top == minus_infinity() ? a.sum : a.sum * expf(a.top - r.top);
  const float of_b = b.top == minus_infinity() ? b.sum : b.sum * expf(b.top - r.top);
  r.sum = of_a + of_b;
  return r;
}

__device__ __forceinline__ Running across_warp(Running a) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    Running b;
    b.top = __shfl_xor_sync(kAllLanes, a.top, step);
    b.sum = __shfl_xor_sync(kAllLanes, a.sum, step);
    b.score = __shfl_xor_sync(kAllLanes, a.score, step);
    b.scaled = __shfl_xor_sync(kAllLanes, a.scaled, step);
    b.id = __shfl_xor_sync(kAllLanes, a.id, step);
    a = together(a, b);
  }
  return a;
}

__device__ __forceinline__ uint64_t rank_of(float z, int64_t id) {
  const uint32_t bits = __float_as_uint(z + 0.0f);  // minus zero is zero
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << kIdBits | ((1u << kIdBits) - 1 - static_cast<uint32_t>(id));
}

__device__ __forceinline__ bool impossible(const Running& row) {
  return !(row.sum > 0.0f) || row.top == minus_infinity();
}

// As gumbel(), with no index into registers.
__device__ __forceinline__ float noise(int64_t seed, int64_t position, int64_t id) {
  const Philox drawn =
      philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(position), static_cast<uint32_t>(id >> 2));
  const uint32_t low = id & 1 ? drawn.word[1] : drawn.word[0], high = id & 1 ? drawn.word[3] : drawn.word[2];
  return gumbel_of_word(id & 2 ? high : low);
}

// One token of one row, in the walk that is under way.
__device__ __forceinline__ void take(Running& mine, float x, int64_t token, int row, Walk walk, int digit,
                                     const DecodeParams& p) {
  const int64_t at = p.first_row + row;
  float z = x;
  if (p.call.scales != nullptr) z *= p.call.scales[token];
  if (p.call.bias != nullptr) z += p.call.bias[token];
  z *= p.scale;
  if (p.cap != 0.0f && z != minus_infinity()) z = p.cap * tanhf(z / p.cap);
  const float y = z / p.temperature;
  if (walk == Walk::sums) {
    if (isnan(y) || y == -minus_infinity()) {
      mine.sum = not_a_number();
      return;
    }
    if (y > mine.top) {
      if (mine.top != minus_infinity()) mine.sum *= expf(mine.top - y);
      mine.top = y;
    }
    if (y != minus_infinity()) mine.sum += expf(y - mine.top);
    if (p.cuts) return;
  } else {
    if (impossible(p.total[row])) return;
    const uint64_t rank = rank_of(z, token);
    const Cut& cut = p.cut[row];
    if (walk == Walk::count) {
      const int shift = shift_of_digit(digit);
      const uint64_t above = ~uint64_t{0} << (digit == 0 ? 63 : shift_of_digit(digit - 1));
      if (cut.resolved || rank < cut.top_k_at || (digit > 0 && (rank & above) != (cut.at_least & above))) return;
      const uint32_t value = static_cast<uint32_t>(rank >> shift) & (kDigits - 1);
      const uint32_t bin = digit == kLastDigit ? value & 511u : value;
      atomicAdd(&p.counts[row * kDigits + bin], 1u);
      const float share = y == minus_infinity() ? 0.0f : expf(y - p.total[row].top);
      atomicAdd(&p.masses[row * kDigits + bin], static_cast<unsigned long long>(share * 1099511627776.0f));
      return;
    }
    if (rank < cut.at_least) return;
  }
  if (y == minus_infinity()) return;
  const float score = p.draws ? y + noise(p.call.seeds[at], p.call.positions[at], token) : y;
  if (better(score, static_cast<int>(token), mine)) {
    mine.score = score;
    mine.scaled = y;
    mine.id = static_cast<int>(token);
  }
}

// One walk through the weight: each warp takes four tokens at a time with all rows, eight at a time.
template <class W>
__global__ void __launch_bounds__(kWalkThreads, sizeof(W) == 1 ? 2 : 3)
    decode_walk(const DecodeParams p, Walk walk, int digit) {
  __shared__ Running running[kRowsAtOnce / kGroup][kWalkThreads];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int groups = (p.rows + kGroup - 1) / kGroup;
  if (walk == Walk::count) {
    bool open = false;
    for (int row = 0; row < p.rows; ++row) open = open || !p.cut[row].resolved;
    if (!open) return;
  }
  for (int group = 0; group < groups; ++group) running[group][threadIdx.x] = nothing();
  constexpr int kPerBlock = kWalkThreads / kWarp * kTokens;
  for (int64_t tile = blockIdx.x; tile * kPerBlock < p.call.vocab; tile += p.blocks) {
    const int64_t token = tile * kPerBlock + warp * kTokens;
    for (int group = 0; group < groups; ++group) {
      const int left = p.rows - group * kGroup;
      const float x = products<W>(p.call, token, p.first_row + group * kGroup, left < kGroup ? left : kGroup);
      const int row = group * kGroup + lane / kTokens;
      const int64_t mine = token + lane % kTokens;
      if (row < p.rows && mine < p.call.vocab) {
        Running state = running[group][threadIdx.x];
        take(state, x, mine, row, walk, digit, p);
        running[group][threadIdx.x] = state;
      }
    }
  }
  if (walk == Walk::count) return;
  __syncthreads();
  for (int row = warp; row < p.rows; row += kWalkThreads / kWarp) {
    const int slot = lane / kTokens * kWarp + row % kGroup * kTokens + lane % kTokens;
    const Running all = across_warp(slot < kWalkThreads ? running[row / kGroup][slot] : nothing());
    if (lane == 0) p.partial[static_cast<int64_t>(blockIdx.x) * kRowsAtOnce + row] = all;
  }
}

// One block a row: its blocks' parts, in one order; the answer, or the start of the search for the cut.
__device__ __forceinline__ void answer(const DecodeParams& p, int row, const Running& sums, const Running& best) {
  const bool none = impossible(sums) || best.id < 0;
  p.call.ids[p.first_row + row] = none ? -1 : best.id;
  p.call.logprobs[p.first_row + row] = none ? not_a_number() : (best.scaled - sums.top) - logf(sums.sum);
}

static __global__ void __launch_bounds__(kThreads) decode_gather(const DecodeParams p, Walk walk) {
  const int row = blockIdx.x, lane = threadIdx.x;
  if (walk == Walk::sums && p.cuts) {
    for (int i = threadIdx.x; i < kDigits; i += kThreads) {
      p.counts[row * kDigits + i] = 0;
      p.masses[row * kDigits + i] = 0;
    }
  }
  if (threadIdx.x >= kWarp) return;
  Running all = nothing();
  for (int block = lane; block < p.blocks; block += kWarp)
    all = together(all, p.partial[static_cast<int64_t>(block) * kRowsAtOnce + row]);
  all = across_warp(all);
  if (lane != 0) return;
  if (walk == Walk::choose) return answer(p, row, p.total[row], all);
  if (!p.cuts) return answer(p, row, all, all);
  p.total[row] = all;
  const bool by_count = p.call.top_k > 0;
  p.cut[row] = Cut{0, 0, by_count ? static_cast<uint64_t>(p.call.top_k) : 0, 0, 0, impossible(all) ? 1u : 0u};
}

// One block a row: the next digit of the threshold, from the highest on. In the search of top-k the digit is where the
// count reaches what is needed, in that of top-p where the mass reaches what is wanted.
static __global__ void __launch_bounds__(kThreads) decode_cut(const DecodeParams p, int digit, bool by_mass) {
  __shared__ unsigned long long counts[kDigits], masses[kDigits];
  const int row = blockIdx.x;
  for (int i = threadIdx.x; i < kDigits; i += kThreads) {
    counts[i] = p.counts[row * kDigits + i];
    masses[i] = p.masses[row * kDigits + i];
    p.counts[row * kDigits + i] = 0;
    p.masses[row * kDigits + i] = 0;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  Cut& cut = p.cut[row];
  if (cut.resolved) return;
  if (by_mass && digit == 0) {
    unsigned long long all = 0;
    for (int i = 0; i < kDigits; ++i) all += masses[i];
    cut.wanted = static_cast<uint64_t>(static_cast<double>(all) * p.call.top_p);
    if (static_cast<double>(cut.wanted) < static_cast<double>(all) * p.call.top_p) ++cut.wanted;
    cut.inside = 0;
  }
  int found = -1;
  for (int i = kDigits - 1; i >= 0; --i) {
    if (counts[i] == 0) continue;
    found = i;
    if (by_mass ? cut.inside + masses[i] >= cut.wanted : counts[i] >= cut.need) break;
    cut.inside += masses[i];
    if (!by_mass) cut.need -= counts[i];
  }
  if (found < 0) found = 0;
  cut.at_least |= static_cast<uint64_t>(found) << shift_of_digit(digit);
  // All of the digit's tokens are in, or there is but one.
  if (digit == kLastDigit || counts[found] <= 1 || (!by_mass && counts[found] == cut.need)) cut.resolved = 1;
}

// The search of top-p goes on within what top-k has left.
static __global__ void decode_reopen(const DecodeParams p) {
  const int row = threadIdx.x;
  if (row >= p.rows || impossible(p.total[row])) return;
  p.cut[row].top_k_at = p.cut[row].at_least;
  p.cut[row].at_least = 0;
  p.cut[row].resolved = 0;
}

template <class W, class Stream>
void launch_walks(DecodeParams p, Stream stream) {
  LF_LAUNCH((decode_walk<W>), p.blocks, kWalkThreads, 0, stream, p, Walk::sums, 0);
  LF_LAUNCH((decode_gather), p.rows, kThreads, 0, stream, p, Walk::sums);
  if (!p.cuts) return;
  const auto search = [&](bool by_mass) {
    for (int digit = 0; digit <= kLastDigit; ++digit) {
      LF_LAUNCH((decode_walk<W>), p.blocks, kWalkThreads, 0, stream, p, Walk::count, digit);
      LF_LAUNCH((decode_cut), p.rows, kThreads, 0, stream, p, digit, by_mass);
    }
  };
  if (p.call.top_k > 0) search(false);
  if (p.call.top_p < 1.0) {
    if (p.call.top_k > 0) LF_LAUNCH((decode_reopen), 1, kRowsAtOnce, 0, stream, p);
    search(true);
  }
  LF_LAUNCH((decode_walk<W>), p.blocks, kWalkThreads, 0, stream, p, Walk::choose, 0);
  LF_LAUNCH((decode_gather), p.rows, kThreads, 0, stream, p, Walk::choose);
}

template <class Stream>
void launch_decode(const DecodeCall& call, int multiprocessors, Stream stream) {
  DecodeParams p;
  p.call = call;
  p.draws = call.seeds != nullptr;
  p.temperature = p.draws ? static_cast<float>(call.temperature) : 1.0f;
  p.scale = static_cast<float>(call.logit_scale);
  p.cap = static_cast<float>(call.soft_cap);
  p.cuts = p.draws && (call.top_k > 0 || call.top_p < 1.0);
  p.blocks = decode_blocks(multiprocessors);
  char* space = static_cast<char*>(call.workspace);
  const auto reserve = [&](int64_t bytes) {
    char* here = space;
    space += (bytes + 15) / 16 * 16;
    return static_cast<void*>(here);
  };
  p.masses = static_cast<unsigned long long*>(reserve(8ll * kRowsAtOnce * kDigits));
  p.counts = static_cast<uint32_t*>(reserve(4ll * kRowsAtOnce * kDigits));
  p.cut = static_cast<Cut*>(reserve(static_cast<int64_t>(sizeof(Cut)) * kRowsAtOnce));
  p.total = static_cast<Running*>(reserve(static_cast<int64_t>(sizeof(Running)) * kRowsAtOnce));
  p.partial = static_cast<Running*>(reserve(static_cast<int64_t>(sizeof(Running)) * kRowsAtOnce * p.blocks));
  for (int64_t row = 0; row < call.rows; row += kRowsAtOnce) {
    p.first_row = row;
    p.rows = static_cast<int>(call.rows - row < kRowsAtOnce ? call.rows - row : kRowsAtOnce);
    if (call.weight_type == WeightType::bf16) {
      launch_walks<Bf16>(p, stream);
    } else if (call.weight_type == WeightType::int8) {
      launch_walks<int8_t>(p, stream);
    } else {
      launch_walks<float>(p, stream);
    }
  }
}

}  // namespace latentforge::cuda
