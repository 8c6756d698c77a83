// The kernels of a CUDA device as the operators call them. Knows nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../problem.h"

namespace tcm::cuda {

enum class Type { kHalf, kBFloat16, kFloat };  // of embeddings

struct Device {
  int sm;  // the architecture whose code it runs, 80, 90, 100...: picks the path
  int sm_count;
  int shared_per_block, shared_per_sm;  // bytes of shared memory that a block may have, that a multiprocessor has
};

// Bytes of device memory that a problem needs. They depend on its sizes and form only, on no pointer.
int64_t workspace_bytes(const Problem<void>& problem, const Device& device);
int64_t workspace_bytes(const CountProblem<float>& problem, const Device& device);

// Enqueue everything on `stream`; never wait for the device, never allocate. All pointers are on the device, margins and
// weights where they say. `workspace` is aligned to 256 bytes and holds anything. `type` is that of x and ref_x;
// penalties are never squared. If an embedding is not finite, `best` of the counts is NaN throughout, and the counts mean
// nothing. They return null, or a static string that says which call of CUDA failed.
const char* loss(const Problem<void>& problem, Type type, const Device& device, const Result<float>& result,
                 void* workspace, cudaStream_t stream);
const char* counts(const CountProblem<float>& problem, const Device& device, const CountResult<float>& result,
                   void* workspace, cudaStream_t stream);

}  // namespace tcm::cuda
