// Exponentials of a row relative to a reference, 2^(c * (x - m)), for whichever
// Simd was included before this header.
//
// Two accuracies. `fast` (bf16 logits): one multiply-add and a quartic,
// relative error 2.6e-6, which is 1/1500 of what the gradient loses when it is
// rounded to bf16. `accurate` (any fp32 logits): argument reduction in the
// units of the logits and a polynomial of degree six, 2e-9 beside the rounding
// of fp32.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace latentforge {
namespace {

constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLog2e = 1.44269504088896340736;

template <bool accurate>
struct Exponent {
  using V = Simd::V;

  explicit Exponent(double temperature) {
    const double exact = kLog2e / temperature;
    c = static_cast<float>(exact);
    per_logit = accurate ? exact : static_cast<double>(c);
    const double step = temperature * kLn2;  // one power of two, in logits
    // 16 significant bits, so that n * hi is exact for |n| < 256.
    int exponent = 0;
    const double mantissa = std::frexp(step, &exponent);
    const double high = std::ldexp(std::floor(mantissa * 65536.0), exponent - 16);
    hi = static_cast<float>(high);
    lo = static_cast<float>(step - high);
    lowest = static_cast<float>(-160.0 * step);
    move_to(0.0f);
  }

  void move_to(float reference) {
    m = reference;
    mc = m * c;
    origin = (Simd::fused && !accurate) ? static_cast<double>(mc) : static_cast<double>(m) * per_logit;
  }

  // c * (x - m), as a power of two.
  V power(V x) const {
    if constexpr (Simd::fused && !accurate) return Simd::fma(x, Simd::set(c), Simd::set(-mc));
    return Simd::mul(Simd::sub(x, Simd::set(m)), Simd::set(c));
  }

  // 2^(c * (x - m)), given z = power(x). Minus infinity gives 0, NaN gives NaN.
  V operator()(V x, V z) const {
    if constexpr (!accurate) {
      V n, f;
      Simd::split(z, n, f);
      V p = Simd::set(0.013534168062f);
      p = Simd::fma(p, f, Simd::set(0.052011460299f));
      p = Simd::fma(p, f, Simd::set(0.2414427571f));
      p = Simd::fma(p, f, Simd::set(0.69300383443f));
      p = Simd::fma(p, f, Simd::set(1.0000025934f));
      return Simd::scale(p, n);
    } else {
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
  }

  // Beyond 2^23 the fused form's reference is rounded by half a power of two or more: sums may leave the range.
  bool coarse() const { return Simd::fused && !accurate && !(std::fabs(mc) < 8388608.0f); }

  // The reference in logits, as this kernel's arithmetic has it.
  double reference() const { return (Simd::fused && !accurate) ? origin / per_logit : static_cast<double>(m); }

  // The same power of two for one logit, without the reference: origin is what
  // to subtract.
  double log2_of(double x) const { return x * per_logit; }

  float c = 0.0f, m = 0.0f, mc = 0.0f, hi = 0.0f, lo = 0.0f, lowest = 0.0f;
  double per_logit = 0.0;  // powers of two per logit, as this kernel's arithmetic has it
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

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline float minus_infinity(float) { return -kInfinity; }
inline uint16_t minus_infinity(uint16_t) { return uint16_t{0xff80}; }

}  // namespace
}  // namespace latentforge
