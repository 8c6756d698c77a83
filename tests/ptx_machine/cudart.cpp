// The part of the CUDA runtime that compiled host code needs, on the machine; and the interface of the tests (ctypes).
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>

#include "machine.h"

using namespace ptx_machine;

namespace {

std::map<const void*, std::string> functions;                                   // host stub to name of the kernel
std::map<std::string, std::map<std::string, std::unique_ptr<Module>>> modules;  // by architecture, by file
std::string selected = "80", text;

Kernel* find(const std::string& name) {
  for (auto& [file, m] : modules[selected])
    if (auto k = m->kernels.find(name); k != m->kernels.end()) return k->second.get();
  return nullptr;
}

CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* size,
                const cuuint64_t* pitch, const cuuint32_t* box, const cuuint32_t* stride,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  TensorMap t{};
  t.magic = TensorMap::kMagic, t.address = reinterpret_cast<u64>(address), t.rank = static_cast<u8>(rank);
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      t.element = 1;
      break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      t.element = 2;
      break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      t.element = 4;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  if (reinterpret_cast<u64>(out) % 64 || t.address % 16 || rank < 1 || rank > 5 ||
      interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return CUDA_ERROR_INVALID_VALUE;
  for (u32 k = 0; k < rank; ++k) {
    if (size[k] == 0 || size[k] > u64{1} << 32 || box[k] == 0 || box[k] > 256 || stride[k] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    if (k > 0 && (pitch[k - 1] % 16 || pitch[k - 1] >= u64{1} << 40 || pitch[k - 1] < size[0] * t.element))
      return CUDA_ERROR_INVALID_VALUE;
    t.size[k] = size[k], t.box[k] = static_cast<u16>(box[k]), t.stride[k] = 1;
    if (k > 0) t.pitch[k - 1] = pitch[k - 1];
  }
  u64 inner = u64{box[0]} * t.element;
  t.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE   ? 0
              : swizzle == CU_TENSOR_MAP_SWIZZLE_32B  ? 1
              : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 2
              : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 3
                                                      : 9;
  if (t.swizzle == 9 || inner % 16 || (t.swizzle && inner > u64{16} << t.swizzle) ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_INVALID_VALUE;
  memset(out, 0, sizeof *out);
  memcpy(out, &t, sizeof t);
  return CUDA_SUCCESS;
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
  functions[host] = name;
}
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
cudaError_t __cudaGetKernel(void*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }

std::map<const void*, int>& shared_leave() {
  static std::map<const void*, int> all;
  return all;
}
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  Kernel* k = find(functions.at(f));
  if (k == nullptr) return report("no kernel " + functions.at(f)), cudaErrorInvalidDeviceFunction;
  if (shared > 48 << 10 && static_cast<int>(shared) > shared_leave()[f])
    return report("launch: shared memory without leave"), cudaErrorInvalidValue;
  if (shared > (selected == "80" ? 163 : 227) * size_t{1024})
    return report("launch: more shared memory than the device has"), cudaErrorInvalidValue;
  try {
    launch(*k, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, arguments);
  } catch (const std::exception& e) {
    report(std::string("launch of ") + functions.at(f).substr(0, 90) + " failed: " + e.what());
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* f) {
  Kernel* k = find(functions.at(f));
  if (k == nullptr) return cudaErrorInvalidDeviceFunction;
  *a = {};
  a->maxThreadsPerBlock = most_threads(*k);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute a, int value) {
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) shared_leave()[f] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr a, int) {
  if (a != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = (selected == "80" ? 163 : 227) * 1024;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "fake CUDA error"; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  if (strcmp(name, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *f = reinterpret_cast<void*>(&encode), *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// --- for ctypes --------------------------------------------------------------------------------------------------
const char* fg_load(const char* sm, const char* path) {
  std::ifstream file(path);
  std::stringstream all;
  all << file.rdbuf();
  std::string name = path;
  name = name.substr(name.rfind('/') + 1);
  try {
    modules[sm][name] = load(all.str(), name);
  } catch (const std::exception& e) {
    return text = name + ": " + e.what(), text.c_str();
  }
  return nullptr;
}
void fg_select(const char* sm) { selected = sm; }
void fg_lenient(int on) { set_lenient(on != 0); }
void fg_seed(uint64_t seed) { set_seed(seed); }
void* fg_allocate(size_t bytes) { return allocate(bytes); }
void fg_adopt(void* memory, size_t bytes) { adopt(memory, bytes); }
void fg_release(void* memory) { release(memory); }
void fg_mark(void* memory, size_t bytes, int state) { mark(memory, bytes, static_cast<u8>(state)); }
const char* fg_reports() { return text = take_reports(), text.c_str(); }
const char* fg_coverage() { return text = coverage(), text.c_str(); }
const char* fg_opcodes() { return text = opcodes(), text.c_str(); }
int fg_tensor_map(void* out, void* address, int element, int rank, const uint64_t* size, const uint64_t* pitch,
                  const uint32_t* box, int swizzle) {
  uint32_t ones[5] = {1, 1, 1, 1, 1};
  alignas(64) CUtensorMap map;
  CUtensorMapDataType type = element == 2   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                             : element == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                            : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  CUresult r = encode(&map, type, rank, address, reinterpret_cast<const cuuint64_t*>(size),
                      reinterpret_cast<const cuuint64_t*>(pitch), box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      static_cast<CUtensorMapSwizzle>(swizzle), CU_TENSOR_MAP_L2_PROMOTION_NONE,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  memcpy(out, &map, 128);
  return r;
}
int fg_launch(const char* kernel, const uint32_t* grid, uint32_t threads, size_t shared, void** arguments) {
  Kernel* k = find(kernel);
  if (k == nullptr) return report(std::string("no kernel ") + kernel), 1;
  try {
    launch(*k, {grid[0], grid[1], grid[2]}, {threads, 1, 1}, shared, arguments);
  } catch (const std::exception& e) {
    report(std::string(kernel) + " failed: " + e.what());
    return 1;
  }
  return 0;
}
int fg_parameters(const char* kernel) {
  Kernel* k = find(kernel);
  return k == nullptr ? -1 : static_cast<int>(parameters(*k));
}
int fg_parameter_bytes(const char* kernel, int i) { return static_cast<int>(parameter_bytes(*find(kernel), i)); }

}  // extern "C"

namespace tcm::cuda {
void guard(unsigned char* memory, int64_t bytes) { mark(memory, static_cast<size_t>(bytes), 2); }
}  // namespace tcm::cuda
