// A stand-in for a CUDA device, for tests of the kernels' logic: the threads of a block are fibres of one thread of the
// host, a barrier is where they change places, blocks run one after the other in any order.
//
// What it notices beside wrong numbers: 16-byte accesses at other addresses, accesses outside the buffers (they lie
// between unreadable pages), barriers that not every thread reaches. What it cannot know: timing, memory order between
// blocks of one launch, the last bit of the special function unit (exp2_approximate errs here as far as it may there).
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define LF_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  ((void)(stream), lf_host::launch([&] { kernel(__VA_ARGS__); }, blocks, threads))
#define threadIdx (lf_host::index_of_thread())
#define blockIdx (lf_host::index_of_block())

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace lf_host {

struct Index {
  unsigned x;
};

constexpr int kLanes = 32;
constexpr size_t kStack = 128 << 10;

struct Fibre {
  ucontext_t start;
  jmp_buf place;
  bool begun = false, done = false;
  const uint64_t* awaited = nullptr;  // a barrier's generation, and what it was on arrival
  uint64_t arrived_at = 0;
  std::unique_ptr<char[]> stack;
};

struct Barrier {
  uint64_t generation = 0;
  int arrived = 0;
  uint32_t values[2][kLanes] = {};
};

struct Machine {
  std::vector<Fibre> fibres;
  std::vector<Barrier> warps;
  Barrier block;
  std::function<void()> body;
  jmp_buf scheduler;
  unsigned thread = 0, block_index = 0;
  int alive = 0;
  uint64_t released = 0;  // barriers passed and threads ended: what counts as progress
  uint64_t progress = 0;
  size_t turn = 0;
  std::string failure;
  uint64_t order = 0;  // 0: threads and blocks in their own order, else shuffled with this seed
};
inline Machine machine;

inline Index index_of_thread() { return {machine.thread}; }
inline Index index_of_block() { return {machine.block_index}; }

inline void back_to_scheduler() { _longjmp(machine.scheduler, 1); }
[[noreturn]] inline void fail(const char* what) {
  if (machine.failure.empty())
    machine.failure = std::string(what) + " (block " + std::to_string(machine.block_index) + ", thread " +
                      std::to_string(machine.thread) + ")";
  _longjmp(machine.scheduler, 1);
}

inline void wait_at(Barrier& barrier, int expected) {
  Fibre& fibre = machine.fibres[machine.thread];
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++machine.released;
    return;
  }
  fibre.awaited = &barrier.generation;
  fibre.arrived_at = barrier.generation;
  if (_setjmp(fibre.place) == 0) back_to_scheduler();
}

inline void run_fibre() {
  machine.body();
  machine.fibres[machine.thread].done = true;
  --machine.alive;
  ++machine.released;
  // A thread that has ended is not waited for.
  if (machine.alive > 0 && machine.block.arrived == machine.alive) {
    machine.block.arrived = 0;
    ++machine.block.generation;
  }
  back_to_scheduler();
}

inline void on_fault(int, siginfo_t* info, void*) {
  char text[80];
  std::snprintf(text, sizeof text, "access outside the buffers, at %p", info->si_addr);
  fail(text);
}

inline void run_block(const std::vector<unsigned>& order) {
  machine.alive = static_cast<int>(order.size());
  machine.block = Barrier();
  std::fill(machine.warps.begin(), machine.warps.end(), Barrier());
  for (Fibre& fibre : machine.fibres) fibre.begun = fibre.done = false, fibre.awaited = nullptr;
  // In the machine, not in registers: the scheduler is re-entered by longjmp.
  while (machine.alive > 0) {
    machine.progress = machine.released;
    for (machine.turn = 0; machine.turn < order.size(); ++machine.turn) {
      Fibre& fibre = machine.fibres[order[machine.turn]];
      if (fibre.done || (fibre.awaited != nullptr && *fibre.awaited == fibre.arrived_at)) continue;
      fibre.awaited = nullptr;
      machine.thread = order[machine.turn];
      if (_setjmp(machine.scheduler) == 0) {
        if (fibre.begun) _longjmp(fibre.place, 1);
        fibre.begun = true;
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = fibre.stack.get();
        fibre.start.uc_stack.ss_size = kStack;
        fibre.start.uc_link = nullptr;
        makecontext(&fibre.start, run_fibre, 0);
        setcontext(&fibre.start);
      }
      if (!machine.failure.empty()) throw std::runtime_error(machine.failure);
    }
    if (machine.released == machine.progress) {
      machine.failure = "a barrier that not every thread reaches (block " + std::to_string(machine.block_index) + ")";
      throw std::runtime_error(machine.failure);
    }
  }
}

inline void launch(std::function<void()> body, unsigned blocks, unsigned threads) {
  machine.failure.clear();
  machine.body = std::move(body);
  if (machine.fibres.size() != threads) {
    machine.fibres = std::vector<Fibre>(threads);
    for (Fibre& fibre : machine.fibres) fibre.stack = std::make_unique<char[]>(kStack);
    machine.warps.resize((threads + kLanes - 1) / kLanes);
  }
  static char signal_stack[64 << 10];
  stack_t alternate = {}, before_stack;
  alternate.ss_sp = signal_stack;
  alternate.ss_size = sizeof signal_stack;
  sigaltstack(&alternate, &before_stack);
  struct sigaction action = {}, before;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before);
  std::vector<unsigned> block_order(blocks), thread_order(threads);
  std::iota(block_order.begin(), block_order.end(), 0u);
  std::iota(thread_order.begin(), thread_order.end(), 0u);
  std::mt19937_64 random(machine.order);
  if (machine.order != 0) std::shuffle(block_order.begin(), block_order.end(), random);
  const auto restore = [&] {
    sigaction(SIGSEGV, &before, nullptr);
    sigaltstack(&before_stack, nullptr);
  };
  try {
    for (unsigned block : block_order) {
      if (machine.order != 0) std::shuffle(thread_order.begin(), thread_order.end(), random);
      machine.block_index = block;
      run_block(thread_order);
    }
  } catch (...) {
    restore();
    throw;
  }
  restore();
}

// --- what kernels call ---------------------------------------------------------------------------------------------

inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint32_t round_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// As wrong as the special function unit may be: up to 2^-22.5, both ways, by a hash of the argument.
inline float exp2_approximate(float x) {
  if (x == 0.0f) return 1.0f;
  const float y = std::exp2(x);
  if (y < 1.1754944e-38f) return 0.0f;
  const double error = (static_cast<double>(bits_of(x) * 2654435761u) / 4294967296.0 - 0.5) * 2.0 * 0x1p-22 * 0.7;
  return static_cast<float>(static_cast<double>(y) * (1.0 + error));
}

inline void require_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail("a 16-byte access at an address that is not a multiple of 16");
}
inline uint4 load_vector(const void* p) {
  require_aligned(p);
  uint4 value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
inline uint4 load_again(const void* p) { return load_vector(p); }
inline uint4 load_once(const void* p) { return load_vector(p); }
inline void store_vector(void* p, uint4 value) {
  require_aligned(p);
  std::memcpy(p, &value, sizeof value);
}

inline uint32_t exchange(uint32_t bits, int from) {
  Barrier& warp = machine.warps[machine.thread / kLanes];
  const uint64_t turn = warp.generation % 2;  // the next exchange writes elsewhere
  warp.values[turn][machine.thread % kLanes] = bits;
  wait_at(warp, kLanes);
  return machine.warps[machine.thread / kLanes].values[turn][from];
}

}  // namespace lf_host

inline void __syncthreads() { lf_host::wait_at(lf_host::machine.block, lf_host::machine.alive); }
inline void __syncwarp(unsigned = 0xffffffffu) { (void)lf_host::exchange(0, 0); }
inline uint32_t __float_as_uint(float x) { return lf_host::bits_of(x); }
inline int32_t __float_as_int(float x) { return static_cast<int32_t>(lf_host::bits_of(x)); }
inline float __int_as_float(int32_t x) { return lf_host::float_from_bits(static_cast<uint32_t>(x)); }

template <class T>
T __shfl_sync(unsigned, T x, int from) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = lf_host::exchange(bits, from % lf_host::kLanes);
  std::memcpy(&x, &bits, 4);
  return x;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int step) {
  return __shfl_sync(mask, x, static_cast<int>(lf_host::machine.thread % lf_host::kLanes) ^ step);
}
inline unsigned __ballot_sync(unsigned, bool yes) {
  unsigned all = 0;
  lf_host::Barrier& warp = lf_host::machine.warps[lf_host::machine.thread / lf_host::kLanes];
  const uint64_t turn = warp.generation % 2;
  (void)lf_host::exchange(yes ? 1u : 0u, 0);
  for (int lane = 0; lane < lf_host::kLanes; ++lane) all |= warp.values[turn][lane] << lane;
  return all;
}
inline unsigned atomicOr(uint32_t* p, unsigned bits) {
  const unsigned before = *p;
  *p |= bits;
  return before;
}
template <class T>
T atomicAdd(T* p, T by) {
  const T before = *p;
  *p += by;
  return before;
}
using std::isinf;
using std::isnan;
