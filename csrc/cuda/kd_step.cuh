// The kernel, and how it is launched.
//
// A pair of rows of logits fits no multiprocessor's shared memory, so it is read twice; rows are taken in batches that
// fit the second-level cache, and one launch does the second pass of one batch beside the first pass of the next: the
// second pass finds its logits in the cache, launches are not separated by idle time, and order comes from the stream
// alone (no flags to spin on, no atomics on floats, no cooperative launch).
#pragma once

#include "kd_gradient.cuh"

namespace latentforge::cuda {

struct Rows {
  int64_t begin = 0;
  int64_t count = 0;
};

template <class S, class T>
__global__ void __launch_bounds__(kThreads, 3) kd_step(const KdParams p, Rows second, Rows first, int slices_written) {
  __shared__ Listed listed;
  const int64_t block = blockIdx.x, of_second = second.count * slices_written;
  if (block < of_second) {
    write_slice<S, T>(p, second.begin + block / slices_written, static_cast<int>(block % slices_written), listed);
  } else {
    const int64_t rest = block - of_second;
    sum_slice<S, T>(p, first.begin + rest / p.slices, static_cast<int>(rest % p.slices), listed);
  }
}

// What the launch is fitted to.
struct Device {
  int multiprocessors = 48;
  int64_t cache_bytes = 24 << 20;  // second level
};

// A quarter of the cache: two batches are in it at once, and the gradient leaves through it.
inline int64_t batch_rows(const KdCall& call, const Device& device) {
  if (!call.write_gradient) return call.rows;
  const int64_t width = (call.student.bf16 ? 2 : 4) + (call.teacher.data == nullptr ? 0 : call.teacher.bf16 ? 2 : 4);
  const int64_t fitting = device.cache_bytes / 4 / (width * call.vocab);
  const int64_t filling = (2 * device.multiprocessors + slices_of(call.vocab) - 1) / slices_of(call.vocab);
  return fitting > filling ? fitting : filling;
}

inline KdParams params_of(const KdCall& call) {
  KdParams p;
  p.call = call;
  const bool teacher = call.teacher.data != nullptr || call.topk_ids != nullptr;
  const double temperature = teacher ? call.temperature : 1.0;
  p.student = factor_of(kLog2e / temperature);
  p.teacher = factor_of(kLog2e / call.teacher_temperature);
  p.one = factor_of(kLog2e);
  p.kd_factor = teacher ? static_cast<float>(call.kd_scale / temperature) : 0.0f;
  p.ce_factor = call.labels == nullptr ? 0.0f : static_cast<float>(call.ce_scale);
  p.scale = static_cast<float>(call.logit_scale);
  p.cap = static_cast<float>(call.soft_cap);
  p.cross_entropy = temperature == 1.0   ? CrossEntropy::same
                    : temperature == 2.0 ? CrossEntropy::square
                                         : CrossEntropy::separate;
  p.shaped = call.bias != nullptr || call.logit_scale != 1.0 || call.soft_cap != 0.0;
  p.slices = static_cast<int>(slices_of(call.vocab));
  return p;
}

template <class S, class T, class Stream>
void launch_steps(const KdCall& call, const Device& device, Stream stream) {
  const KdParams p = params_of(call);
  const int64_t batch = batch_rows(call, device);
  const int slices_written = call.write_gradient ? p.slices : 1;
  Rows second;
  for (int64_t row = 0; second.count > 0 || row < call.rows;) {
    const Rows first{row, row + batch < call.rows ? batch : call.rows - row};
    const unsigned blocks = static_cast<unsigned>(second.count * slices_written + first.count * p.slices);
    LF_LAUNCH((kd_step<S, T>), blocks, kThreads, 0, stream, p, second, first, slices_written);
    second = first;
    row += first.count;
  }
}

template <class S, class Stream>
void launch_for_teacher(const KdCall& call, const Device& device, Stream stream) {
  if (call.topk_ids != nullptr) return launch_steps<S, TopK>(call, device, stream);
  if (call.teacher.data == nullptr) return launch_steps<S, NoTeacher>(call, device, stream);
  if (call.teacher.bf16) return launch_steps<S, Bf16>(call, device, stream);
  launch_steps<S, float>(call, device, stream);
}

template <class Stream>
void launch_kd(const KdCall& call, const Device& device, Stream stream) {
  if (call.rows == 0) return;
  if (call.student.bf16) return launch_for_teacher<Bf16>(call, device, stream);
  launch_for_teacher<float>(call, device, stream);
}

}  // namespace latentforge::cuda
