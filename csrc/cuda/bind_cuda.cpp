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
using cuda::DecodeCall;
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

  m.def(
      "cuda_load",
      [](const std::string& op, int device) {
        if (op != "kd" && op != "decode") throw py::value_error("no kernels are called " + op);
        py::list loaded;
        for (const auto& kernel : op == "kd" ? cuda::load_kd(device) : cuda::load_decode(device)) {
          py::dict one;
          one["kernel"] = kernel.name;
          one["registers"] = kernel.registers;
          one["local_bytes"] = kernel.local_bytes;
          one["shared_bytes"] = kernel.shared_bytes;
          one["code"] = "sm_" + std::to_string(kernel.code);
          loaded.append(one);
        }
        return loaded;
      },
      py::arg("op"), py::arg("device"),
      "Loads every kernel of `kd` or `decode` without a launch, and says what it takes.");

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

  py::class_<DecodeCall>(m, "CudaDecodeCall")
      .def(py::init<>())
      .def_readwrite("rows", &DecodeCall::rows)
      .def_readwrite("width", &DecodeCall::width)
      .def_readwrite("vocab", &DecodeCall::vocab)
      .def_readwrite("temperature", &DecodeCall::temperature)
      .def_readwrite("logit_scale", &DecodeCall::logit_scale)
      .def_readwrite("soft_cap", &DecodeCall::soft_cap)
      .def_readwrite("top_k", &DecodeCall::top_k)
      .def_readwrite("top_p", &DecodeCall::top_p)
      .def("hidden",
           [](DecodeCall& c, uintptr_t a, int64_t stride) {
             c.hidden = at<const float>(a);
             c.hidden_stride = stride;
           })
      .def("weight",
           [](DecodeCall& c, uintptr_t a, int64_t stride, int type) {
             c.weight = at<const void>(a);
             c.weight_stride = stride;
             c.weight_type = static_cast<cuda::WeightType>(type);
           })
      .def("scales", [](DecodeCall& c, uintptr_t a) { c.scales = at<const float>(a); })
      .def("bias", [](DecodeCall& c, uintptr_t a) { c.bias = at<const float>(a); })
      .def("keys",
           [](DecodeCall& c, uintptr_t seeds, uintptr_t positions) {
             c.seeds = at<const int64_t>(seeds);
             c.positions = at<const int64_t>(positions);
           })
      .def("results",
           [](DecodeCall& c, uintptr_t ids, uintptr_t logprobs) {
             c.ids = at<int64_t>(ids);
             c.logprobs = at<float>(logprobs);
           })
      .def("workspace", [](DecodeCall& c, uintptr_t a) { c.workspace = at<void>(a); });
  m.def("cuda_decode_workspace_bytes", &cuda::decode_space);
  m.def(
      "cuda_decode",
      [](const DecodeCall& call, int device, uintptr_t stream) {
        py::gil_scoped_release release;
        cuda::decode_rows(call, device, stream);
      },
      py::arg("call"), py::arg("device"), py::arg("stream"), "Puts the work on the stream and returns.");
}

#else

void latentforge::bind_cuda(py::module_& m) {
  m.def("cuda_info", [] { return py::none(); });
}

#endif
