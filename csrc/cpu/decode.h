// Token ids from hidden rows and a vocabulary matrix: what a caller hands in, and the variants that do it.
#pragma once

#include <cstdint>
#include <string>

namespace latentforge {

// out[i] = the Gumbel noise of (seed, position, first + i), as csrc/gumbel.h defines it.
using NoiseKernel = void (*)(int64_t seed, int64_t position, int64_t first, int64_t count, float* out);

// What one instruction set brings; each table lies in its own translation unit.
struct DecodeKernels {
  NoiseKernel noise;
};
const DecodeKernels& baseline_decode_kernels();
const DecodeKernels& avx2_decode_kernels();
const DecodeKernels& avx512_decode_kernels();

// Throws std::invalid_argument for a variant that this machine lacks.
const DecodeKernels& find_decode_kernels(const std::string& variant);

}  // namespace latentforge
