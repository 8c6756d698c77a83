// The operators for CUDA tensors: the kernels' host, with torch's memory, device and stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "../tensor_args.h"
#include "kernels.h"

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

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "tcm_fused: ", what, ": ", cudaGetErrorString(error));
}

// The architecture whose code a device of compute capability `sm` (80, 90, 100...) runs: the latest not above it; 0:
// none. TCM_FUSED_SM lowers it: so the paths for older GPUs are tested on a newer one.
int built_for(int sm) {
  int best = 0;
  std::istringstream names(TCM_CUDA_ARCHITECTURES);  // "sm_80 sm_90a compute_100"
  for (std::string name; names >> name;) {
    int built = std::atoi(name.c_str() + name.find('_') + 1);
    // PTX runs on all later devices, machine code on later minor versions, "sm_90a" on no other.
    bool ptx = name.rfind("compute_", 0) == 0, exact = name.back() == 'a', same_major = built / 10 == sm / 10;
    if (exact ? built == sm : built <= sm && (ptx || same_major)) best = std::max(best, built);
  }
  const char* wish = std::getenv("TCM_FUSED_SM");
  return wish != nullptr ? std::min(best, std::atoi(wish)) : best;
}

struct Found {
  int sm;  // its own compute capability
  Device device;
};

Found look_up(int index) {
  auto read = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, index), "device attributes");
    return value;
  };
  int sm = 10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor);
  return {sm,
          {.sm = built_for(sm),
           .sm_count = read(cudaDevAttrMultiProcessorCount),
           .shared_per_block = read(cudaDevAttrMaxSharedMemoryPerBlockOptin),
           .shared_per_sm = read(cudaDevAttrMaxSharedMemoryPerMultiprocessor)}};
}

const Device& device_of(const Tensor& x) {
  static const std::vector<Found> all = [] {
    int count = 0;
    check(cudaGetDeviceCount(&count), "devices");
    std::vector<Found> found;
    for (int index = 0; index < count; ++index) found.push_back(look_up(index));
    return found;
  }();
  const Found& found = all.at(x.get_device_index());
  STD_TORCH_CHECK(found.device.sm > 0, "tcm_fused: cuda:", x.get_device_index(), " has compute capability ",
                  found.sm / 10, ".", found.sm % 10,
                  ", the CUDA kernels were built for " TCM_CUDA_ARCHITECTURES "; use backend='torch'");
  return found.device;
}

cudaStream_t current_stream(int device) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "tcm_fused: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the device of x the current one, of torch's runtime and of the one in here, which is not torch's.
class Current {
 public:
  explicit Current(const char* name, const Tensor& x)
      : index_(index_of(name, x)), guard_(index_), device_(device_of(x)) {
    check(cudaSetDevice(index_), "current device");
  }
  const Device& device() const { return device_; }
  cudaStream_t stream() const { return current_stream(index_); }
  // Torch's own allocator: it never waits for the device, and its memory may be captured in a CUDA graph.
  static Tensor workspace(const Tensor& x, int64_t bytes) { return empty(x, {bytes}, ScalarType::Byte); }
  void succeeded(const char* name, const char* error) const {
    STD_TORCH_CHECK(error == nullptr, name, " on cuda:", index_, ": ", error);
  }

 private:
  static int index_of(const char* name, const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), name, ": embeddings must be on the CUDA device; they are ", describe(x));
    return x.get_device_index();
  }
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  const Device& device_;
};

Type type_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return Type::kHalf;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Float: return Type::kFloat;
    default: STD_TORCH_CHECK(false, name, ": embeddings must be float16, bfloat16 or float32; they are ", describe(x));
  }
}

LossTensors loss_operator(LossArguments& a) {
  STD_TORCH_CHECK(!a.squared, a.name, ": there is no squared penalty on cuda");
  Current current(a.name, a.x);
  Type type = type_of(a.name, a.x);
  a.x = dense(a.x), a.y = dense(a.y);
  if (a.ref_x) a.ref_x = dense(*a.ref_x), a.ref_y = dense(*a.ref_y);
  LossTensors out(a, ScalarType::Float);
  Problem<void> problem = a.problem<void>();
  Tensor workspace = Current::workspace(a.x, workspace_bytes(problem, current.device()));
  current.succeeded(a.name, loss(problem, type, current.device(), out.result<float>(a), workspace.mutable_data_ptr(),
                                 current.stream()));
  return out;
}

CountTensors counts_operator(CountArguments& a) {
  Current current(a.kName, a.x);
  STD_TORCH_CHECK(a.x.scalar_type() == ScalarType::Float, a.kName,
                  ": on a CUDA device embeddings must be float32; others take backend='torch'");
  a.make_dense();
  CountTensors out(a);
  CountProblem<float> problem = a.problem<float>();
  CountResult<float> result = out.result<float>(a);
  // The device works on its own: all that is known here is that nothing has been given to it yet, and then all.
  if (result.progress != nullptr) result.progress[0] = 0, result.progress[1] = 1;
  Tensor workspace = Current::workspace(a.x, workspace_bytes(problem, current.device()));
  current.succeeded(a.kName, counts(problem, current.device(), result, workspace.mutable_data_ptr(), current.stream()));
  if (result.progress != nullptr) result.progress[0] = 1;
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcm_fused, CUDA, library) {
  library.impl("loss", TORCH_BOX(&LossOperators<loss_operator>::loss));
  library.impl("penalties", TORCH_BOX(&LossOperators<loss_operator>::penalties));
  library.impl("counts", TORCH_BOX(&count_operator<counts_operator>));
}

}  // namespace tcm::cuda
