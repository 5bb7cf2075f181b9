// The KD loss on a stream. Compiled ahead of time; the logic runs under host emulation in the tests.
#include "runtime.cuh"
#include "runtime.h"

namespace latentforge::cuda {

void kd_rows(const KdCall& call, int device, uintptr_t stream) {
  const OnDevice on(device);
  launch_kd(call, properties(device), reinterpret_cast<cudaStream_t>(stream));
  check(cudaGetLastError(), "launching the KD loss");
}

}  // namespace latentforge::cuda
