// Rows of stored targets: from tokens and bits to ids and log-probabilities.
#pragma once

#include <cstdint>

namespace latentforge {

// The body of a row, as latentforge/targets/packing.py defines it; every length is checked against the others.
struct RowBody {
  const uint8_t* scalars;
  int64_t n_scalars;
  const uint8_t* gaps;
  int64_t n_gaps;
  const uint8_t* places;
  int64_t n_places;
  const uint8_t* falls;
  int64_t n_falls;
  const uint8_t* bits;
  int64_t n_bits;  // in bytes
  int64_t positions;
  int64_t k;
  int64_t temperatures;
  bool mixed;
};

// How levels and tails become numbers: a level below n_table is looked up, one above is beyond_a - level * beyond_b.
struct RowScale {
  const float* table;
  int64_t n_table;
  double beyond_a;
  double beyond_b;
  double first_step;       // a position's levels begin at 0 below first * first_step; with step 0 they begin at first
  const double* ceilings;  // [temperatures]
  double tail_step;
};

// ids [positions, k] (-1 absent), logprobs [positions, k] (minus infinity absent), tails [temperatures, positions].
// False where the body contradicts itself; what was written by then is to be thrown away.
bool unpack_row(const RowBody& body, const RowScale& scale, int32_t* ids, float* logprobs, float* tails);

}  // namespace latentforge
