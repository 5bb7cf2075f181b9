// Exponentials of fp32 logits relative to a reference, 2^(c * (x - m)), for
// whichever Simd was included before this header: argument reduction in the
// units of the logits and a polynomial of degree six, 2e-9 beside the rounding
// of fp32. Any logit is taken: minus infinity gives 0, NaN gives NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace latentforge {
namespace {

constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLog2e = 1.44269504088896340736;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Exponent {
  using V = Simd::V;

  explicit Exponent(double temperature) {
    per_logit = kLog2e / temperature;
    c = static_cast<float>(per_logit);
    const double step = temperature * kLn2;  // one power of two, in logits
    // 16 significant bits, so that n * hi is exact for |n| < 256.
    int exponent = 0;
    const double mantissa = std::frexp(step, &exponent);
    const double high = std::ldexp(std::floor(mantissa * 65536.0), exponent - 16);
    hi = static_cast<float>(high);
    lo = static_cast<float>(step - high);
    lowest = static_cast<float>(-160.0 * step);
  }

  void move_to(float reference) {
    m = reference;
    origin = static_cast<double>(m) * per_logit;
  }

  V operator()(V x) const {
    const V d = Simd::max(Simd::set(lowest), Simd::sub(x, Simd::set(m)));
    const V n = Simd::floor(Simd::mul(d, Simd::set(c)));
    const V rest = Simd::fnma(n, Simd::set(lo), Simd::fnma(n, Simd::set(hi), d));
    const V f = Simd::mul(rest, Simd::set(c));
    V p = Simd::set(0.00021702255681f);
    p = Simd::fma(p, f, Simd::set(0.0012439687747f));
    p = Simd::fma(p, f, Simd::set(0.009678841007f));
    p = Simd::fma(p, f, Simd::set(0.055483341978f));
    p = Simd::fma(p, f, Simd::set(0.24022983628f));
    p = Simd::fma(p, f, Simd::set(0.69314698384f));
    p = Simd::fma(p, f, Simd::set(1.0000000019f));
    return Simd::scale_clamped(p, n);
  }

  // The same for one logit, in double precision.
  double exactly(double x) const { return std::exp2((x - m) * per_logit); }

  float c = 0.0f, m = 0.0f, hi = 0.0f, lo = 0.0f, lowest = 0.0f;
  double per_logit = 0.0;  // powers of two per logit
  double origin = 0.0;     // the reference in powers of two
};

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline void narrow(double x, float* out) { *out = static_cast<float>(x); }
inline void narrow(double x, uint16_t* out) {
  const float value = static_cast<float>(x);
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  *out = value != value ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x8000u) >> 16);
}

}  // namespace
}  // namespace latentforge
