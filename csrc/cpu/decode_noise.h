// The noise of a run of neighbouring ids, for the compiler to make vectors of: there is one way to round each
// operation, so what it makes has the bits of gumbel.h.
#pragma once

#include <algorithm>

#include "../gumbel.h"

namespace latentforge {
namespace {

constexpr int64_t kNoiseBlock = 64;  // ids; sixteen counters

// The noise of ids [64 * block, 64 * block + 64).
inline void noise_block(int64_t seed, int64_t position, int64_t block, float* __restrict out) {
  uint32_t words[4][16];
  for (uint32_t lane = 0; lane < 16; ++lane) {
    const Philox drawn =
        philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(position), static_cast<uint32_t>(block * 16) + lane);
    for (int j = 0; j < 4; ++j) words[j][lane] = drawn.word[j];
  }
  float noise[4][16];
  for (int j = 0; j < 4; ++j)
    for (int lane = 0; lane < 16; ++lane) noise[j][lane] = gumbel_of_word(words[j][lane]);
  for (int lane = 0; lane < 16; ++lane)
    for (int j = 0; j < 4; ++j) out[4 * lane + j] = noise[j][lane];
}

inline void noise_run(int64_t seed, int64_t position, int64_t first, int64_t count, float* out) {
  float block[kNoiseBlock];
  const int64_t end = first + count;
  for (int64_t id = first; id < end;) {
    const int64_t start = id / kNoiseBlock * kNoiseBlock, stop = std::min(end, start + kNoiseBlock);
    noise_block(seed, position, start / kNoiseBlock, block);
    for (; id < stop; ++id) out[id - first] = block[id - start];
  }
}

}  // namespace
}  // namespace latentforge
