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

inline uint32_t width_of(uint32_t token) { return token < direct ? 0 : token - offset; }

// What a token stands for: base + that many bits. Looked up, since whether a token is direct cannot be predicted.
struct Tokens {
  uint8_t width[256];
  uint32_t base[256];
  uint32_t mask[256];
  constexpr Tokens() : width(), base(), mask() {
    for (uint32_t token = 0; token < 256; ++token) {
      const uint32_t bits = token < direct || token > largest_token ? 0 : token - offset;
      width[token] = static_cast<uint8_t>(bits);
      base[token] = token < direct ? token : uint32_t{1} << bits;
      mask[token] = (uint32_t{1} << bits) - 1;
    }
  }
};
constexpr Tokens tokens_of;

// A position in the packed bits; the sum of all widths has been compared with their number before.
class Cursor {
 public:
  Cursor(const uint8_t* bits, int64_t bytes, uint64_t at) : bits_(bits), bytes_(bytes), at_(at) {}

  // The value of a token, its remaining bits taken.
  inline uint32_t value(uint8_t token) {
    const uint32_t low = static_cast<uint32_t>(load() >> (at_ & 7)) & tokens_of.mask[token];
    at_ += tokens_of.width[token];
    return tokens_of.base[token] + low;
  }

 private:
  inline uint64_t load() const {
    const int64_t byte = static_cast<int64_t>(at_ >> 3);
    uint64_t window = 0;
    if (byte + 8 <= bytes_) {
      std::memcpy(&window, bits_ + byte, 8);
    } else if (byte < bytes_) {
      std::memcpy(&window, bits_ + byte, static_cast<size_t>(bytes_ - byte));
    }
    return window;
  }

  const uint8_t* bits_;
  int64_t bytes_;
  uint64_t at_;
};

bool widths(const uint8_t* tokens, int64_t n, uint64_t* sum) {
  uint32_t largest = 0;
  uint64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t token = tokens[i];
    largest = std::max(largest, token);
    total += width_of(token);
  }
  *sum += total;
  return largest <= largest_token;
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

  std::vector<uint32_t> scalars(static_cast<size_t>(body.n_scalars));
  Cursor at_scalars(body.bits, body.n_bits, 0);
  for (int64_t i = 0; i < body.n_scalars; ++i) scalars[i] = at_scalars.value(body.scalars[i]);

  // The list of ids: ascending inside each group of places (0-15, 16-31, 32-63, ...).
  std::vector<int32_t> list(static_cast<size_t>(body.n_gaps));
  Cursor at_gaps(body.bits, body.n_bits, ends[0]);
  for (int64_t begin = 0, end = direct; begin < body.n_gaps; begin = end, end *= 2) {
    int64_t id = -1;
    for (int64_t i = begin; i < std::min(end, body.n_gaps); ++i) {
      id += 1 + static_cast<int64_t>(at_gaps.value(body.gaps[i]));
      if (id > std::numeric_limits<int32_t>::max()) return false;
      list[i] = static_cast<int32_t>(id);
    }
  }

  const uint32_t* counts = body.mixed ? scalars.data() : nullptr;
  const uint32_t* firsts = scalars.data() + (body.mixed ? positions : 0);
  Cursor at_places(body.bits, body.n_bits, ends[1]);
  Cursor at_falls(body.bits, body.n_bits, ends[2]);
  int64_t entry = 0, fall = 0;
  for (int64_t p = 0; p < positions; ++p) {
    const int64_t count = counts != nullptr ? counts[p] : k;
    if (count > k || entry + count > body.n_places || fall + std::max<int64_t>(count - 1, 0) > body.n_falls)
      return false;
    uint64_t level = scale.first_step > 0 ? 0 : firsts[p];
    const float base = static_cast<float>(-(static_cast<double>(firsts[p]) * scale.first_step));
    int32_t* row_ids = ids + p * k;
    float* row_logprobs = logprobs + p * k;
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t place = at_places.value(body.places[entry++]);
      if (place >= body.n_gaps) return false;
      row_ids[j] = list[place];
      if (j > 0) level += at_falls.value(body.falls[fall++]);
      if (level < static_cast<uint64_t>(scale.n_table)) {
        row_logprobs[j] = base + scale.table[level];
      } else {
        const double beyond = scale.beyond_a - static_cast<double>(level) * scale.beyond_b;
        if (!(beyond < 0)) return false;  // a ladder that ends with its table
        row_logprobs[j] = base + static_cast<float>(beyond);
      }
    }
    std::fill(row_ids + count, row_ids + k, -1);
    std::fill(row_logprobs + count, row_logprobs + k, -std::numeric_limits<float>::infinity());
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
