// What launchers share: errors as exceptions, the device that a call is for, its properties.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kd_step.cuh"

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
    if (before_ != device) check(cudaSetDevice(device), "choosing the device");
  }
  ~OnDevice() { (void)cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

inline Device properties(int device) {
  Device found;
  int cache = 0;
  check(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  check(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device), "second-level cache");
  found.cache_bytes = cache;
  return found;
}

}  // namespace latentforge::cuda
