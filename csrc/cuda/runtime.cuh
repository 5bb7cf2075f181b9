// What launchers share: errors as exceptions, the device that a call is for, its properties.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kd_step.cuh"
#include "runtime.h"

namespace latentforge::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(static_cast<int>(error)) + ", " +
                             cudaGetErrorString(error));
}

// Makes a device current for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "the current device");
    if (before_ == device) return;
    check(cudaSetDevice(device), "choosing the device");
    changed_ = true;
  }
  // Only where it was changed: setting a device starts a context on it.
  ~OnDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline Device properties(int device) {
  Device found;
  int cache = 0;
  check(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  check(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device), "second-level cache");
  found.cache_bytes = cache;
  return found;
}

// Asking for a function's attributes loads it, whatever the loading mode.
template <class Kernel>
Loaded load(const char* name, Kernel* kernel) {
  cudaFuncAttributes found;
  check(cudaFuncGetAttributes(&found, kernel), name);
  return {name, found.numRegs, static_cast<int64_t>(found.localSizeBytes), static_cast<int64_t>(found.sharedSizeBytes),
          found.binaryVersion};
}

}  // namespace latentforge::cuda
