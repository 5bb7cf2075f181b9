// The KD loss on a stream. Compiled ahead of time; the logic runs under host emulation in the tests.
#include "runtime.cuh"

namespace latentforge::cuda {

void kd_rows(const KdCall& call, int device, uintptr_t stream) {
  const OnDevice on(device);
  launch_kd(call, properties(device), reinterpret_cast<cudaStream_t>(stream));
  check(cudaGetLastError(), "launching the KD loss");
}

std::vector<Loaded> load_kd(int device) {
  const OnDevice on(device);
  return {load("kd_step bf16, bf16 teacher", kd_step<Bf16, Bf16>),
          load("kd_step bf16, fp32 teacher", kd_step<Bf16, float>),
          load("kd_step bf16, top-k", kd_step<Bf16, TopK>),
          load("kd_step bf16, no teacher", kd_step<Bf16, NoTeacher>),
          load("kd_step fp32, bf16 teacher", kd_step<float, Bf16>),
          load("kd_step fp32, fp32 teacher", kd_step<float, float>),
          load("kd_step fp32, top-k", kd_step<float, TopK>),
          load("kd_step fp32, no teacher", kd_step<float, NoTeacher>)};
}

}  // namespace latentforge::cuda
