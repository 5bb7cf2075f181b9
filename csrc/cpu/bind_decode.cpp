// Python's door to the decoding kernels of the host.
#include <pybind11/pybind11.h>

#include <string>

#include "../bindings.h"
#include "../gumbel.h"
#include "decode.h"

namespace py = pybind11;
using latentforge::at;

void latentforge::bind_cpu_decode(py::module_& m) {
  m.def(
      "gumbel_noise",
      [](int64_t seed, int64_t position, int64_t first, int64_t count, uintptr_t out, const std::string& variant) {
        find_decode_kernels(variant).noise(seed, position, first, count, at<float>(out));
      },
      py::arg("seed"), py::arg("position"), py::arg("first"), py::arg("count"), py::arg("out"), py::arg("variant"),
      "Noise of ids [first, first + count) into fp32 memory, by a variant's vectors.");
  m.def("gumbel", &gumbel, py::arg("seed"), py::arg("position"), py::arg("id"), "Noise of one id, by scalars.");
  m.def("gumbel_of_word", [](uint32_t word) { return gumbel_of_word(word); }, py::arg("word"));
}
