// The row kernels, compiled for the instruction set that this file is named
// after.
#include "simd_neon.h"
//
#include "kd_rows.h"

namespace latentforge {
void neon_kd_row(const KdCall& call, int64_t row, int64_t ahead, Scratch& scratch) {
  kd_row(call, row, ahead, scratch);
}
}  // namespace latentforge
