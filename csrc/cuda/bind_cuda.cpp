// Python's door to the CUDA part: addresses, sizes, strides and a stream in, nothing out but errors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../bindings.h"
#ifdef LATENTFORGE_WITH_CUDA
#include "cuda_report.h"
#include "runtime.h"
#endif

namespace py = pybind11;
using latentforge::at;

#ifdef LATENTFORGE_WITH_CUDA

namespace cuda = latentforge::cuda;
using cuda::KdCall;

void latentforge::bind_cuda(py::module_& m) {
  m.def(
      "cuda_info",
      [] {
        py::dict info;
        info["nvcc"] = LATENTFORGE_NVCC;
        info["architectures"] = LATENTFORGE_CUDA_ARCHITECTURES;
        info["runtime"] = cuda::runtime_version();
        info["driver"] = cuda::driver_version();
        const auto devices = cuda::device_count();
        info["devices"] = devices.count;
        info["error"] = devices.error;
        info["trouble"] = devices.trouble;
        return info;
      },
      "Compiler, architectures with machine code, versions, usable devices; None in a build without CUDA.");
  m.def(
      "cuda_resources", [] { return std::string(kResourceReport); },
      "What the assembler reported of each kernel for each architecture.");

  py::class_<KdCall>(m, "CudaKdCall")
      .def(py::init<>())
      .def_readwrite("rows", &KdCall::rows)
      .def_readwrite("vocab", &KdCall::vocab)
      .def_readwrite("ignore_index", &KdCall::ignore_index)
      .def_readwrite("temperature", &KdCall::temperature)
      .def_readwrite("teacher_temperature", &KdCall::teacher_temperature)
      .def_readwrite("ce_scale", &KdCall::ce_scale)
      .def_readwrite("kd_scale", &KdCall::kd_scale)
      .def_readwrite("logit_scale", &KdCall::logit_scale)
      .def_readwrite("soft_cap", &KdCall::soft_cap)
      .def_readwrite("reverse", &KdCall::reverse)
      .def_readwrite("write_gradient", &KdCall::write_gradient)
      .def("student",
           [](KdCall& c, uintptr_t a, int64_t stride, bool bf16) { c.student = {at<void>(a), stride, bf16}; })
      .def("teacher",
           [](KdCall& c, uintptr_t a, int64_t stride, bool bf16) { c.teacher = {at<void>(a), stride, bf16}; })
      .def("topk",
           [](KdCall& c, uintptr_t ids, bool ids_are_64_bit, uintptr_t logprobs, uintptr_t tail, int64_t k) {
             c.topk_ids = at<const void>(ids);
             c.ids_are_64_bit = ids_are_64_bit;
             c.topk_logprobs = at<const float>(logprobs);
             c.topk_tail = at<const float>(tail);
             c.k = k;
           })
      .def("labels", [](KdCall& c, uintptr_t labels) { c.labels = at<const int64_t>(labels); })
      .def("bias", [](KdCall& c, uintptr_t bias) { c.bias = at<const float>(bias); })
      .def("results",
           [](KdCall& c, uintptr_t ce, uintptr_t kd) {
             c.ce_rows = at<float>(ce);
             c.kd_rows = at<float>(kd);
           })
      .def("workspace", [](KdCall& c, uintptr_t workspace) { c.workspace = at<float>(workspace); })
      .def("workspace_bytes", [](const KdCall& c) { return cuda::kd_workspace_bytes(c); });
  m.def(
      "cuda_kd_rows",
      [](const KdCall& call, int device, uintptr_t stream) {
        py::gil_scoped_release release;
        cuda::kd_rows(call, device, stream);
      },
      py::arg("call"), py::arg("device"), py::arg("stream"), "Puts the work on the stream and returns.");
}

#else

void latentforge::bind_cuda(py::module_& m) {
  m.def("cuda_info", [] { return py::none(); });
}

#endif
