// The decode kernels, compiled for the instruction set that this file is named after.
#include "decode.h"
#include "decode_noise.h"

namespace latentforge {
const DecodeKernels& baseline_decode_kernels() {
  static constexpr DecodeKernels kernels{noise_run};
  return kernels;
}
}  // namespace latentforge
