// The operators for CPU tensors: the kernels' host, with torch's threads and torch's matrix products.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "../memory.h"
#include "../tensor_args.h"
#include "counts.h"
#include "loss.h"

// PyTorch's door to oneDNN's matrix kernels: s (+)= a b with operands as they lie, nothing packed. Not part of the stable
// ABI, so it is null where a torch lacks it.
namespace at::native::cpublas {
__attribute__((weak, visibility("default"))) void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                                         int64_t ldc, bool add, const float* a, const float* b,
                                                         float* c, bool vnni);
__attribute__((weak, visibility("default"))) void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                                         int64_t ldc, bool add, const unsigned char* a,
                                                         const signed char* b, int32_t* c, bool vnni);
__attribute__((weak, visibility("default"))) void brgemm_release(bool vnni);
}  // namespace at::native::cpublas

namespace tcm::cpu {

bool multiplies_codes();  // whether products of codes are to be had, which is tried out once

namespace {

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

// oneDNN generates code for each shape and thread at its first use, and writes through a null pointer if there is no
// memory for it. So that is asked for first, by one thread at a time.
template <class left, class right, class sum>
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const left* a,
            const right* b, sum* c) {
  constexpr size_t kCode = 4 << 20;
  static std::mutex mutex;
  static thread_local std::set<std::array<int64_t, 7>> generated;
  std::array<int64_t, 7> shape{m, n, k, lda, ldb, ldc, add};
  std::unique_lock<std::mutex> lock(mutex, std::defer_lock);
  bool is_new = !generated.contains(shape);
  if (is_new) lock.lock(), require_memory(kCode, "the code of a matrix product");
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, sizeof(right) == 1);
  if (is_new) generated.insert(shape);
}

// In steps of 256 columns: the operands of a step stay in cache, and its partial sums are shorter, so rounded less.
void transposed_product(const float* a, int64_t m, const float* b, int64_t n, int64_t d, int64_t b_stride, float* s,
                        int64_t stride) {
  for (int64_t k = 0; k < d; k += 256)
    brgemm(m, n, std::min<int64_t>(256, d - k), d, b_stride, stride, k > 0, a + k, b + k * b_stride, s);
}

template <class real>
void add_product(const real* a, int64_t m, int64_t n, const real* b, int64_t d, real* c) {
  View<real> out(c, m, d, d, 1), left(a, m, n, n, 1), right(b, n, d, d, 1);
  TCM_CHECK(aoti_torch_cpu_addmm_out(out.handle, out.handle, left.handle, right.handle, 1, 1));
}

void add_brgemm(const float* a, int64_t m, int64_t n, const float* b, int64_t d, float* c) {
  for (int64_t k = 0; k < d; k += 256)  // so that the operands of a step stay in cache
    brgemm(m, std::min<int64_t>(256, d - k), n, n, d, d, true, a, b + k, c + k);
}

// a [rows, columns], rows `stride` apart, in float64.
std::vector<double> widened(const float* a, int64_t rows, int64_t columns, int64_t stride) {
  std::vector<double> wide(rows * columns);
  for (int64_t i = 0; i < rows; ++i) std::copy_n(a + i * stride, columns, wide.data() + i * columns);
  return wide;
}

// Products in float64, which nothing lowers.
void wide_product(const float* a, int64_t m, const float* b, int64_t n, int64_t d, int64_t b_stride, float* s,
                  int64_t stride) {
  std::vector<double> left = widened(a, m, d, d), right = widened(b, n, d, b_stride), out(m * n);
  product(left.data(), m, right.data(), n, d, d, out.data(), n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) s[i * stride + j] = static_cast<float>(out[i * n + j]);
}

void wide_add_product(const float* a, int64_t m, int64_t n, const float* b, int64_t d, float* c) {
  std::vector<double> left = widened(a, m, n, n), right = widened(b, n, d, d), out = widened(c, m, d, d);
  add_product(left.data(), m, n, right.data(), d, out.data());
  for (int64_t k = 0; k < m * d; ++k) c[k] = static_cast<float>(out[k]);
}

void code_product(const uint8_t* a, int64_t m, const int8_t* b, int64_t n, int64_t k, int32_t* s, int64_t stride) {
  brgemm(m, n, k, k, n, stride, false, a, b, s);
}

// Whether this processor multiplies bytes, and rightly: oneDNN throws where it has no instruction for them.
bool try_code_product() {
  using Product = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const unsigned char*,
                           const signed char*, int32_t*, bool);
  if (!static_cast<Product>(at::native::cpublas::brgemm) || !at::native::cpublas::brgemm_release) return false;
  constexpr int kSize = 64;
  alignas(64) uint8_t a[kSize * kSize];
  alignas(64) int8_t b[kSize * kSize];
  alignas(64) int32_t s[kSize * kSize];
  for (int k = 0; k < kSize * kSize; ++k) {  // among them the largest, for instructions whose sums saturate
    a[k] = static_cast<uint8_t>(k % 5 ? 255 - k % 7 : k % 256);
    b[k] = static_cast<int8_t>(k % 3 ? k % 11 - 127 : k % 255 - 127);
  }
  try {
    code_product(a, kSize, b, kSize, kSize, s, kSize);
    at::native::cpublas::brgemm_release(true);
  } catch (const std::bad_alloc&) {
    throw;
  } catch (...) {
    return false;
  }
  for (int i = 0; i < kSize; ++i)
    for (int j = 0; j < kSize; ++j) {
      int32_t sum = 0;
      for (int k = 0; k < kSize; ++k) sum += a[i * kSize + k] * b[(k / 4 * kSize + j) * 4 + k % 4];
      if (s[i * kSize + j] != sum) return false;
    }
  return true;
}

// Products by oneDNN's kernels if this torch has them, else by aten::mm; in float64 if those were inexact.
// TCM_FUSED_PRODUCTS (mm, wide) leaves out the first of these, so that the others are tested where they are not needed;
// "codes" has every tile looked at in eight bits, "float" none.
void set_products(Host<float>& host) {
  const char* wish = std::getenv("TCM_FUSED_PRODUCTS");
  std::string products = wish ? wish : "";
  using Product =
      void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*, const float*, float*, bool);
  if (static_cast<Product>(at::native::cpublas::brgemm) && products != "mm" && products != "wide")
    host.product = transposed_product, host.transposed = true, host.add_product = add_brgemm;
  if (products == "wide" || !exact(host))
    host.product = wide_product, host.transposed = false, host.add_product = wide_add_product;
  if (!multiplies_codes() || !(products.empty() || products == "codes")) return;
  host.code_product = code_product, host.release_code_product = [] { at::native::cpublas::brgemm_release(true); };
  host.always_codes = products == "codes";
}
void set_products(Host<double>&) {}

constexpr int64_t kWorthThreads = 1 << 19;  // multiplications; below, starting threads costs more than they save

void parallel_for(int64_t size, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, size, 1, body);
}

template <class real>
Host<real> host(int64_t multiplications) {
  int threads = multiplications < kWorthThreads ? 1 : static_cast<int>(torch::stable::get_num_threads());
  if (threads > 1) require_threads(threads - 1);
  Host<real> host{
      .threads = threads,
      .parallel_for = parallel_for,
      .product = product<real>,
      .add_product = add_product<real>,
  };
  set_products(host);
  return host;
}

template <class real>
void run_loss(const LossArguments& arguments, LossTensors& out) {
  Problem<real> problem = arguments.problem<real>();
  loss<real>(problem, out.result<real>(arguments), host<real>(problem.n * problem.m * problem.d), best_isa());
}

LossTensors loss_operator(LossArguments& a) {
  bool is_double = a.x.scalar_type() == ScalarType::Double;
  ScalarType real = is_double ? ScalarType::Double : ScalarType::Float;  // 16-bit embeddings are computed in float32
  a.x = dense(a.x, real), a.y = dense(a.y);
  if (a.ref_x) a.ref_x = dense(*a.ref_x, real), a.ref_y = dense(*a.ref_y);
  LossTensors out(a, real);
  is_double ? run_loss<double>(a, out) : run_loss<float>(a, out);
  return out;
}

template <class real>
void run_counts(const CountArguments& arguments, CountTensors& out) {
  CountProblem<real> problem = arguments.problem<real>();
  counts<real>(problem, out.result<real>(arguments), host<real>(problem.n * problem.m * problem.d), best_isa());
}

CountTensors counts_operator(CountArguments& a) {
  a.make_dense();
  CountTensors out(a);
  a.x.scalar_type() == ScalarType::Double ? run_counts<double>(a, out) : run_counts<float>(a, out);
  return out;
}

}  // namespace

bool multiplies_codes() {
  static const bool right = try_code_product();
  return right;
}

STABLE_TORCH_LIBRARY_IMPL(tcm_fused, CPU, library) {
  library.impl("loss", TORCH_BOX(&LossOperators<loss_operator>::loss));
  library.impl("penalties", TORCH_BOX(&LossOperators<loss_operator>::penalties));
  library.impl("counts", TORCH_BOX(&count_operator<counts_operator>));
}

}  // namespace tcm::cpu
