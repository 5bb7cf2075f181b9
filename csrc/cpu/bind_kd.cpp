// Python's door to the KD loss of the host: addresses, sizes and strides in,
// numbers out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "../bindings.h"
#include "kd.h"

namespace py = pybind11;
using latentforge::at;
using latentforge::Dtype;
using latentforge::KdCall;

namespace {

latentforge::Logits logits(uintptr_t address, int64_t row_stride, int64_t column_stride, bool bf16) {
  return {at<void>(address), row_stride, column_stride, bf16 ? Dtype::bf16 : Dtype::f32};
}

latentforge::Direction direction(const std::string& name) {
  if (name == "forward") return latentforge::Direction::forward;
  if (name == "reverse") return latentforge::Direction::reverse;
  if (name == "jsd") return latentforge::Direction::jsd;
  throw std::invalid_argument("direction '" + name + "'");
}

}  // namespace

void latentforge::bind_cpu_kd(py::module_& m) {
  m.def("cpu_variants", &latentforge::cpu_variants);

  py::class_<KdCall>(m, "KdCall")
      .def(py::init<>())
      .def_readwrite("rows", &KdCall::rows)
      .def_readwrite("vocab", &KdCall::vocab)
      .def_readwrite("k", &KdCall::k)
      .def_readwrite("ignore_index", &KdCall::ignore_index)
      .def_readwrite("temperature", &KdCall::temperature)
      .def_readwrite("teacher_temperature", &KdCall::teacher_temperature)
      .def_readwrite("ce_scale", &KdCall::ce_scale)
      .def_readwrite("kd_scale", &KdCall::kd_scale)
      .def_readwrite("beta", &KdCall::beta)
      .def_readwrite("logit_scale", &KdCall::logit_scale)
      .def_readwrite("soft_cap", &KdCall::soft_cap)
      .def("direction", [](KdCall& c, const std::string& name) { c.direction = direction(name); })
      .def("bias", [](KdCall& c, uintptr_t bias) { c.bias = at<const float>(bias); })
      .def("student", [](KdCall& c, uintptr_t a, int64_t row, int64_t column,
                         bool bf16) { c.student = logits(a, row, column, bf16); })
      .def("teacher", [](KdCall& c, uintptr_t a, int64_t row, int64_t column,
                         bool bf16) { c.teacher = logits(a, row, column, bf16); })
      .def("gradient", [](KdCall& c, uintptr_t a, int64_t row, int64_t column,
                          bool bf16) { c.gradient = logits(a, row, column, bf16); })
      .def("topk",
           [](KdCall& c, uintptr_t ids, uintptr_t logprobs, uintptr_t tail, int64_t k) {
             c.topk_ids = at<const int64_t>(ids);
             c.topk_logprobs = at<const float>(logprobs);
             c.topk_tail = at<const float>(tail);
             c.k = k;
           })
      .def("labels", [](KdCall& c, uintptr_t labels) { c.labels = at<const int64_t>(labels); })
      .def("results", [](KdCall& c, uintptr_t ce, uintptr_t kd) {
        c.ce_rows = at<double>(ce);
        c.kd_rows = at<double>(kd);
      });

  m.def(
      "check_indices",
      [](const KdCall& call) {
        const auto bad = latentforge::check_indices(call);
        return py::make_tuple(bad.kind, bad.row, bad.value);
      },
      "(kind, row, value) of the first index that is out of range or given "
      "twice; kind is '' where all are right.");
  m.def(
      "run_rows",
      [](const KdCall& call, const std::string& variant, int threads) {
        py::gil_scoped_release release;
        latentforge::run_rows(call, variant, threads);
      },
      py::arg("call"), py::arg("variant"), py::arg("threads"));
}
