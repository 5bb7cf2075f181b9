// Products of a group of hidden rows with a block of the weight's rows, for any Dot.
//
// A Dot is one way to multiply, in one instruction set. Each (row, token) pair has one accumulator, fed piece by piece
// in the order of the columns and summed over its lanes in one fixed tree, so a product's bits depend on the Dot alone,
// never on the tile. A Dot has:
//   Weight, Hidden        element types of the weight in memory and of the packed hidden rows
//   Source                what pack() reads: float, or int32_t for the 23-bit fixed point of the int8 products
//   step                  columns of a piece
//   hidden_step           packed elements of a piece
//   rows, tokens(k)       the largest group of rows; the tile's tokens (1 to 8) for a group of k rows
//   parts, Total          numbers that a product ends in (1 float; 3 int32_t for the bytes of the fixed point)
//   offset_weight         what weight() adds to every int8 (0, or 128 where it makes them unsigned)
//   Piece weight(const Weight*)                    loads `step` columns, from any address
//   void pack(const Source*, Hidden*)              `step` columns in the order that add() reads them
//   Row hidden(const Hidden*)                      a packed row's `step` columns, or where they are
//   Acc zero();  Acc add(Acc, Piece, Row)
//   void sum4(const Acc*, Total (*out)[4])         four accumulators, out[part][accumulator]
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "decode.h"

namespace latentforge {
namespace {

template <class D>
using Totals = typename D::Total[D::rows][D::parts][kBlock];

// Where the weight's rows of a block lie. `cold`: nobody has read them yet.
template <class D>
struct WeightBlock {
  const typename D::Weight* first;
  int64_t stride;
  int64_t width;
  int64_t tokens;
  bool cold;
};

constexpr int64_t kLine = 64;        // bytes that memory is fetched in
constexpr int64_t kLinesAhead = 16;  // fetched early at each place
constexpr int64_t kFirstLines = 4;   // of each of the next block's places: its prefetcher must find them first

inline void fetch(const void* at, int64_t bytes) { __builtin_prefetch(static_cast<const char*>(at) + bytes, 0, 3); }

template <class D, int K, bool Cold>
__attribute__((noinline)) void multiply_group(const WeightBlock<D>& block, const typename D::Hidden* hidden,
                                              Totals<D>& totals) {
  using Weight = typename D::Weight;
  constexpr int R = D::tokens(K);
  constexpr int pairs = R * K, padded = (pairs + 3) / 4 * 4;
  const int64_t pieces = block.width / D::step, rest = block.width % D::step;
  // The tile takes its tokens from all over the block: the hardware follows several streams faster than one.
  const int64_t apart = (block.tokens + R - 1) / R;
  for (int64_t token = 0; token < apart; ++token) {
    const Weight* rows[R];
    int64_t index[R];
    for (int r = 0; r < R; ++r) {
      index[r] = std::min(token + r * apart, block.tokens - 1);
      rows[r] = block.first + index[r] * block.stride;
    }
    typename D::Acc acc[padded];
#pragma GCC unroll 32
    for (int i = 0; i < padded; ++i) acc[i] = D::zero();
    const typename D::Hidden* h = hidden;
    const auto one_piece = [&](const Weight* const* at, int64_t offset) __attribute__((always_inline)) {
      typename D::Piece piece[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) piece[r] = D::weight(at[r] + offset);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const auto row = D::hidden(h + k * D::hidden_step);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[k * R + r] = D::add(acc[k * R + r], piece[r], row);
      }
      h += K * D::hidden_step;
    };
    // Vectors narrower than half a line have more to do with the products than with waiting.
    constexpr int64_t bytes = D::step * static_cast<int64_t>(sizeof(Weight));
    for (int64_t i = 0; i < pieces; ++i) {
      if constexpr (Cold && 2 * bytes >= kLine) {
#pragma GCC unroll 2
        for (int64_t line = 0; line < bytes; line += kLine)
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
            if (bytes >= kLine || i % (kLine / bytes) == 0) fetch(rows[r] + i * D::step, kLinesAhead * kLine + line);
      }
      one_piece(rows, i * D::step);
    }
    if (Cold && token + 1 == apart)
      for (int r = 0; r < R; ++r)
        for (int64_t line = 0; line < kFirstLines; ++line)
          fetch(block.first + (block.tokens + r * apart) * block.stride, line * kLine);
    if (rest != 0) {
      alignas(64) Weight last[R][D::step] = {};
      const Weight* tail[R];
      for (int r = 0; r < R; ++r) {
        std::memcpy(last[r], rows[r] + pieces * D::step, static_cast<size_t>(rest) * sizeof(Weight));
        tail[r] = last[r];
      }
      one_piece(tail, 0);
    }
#pragma GCC unroll 8
    for (int i = 0; i < padded; i += 4) {
      typename D::Total sums[D::parts][4];
      D::sum4(acc + i, sums);
      for (int p = 0; p < D::parts; ++p)
        for (int j = 0; j < 4 && i + j < pairs; ++j) totals[(i + j) / R][p][index[(i + j) % R]] = sums[p][j];
    }
  }
}

template <class D, int K = 1>
void multiply(int rows, const WeightBlock<D>& block, const typename D::Hidden* hidden, Totals<D>& totals) {
  if (rows == K)
    (block.cold ? multiply_group<D, K, true> : multiply_group<D, K, false>)(block, hidden, totals);
  else if constexpr (K < D::rows)
    multiply<D, K + 1>(rows, block, hidden, totals);
}

inline float widened(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

// The row as fixed point: h = q * unit with |q| <= 0x7f7f7f, three signed bytes; unit is a power of two, so a bf16 row
// loses nothing but in entries below 2^-14 of its largest.
inline double fixed_point(const float* row, int64_t count, int32_t* q) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(row[i]));
  int power = 0;
  if (largest > 0.0f) {
    const double mantissa = std::frexp(static_cast<double>(largest), &power);  // in [1/2, 1)
    power -= mantissa * 8388608.0 > 8355711.0 ? 22 : 23;
  }
  for (int64_t i = 0; i < count; ++i)
    q[i] = static_cast<int32_t>(std::nearbyint(std::ldexp(static_cast<double>(row[i]), -power)));
  return std::ldexp(1.0, power);
}

// The three signed bytes of a fixed-point number, highest first.
inline void three_bytes(int32_t q, int32_t* part) {
  part[2] = static_cast<int8_t>(q & 0xff);
  const int32_t upper = (q - part[2]) >> 8;
  part[1] = static_cast<int8_t>(upper & 0xff);
  part[0] = (upper - part[1]) >> 8;
}

template <class D>
void pack_rows(Sweep& sweep) {
  const DecodeCall& call = *sweep.call;
  PackedRows& packed = sweep.packed;
  const auto count = static_cast<int64_t>(sweep.rows.size());
  const int64_t pieces = (call.width + D::step - 1) / D::step, columns = pieces * D::step;
  const int64_t row_elements = pieces * D::hidden_step;
  const int64_t groups = (count + D::rows - 1) / D::rows;
  packed.groups.clear();
  packed.scales.assign(static_cast<size_t>(count), {});
  packed.bytes.assign(static_cast<size_t>(count * row_elements) * sizeof(typename D::Hidden) + 64, 0);
  packed.data = packed.bytes.data() + (64 - reinterpret_cast<uintptr_t>(packed.bytes.data()) % 64) % 64;
  std::vector<float> row(static_cast<size_t>(columns), 0.0f);
  std::vector<int32_t> fixed(std::is_same_v<typename D::Source, int32_t> ? static_cast<size_t>(columns) : 0, 0);
  for (int64_t g = 0; g < groups; ++g) {  // of nearly equal sizes
    const int64_t first = count * g / groups, end = count * (g + 1) / groups;
    const int size = static_cast<int>(end - first);
    const auto offset = static_cast<size_t>(first * row_elements) * sizeof(typename D::Hidden);
    packed.groups.push_back({first, size, offset});
    auto* out = reinterpret_cast<typename D::Hidden*>(packed.data + offset);
    for (int64_t i = first; i < end; ++i) {
      const int64_t start = sweep.rows[static_cast<size_t>(i)].row * call.hidden_stride;
      for (int64_t j = 0; j < call.width; ++j)
        row[static_cast<size_t>(j)] = call.hidden_bf16 ? widened(static_cast<const uint16_t*>(call.hidden)[start + j])
                                                       : static_cast<const float*>(call.hidden)[start + j];
      const typename D::Source* source;
      if constexpr (std::is_same_v<typename D::Source, int32_t>) {
        auto& scale = packed.scales[static_cast<size_t>(i)];
        bool finite = true;
        for (const float h : row) finite = finite && std::isfinite(h);
        if (finite) {
          scale.unit = fixed_point(row.data(), columns, fixed.data());
        } else {
          std::fill(fixed.begin(), fixed.end(), 0);
          scale.unit = std::numeric_limits<double>::quiet_NaN();  // every logit of the row
        }
        int64_t sum = 0;
        for (const int32_t q : fixed) sum += q;
        scale.offset = static_cast<double>(D::offset_weight * sum);
        source = fixed.data();
      } else {
        source = row.data();
      }
      for (int64_t p = 0; p < pieces; ++p)
        D::pack(source + p * D::step, out + (p * size + (i - first)) * D::hidden_step);
    }
  }
}

// The row's products of a block as fp32.
template <class D>
void products(const typename D::Total (*totals)[kBlock], const PackedRows::Scale& scale, const float* token_scales,
              int64_t tokens, float* __restrict z) {
  if constexpr (D::parts == 1) {
    (void)scale, (void)token_scales, (void)tokens;
    for (int64_t i = 0; i < kBlock; ++i) z[i] = totals[0][i];
  } else {
    for (int64_t i = 0; i < tokens; ++i) {
      const double sum = (static_cast<double>(totals[0][i]) * 65536.0 + static_cast<double>(totals[1][i]) * 256.0) +
                         (static_cast<double>(totals[2][i]) - scale.offset);
      z[i] = static_cast<float>(sum * scale.unit * static_cast<double>(token_scales[i]));
    }
  }
}

}  // namespace
}  // namespace latentforge
