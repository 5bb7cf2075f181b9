// Python's door to the rows of stored targets.
#include <pybind11/pybind11.h>

#include "../bindings.h"
#include "rows.h"

namespace py = pybind11;
using latentforge::at;

void latentforge::bind_cpu_rows(py::module_& m) {
  m.def(
      "unpack_row",
      [](uintptr_t scalars, int64_t n_scalars, uintptr_t gaps, int64_t n_gaps, uintptr_t places, int64_t n_places,
         uintptr_t falls, int64_t n_falls, uintptr_t bits, int64_t n_bits, int64_t positions, int64_t k, bool mixed,
         int64_t temperatures, uintptr_t table, int64_t n_table, double beyond_a, double beyond_b, double first_step,
         uintptr_t ceilings, double tail_step, uintptr_t ids, uintptr_t logprobs, uintptr_t tails) {
        const RowBody body{at<const uint8_t>(scalars),
                           n_scalars,
                           at<const uint8_t>(gaps),
                           n_gaps,
                           at<const uint8_t>(places),
                           n_places,
                           at<const uint8_t>(falls),
                           n_falls,
                           at<const uint8_t>(bits),
                           n_bits,
                           positions,
                           k,
                           temperatures,
                           mixed};
        const RowScale scale{at<const float>(table),     n_table,  beyond_a, beyond_b, first_step,
                             at<const double>(ceilings), tail_step};
        return unpack_row(body, scale, at<int32_t>(ids), at<float>(logprobs), at<float>(tails));
      },
      py::call_guard<py::gil_scoped_release>(),
      "Ids, log-probabilities and tails of one stored row; False where its body contradicts itself.");
}
