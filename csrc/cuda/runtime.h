// What the rest of the module sees of the CUDA part: no CUDA header is needed to include this.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

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

// A kernel as the driver has loaded it: what a thread and a block of it take.
struct Loaded {
  std::string name;
  int registers = 0;
  int64_t local_bytes = 0;  // stack and spills of a thread
  int64_t shared_bytes = 0;
  int code = 0;  // architecture of the machine code, 90 is sm_90
};

// Loads every kernel on `device` and launches none; std::runtime_error naming the first that is not there.
std::vector<Loaded> load_kd(int device);
std::vector<Loaded> load_decode(int device);

}  // namespace latentforge::cuda
