// The operators for CPU tensors: the host of the walks, with torch's threads and torch's BLAS.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "histogram.h"
#include "tile_walk.h"

#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define TCM_CHECK STABLE_TORCH_ERROR_CODE_CHECK
#else  // torch 2.11
#define TCM_CHECK TORCH_ERROR_CODE_CHECK
#endif

// PyTorch's door to oneDNN's matrix kernels: s (+)= a b with operands as they lie, nothing packed. Not part of the stable
// ABI, so it is null where a torch lacks it.
namespace at::native::cpublas {
__attribute__((weak, visibility("default"))) void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                                         int64_t ldc, bool add, const float* a, const float* b,
                                                         float* c, bool vnni);
}

namespace tcm::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class real>
constexpr ScalarType kDtype = std::is_same_v<real, float> ? ScalarType::Float : ScalarType::Double;

// A view of memory that somebody else owns, as the shim wants it.
template <class real>
class View {
 public:
  View(const real* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    TCM_CHECK(aoti_torch_create_tensor_from_blob(
        const_cast<real*>(data), 2, sizes, strides, 0,
        std::is_same_v<real, float> ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64(),
        aoti_torch_device_type_cpu(), 0, &handle));
  }
  View(const View&) = delete;
  ~View() { aoti_torch_delete_tensor_object(handle); }
  AtenTensorHandle handle = nullptr;
};

template <class real>
void product(const real* a, int64_t m, const real* b, int64_t n, int64_t d, int64_t b_stride, real* s, int64_t stride) {
  View<real> out(s, m, n, stride, 1), left(a, m, d, d, 1), right(b, d, n, 1, b_stride);
  TCM_CHECK(aoti_torch_cpu_mm_out(out.handle, left.handle, right.handle));
}

// In steps of 256 columns: the operands of a step stay in cache, and its partial sums are shorter, so rounded less.
void transposed_product(const float* a, int64_t m, const float* b, int64_t n, int64_t d, int64_t b_stride, float* s,
                        int64_t stride) {
  for (int64_t k = 0; k < d; k += 256)
    at::native::cpublas::brgemm(m, n, std::min<int64_t>(256, d - k), d, b_stride, stride, k > 0, a + k, b + k * b_stride,
                                s, false);
}

template <class real>
void add_product(const real* a, int64_t m, int64_t n, const real* b, int64_t d, real* c) {
  View<real> out(c, m, d, d, 1), left(a, m, n, n, 1), right(b, n, d, d, 1);
  TCM_CHECK(aoti_torch_cpu_addmm_out(out.handle, out.handle, left.handle, right.handle, 1, 1));
}

void add_brgemm(const float* a, int64_t m, int64_t n, const float* b, int64_t d, float* c) {
  for (int64_t k = 0; k < d; k += 256)  // so that the operands of a step stay in cache
    at::native::cpublas::brgemm(m, std::min<int64_t>(256, d - k), n, n, d, d, true, a, b + k, c + k, false);
}

constexpr int64_t kWorthThreads = 1 << 19;  // multiplications; below, starting threads costs more than they save

void parallel_for(int64_t size, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, size, 1, body);
}

template <class real>
Host<real> host(int threads) {
  Host<real> host{.threads = threads, .parallel_for = parallel_for, .product = product<real>, .add_product = add_product<real>};
  if constexpr (std::is_same_v<real, float>)
    if (at::native::cpublas::brgemm)
      host.product = transposed_product, host.transposed = true, host.add_product = add_brgemm;
  return host;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class real>
Results run(const Tensor& x, const Tensor& y, const std::optional<Tensor>& ref_x, const std::optional<Tensor>& ref_y,
            int64_t row_offset, const double (&margin)[2], const double (&lambda)[2], bool squared, bool per_side,
            bool grad_x, bool grad_ref) {
  int64_t n = x.size(0), d = x.size(1), m = ref_x ? ref_x->size(0) : n;
  auto gradient = [&](bool wanted, int64_t rows) {
    if (!wanted) return torch::stable::new_empty(x, {0});
    return per_side ? torch::stable::new_empty(x, {2, rows, d}) : torch::stable::new_empty(x, {rows, d});
  };
  Tensor loss = torch::stable::new_empty(x, {}), dx = gradient(grad_x, n), dref = gradient(grad_ref, m);
  Tensor penalty = torch::stable::new_empty(x, {2}, ScalarType::Double);
  Tensor count = torch::stable::new_empty(x, {2}, ScalarType::Long);
  Problem<real> problem{
      .symmetric = !ref_x, .n = n, .m = m, .d = d,
      .x = x.const_data_ptr<real>(), .y = y.const_data_ptr<int64_t>(),
      .ref_x = ref_x ? ref_x->const_data_ptr<real>() : nullptr,
      .ref_y = ref_y ? ref_y->const_data_ptr<int64_t>() : nullptr,
      .row_offset = row_offset,
      .margin = {margin[kPlus], margin[kMinus]},
      .lambda = {lambda[kPlus], lambda[kMinus]},
      .squared = squared,
  };
  Result<real> result{
      .per_side = per_side,
      .loss = loss.mutable_data_ptr<real>(),
      .grad_x = grad_x ? dx.mutable_data_ptr<real>() : nullptr,
      .grad_ref = grad_ref ? dref.mutable_data_ptr<real>() : nullptr,
      .penalty = penalty.mutable_data_ptr<double>(),
      .count = count.mutable_data_ptr<int64_t>(),
  };
  int threads = n * m * d < kWorthThreads ? 1 : static_cast<int>(torch::stable::get_num_threads());
  tcm_loss<real>(problem, result, host<real>(threads), best_isa());
  return {loss, dx, dref, penalty, count};
}

// What is wrong here would be read out of bounds in the kernel.
void check_set(const Tensor& x, const Tensor& y, const Tensor& like) {
  bool floating = false;
  for (ScalarType type : {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float, ScalarType::Double})
    floating |= x.scalar_type() == type;
  STD_TORCH_CHECK(floating && x.scalar_type() == like.scalar_type(),
                  "tcm_fused::fused: embeddings must be float16, bfloat16, float32 or float64, and of one dtype");
  STD_TORCH_CHECK(y.scalar_type() == ScalarType::Long, "tcm_fused::fused: labels must be int64");
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 1 && x.size(0) == y.size(0) && x.size(1) == like.size(1),
                  "tcm_fused::fused: embeddings must be [N, D] and [M, D], labels [N] and [M]");
}

Results fused(const Tensor& x, const Tensor& y, std::optional<Tensor> ref_x, std::optional<Tensor> ref_y,
              std::optional<int64_t> row_offset, double margin_plus, double margin_minus, double lambda_plus,
              double lambda_minus, bool squared, bool /* fp16: there is nothing less than fp32 here */,
              bool per_side, bool grad_x, bool grad_ref) {
  STD_TORCH_CHECK(ref_x.has_value() == ref_y.has_value(), "tcm_fused::fused: give both ref_x and ref_y, or neither");
  check_set(x, y, x);
  if (ref_x) check_set(*ref_x, *ref_y, x);
  int64_t last = ref_x ? ref_x->size(0) - x.size(0) : 0;
  STD_TORCH_CHECK(!row_offset || (0 <= *row_offset && *row_offset <= last),
                  "tcm_fused::fused: row_offset must put every row among the columns");
  ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  auto embeddings = [dtype](const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, dtype)); };
  if (ref_x) ref_x = embeddings(*ref_x), ref_y = torch::stable::contiguous(*ref_y);
  auto f = dtype == ScalarType::Float ? run<float> : run<double>;
  return f(embeddings(x), torch::stable::contiguous(y), ref_x, ref_y, row_offset.value_or(-1),
           {margin_plus, margin_minus}, {lambda_plus, lambda_minus}, squared, per_side, grad_x, grad_ref && ref_x);
}

template <class real>
std::tuple<Tensor, Tensor, Tensor> count(const Tensor& x, const Tensor& y, int64_t classes, const Tensor& threshold,
                                         int64_t bits, const std::optional<Tensor>& progress) {
  int64_t n = x.size(0), d = x.size(1), bins = (int64_t{2} << bits) + 1, thresholds = threshold.size(0);
  Tensor counts = torch::stable::new_empty(x, {2, bins}, ScalarType::Long);
  Tensor class_counts = torch::stable::new_empty(x, {2, classes + 1, thresholds}, ScalarType::Long);
  Tensor best = torch::stable::new_empty(x, {2, n});
  int64_t *all = counts.mutable_data_ptr<int64_t>(), *by_class = class_counts.mutable_data_ptr<int64_t>();
  real* nearest = best.mutable_data_ptr<real>();
  PairCountProblem<real> problem{
      .n = n, .d = d, .classes = classes, .thresholds = thresholds,
      .x = x.const_data_ptr<real>(), .y = y.const_data_ptr<int64_t>(), .threshold = threshold.const_data_ptr<real>(),
      .bits = static_cast<int>(bits),
  };
  PairCounts<real> result{
      .count = {all, all + bins},
      .class_count = {by_class, by_class + (classes + 1) * thresholds},
      .best = {nearest, nearest + n},
      .progress = progress ? progress->mutable_data_ptr<int64_t>() : nullptr,
  };
  int threads = n * n * d < kWorthThreads ? 1 : static_cast<int>(torch::stable::get_num_threads());
  count_pairs<real>(problem, result, host<real>(threads), best_isa());
  return {counts, class_counts, best};
}

std::tuple<Tensor, Tensor, Tensor> pair_counts(const Tensor& x, const Tensor& y, int64_t classes, const Tensor& threshold,
                                               int64_t bits, std::optional<Tensor> progress) {
  bool is_float = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(is_float || x.scalar_type() == ScalarType::Double,
                  "tcm_fused::pair_counts: embeddings must be float32 or float64");
  STD_TORCH_CHECK(threshold.scalar_type() == x.scalar_type() && threshold.dim() == 1,
                  "tcm_fused::pair_counts: thresholds must be [T] in the dtype of the embeddings");
  STD_TORCH_CHECK(y.scalar_type() == ScalarType::Long, "tcm_fused::pair_counts: classes must be int64");
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 1 && x.size(0) == y.size(0),
                  "tcm_fused::pair_counts: embeddings must be [N, D] and classes [N]");
  STD_TORCH_CHECK(0 <= bits && bits <= 20 && classes >= 0,
                  "tcm_fused::pair_counts: bits must be from 0 to 20, the number of classes 0 or more");
  STD_TORCH_CHECK(!progress || (progress->scalar_type() == ScalarType::Long && progress->numel() == 2 && progress->is_contiguous()),
                  "tcm_fused::pair_counts: progress must be two int64");
  auto f = is_float ? count<float> : count<double>;
  return f(torch::stable::contiguous(x), torch::stable::contiguous(y), classes, torch::stable::contiguous(threshold), bits,
           progress);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcm_fused, CPU, library) {
  library.impl("fused", TORCH_BOX(&fused));
  library.impl("pair_counts", TORCH_BOX(&pair_counts));
}

}  // namespace tcm::cpu
