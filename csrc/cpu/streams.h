// How fast this machine's memory moves, measured beside the kernels: the
// floors of their benches.
#pragma once

#include <cstdint>

namespace latentforge {

// Each over `count` numbers, split over `threads`. The sum is there so that
// reading cannot be left out.
uint64_t stream_read(const uint64_t* a, int64_t count, int threads);
void stream_scale(float* a, int64_t count, int threads);
void stream_add(float* a, const float* b, int64_t count, int threads);
void stream_copy(float* a, const float* b, int64_t count, int threads);

}  // namespace latentforge
