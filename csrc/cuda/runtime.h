// What the rest of the module sees of the CUDA part: no CUDA header is needed to include this.
#pragma once

#include <cstdint>
#include <string>

#include "decode_call.h"
#include "kd_call.h"

namespace latentforge::cuda {

// Devices that can be used; `trouble` says why there is none (no driver, no device), in the runtime's words.
struct DeviceCount {
  int count = 0;
  int error = 0;
  std::string trouble;
};
DeviceCount device_count();

// Versions of the static runtime and of the driver (0 where there is none), as 1000 * major + 10 * minor.
int runtime_version();
int driver_version();

// Put the work on `stream` of `device` and return; std::runtime_error with the runtime's words where that fails.
void kd_rows(const KdCall& call, int device, uintptr_t stream);
void decode_rows(const DecodeCall& call, int device, uintptr_t stream);
int64_t decode_space();  // bytes of DecodeCall::workspace

}  // namespace latentforge::cuda
