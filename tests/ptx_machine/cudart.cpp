// The part of the CUDA runtime that the kernels' compiled host code calls, on the machine.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>

#include "interface.h"

using namespace ptx_machine;

namespace {

std::map<const void*, std::string>& functions() {  // host stub to name of the kernel
  static std::map<const void*, std::string> all;
  return all;
}
std::map<const void*, int>& leave() {  // bytes of shared memory that a kernel may ask for
  static std::map<const void*, int> all;
  return all;
}

CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* size,
                const cuuint64_t* pitch, const cuuint32_t* box, const cuuint32_t* stride,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  static_assert(CU_TENSOR_MAP_SWIZZLE_NONE == 0 && CU_TENSOR_MAP_SWIZZLE_128B == 3);
  if (type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || reinterpret_cast<u64>(out) % 64 ||
      interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_INVALID_VALUE;
  for (u32 k = 0; k < rank; ++k)
    if (stride[k] != 1) return CUDA_ERROR_INVALID_VALUE;
  const bool made = make_tensor_map(out, address, 2, rank, reinterpret_cast<const u64*>(size),
                                    reinterpret_cast<const u64*>(pitch), box, swizzle);
  return made ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  functions()[host] = name;
}
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }  // kernels are not launched so
cudaError_t __cudaGetKernel(void*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }

cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  const std::string& name = functions().at(f);
  Kernel* k = find_kernel(name);
  if (k == nullptr) return report("no kernel " + name), cudaErrorInvalidDeviceFunction;
  if (shared > 48 << 10 && static_cast<int>(shared) > leave()[f])
    return report("launch: shared memory without leave"), cudaErrorInvalidValue;
  if (shared > shared_per_block())
    return report("launch: more shared memory than the device has"), cudaErrorInvalidValue;
  const bool done =
      launch_or_report(*k, name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, arguments);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* f) {
  Kernel* k = find_kernel(functions().at(f));
  if (k == nullptr) return cudaErrorInvalidDeviceFunction;
  *a = {};
  a->maxThreadsPerBlock = most_threads(*k);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute a, int value) {
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) leave()[f] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr a, int) {
  if (a != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = static_cast<int>(shared_per_block());
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "a launch failed: see the machine's reports"; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  if (strcmp(name, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *f = reinterpret_cast<void*>(&encode), *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"

namespace tcm::cuda {
void guard(void* memory, int64_t bytes) { mark(memory, static_cast<size_t>(bytes), kForbidden); }
}  // namespace tcm::cuda
