// Shared by the hosts of the kernels: the layout of the workspace, the prologue, the choice of a path.
#pragma once

#include <algorithm>

#include "similarity_sm90.cuh"
#include "kernels.h"

namespace tcm::cuda {

// Sizes that a test makes smaller, to have many rectangles and merges of few rows, and similarities beyond the window.
struct Tuning {
  int rectangle = kRectangle;
  int screen_from = kScreenFrom;
  int window = INT32_MAX;  // cells; even
  int64_t chunk = kChunk, one_chunk = kOneChunk;
};

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

#if defined(TCM_FUSED_GUARD)  // tests/ptx_machine sees to it that no kernel touches these bytes
void guard(void* memory, int64_t bytes);
#else
inline void guard(void*, int64_t) {}
#endif

// Hands out the workspace from its start on, with gaps that nobody touches; with no workspace it only counts.
class Layout {
 public:
  explicit Layout(void* start) : start_(static_cast<unsigned char*>(start)) {}
  template <class T>
  void take(T*& p, int64_t size) {
    int64_t bytes = size * static_cast<int64_t>(sizeof(T)), end = round_up(used_ + bytes + 1, 256);
    p = start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + used_);
    if (start_ != nullptr) guard(start_ + used_ + bytes, end - used_ - bytes);
    used_ = end;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* start_;
  int64_t used_ = 0;
};

inline void lay_out(Layout& layout, const Work& w, Embeddings& set, bool gradient) {
  int64_t rows = int64_t{set.tiles} * kTile;
  for (int k = 0; k < 2; ++k) layout.take(set.label[k], set.n), layout.take(set.order[k], set.n);
  layout.take(set.position, set.n);
  layout.take(set.first, set.n), layout.take(set.last, set.n), layout.take(set.own, set.n);
  layout.take(set.inverse, set.n);
  layout.take(set.unit, w.parts * rows * w.width);
  layout.take(set.tile_sum, int64_t{set.tiles} * w.width);
  set.sum[kPlus] = set.sum[kMinus] = nullptr, set.touched = nullptr, set.marked = nullptr;
  if (!gradient) return;
  layout.take(set.sum[kPlus], rows * w.width), layout.take(set.sum[kMinus], rows * w.width);
  layout.take(set.touched, int64_t{2} * set.tiles * w.slices), layout.take(set.marked, int64_t{2} * set.tiles);
}

inline unsigned blocks(int64_t size, int64_t each) {
  return static_cast<unsigned>(std::max<int64_t>(1, (size + each - 1) / each));
}

// Enqueues the prologue (prologue.cuh): sorted labels and x^, and the sums over tiles where wanted.
cudaError_t prologue(const Work& w, Type type, bool sums, const Tuning& tuning, cudaStream_t stream);

// Starts `kernel` on `stream`; the error, or cudaSuccess.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Parameters... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 << 10) {  // more needs leave: ask for all there is, for later launches too
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream);
}

// Describes a matrix [rows, columns] of halves to the copy engine; false if the driver cannot.
inline bool describe(TensorMap& map, const Half* matrix, int64_t rows, int columns) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) !=
          cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    return false;
  cuuint64_t size[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
             pitch[] = {size[0] * sizeof(Half)};
  cuuint32_t box[] = {kBoxColumns, kBoxRows}, stride[] = {1, 1};
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
             &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<Half*>(matrix), size, pitch, box, stride,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Threads a block of the kernel can have on the current device, as its code there was compiled; 0: there is none.
template <class Kernel>
int most_threads(Kernel* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess
             ? attributes.maxThreadsPerBlock
             : 0;
}

// Whether the device, its driver and the code compiled for it allow products by warpgroups; if so, describes x^ for
// them.
template <class Kernel>
bool use_sm90(int sm, Kernel* kernel, const Work& w, TensorMaps& maps) {
  if (sm < 90 || sm > 99 || most_threads(kernel) < kThreadsSm90) return false;
  for (int k = 0; k < 2; ++k) {
    int64_t rows = int64_t{w.parts} * w.set[k].tiles * kTile;
    if (rows == 0 || rows + 2 * kTile > INT32_MAX || !describe(maps.of[k], w.set[k].unit, rows, w.width)) return false;
  }
  return true;
}

}  // namespace tcm::cuda
