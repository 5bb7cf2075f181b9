// Which variant runs, and how its work is shared out.
#include <algorithm>
#include <stdexcept>

#include "decode.h"
#include "kd.h"

namespace latentforge {

const DecodeKernels& find_decode_kernels(const std::string& variant) {
  const auto available = cpu_variants();
  if (std::find(available.begin(), available.end(), variant) == available.end())
    throw std::invalid_argument("this machine has no '" + variant + "' variant");
#if defined(__x86_64__)
  if (variant == "avx512") return avx512_decode_kernels();
  if (variant == "avx2") return avx2_decode_kernels();
#endif
  return baseline_decode_kernels();
}

}  // namespace latentforge
