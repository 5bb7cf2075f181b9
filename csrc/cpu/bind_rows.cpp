// Python's door to the rows of stored targets.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "../bindings.h"
#include "rows.h"

namespace py = pybind11;

namespace {

// The bytes of a Python object for as long as this lives; to be made and ended with the interpreter's lock held.
class Bytes {
 public:
  explicit Bytes(py::handle object, int flags = PyBUF_SIMPLE) {
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  template <class T = const uint8_t>
  T* data() const {
    return static_cast<T*>(view_.buf);
  }
  int64_t size() const { return view_.len; }

 private:
  Py_buffer view_;
};

// What all rows of a store share, kept between them.
class Scale {
 public:
  Scale(py::handle table, double beyond_a, double beyond_b, double first_step, std::vector<double> ceilings,
        double tail_step)
      : beyond_a_(beyond_a),
        beyond_b_(beyond_b),
        first_step_(first_step),
        ceilings_(std::move(ceilings)),
        tail_step_(tail_step) {
    const Bytes given(table);
    const auto* begin = given.data<const float>();
    table_.assign(begin, begin + given.size() / static_cast<int64_t>(sizeof(float)));
  }
  int64_t temperatures() const { return static_cast<int64_t>(ceilings_.size()); }
  latentforge::RowScale seen() const {
    return {table_.data(), static_cast<int64_t>(table_.size()), beyond_a_, beyond_b_, first_step_, ceilings_.data(),
            tail_step_};
  }

 private:
  std::vector<float> table_;
  double beyond_a_, beyond_b_, first_step_;
  std::vector<double> ceilings_;
  double tail_step_;
};

bool unpack_into(const Scale& scale, py::handle scalars, py::handle gaps, py::handle places, py::handle falls,
                 py::handle bits, int64_t positions, int64_t k, bool mixed, py::handle out) {
  const Bytes s(scalars), g(gaps), p(places), f(falls), b(bits), memory(out, PyBUF_WRITABLE);
  const int64_t cells = positions * k;
  if (memory.size() != 4 * (2 * cells + scale.temperatures() * positions))
    throw std::invalid_argument("the memory for a row is not of its size");
  const latentforge::RowBody body{s.data(),
                                  s.size(),
                                  g.data(),
                                  g.size(),
                                  p.data(),
                                  p.size(),
                                  f.data(),
                                  f.size(),
                                  b.data(),
                                  b.size(),
                                  positions,
                                  k,
                                  scale.temperatures(),
                                  mixed};
  auto* ids = memory.data<int32_t>();
  auto* numbers = memory.data<float>();
  const py::gil_scoped_release others_run;
  return latentforge::unpack_row(body, scale.seen(), ids, numbers + cells, numbers + 2 * cells);
}

}  // namespace

void latentforge::bind_cpu_rows(py::module_& m) {
  py::class_<Scale>(m, "RowScale", "How the levels of rows become numbers.")
      .def(py::init<py::handle, double, double, double, std::vector<double>, double>());
  m.def("unpack_row", &unpack_into,
        "Into out (ids, log-probabilities, tails, four bytes each): one stored row; False where its body contradicts "
        "itself.");
}
