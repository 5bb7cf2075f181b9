// latentforge._native: tensors stay on the Python side, addresses come in.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
#include "source_digest.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels of LatentForge; call them through latentforge.kernels.";
  m.def("source_digest", [] { return std::string(LATENTFORGE_SOURCE_DIGEST); });
  m.def("compiler", [] { return std::string(LATENTFORGE_COMPILER); });
  latentforge::bind_cpu_kd(m);
  latentforge::bind_cpu_decode(m);
  latentforge::bind_cpu_streams(m);
  latentforge::bind_cpu_rows(m);
  latentforge::bind_cuda(m);
}
