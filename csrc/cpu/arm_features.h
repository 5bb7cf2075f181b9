// What an aarch64 processor can do beyond Armv8.0, asked of the kernel.
#pragma once

#if defined(__aarch64__)
#include <sys/auxv.h>

namespace latentforge {
namespace {

// What the neon_bf16 units are compiled for. The bits are HWCAP_ASIMDDP and HWCAP2_BF16, which older headers lack.
inline bool has_bf16_and_dot_products() {
  return (getauxval(AT_HWCAP) & (1ul << 20)) != 0 && (getauxval(AT_HWCAP2) & (1ul << 14)) != 0;
}

}  // namespace
}  // namespace latentforge
#endif
