// Python's door to the memory's streams.
#include <pybind11/pybind11.h>

#include "../bindings.h"
#include "streams.h"

namespace py = pybind11;
using latentforge::at;

void latentforge::bind_cpu_streams(py::module_& m) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  m.def(
      "stream_read",
      [](uintptr_t a, int64_t count, int threads) { return stream_read(at<const uint64_t>(a), count, threads); },
      py::arg("a"), py::arg("count"), py::arg("threads"), released, "Sum (modulo 2^64) of `count` 64-bit integers.");
  m.def(
      "stream_scale", [](uintptr_t a, int64_t count, int threads) { stream_scale(at<float>(a), count, threads); },
      py::arg("a"), py::arg("count"), py::arg("threads"), released, "a *= 2 over `count` fp32 numbers.");
  m.def(
      "stream_add",
      [](uintptr_t a, uintptr_t b, int64_t count, int threads) {
        stream_add(at<float>(a), at<const float>(b), count, threads);
      },
      py::arg("a"), py::arg("b"), py::arg("count"), py::arg("threads"), released, "a += b over `count` fp32 numbers.");
  m.def(
      "stream_copy",
      [](uintptr_t a, uintptr_t b, int64_t count, int threads) {
        stream_copy(at<float>(a), at<const float>(b), count, threads);
      },
      py::arg("a"), py::arg("b"), py::arg("count"), py::arg("threads"), released, "a = b over `count` fp32 numbers.");
}
