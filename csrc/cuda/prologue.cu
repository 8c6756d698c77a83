// Launches the kernels of prologue.cuh, for all that starts with sorted unit vectors.
#include "prologue.cuh"

#include "plan.cuh"

namespace tcm::cuda {
namespace {

cudaError_t sort_labels(const Work& w, unsigned sets, const Tuning& tuning, cudaStream_t stream) {
  int64_t n = std::max(w.set[0].n, w.set[1].n), chunk = n <= tuning.one_chunk ? round_up(n + 1, kSorted) : tuning.chunk;
  int merges = 0;
  for (int64_t run = chunk; run < n; run *= 2) ++merges;
  int at = merges % 2;  // so that the last merge ends in [0]
  cudaError_t error = launch(rank_labels, dim3(blocks(n, kSorted), sets), dim3(kThreads), kWarps * 32 * sizeof(int),
                             stream, w, chunk, at);
  for (int64_t run = chunk; run < n && error == cudaSuccess; run *= 2, at = 1 - at)
    error = launch(merge_labels, dim3(blocks(n, kThreads), sets), dim3(kThreads), 0, stream, w, run, at);
  return error;
}

}  // namespace

cudaError_t prologue(const Work& w, Type type, bool sums, const Tuning& tuning, cudaStream_t stream) {
  const unsigned sets = w.symmetric ? 1 : 2;
  cudaError_t error = sort_labels(w, sets, tuning, stream);
  if (error != cudaSuccess) return error;
  int tiles = std::max(w.set[0].tiles, w.set[1].tiles);
  auto kernel = type == Type::kHalf       ? normalise<Half>
                : type == Type::kBFloat16 ? normalise<BFloat16>
                                          : normalise<float>;
  error = launch(kernel, dim3(blocks(int64_t{tiles} * kTile, kWarps), sets), dim3(kThreads), 0, stream, w);
  if (error != cudaSuccess || !sums || tiles == 0) return error;
  dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(w.width / kDepth), sets);
  return launch(sum_tiles, grid, dim3(kThreads), kThreads * sizeof(float2), stream, w);
}

}  // namespace tcm::cuda
