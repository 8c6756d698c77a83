// tcm_fused::fused and pair_counts for CUDA tensors: the host of the kernels, with torch's memory, device and stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "pair_counts.h"
#include "tcm_loss.h"

// Of torch's C interface, but only in a torch with CUDA: in another one it is null, and the extension loads.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace tcm::cuda {

// Why the CUDA runtime in here cannot start (a driver that is too old for it, say), or an empty string.
std::string runtime_error() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "tcm_fused: ", what, ": ", cudaGetErrorString(error));
}

struct Device {
  int sm;         // its compute capability: 80, 90, 100...
  int built_for;  // what the code that it runs was compiled for: the latest architecture not above `sm`; 0: none.
                  // TCM_FUSED_SM, an architecture, lowers it: so the paths for older GPUs are tested on a newer one.
  int sm_count;
  int shared_per_block, shared_per_sm;  // bytes of shared memory
};

Device look_up(int index) {
  auto read = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, index), "device attributes");
    return value;
  };
  Device device{};
  device.sm = 10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor);
  device.sm_count = read(cudaDevAttrMultiProcessorCount);
  device.shared_per_block = read(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.shared_per_sm = read(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const char* wish = std::getenv("TCM_FUSED_SM");
  std::istringstream names(TCM_CUDA_ARCHITECTURES);  // "sm_80 sm_90a compute_100"
  for (std::string name; names >> name;) {
    int built = std::atoi(name.c_str() + name.find('_') + 1);
    // PTX runs on all later devices, machine code on later minor versions, "sm_90a" on no other.
    bool ptx = name.rfind("compute_", 0) == 0, exact = name.back() == 'a', same_major = built / 10 == device.sm / 10;
    bool runs = exact ? built == device.sm : built <= device.sm && (ptx || same_major);
    if (runs) device.built_for = std::max(device.built_for, built);
  }
  if (wish != nullptr) device.built_for = std::min(device.built_for, std::atoi(wish));
  return device;
}

const Device& device_of(const Tensor& x) {
  static const std::vector<Device> all = [] {
    int count = 0;
    check(cudaGetDeviceCount(&count), "devices");
    std::vector<Device> found;
    for (int index = 0; index < count; ++index) found.push_back(look_up(index));
    return found;
  }();
  const Device& device = all.at(x.get_device_index());
  STD_TORCH_CHECK(device.built_for > 0, "tcm_fused: cuda:", x.get_device_index(), " has compute capability ",
                  device.sm / 10, ".", device.sm % 10,
                  ", the CUDA kernels were built for " TCM_CUDA_ARCHITECTURES "; use backend='torch'");
  return device;
}

cudaStream_t current_stream(int device) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "tcm_fused: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The kernels trust these: what is wrong here would be read out of bounds there.
void check_set(const Tensor& x, const Tensor& y, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 1 && x.size(0) == y.size(0) && x.size(1) == like.size(1),
                  "tcm_fused::fused: embeddings must be [N, D] and [M, D], labels [N] and [M]");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), "tcm_fused::fused: embeddings must be of one dtype");
  STD_TORCH_CHECK(y.scalar_type() == ScalarType::Long, "tcm_fused::fused: labels must be int64");
  STD_TORCH_CHECK(x.is_cuda() && y.is_cuda() && x.get_device_index() == like.get_device_index() &&
                      y.get_device_index() == like.get_device_index(),
                  "tcm_fused::fused: all tensors must be on one CUDA device");
}

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return Type::kHalf;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Float: return Type::kFloat;
    default: STD_TORCH_CHECK(false, "tcm_fused::fused: embeddings must be float16, bfloat16 or float32");
  }
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results fused(const Tensor& x_any, const Tensor& y_any, std::optional<Tensor> ref_x, std::optional<Tensor> ref_y,
              std::optional<int64_t> row_offset, double margin_plus, double margin_minus, double lambda_plus,
              double lambda_minus, bool squared, bool fp16, bool per_side, bool grad_x, bool grad_ref) {
  STD_TORCH_CHECK(!squared, "tcm_fused::fused: there is no squared penalty on cuda");
  STD_TORCH_CHECK(ref_x.has_value() == ref_y.has_value(), "tcm_fused::fused: give both ref_x and ref_y, or neither");
  check_set(x_any, y_any, x_any);
  if (ref_x) check_set(*ref_x, *ref_y, x_any);
  const Device& device = device_of(x_any);
  int index = x_any.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  check(cudaSetDevice(index), "current device");  // of the runtime in here, which is not torch's
  Tensor x = torch::stable::contiguous(x_any), y = torch::stable::contiguous(y_any);
  if (ref_x) ref_x = torch::stable::contiguous(*ref_x), ref_y = torch::stable::contiguous(*ref_y);
  grad_ref = grad_ref && ref_x;

  int64_t n = x.size(0), d = x.size(1), m = ref_x ? ref_x->size(0) : n;
  STD_TORCH_CHECK(!ref_x || !row_offset || (*row_offset >= 0 && *row_offset <= m - n),
                  "tcm_fused::fused: row_offset puts rows outside the columns");
  auto empty = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(x, shape, dtype);
  };
  Tensor loss = empty({}, ScalarType::Float);
  auto gradient = [&](bool wanted, int64_t rows) {
    if (!wanted) return empty({0}, ScalarType::Float);
    return per_side ? empty({2, rows, d}, ScalarType::Float) : empty({rows, d}, ScalarType::Float);
  };
  Tensor dx = gradient(grad_x, n), dref = gradient(grad_ref, m);
  Tensor penalty = empty({2}, ScalarType::Double), count = empty({2}, ScalarType::Long);
  Problem problem{
      .symmetric = !ref_x, .n = n, .m = m, .d = d,
      .type = type_of(x),
      .fp16 = fp16,
      .x = x.const_data_ptr(), .y = y.const_data_ptr<int64_t>(),
      .ref_x = ref_x ? ref_x->const_data_ptr() : nullptr,
      .ref_y = ref_y ? ref_y->const_data_ptr<int64_t>() : nullptr,
      .row_offset = row_offset.value_or(-1),
      .margin = {margin_plus, margin_minus},
      .lambda = {lambda_plus, lambda_minus},
      .per_side = per_side,
      .sm = device.built_for,
      .sm_count = device.sm_count,
  };
  Result result{
      .loss = loss.mutable_data_ptr<float>(),
      .grad_x = grad_x ? dx.mutable_data_ptr<float>() : nullptr,
      .grad_ref = grad_ref ? dref.mutable_data_ptr<float>() : nullptr,
      .penalty = penalty.mutable_data_ptr<double>(),
      .count = count.mutable_data_ptr<int64_t>(),
  };
  // Torch's own allocator: it never waits for the device, and its memory may be captured in a CUDA graph.
  Tensor workspace = empty({workspace_bytes(problem)}, ScalarType::Byte);
  const char* error = tcm_loss(problem, result, workspace.mutable_data_ptr(), current_stream(index));
  STD_TORCH_CHECK(error == nullptr, "tcm_fused::fused on cuda:", index, ": ", error);
  return {loss, dx, dref, penalty, count};
}

std::tuple<Tensor, Tensor, Tensor> count(const Tensor& x_any, const Tensor& y_any, int64_t classes,
                                         const Tensor& threshold_any, int64_t bits, std::optional<Tensor> progress) {
  auto on_device = [&](const Tensor& t) { return t.is_cuda() && t.get_device_index() == x_any.get_device_index(); };
  STD_TORCH_CHECK(x_any.is_cuda() && on_device(y_any) && on_device(threshold_any),
                  "tcm_fused::pair_counts: embeddings, classes and thresholds must be on one CUDA device");
  STD_TORCH_CHECK(x_any.scalar_type() == ScalarType::Float,
                  "tcm_fused::pair_counts: on a CUDA device embeddings must be float32; others take backend='torch'");
  STD_TORCH_CHECK(threshold_any.scalar_type() == ScalarType::Float && threshold_any.dim() == 1,
                  "tcm_fused::pair_counts: thresholds must be [T] in the dtype of the embeddings");
  STD_TORCH_CHECK(y_any.scalar_type() == ScalarType::Long, "tcm_fused::pair_counts: classes must be int64");
  STD_TORCH_CHECK(x_any.dim() == 2 && y_any.dim() == 1 && x_any.size(0) == y_any.size(0),
                  "tcm_fused::pair_counts: embeddings must be [N, D] and classes [N]");
  STD_TORCH_CHECK(0 <= bits && bits <= 20 && classes >= 0,
                  "tcm_fused::pair_counts: bits must be from 0 to 20, the number of classes 0 or more");
  STD_TORCH_CHECK(!progress || (progress->is_cpu() && progress->scalar_type() == ScalarType::Long &&
                                progress->numel() == 2 && progress->is_contiguous()),
                  "tcm_fused::pair_counts: progress must be two int64 on the CPU");
  const Device& device = device_of(x_any);
  int index = x_any.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  check(cudaSetDevice(index), "current device");
  Tensor x = torch::stable::contiguous(x_any), y = torch::stable::contiguous(y_any);
  Tensor threshold = torch::stable::contiguous(threshold_any);
  int64_t n = x.size(0), thresholds = threshold.size(0), cells = (int64_t{2} << bits) + 1;
  Tensor counts = torch::stable::new_empty(x, {2, cells}, ScalarType::Long);
  Tensor class_counts = torch::stable::new_empty(x, {2, classes + 1, thresholds}, ScalarType::Long);
  Tensor best = torch::stable::new_empty(x, {2, n});
  PairCountProblem problem{
      .n = n, .d = x.size(1), .classes = classes, .thresholds = thresholds,
      .x = x.const_data_ptr<float>(), .y = y.const_data_ptr<int64_t>(), .threshold = threshold.const_data_ptr<float>(),
      .bits = static_cast<int>(bits),
      .sm = device.built_for, .sm_count = device.sm_count,
      .shared_per_block = device.shared_per_block, .shared_per_sm = device.shared_per_sm,
  };
  PairCountResult result{
      .count = counts.mutable_data_ptr<int64_t>(),
      .class_count = class_counts.mutable_data_ptr<int64_t>(),
      .best = best.mutable_data_ptr<float>(),
  };
  // The device works on its own: all that is known here is that nothing has been given to it yet, and then all.
  int64_t* blocks = progress ? progress->mutable_data_ptr<int64_t>() : nullptr;
  if (blocks != nullptr) blocks[0] = 0, blocks[1] = 1;
  Tensor workspace = torch::stable::new_empty(x, {workspace_bytes(problem)}, ScalarType::Byte);
  const char* error = pair_counts(problem, result, workspace.mutable_data_ptr(), current_stream(index));
  STD_TORCH_CHECK(error == nullptr, "tcm_fused::pair_counts on cuda:", index, ": ", error);
  if (blocks != nullptr) blocks[0] = 1;
  return {counts, class_counts, best};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcm_fused, CUDA, library) {
  library.impl("fused", TORCH_BOX(&fused));
  library.impl("pair_counts", TORCH_BOX(&count));
}

}  // namespace tcm::cuda
