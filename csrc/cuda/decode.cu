// Decoding on a stream. Compiled ahead of time; the logic runs under host emulation in the tests.
#include "decode_rows.cuh"
#include "runtime.cuh"

namespace latentforge::cuda {

int64_t decode_space() { return decode_workspace_bytes(); }

void decode_rows(const DecodeCall& call, int device, uintptr_t stream) {
  const OnDevice on(device);
  launch_decode(call, properties(device).multiprocessors, reinterpret_cast<cudaStream_t>(stream));
  check(cudaGetLastError(), "launching the decoder");
}

std::vector<Loaded> load_decode(int device) {
  const OnDevice on(device);
  return {load("decode_walk bf16", decode_walk<Bf16>),
          load("decode_walk fp32", decode_walk<float>),
          load("decode_walk int8", decode_walk<int8_t>),
          load("decode_gather", decode_gather),
          load("decode_cut", decode_cut),
          load("decode_reopen", decode_reopen)};
}

}  // namespace latentforge::cuda
