// Threads of one call, and the arithmetic mode that they compute in.
#pragma once

#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace latentforge {
namespace {

// Denormal results become zero while a row is computed: they are 1e-38 of
// nothing and cost a hundred cycles each.
class [[maybe_unused]] FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8000u); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned before_;
#endif
};

// Threads live for one call: nothing is left behind for a fork to trip over,
// and a start costs microseconds where a call takes milliseconds.
template <class Body>
void on_threads(int threads, Body body) {
  std::vector<std::exception_ptr> failures(static_cast<size_t>(threads));
  const auto guarded = [&](int index) {
    try {
      body(index);
    } catch (...) {
      failures[static_cast<size_t>(index)] = std::current_exception();
    }
  };
  std::vector<std::thread> pool;
  pool.reserve(static_cast<size_t>(threads - 1));
  int started = 1;
  try {
    for (; started < threads; ++started) pool.emplace_back(guarded, started);
  } catch (const std::system_error&) {
    // A machine out of threads: those that started, and this one, share the
    // work.
  }
  guarded(0);
  for (auto& thread : pool) thread.join();
  for (const auto& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

}  // namespace
}  // namespace latentforge
