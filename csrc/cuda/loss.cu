// The host's part of the loss: lays out the workspace and launches the kernels. Arithmetic on sizes only; see work.h.
#include "kernels.h"

#include <algorithm>

#include "epilogue.cuh"
#include "masked_sum.cuh"
#include "plan.cuh"
#include "screen.cuh"
#include "similarity.cuh"

namespace tcm::cuda {
namespace {

struct Plan {
  Work work;
  bool sm90;  // products by warpgroups
  TensorMaps maps;
  int side[2];  // tiles on each side of a rectangle: of rows, of columns
  int64_t bytes;
};

// Tiles of each rectangle along a side of `tiles`: rectangles of one size, so that the last is not a sliver.
int rectangle_side(int tiles, int most) {
  int rectangles = std::max(1, (tiles + most - 1) / most);
  return (tiles + rectangles - 1) / rectangles;
}

// `gradient`: of x, of ref_x. Sizes are the same with and without a workspace.
Plan make_plan(const Problem<void>& p, const Device& device, int gradients, const bool (&gradient)[2], void* workspace,
               const Tuning& tuning) {
  Plan plan{};
  Work& w = plan.work;
  w.symmetric = p.symmetric, w.has_own = !p.symmetric && p.row_offset >= 0;
  w.gradients = gradients;
  w.d = p.d, w.row_offset = p.row_offset;
  w.width = static_cast<int>(round_up(std::max<int64_t>(p.d, 1), kDepth));
  w.slices = (w.width + kSlice - 1) / kSlice;
  w.parts = p.fp16 ? 1 : 2;
  w.partials = 2 * std::max(1, device.sm_count);
  w.margin = p.margin, w.weight = p.weight;
  for (int k = 0; k < 2; ++k) {
    bool rows = k == 0 || p.symmetric;
    w.set[k].x = rows ? p.x : p.ref_x, w.set[k].y = rows ? p.y : p.ref_y, w.set[k].n = rows ? p.n : p.m;
    w.set[k].tiles = static_cast<int>(round_up(w.set[k].n, kTile) / kTile);
    plan.side[k] = rectangle_side(w.set[k].tiles, tuning.rectangle);
  }
  Layout layout(workspace);
  lay_out(layout, w, w.set[0], gradient[0]);
  if (p.symmetric) w.set[1] = w.set[0];
  else lay_out(layout, w, w.set[1], gradient[1]);
  layout.take(w.state, 1), layout.take(w.partial, w.partials);
  int64_t tiles = int64_t{plan.side[0]} * plan.side[1];
  layout.take(w.record, tiles * 2);
  const int places = Rectangle{0, plan.side[0], 0, plan.side[1], false, 0}.places();
  w.undecided_words = w.parts == 2 ? (places + 31) / 32 : 0;
  if (w.parts == 2) {
    layout.take(w.undecided, w.undecided_words), layout.take(w.listed, places), layout.take(w.listed_size, 1);
  }
  layout.take(w.mask, gradient[0] || gradient[1] ? tiles * 2 * kTile : 0);
  layout.take(w.occupied, tiles * 3);
  plan.bytes = layout.used();
  return plan;
}

template <class Visitor>
cudaError_t similarities(const Plan& plan, const Work& w, const Rectangle& rectangle, unsigned grid, Visitor visitor,
                         cudaStream_t stream) {
  if (plan.sm90)
    return launch(similarity_sm90<Visitor>, dim3(grid), dim3(kThreadsSm90), sizeof(SimilaritySm90Memory<Visitor>),
                  stream, w, rectangle, visitor, plan.maps);
  return launch(similarity<Visitor>, dim3(grid), dim3(kThreads), sizeof(SimilarityMemory<Visitor>), stream, w,
                rectangle, visitor);
}

// Three products for each tile that one product does not decide: see screen.cuh.
cudaError_t screened(const Plan& plan, const Rectangle& rectangle, unsigned grid, cudaStream_t stream) {
  const Work& w = plan.work;
  Work high = w;
  high.parts = 1;
  cudaError_t error = similarities(plan, high, rectangle, grid, ScreenVisitor{screen_bound(w.width)}, stream);
  if (error == cudaSuccess)
    error = launch(list_undecided, dim3(1), dim3(kThreads), kWarps * sizeof(int), stream, w, rectangle);
  return error != cudaSuccess ? error : similarities(plan, w, rectangle, grid, UndecidedVisitor{}, stream);
}

cudaError_t one_rectangle(const Plan& plan, const Rectangle& rectangle, const Tuning& tuning, cudaStream_t stream) {
  const Work& w = plan.work;
  int rows = rectangle.i1 - rectangle.i0, columns = rectangle.j1 - rectangle.j0;
  // On Hopper a block of threads fills a multiprocessor, and takes two tiles at a time.
  int64_t tiles = int64_t{rows} * (plan.sm90 ? (columns + 1) / 2 : columns), room = w.partials / (plan.sm90 ? 2 : 1);
  unsigned grid = static_cast<unsigned>(std::min(tiles, room));
  int64_t work = rectangle.diagonal ? tiles / 2 : tiles;
  cudaError_t error = w.parts == 2 && work >= tuning.screen_from * room
                          ? screened(plan, rectangle, grid, stream)
                          : similarities(plan, w, rectangle, grid, LossVisitor{}, stream);
  int owners =
      (w.set[0].sum[0] != nullptr ? rows : 0) + (w.set[1].sum[0] != nullptr && !rectangle.diagonal ? columns : 0);
  if (error != cudaSuccess || owners == 0) return error;
  auto kernel = plan.sm90 ? masked_sum_sm90 : masked_sum;
  return launch(kernel, dim3(static_cast<unsigned>(owners) * w.slices, 2), dim3(kThreads), sizeof(MaskedSumMemory),
                stream, w, rectangle);
}

cudaError_t enqueue(const Plan& plan, Type type, cudaStream_t stream, const Tuning& tuning) {
  const Work& w = plan.work;
  cudaError_t error = prologue(w, type, w.set[0].sum[0] != nullptr || w.set[1].sum[0] != nullptr, tuning, stream);
  int number = 0;
  for (int i = 0; i < w.set[0].tiles; i += plan.side[0])
    for (int j = w.symmetric ? i : 0; j < w.set[1].tiles && error == cudaSuccess; j += plan.side[1]) {
      const int i1 = std::min(i + plan.side[0], w.set[0].tiles), j1 = std::min(j + plan.side[1], w.set[1].tiles);
      const Rectangle rectangle{i, i1, j, j1, w.symmetric && i == j, ++number};
      error = one_rectangle(plan, rectangle, tuning, stream);
    }
  if (error != cudaSuccess) return error;
  int64_t rows = std::max(w.set[0].n, w.set[1].n);
  unsigned grid = static_cast<unsigned>(std::min<int64_t>(blocks(rows, kWarps), int64_t{4} * w.partials));
  return launch(finish, dim3(grid, w.symmetric ? 1 : 2, w.gradients), dim3(kThreads), kThreads * sizeof(Totals), stream,
                w);
}

// The gradients for which there is room in the workspace: all that the form of the problem can have.
int64_t bytes_of(const Problem<void>& problem, const Device& device, const Tuning& tuning) {
  return make_plan(problem, device, 0, {true, !problem.symmetric}, nullptr, tuning).bytes;
}

const char* run(const Problem<void>& problem, Type type, const Device& device, const Result<float>& result,
                void* workspace, cudaStream_t stream, const Tuning& tuning) {
  if (std::max(problem.n, problem.m) > (int64_t{1} << 31) - 2 * kTile) return "more than 2^31 - 256 embeddings";
  if (problem.d > 65535 * int64_t{kDepth}) return "embeddings of more than 4,194,240 dimensions";
  Plan plan =
      make_plan(problem, device, result.gradients(),
                {result.grad_x != nullptr, !problem.symmetric && result.grad_ref != nullptr}, workspace, tuning);
  Work& w = plan.work;
  w.set[0].grad = result.grad_x, w.set[1].grad = problem.symmetric ? result.grad_x : result.grad_ref;
  w.loss = result.loss, w.penalty = result.penalty, w.count = result.count;
  plan.sm90 = use_sm90(device.sm, similarity_sm90<LossVisitor>, w, plan.maps);
  cudaError_t error = enqueue(plan, type, stream, tuning);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t workspace_bytes(const Problem<void>& problem, const Device& device) { return bytes_of(problem, device, {}); }

const char* loss(const Problem<void>& problem, Type type, const Device& device, const Result<float>& result,
                 void* workspace, cudaStream_t stream) {
  return run(problem, type, device, result, workspace, stream, {});
}

}  // namespace tcm::cuda
