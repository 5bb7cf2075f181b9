// The machine's side of the CUDA part, where no kernel is involved: it must answer on a machine without a driver.
#include "runtime.h"

#include <cuda_runtime_api.h>

namespace latentforge::cuda {

DeviceCount device_count() {
  DeviceCount found;
  // Without a driver the count is left as it was.
  const cudaError_t error = cudaGetDeviceCount(&found.count);
  found.error = static_cast<int>(error);
  if (error != cudaSuccess) {
    found.count = 0;
    found.trouble = cudaGetErrorString(error);
    (void)cudaGetLastError();
  }
  return found;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace latentforge::cuda
