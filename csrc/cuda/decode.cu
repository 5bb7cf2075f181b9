// Decoding on a stream. Compiled ahead of time; the logic runs under host emulation in the tests.
#include "decode_rows.cuh"
#include "runtime.cuh"
#include "runtime.h"

namespace latentforge::cuda {

int64_t decode_space() { return decode_workspace_bytes(); }

void decode_rows(const DecodeCall& call, int device, uintptr_t stream) {
  const OnDevice on(device);
  launch_decode(call, properties(device).multiprocessors, reinterpret_cast<cudaStream_t>(stream));
  check(cudaGetLastError(), "launching the decoder");
}

}  // namespace latentforge::cuda
