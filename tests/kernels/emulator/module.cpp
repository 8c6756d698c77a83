// The emulated kernels for Python: numpy in, numpy out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "call.h"

namespace py = pybind11;
using namespace tcm::cuda;

namespace {

using Labels = py::array_t<int64_t, py::array::c_style>;

Type type_of(const py::array& x) {
  if (x.dtype().kind() == 'u' && x.itemsize() == 2) return Type::kBFloat16;  // numpy has no such type: its bits
  if (x.dtype().kind() == 'f' && x.itemsize() == 2) return Type::kHalf;
  if (x.dtype().kind() == 'f' && x.itemsize() == 4) return Type::kFloat;
  throw py::type_error("embeddings are float16, float32, or bfloat16 as uint16");
}

py::object gradient(const std::vector<float>& values, int64_t n, const Problem& problem, bool wanted) {
  if (!wanted) return py::none();
  std::vector<int64_t> shape{n, problem.d};
  if (problem.per_side) shape.insert(shape.begin(), 2);
  py::array_t<float> out(shape);
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

py::tuple tcm_loss_emulated(const py::array& x, const Labels& y, const std::optional<py::array>& ref_x,
                            const std::optional<Labels>& ref_y, std::optional<int64_t> row_offset,
                            std::array<double, 2> margin, std::array<double, 2> lambda, bool fp16, bool per_side,
                            bool grad_x, bool grad_ref, int sm, int sm_count, int block, int64_t chunk, int64_t one_chunk,
                            const std::string& schedule, unsigned seed) {
  Problem problem{};
  problem.symmetric = !ref_x.has_value();
  problem.n = x.shape(0), problem.d = x.shape(1), problem.m = ref_x ? ref_x->shape(0) : x.shape(0);
  problem.type = type_of(x), problem.fp16 = fp16, problem.per_side = per_side;
  problem.x = x.data(), problem.y = y.data();
  problem.ref_x = ref_x ? ref_x->data() : nullptr, problem.ref_y = ref_y ? ref_y->data() : nullptr;
  problem.row_offset = row_offset.value_or(-1);
  for (int side = 0; side < 2; ++side) problem.margin[side] = margin[side], problem.lambda[side] = lambda[side];
  problem.sm = sm, problem.sm_count = sm_count;
  emulator::options = {emulator::schedule_of(schedule), seed};
  Tuning tuning;
  tuning.block = block, tuning.chunk = chunk, tuning.one_chunk = one_chunk;
  Outcome out = emulate(problem, grad_x, grad_ref, tuning);
  return py::make_tuple(out.loss, gradient(out.grad_x, problem.n, problem, grad_x),
                        gradient(out.grad_ref, problem.m, problem, grad_ref),
                        py::make_tuple(out.penalty[0], out.penalty[1]), py::make_tuple(out.count[0], out.count[1]));
}

}  // namespace

PYBIND11_MODULE(tcm_emulated, module) {
  module.def("tcm_loss", &tcm_loss_emulated, py::kw_only(), py::arg("x"), py::arg("y"), py::arg("ref_x"),
      py::arg("ref_y"),
             py::arg("row_offset"), py::arg("margin"), py::arg("lambda_"), py::arg("fp16"), py::arg("per_side"),
             py::arg("grad_x"), py::arg("grad_ref"), py::arg("sm") = 80, py::arg("sm_count") = 3, py::arg("block") = kBlock,
             py::arg("chunk") = kChunk, py::arg("one_chunk") = kOneChunk, py::arg("schedule") = "in order",
             py::arg("seed") = 0);
}
