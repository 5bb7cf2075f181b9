// The decode kernels, compiled for the instruction set that this file is named after.
#include "decode_sweep.h"
//
#include "decode_dot_neon.h"

namespace latentforge {
const DecodeKernels& neon_bf16_decode_kernels() {
  static constexpr DecodeKernels kernels{noise_run, product<Bf16PairDot>(), product<Bf16Dot>(), product<F32Dot>(),
                                         product<Int8DotProduct>()};
  return kernels;
}
}  // namespace latentforge
