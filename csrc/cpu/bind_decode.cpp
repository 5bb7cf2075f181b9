// Python's door to the decoding kernels of the host.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../bindings.h"
#include "../gumbel.h"
#include "decode.h"

namespace py = pybind11;
using latentforge::at;
using latentforge::DecodeCall;

void latentforge::bind_cpu_decode(py::module_& m) {
  m.def("decode_variants", &latentforge::decode_variants);

  py::class_<DecodeCall>(m, "DecodeCall")
      .def(py::init<>())
      .def_readwrite("rows", &DecodeCall::rows)
      .def_readwrite("width", &DecodeCall::width)
      .def_readwrite("vocab", &DecodeCall::vocab)
      .def_readwrite("logit_scale", &DecodeCall::logit_scale)
      .def_readwrite("soft_cap", &DecodeCall::soft_cap)
      .def_readwrite("temperature", &DecodeCall::temperature)
      .def_readwrite("top_k", &DecodeCall::top_k)
      .def_readwrite("top_p", &DecodeCall::top_p)
      .def("hidden",
           [](DecodeCall& c, uintptr_t a, int64_t stride, bool bf16) {
             c.hidden = at<const void>(a);
             c.hidden_stride = stride;
             c.hidden_bf16 = bf16;
           })
      .def("weight",
           [](DecodeCall& c, uintptr_t a, int64_t stride, bool bf16) {
             c.weight = at<const void>(a);
             c.weight_stride = stride;
             c.weight_kind = bf16 ? WeightKind::bf16 : WeightKind::f32;
           })
      .def("int8_weight",
           [](DecodeCall& c, uintptr_t a, int64_t stride, uintptr_t scales) {
             c.weight = at<const void>(a);
             c.weight_stride = stride;
             c.weight_kind = WeightKind::int8;
             c.scales = at<const float>(scales);
           })
      .def("bias",
           [](DecodeCall& c, uintptr_t a, bool bf16) {
             c.bias = at<const void>(a);
             c.bias_bf16 = bf16;
           })
      .def("keys",
           [](DecodeCall& c, uintptr_t seeds, uintptr_t positions) {
             c.seeds = at<const int64_t>(seeds);
             c.positions = at<const int64_t>(positions);
           })
      .def("results", [](DecodeCall& c, uintptr_t ids, uintptr_t logprobs) {
        c.ids = at<int64_t>(ids);
        c.logprobs = at<float>(logprobs);
      });
  m.def(
      "decode_rows",
      [](const DecodeCall& call, const std::string& variant, int threads) {
        py::gil_scoped_release release;
        latentforge::decode_rows(call, variant, threads);
      },
      py::arg("call"), py::arg("variant"), py::arg("threads"));

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
