// The row kernels, compiled for the instruction set that this file is named
// after.
#include "simd_neon.h"
//
#include "kd_rows.h"

namespace latentforge {
RowKernel neon_bf16_row_kernel(const KdCall& call) { return select_row_kernel(call); }
}  // namespace latentforge
