// What each part of the extension adds to the module, and how an address
// becomes a pointer.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace latentforge {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

void bind_cpu_kd(pybind11::module_& m);
void bind_cpu_decode(pybind11::module_& m);
void bind_cpu_streams(pybind11::module_& m);
void bind_cpu_rows(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);  // cuda_info() alone where the build has no CUDA

}  // namespace latentforge
