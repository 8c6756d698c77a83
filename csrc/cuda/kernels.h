// The TCM loss on a CUDA device: what the operator hands to the kernels. Knows nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tcm::cuda {

enum class Type { kHalf, kBFloat16, kFloat };

// Pairs, sides and margins are those of ../tcm_fused.h. All pointers are on the device.
struct Problem {
  bool symmetric;      // the columns are the rows: m == n, ref_x, ref_y and row_offset are not read
  int64_t n, m, d;
  Type type;           // of x and ref_x
  bool fp16;           // one fp16 product; false: fp32 accuracy (three products)
  const void* x;       // [n, d] rows
  const int64_t* y;    // [n]
  const void* ref_x;   // [m, d] columns
  const int64_t* ref_y;  // [m]
  int64_t row_offset;  // column that is row 0 itself; -1: none
  double margin[2];
  double lambda[2];
  bool per_side;       // gradients are those of the two penalties, not of the loss
  int sm;              // compute capability of the device, 80, 90, 100...: picks the path
  int sm_count;
};

// On the device; null: not wanted. With per_side the gradients are [2, n, d] and [2, m, d], of penalty[0] and of
// penalty[1], and lambda has no part in them.
struct Result {
  float* loss;      // []
  float* grad_x;    // [n, d] dL/dx
  float* grad_ref;  // [m, d] dL/dref_x
  double* penalty;  // [2] sums of m+ - s and s - m- over the hard pairs
  int64_t* count;   // [2] hard pairs, ordered
};

// Bytes of device memory that tcm_loss needs for this problem; depends on its sizes and forms only, on no pointer.
int64_t workspace_bytes(const Problem& problem);

// Enqueues everything on `stream`; never waits for the device, never allocates. `workspace` is aligned to 256 bytes and
// holds anything. Returns null, or what failed (a static string).
const char* tcm_loss(const Problem& problem, const Result& result, void* workspace, cudaStream_t stream);

}  // namespace tcm::cuda
