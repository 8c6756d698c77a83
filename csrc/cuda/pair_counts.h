// Pairs counted by similarity on a CUDA device: what the operator hands to the kernels. Knows nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tcm::cuda {

// The unordered pairs of n rows. Rows of one class are positives of it; a pair of different classes is a negative of
// both. Classes from `classes` on share one row of counts; a row of a negative class is in no count at all. All
// pointers are on the device.
struct PairCountProblem {
  int64_t n, d, classes, thresholds;
  const float* x;          // [n, d] rows of any length
  const int64_t* y;        // [n] class
  const float* threshold;  // [thresholds] ascending
  int bits;                // the grid on [-1, 1] has steps of 2^-bits, 0 to 20
  int sm;                  // compute capability of the device, 80, 90, 100...: picks the path
  int sm_count;
  int shared_per_block;    // bytes of shared memory that a block may have, and that a multiprocessor has
  int shared_per_sm;
};

// On the device.
struct PairCountResult {
  int64_t* count;        // [2, 2^(bits + 1) + 1] positives, negatives in each cell [k, k + 1) 2^-bits - 1; last: s >= 1
  int64_t* class_count;  // [2, classes + 1, thresholds] those of each class with threshold k <= s < threshold k + 1
  float* best;           // [2, n] largest similarity to a positive, to a negative; -infinity where there is none.
                         // All NaN if an embedding that takes part is not finite: the counts then mean nothing
};

// Bytes of device memory that pair_counts needs; depends on sizes only, on no pointer.
int64_t workspace_bytes(const PairCountProblem& problem);

// As tcm_loss: enqueues everything on `stream`, waits for nothing. Returns null, or what failed (a static string).
const char* pair_counts(const PairCountProblem& problem, const PairCountResult& result, void* workspace,
    cudaStream_t stream);

}  // namespace tcm::cuda
