// The host's part of the counts: everything in stream order, and no launch depends on the results of another.
// 1. Prologue (prologue.cuh): rows sorted by class, x^ as two halves for each element, sums of x^ over tiles of rows.
// 2. prepare_counts, centre_window: zeros, tables, and where the window of hot cells begins.
// 3. similarity: all tiles, or of one set those above the diagonal, in one launch, with `CountVisitor` as visitor.
// 4. finish_counts: the largest similarities in the order of the input.
#include "kernels.h"

#include "counts.cuh"
#include "plan.cuh"
#include "similarity.cuh"

namespace tcm::cuda {
namespace {

struct CountPlan {
  Work work;
  CountVisitor counter;
  int64_t bytes;
};

CountPlan plan_counts(const CountProblem<float>& p, const Device& device, void* workspace) {
  CountPlan plan{};
  Work& w = plan.work;
  w.symmetric = p.symmetric, w.gradients = 0, w.parts = 2, w.d = p.d;
  w.width = static_cast<int>(round_up(std::max<int64_t>(p.d, 1), kDepth));
  w.partials = 2 * std::max(1, device.sm_count);
  CountVisitor& counter = plan.counter;
  counter.classes = p.classes;
  counter.bits = p.bits, counter.thresholds = static_cast<int>(p.thresholds), counter.threshold = p.threshold;
  Layout layout(workspace);
  for (int k = 0; k < 2; ++k) {
    Embeddings& set = w.set[k];
    if (k == 1 && p.symmetric) {
      set = w.set[0], counter.table[1] = counter.table[0];
      for (int side = 0; side < 2; ++side) counter.best[1][side] = counter.best[0][side];
      break;
    }
    set.x = k == 0 ? p.x : p.ref_x, set.y = k == 0 ? p.y : p.ref_y, set.n = k == 0 ? p.n : p.m;
    set.tiles = static_cast<int>(round_up(set.n, kTile) / kTile);
    lay_out(layout, w, set, false);
    layout.take(counter.table[k], set.n);
    for (int side = 0; side < 2; ++side) layout.take(counter.best[k][side], int64_t{set.tiles} * kTile);
  }
  layout.take(w.state, 1), layout.take(w.partial, w.partials);
  layout.take(counter.first, 1), layout.take(counter.start, counter.cells() + 1);
  plan.bytes = layout.used();
  return plan;
}

cudaError_t count_tiles(const Device& device, CountPlan& plan, const Tuning& tuning, cudaStream_t stream) {
  const Work& w = plan.work;
  CountVisitor& counter = plan.counter;
  TensorMaps maps;
  const bool sm90 = use_sm90(device.sm, similarity_sm90<CountVisitor>, w, maps);
  int64_t used = sizeof(SimilarityMemory<CountVisitor>),
          bytes = device.shared_per_sm / 2 - 1024;  // two blocks, 1 KB each
  if (sm90) used = sizeof(SimilaritySm90Memory<CountVisitor>), bytes = device.shared_per_block;
  else if (bytes < used + (8 << 10)) bytes = device.shared_per_block;  // one with a window, not two without
  const int64_t room = std::max<int64_t>(0, bytes - used) / 4 * 2;     // cells of two bytes
  counter.window = static_cast<int>(std::min({room, int64_t{counter.cells()} - 1, int64_t{tuning.window}}));
  const size_t shared = used + int64_t{counter.window} * 2;

  cudaError_t error = launch(prepare_counts, dim3(4 * w.partials), dim3(kThreads), 0, stream, w, counter);
  if (error != cudaSuccess) return error;
  error = launch(centre_window, dim3(1), dim3(kThreads), kWarps * sizeof(double), stream, w, counter);
  const int64_t tiles = int64_t{w.set[0].tiles} * w.set[1].tiles;
  if (error != cudaSuccess || tiles == 0) return error;
  const Rectangle rectangle{0, w.set[0].tiles, 0, w.set[1].tiles, w.symmetric, 1};
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(tiles, w.partials / (sm90 ? 2 : 1)));
  if (sm90)
    return launch(similarity_sm90<CountVisitor>, dim3(grid), dim3(kThreadsSm90), shared, stream, w, rectangle, counter,
                  maps);
  return launch(similarity<CountVisitor>, dim3(grid), dim3(kThreads), shared, stream, w, rectangle, counter);
}

const char* run_counts(const CountProblem<float>& problem, const Device& device, const CountResult<float>& result,
                       void* workspace, cudaStream_t stream, const Tuning& tuning) {
  if (std::max(problem.n, problem.m) > (int64_t{1} << 31) - 2 * kTile) return "more than 2^31 - 256 embeddings";
  if (problem.d > 65535 * int64_t{kDepth}) return "embeddings of more than 4,194,240 dimensions";
  if (std::max(problem.classes, problem.thresholds) > INT32_MAX - 1) return "more than 2^31 - 2 classes or thresholds";
  CountPlan plan = plan_counts(problem, device, workspace);
  for (int side = 0; side < 2; ++side)
    plan.counter.count[side] = result.count[side], plan.counter.class_count[side] = result.class_count[side];
  cudaError_t error = prologue(plan.work, Type::kFloat, true, tuning, stream);
  if (error == cudaSuccess) error = count_tiles(device, plan, tuning, stream);
  for (int set = 0; set < (problem.symmetric ? 1 : 2) && error == cudaSuccess; ++set) {
    float* const(&best)[2] = set == 0 ? result.best : result.ref_best;
    error = launch(finish_counts, dim3(blocks(plan.work.set[set].n, kThreads)), dim3(kThreads), 0, stream, plan.work,
                   plan.counter, set, best[kPlus], best[kMinus]);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t workspace_bytes(const CountProblem<float>& problem, const Device& device) {
  return plan_counts(problem, device, nullptr).bytes;
}

const char* counts(const CountProblem<float>& problem, const Device& device, const CountResult<float>& result,
                   void* workspace, cudaStream_t stream) {
  return run_counts(problem, device, result, workspace, stream, {});
}

}  // namespace tcm::cuda
