#include "streams.h"

#include <algorithm>
#include <atomic>

#include "threads.h"

// The widest loads that the machine has, so that the floor is the memory's and
// not the compiler's.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LF_WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LF_WIDEST
#endif

namespace latentforge {

namespace {

// A cache line as the compiler's own vector, at any address.
typedef uint64_t Line __attribute__((vector_size(64), aligned(8), may_alias));

LF_WIDEST uint64_t read_all(const uint64_t* a, int64_t count) {
  // Eight places at once, each load over the end of a line: one place leaves a
  // third of the memory's speed unused, since its misses wait for each other,
  // and loads of whole lines a tenth.
  constexpr int64_t kPlaces = 8, kLine = 8;
  uint64_t sum = 0;
  for (; count > 0 && reinterpret_cast<uintptr_t>(a) % 64 != 32; --count) sum += *a++;
  const int64_t apart = count / kPlaces / kLine * kLine;
  Line sums[kPlaces] = {};
  for (int64_t i = 0; i < apart; i += kLine)
#pragma GCC unroll 8
    for (int64_t place = 0; place < kPlaces; ++place)
      sums[place] += *reinterpret_cast<const Line*>(a + place * apart + i);
  for (const Line& line : sums)
    for (int64_t j = 0; j < kLine; ++j) sum += line[j];
  for (int64_t i = kPlaces * apart; i < count; ++i) sum += a[i];
  return sum;
}

LF_WIDEST void scale_all(float* a, int64_t count) {
  for (int64_t i = 0; i < count; ++i) a[i] *= 2.0f;
}

LF_WIDEST void add_all(float* __restrict a, const float* __restrict b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) a[i] += b[i];
}

template <class Body>
void shared_out(int64_t count, int threads, Body body) {
  threads = std::max(threads, 1);
  const int64_t share = (count + threads - 1) / threads;
  on_threads(threads, [&](int index) {
    const int64_t start = std::min(count, index * share);
    body(start, std::min(count, start + share) - start);
  });
}

}  // namespace

uint64_t stream_read(const uint64_t* a, int64_t count, int threads) {
  std::atomic<uint64_t> sum{0};
  shared_out(count, threads, [&](int64_t start, int64_t length) { sum += read_all(a + start, length); });
  return sum;
}

void stream_scale(float* a, int64_t count, int threads) {
  shared_out(count, threads, [&](int64_t start, int64_t length) { scale_all(a + start, length); });
}

void stream_add(float* a, const float* b, int64_t count, int threads) {
  shared_out(count, threads, [&](int64_t start, int64_t length) { add_all(a + start, b + start, length); });
}

void stream_copy(float* a, const float* b, int64_t count, int threads) {
  shared_out(count, threads, [&](int64_t start, int64_t length) { std::copy_n(b + start, length, a + start); });
}

}  // namespace latentforge
