// The decode kernels, compiled for the instruction set that this file is named after.
#include "decode_sweep.h"
//
#include "decode_dot_neon.h"

namespace latentforge {
const DecodeKernels& neon_decode_kernels() {
  static constexpr DecodeKernels kernels{noise_run, product<Bf16Dot>(), product<Bf16Dot>(), product<F32Dot>(),
                                         product<Int8Dot>()};
  return kernels;
}
}  // namespace latentforge
