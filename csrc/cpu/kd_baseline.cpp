// The row kernels, compiled for the instruction set that this file is named
// after.
#include "simd_baseline.h"
//
#include "kd_rows.h"

namespace latentforge {
void baseline_kd_row(const KdCall& call, int64_t row, int64_t ahead, Scratch& scratch) {
  kd_row(call, row, ahead, scratch);
}
}  // namespace latentforge
