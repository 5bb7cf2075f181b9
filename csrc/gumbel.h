// The noise of sampling: one Gumbel variate for each (seed, position, vocabulary id), with the same bits on every
// backend. latentforge/kernels/noise.py is the definition; this is the same order of the same operations.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) gives 32 bits w. With
// t = (w + 1/2) / 2^32 the variate is -log(-log1p(-t)). Every operation below is an IEEE fp32 add, subtract or multiply
// rounded to nearest, a conversion, or a bit operation: compile with -ffp-contract=off. Under nvcc the macros are the
// intrinsics that are never fused. No value is denormal, so flushing them changes nothing.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LF_HD __host__ __device__ __forceinline__
#else
#define LF_HD inline
#endif

#if defined(__CUDA_ARCH__)
#define LF_ADD(a, b) __fadd_rn(a, b)
#define LF_SUB(a, b) __fsub_rn(a, b)
#define LF_MUL(a, b) __fmul_rn(a, b)
#define LF_BITS(x) __float_as_int(x)
#define LF_FLOAT(i) __int_as_float(i)
#else
#define LF_ADD(a, b) ((a) + (b))
#define LF_SUB(a, b) ((a) - (b))
#define LF_MUL(a, b) ((a) * (b))
#define LF_BITS(x) __builtin_bit_cast(int32_t, x)
#define LF_FLOAT(i) __builtin_bit_cast(float, i)
#endif

namespace latentforge {
namespace {  // compiled once for each instruction set: none may stand in for another

struct Philox {
  uint32_t word[4];
};

// Ten rounds over the counter (group, 0, position) with the key (seed); low halves first.
LF_HD Philox philox(uint64_t seed, uint64_t position, uint32_t group) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = group, c1 = 0, c2 = static_cast<uint32_t>(position), c3 = static_cast<uint32_t>(position >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t next0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, next2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// k log 2 + log(1 + f) for f in [-0.293, 0.415): the polynomial of Cephes' logf.
LF_HD float log_parts(float k, float f) {
  const float square = LF_MUL(f, f);
  float p = 7.0376836292e-2f;
  p = LF_ADD(LF_MUL(p, f), -1.1514610310e-1f);
  p = LF_ADD(LF_MUL(p, f), 1.1676998740e-1f);
  p = LF_ADD(LF_MUL(p, f), -1.2420140846e-1f);
  p = LF_ADD(LF_MUL(p, f), 1.4249322787e-1f);
  p = LF_ADD(LF_MUL(p, f), -1.6668057665e-1f);
  p = LF_ADD(LF_MUL(p, f), 2.0000714765e-1f);
  p = LF_ADD(LF_MUL(p, f), -2.4999993993e-1f);
  p = LF_ADD(LF_MUL(p, f), 3.3333331174e-1f);
  float y = LF_MUL(LF_MUL(p, f), square);
  y = LF_ADD(y, LF_MUL(k, -2.12194440e-4f));
  y = LF_SUB(y, LF_MUL(0.5f, square));
  return LF_ADD(LF_ADD(f, y), LF_MUL(k, 0.693359375f));
}

// x = 2^k (1 + f) for a normal x > 0, with 1 + f in [sqrt(1/2), sqrt(2)).
LF_HD void split_log(float x, float* k, float* f) {
  const int32_t bits = LF_BITS(x), power = (bits - 0x3f3504f3) >> 23;
  *k = static_cast<float>(power);
  *f = LF_SUB(LF_FLOAT(bits - (power << 23)), 1.0f);
}

// (w + 1/2) / 2^32, rounded once: both halves are exact, so is the scaling.
LF_HD float unit_interval(uint32_t word) {
  const float high = LF_MUL(static_cast<float>(static_cast<int32_t>(word >> 16)), 65536.0f);
  const float low = LF_ADD(static_cast<float>(static_cast<int32_t>(word & 0xffffu)), 0.5f);
  return LF_MUL(LF_ADD(high, low), 2.3283064365386963e-10f);
}

// From t = 1/4 on, 1 - t comes from the complement of the bits: nothing cancels. Chosen by masks, so that a loop over
// words becomes vectors.
LF_HD float gumbel_of_word(uint32_t word) {
  const int32_t upper = word < 0x40000000u ? 0 : -1;
  const float x = unit_interval(word ^ static_cast<uint32_t>(upper));
  float k, f;
  split_log(x, &k, &f);
  k = LF_FLOAT(LF_BITS(k) & upper);
  f = LF_FLOAT((LF_BITS(f) & upper) | (LF_BITS(LF_SUB(0.0f, x)) & ~upper));
  const float exponential = LF_SUB(0.0f, log_parts(k, f));
  split_log(exponential, &k, &f);
  return LF_SUB(0.0f, log_parts(k, f));
}

// Four neighbouring ids share one counter; a kernel that walks the vocabulary calls philox once for them.
LF_HD float gumbel(int64_t seed, int64_t position, int64_t id) {
  const Philox drawn =
      philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(position), static_cast<uint32_t>(id >> 2));
  return gumbel_of_word(drawn.word[id & 3]);
}

}  // namespace
}  // namespace latentforge
