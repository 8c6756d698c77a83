// The emulated counting kernels for Python: numpy in, numpy out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "counts.h"

namespace py = pybind11;
using namespace tcm::cuda;

namespace {

template <class T>
py::array_t<T> shaped(const std::vector<T>& values, std::vector<int64_t> shape) {
  py::array_t<T> out(shape);
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

template <class T>
using Array = py::array_t<T, py::array::c_style>;

py::tuple pair_counts_emulated(const Array<float>& x, const Array<int64_t>& y, int64_t classes,
                               const Array<float>& thresholds, int bits, int sm, int sm_count, int shared_per_block,
                               int shared_per_sm, int window, int64_t chunk, int64_t one_chunk,
                               const std::string& schedule, unsigned seed) {
  PairCountProblem problem{};
  problem.n = x.shape(0), problem.d = x.shape(1);
  problem.classes = classes, problem.thresholds = thresholds.shape(0);
  problem.x = x.data(), problem.y = y.data(), problem.threshold = thresholds.data();
  problem.bits = bits, problem.sm = sm, problem.sm_count = sm_count;
  problem.shared_per_block = shared_per_block, problem.shared_per_sm = shared_per_sm;
  emulator::options = {emulator::schedule_of(schedule), seed};
  Tuning tuning;
  tuning.window = window, tuning.chunk = chunk, tuning.one_chunk = one_chunk;
  CountOutcome out = emulate_counts(problem, tuning);
  return py::make_tuple(shaped(out.count, {2, (int64_t{2} << bits) + 1}),
                        shaped(out.class_count, {2, classes + 1, problem.thresholds}),
                        shaped(out.best, {2, problem.n}));
}

}  // namespace

PYBIND11_MODULE(tcm_counts_emulated, module) {
  module.def("pair_counts", &pair_counts_emulated, py::kw_only(), py::arg("x"), py::arg("y"), py::arg("classes"),
             py::arg("thresholds"), py::arg("bits"), py::arg("sm") = 80, py::arg("sm_count") = 3,
             py::arg("shared_per_block") = 227 << 10, py::arg("shared_per_sm") = 228 << 10,
             py::arg("window") = INT32_MAX, py::arg("chunk") = kChunk, py::arg("one_chunk") = kOneChunk,
             py::arg("schedule") = "in order", py::arg("seed") = 0);
}
