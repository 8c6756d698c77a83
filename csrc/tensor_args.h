// Tensors in and tensors out of the operators, on every device: arguments are checked here, since the kernels trust
// them and would read out of bounds, and results are allocated.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <exception>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "memory.h"
#include "problem.h"

#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define TCM_CHECK STABLE_TORCH_ERROR_CODE_CHECK
#else  // torch 2.11
#define TCM_CHECK TORCH_ERROR_CODE_CHECK
#endif

// Of torch's C interface from 2.13 on; null before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace tcm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "[3, 2] Float on cpu", for errors.
inline std::string describe(const Tensor& t) {
  std::string text = "[";
  for (int64_t k = 0; k < t.dim(); ++k) text += (k > 0 ? ", " : "") + std::to_string(t.size(k));
  text += std::string("] ") + torch::headeronly::toString(t.scalar_type());
  return text + (t.is_cpu() ? " on cpu" : t.is_cuda() ? " on cuda:" + std::to_string(t.get_device_index()) : "");
}

inline bool on_device_of(const Tensor& x, const Tensor& t) {
  return t.is_cpu() == x.is_cpu() && t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index();
}

// make(), a new tensor on the device of `like`. If there is no memory, it is said so, which the stable ABI does not.
template <class Make>
Tensor allocate(const Tensor& like, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    bool knows = &torch_exception_get_what_without_backtrace != nullptr;
    std::string reason = knows ? torch_exception_get_what_without_backtrace() : "CUDA out of memory, it seems";
    if (like.is_cpu()) throw OutOfMemory("a tensor cannot be allocated beside embeddings " + describe(like));
    STD_TORCH_CHECK(false, "tcm_fused: a tensor cannot be allocated beside embeddings ", describe(like), ": ", reason);
  }
}

// torch::stable::new_empty, and below to and contiguous, look an operator up by its name and box its arguments: five and
// four of them took longer than the kernel for a small batch. So this calls the function itself, and those are called
// only where there is something to do.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  int64_t strides[3] = {1, 1, 1};
  for (int k = static_cast<int>(shape.size()) - 2; k >= 0; --k)
    strides[k] = strides[k + 1] * std::max<int64_t>(shape.begin()[k + 1], 1);
  return allocate(like, [&] {
    int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device = 0;
    TCM_CHECK(aoti_torch_get_device_type(like.get(), &device));
    AtenTensorHandle made = nullptr;
    TCM_CHECK(
        aoti_torch_empty_strided(shape.size(), shape.begin(), strides, type, device, like.get_device_index(), &made));
    return Tensor(made);
  });
}

inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous()) return t;
  return allocate(t, [&] { return torch::stable::contiguous(t); });
}
inline Tensor dense(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return dense(t);
  return allocate(t, [&] { return torch::stable::contiguous(torch::stable::to(t, dtype)); });
}

// The arguments of `loss` and of `penalties`, which has no weights.
struct LossArguments {
  const char* name;  // of the operator
  Tensor x, y;
  std::optional<Tensor> ref_x, ref_y;
  std::optional<int64_t> row_offset;
  Tensor margins;
  std::optional<Tensor> weights;
  bool squared, fp16, grad_x, grad_ref;

  void check() const {
    STD_TORCH_CHECK(ref_x.has_value() == ref_y.has_value(), name, ": give both ref_x and ref_y, or neither");
    check_rows("x", x, "y", y);
    if (ref_x) check_rows("ref_x", *ref_x, "ref_y", *ref_y);
    int64_t last = ref_x ? ref_x->size(0) - x.size(0) : 0;
    STD_TORCH_CHECK(!row_offset || (0 <= *row_offset && *row_offset <= last), name, ": row_offset is ",
                    row_offset.value_or(0), ", with which rows are not among the columns; it must be from 0 to ", last);
    sides("margins", margins);
    if (weights) sides("weights", *weights);
  }

  // The kernel's arguments, of contiguous tensors.
  template <class element>
  Problem<element> problem() const {
    auto data = [](const Tensor& t) { return static_cast<const element*>(t.const_data_ptr()); };
    return {
        .symmetric = !ref_x,
        .n = x.size(0),
        .m = ref_x ? ref_x->size(0) : x.size(0),
        .d = x.size(1),
        .x = data(x),
        .y = y.const_data_ptr<int64_t>(),
        .ref_x = ref_x ? data(*ref_x) : nullptr,
        .ref_y = ref_y ? ref_y->const_data_ptr<int64_t>() : nullptr,
        .row_offset = row_offset.value_or(-1),
        .margin = sides("margins", margins),
        .weight = weights ? sides("weights", *weights) : Sides{},
        .squared = squared,
        .fp16 = fp16,
    };
  }

 private:
  void check_rows(const char* x_name, const Tensor& rows, const char* y_name, const Tensor& labels) const {
    bool floating = false;
    for (ScalarType type : {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float, ScalarType::Double})
      floating |= rows.scalar_type() == type;
    STD_TORCH_CHECK(rows.dim() == 2 && floating, name, ": embeddings must be [N, D] of a floating dtype; ", x_name,
                    " is ", describe(rows));
    STD_TORCH_CHECK(rows.scalar_type() == x.scalar_type() && rows.size(1) == x.size(1) && on_device_of(x, rows), name,
                    ": embeddings must be of one dtype, one width and on one device; x is ", describe(x), ", ", x_name,
                    " is ", describe(rows));
    STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == rows.size(0) &&
                        on_device_of(x, labels),
                    name, ": labels must be int64, one for each of the embeddings and on their device; ", x_name,
                    " is ", describe(rows), ", ", y_name, " is ", describe(labels));
  }

  // Numbers on the CPU are read now; those on the device of x by the kernels, when their turn comes.
  Sides sides(const char* argument, const Tensor& t) const {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.dim() == 1 && t.size(0) == 2 && t.is_contiguous() &&
                        (t.is_cpu() || on_device_of(x, t)),
                    name, ": ", argument, " must be two contiguous float64 numbers, for positives and for negatives, ",
                    "on the CPU or on the device of x (", describe(x), "); they are ", describe(t),
                    t.is_contiguous() ? "" : ", not contiguous");
    const double* data = t.const_data_ptr<double>();
    if (t.is_cpu()) return {.value = {data[kPlus], data[kMinus]}};
    return {.device = data};
  }
};

// The results of both, on the device of x.
struct LossTensors {
  std::optional<Tensor> loss;
  Tensor grad_x, grad_ref, penalty, count;

  LossTensors(const LossArguments& a, ScalarType real)
      : grad_x(gradient(a, a.grad_x ? &a.x : nullptr, real)),
        grad_ref(gradient(a, a.grad_ref && a.ref_x ? &*a.ref_x : nullptr, real)),
        penalty(empty(a.x, {2}, ScalarType::Double)),
        count(empty(a.x, {2}, ScalarType::Long)) {
    if (a.weights) loss = empty(a.x, {}, real);
  }

  template <class real>
  Result<real> result(const LossArguments& a) {
    return {
        .loss = loss ? loss->mutable_data_ptr<real>() : nullptr,
        .grad_x = a.grad_x ? grad_x.mutable_data_ptr<real>() : nullptr,
        .grad_ref = a.grad_ref && a.ref_x ? grad_ref.mutable_data_ptr<real>() : nullptr,
        .penalty = penalty.mutable_data_ptr<double>(),
        .count = count.mutable_data_ptr<int64_t>(),
    };
  }

 private:
  static Tensor gradient(const LossArguments& a, const Tensor* of, ScalarType real) {
    if (of == nullptr) return empty(a.x, {0}, real);
    if (a.weights) return empty(a.x, {of->size(0), of->size(1)}, real);
    return empty(a.x, {2, of->size(0), of->size(1)}, real);
  }
};

// The operators `loss` and `penalties` of a device, whose `run` takes checked arguments and returns LossTensors.
template <LossTensors (*run)(LossArguments&)>
struct LossOperators {
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss(const Tensor& x, const Tensor& y,
                                                                 std::optional<Tensor> ref_x,
                                                                 std::optional<Tensor> ref_y,
                                                                 std::optional<int64_t> row_offset,
                                                                 const Tensor& margins, const Tensor& weights,
                                                                 bool squared, bool fp16, bool grad_x, bool grad_ref) {
    LossArguments arguments{"tcm_fused::loss", x,       y,       ref_x, ref_y,  row_offset,
                            margins,           weights, squared, fp16,  grad_x, grad_ref};
    arguments.check();
    LossTensors out = run(arguments);
    return {*out.loss, out.grad_x, out.grad_ref, out.penalty, out.count};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> penalties(const Tensor& x, const Tensor& y,
                                                              std::optional<Tensor> ref_x, std::optional<Tensor> ref_y,
                                                              std::optional<int64_t> row_offset, const Tensor& margins,
                                                              bool squared, bool fp16, bool grad_x, bool grad_ref) {
    LossArguments arguments{"tcm_fused::penalties", x,       y,    ref_x,  ref_y,   row_offset, margins,
                            std::nullopt,           squared, fp16, grad_x, grad_ref};
    arguments.check();
    LossTensors out = run(arguments);
    return {out.penalty, out.grad_x, out.grad_ref, out.count};
  }
};

// The arguments of `counts`.
struct CountArguments {
  static constexpr const char* kName = "tcm_fused::counts";
  Tensor x, y;
  std::optional<Tensor> ref_x, ref_y;
  int64_t classes;
  Tensor thresholds;
  int64_t bits;
  std::optional<Tensor> progress;

  void check() const {
    STD_TORCH_CHECK((x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double) && x.dim() == 2,
                    kName, ": embeddings must be [N, D], float32 or float64; they are ", describe(x));
    STD_TORCH_CHECK(ref_x.has_value() == ref_y.has_value(), kName, ": give both ref_x and ref_y, or neither");
    check_classes(x, y);
    if (ref_x) {
      STD_TORCH_CHECK(ref_x->dim() == 2 && ref_x->size(1) == x.size(1) && ref_x->scalar_type() == x.scalar_type() &&
                          on_device_of(x, *ref_x),
                      kName, ": embeddings must be of one dtype, one width and on one device; x is ", describe(x),
                      ", ref_x is ", describe(*ref_x));
      check_classes(*ref_x, *ref_y);
    }
    STD_TORCH_CHECK(thresholds.scalar_type() == x.scalar_type() && thresholds.dim() == 1 && on_device_of(x, thresholds),
                    kName, ": thresholds must be [T] in the dtype and on the device of the embeddings; they are ",
                    describe(thresholds), ", embeddings ", describe(x));
    STD_TORCH_CHECK(0 <= bits && bits <= 20 && classes >= 0, kName,
                    ": bits must be from 0 to 20, the number of classes 0 or more; they are ", bits, " and ", classes);
    STD_TORCH_CHECK(!progress || (progress->is_cpu() && progress->scalar_type() == ScalarType::Long &&
                                  progress->numel() == 2 && progress->is_contiguous()),
                    kName, ": progress must be two int64, contiguous and on the CPU");
  }

  void make_dense() {
    x = dense(x), y = dense(y), thresholds = dense(thresholds);
    if (ref_x) ref_x = dense(*ref_x), ref_y = dense(*ref_y);
  }

  // The kernel's arguments, of contiguous tensors.
  template <class real>
  CountProblem<real> problem() const {
    return {
        .symmetric = !ref_x,
        .n = x.size(0),
        .m = ref_x ? ref_x->size(0) : x.size(0),
        .d = x.size(1),
        .classes = classes,
        .thresholds = thresholds.size(0),
        .x = x.const_data_ptr<real>(),
        .y = y.const_data_ptr<int64_t>(),
        .ref_x = ref_x ? ref_x->const_data_ptr<real>() : nullptr,
        .ref_y = ref_y ? ref_y->const_data_ptr<int64_t>() : nullptr,
        .threshold = thresholds.const_data_ptr<real>(),
        .bits = static_cast<int>(bits),
    };
  }

 private:
  static void check_classes(const Tensor& rows, const Tensor& labels) {
    STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == rows.size(0) &&
                        on_device_of(rows, labels),
                    kName, ": classes must be int64, one for each of the embeddings and on their device; they are ",
                    describe(labels), ", embeddings ", describe(rows));
  }
};

// The results of `counts`, on the device of x.
struct CountTensors {
  Tensor count, class_count, best, ref_best;

  explicit CountTensors(const CountArguments& a)
      : count(empty(a.x, {2, (int64_t{2} << a.bits) + 1}, ScalarType::Long)),
        class_count(empty(a.x, {2, a.classes + 1, a.thresholds.size(0)}, ScalarType::Long)),
        best(empty(a.x, {2, a.x.size(0)}, a.x.scalar_type())),
        ref_best(empty(a.x, {2, a.ref_x ? a.ref_x->size(0) : 0}, a.x.scalar_type())) {}

  template <class real>
  CountResult<real> result(const CountArguments& a) {
    int64_t *all = count.mutable_data_ptr<int64_t>(), *by_class = class_count.mutable_data_ptr<int64_t>();
    real *nearest = best.mutable_data_ptr<real>(), *ref_nearest = ref_best.mutable_data_ptr<real>();
    return {
        .count = {all, all + count.size(1)},
        .class_count = {by_class, by_class + class_count.size(1) * class_count.size(2)},
        .best = {nearest, nearest + best.size(1)},
        .ref_best = {ref_nearest, ref_nearest + ref_best.size(1)},
        .progress = a.progress ? a.progress->mutable_data_ptr<int64_t>() : nullptr,
    };
  }
};

// The operator `counts` of a device, whose `run` takes checked arguments.
template <CountTensors (*run)(CountArguments&)>
std::tuple<Tensor, Tensor, Tensor, Tensor> count_operator(const Tensor& x, const Tensor& y, std::optional<Tensor> ref_x,
                                                          std::optional<Tensor> ref_y, int64_t classes,
                                                          const Tensor& thresholds, int64_t bits,
                                                          std::optional<Tensor> progress) {
  CountArguments arguments{x, y, ref_x, ref_y, classes, thresholds, bits, progress};
  arguments.check();
  CountTensors out = run(arguments);
  return {out.count, out.class_count, out.best, out.ref_best};
}

}  // namespace tcm
