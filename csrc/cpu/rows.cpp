#include "rows.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace latentforge {
namespace {

constexpr uint32_t direct = 16;
constexpr uint32_t offset = 12;
constexpr uint32_t largest_token = 23 + offset;

// What a token stands for: base + that many bits. Looked up, since whether a token is direct cannot be predicted.
struct Token {
  uint32_t base;
  uint32_t width;
};
struct Tokens {
  Token of[256];
  constexpr Tokens() : of() {
    for (uint32_t token = 0; token < 256; ++token) {
      const uint32_t width = token < direct || token > largest_token ? 0 : token - offset;
      of[token] = {token < direct ? token : uint32_t{1} << width, width};
    }
  }
};
constexpr Tokens tokens_of;

// The packed bits with so many bytes of nothing behind them: eight bytes can be read wherever a bit is.
constexpr size_t behind = 8;

// The values of n tokens, whose own bits begin at bit `at`; returns where they end. That the bits reach so far has been
// seen before.
inline uint64_t expand(const uint8_t* __restrict tokens, int64_t n, const uint8_t* __restrict bits, uint64_t at,
                       uint32_t* __restrict values) {
  for (int64_t i = 0; i < n; ++i) {
    const Token token = tokens_of.of[tokens[i]];
    uint64_t window;
    std::memcpy(&window, bits + (at >> 3), sizeof window);
    values[i] = token.base + (static_cast<uint32_t>(window >> (at & 7)) & ((uint32_t{1} << token.width) - 1));
    at += token.width;
  }
  return at;
}

// Adds up what the tokens leave to the bits; false where one is no token. Summed in small numbers, many at a time.
bool widths(const uint8_t* tokens, int64_t n, uint64_t* sum) {
  constexpr int64_t block = 2048;
  static_assert(block * (largest_token - offset) <= std::numeric_limits<uint16_t>::max());
  uint8_t largest = 0;
  for (int64_t begin = 0; begin < n; begin += block) {
    uint16_t part = 0;
    for (int64_t i = begin; i < std::min(begin + block, n); ++i) {
      const uint8_t token = tokens[i];
      largest = std::max(largest, token);
      part = static_cast<uint16_t>(part + (token < direct ? 0 : token - offset));
    }
    *sum += part;
  }
  return largest <= largest_token;
}

// False where a place is not one of the list.
inline bool ids_of(const uint32_t* places, int64_t count, const std::vector<uint32_t>& list, int32_t* ids) {
  uint32_t last = 0;
  for (int64_t j = 0; j < count; ++j) last = std::max(last, places[j]);
  if (count > 0 && last >= list.size()) return false;
  for (int64_t j = 0; j < count; ++j) ids[j] = static_cast<int32_t>(list[places[j]]);
  return true;
}

// False where a level lies below the end of a ladder that ends with its table.
inline bool logprobs_of(uint32_t first, const uint32_t* falls, int64_t count, const RowScale& scale, float* logprobs) {
  uint64_t level = scale.first_step > 0 ? 0 : first;
  const float base = static_cast<float>(-(static_cast<double>(first) * scale.first_step));
  for (int64_t j = 0; j < count; ++j) {
    if (j > 0) level += falls[j - 1];
    if (level < static_cast<uint64_t>(scale.n_table)) {
      logprobs[j] = base + scale.table[level];
    } else {
      const double beyond = scale.beyond_a - static_cast<double>(level) * scale.beyond_b;
      if (!(beyond < 0)) return false;
      logprobs[j] = base + static_cast<float>(beyond);
    }
  }
  return true;
}

}  // namespace

bool unpack_row(const RowBody& body, const RowScale& scale, int32_t* ids, float* logprobs, float* tails) {
  const int64_t positions = body.positions, k = body.k;
  const int64_t columns = 1 + (body.mixed ? 1 : 0) + body.temperatures;
  if (body.n_scalars != positions * columns) return false;

  uint64_t ends[4] = {0, 0, 0, 0};
  const uint8_t* streams[4] = {body.scalars, body.gaps, body.places, body.falls};
  const int64_t lengths[4] = {body.n_scalars, body.n_gaps, body.n_places, body.n_falls};
  for (int s = 0; s < 4; ++s) {
    ends[s] = s == 0 ? 0 : ends[s - 1];
    if (!widths(streams[s], lengths[s], &ends[s])) return false;
  }
  if (ends[3] > static_cast<uint64_t>(body.n_bits) * 8) return false;

  std::vector<uint8_t> padded(static_cast<size_t>(body.n_bits) + behind);
  std::copy_n(body.bits, body.n_bits, padded.data());
  const uint8_t* bits = padded.data();

  std::vector<uint32_t> scalars(static_cast<size_t>(body.n_scalars));
  expand(body.scalars, body.n_scalars, bits, 0, scalars.data());

  // The list of ids: ascending inside each group of places (0-15, 16-31, 32-63, ...).
  std::vector<uint32_t> list(static_cast<size_t>(body.n_gaps));
  expand(body.gaps, body.n_gaps, bits, ends[0], list.data());
  for (int64_t begin = 0, end = direct; begin < body.n_gaps; begin = end, end *= 2) {
    int64_t id = -1;
    for (int64_t i = begin; i < std::min(end, body.n_gaps); ++i) {
      id += 1 + static_cast<int64_t>(list[i]);
      if (id > std::numeric_limits<int32_t>::max()) return false;
      list[i] = static_cast<uint32_t>(id);
    }
  }

  const uint32_t* counts = body.mixed ? scalars.data() : nullptr;
  const uint32_t* firsts = scalars.data() + (body.mixed ? positions : 0);
  std::vector<uint32_t> places(static_cast<size_t>(k)), falls(static_cast<size_t>(k));
  uint64_t at_places = ends[1], at_falls = ends[2];
  int64_t entry = 0, fall = 0;
  for (int64_t p = 0; p < positions; ++p) {
    const int64_t count = counts != nullptr ? counts[p] : k, fallen = std::max<int64_t>(count - 1, 0);
    if (count > k || entry + count > body.n_places || fall + fallen > body.n_falls) return false;
    at_places = expand(body.places + entry, count, bits, at_places, places.data());
    at_falls = expand(body.falls + fall, fallen, bits, at_falls, falls.data());
    entry += count;
    fall += fallen;
    if (!ids_of(places.data(), count, list, ids + p * k)) return false;
    if (!logprobs_of(firsts[p], falls.data(), count, scale, logprobs + p * k)) return false;
    std::fill(ids + p * k + count, ids + (p + 1) * k, -1);
    std::fill(logprobs + p * k + count, logprobs + (p + 1) * k, -std::numeric_limits<float>::infinity());
  }
  if (entry != body.n_places || fall != body.n_falls) return false;

  const uint32_t* tail_levels = firsts + positions;
  for (int64_t t = 0; t < body.temperatures; ++t) {
    for (int64_t p = 0; p < positions; ++p) {
      const uint32_t level = tail_levels[t * positions + p];
      tails[t * positions + p] =
          level == 0 ? -std::numeric_limits<float>::infinity()
                     : static_cast<float>(scale.ceilings[t] - (static_cast<double>(level) - 1.0) * scale.tail_step);
    }
  }
  return true;
}

}  // namespace latentforge
