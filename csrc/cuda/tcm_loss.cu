// The host's part: lays out the workspace and launches the kernels. Arithmetic on sizes only; see work.h for the plan.
#include "tcm_loss.h"

#include <algorithm>

#include "epilogue.cuh"
#include "masked_sum.cuh"
#include "prologue.cuh"
#include "similarity.cuh"
#include "similarity_sm90.cuh"

namespace tcm::cuda {
namespace {

// What a test sets smaller, to see many blocks and merges with few rows.
struct Tuning {
  int block = kBlock;
  int64_t chunk = kChunk, one_chunk = kOneChunk;
};

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

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

struct Plan {
  Work work;
  bool sm90;  // products by warpgroups
  TensorMaps maps;
  int side[2];  // tiles a side of a block: rows, columns
  int64_t bytes;
};

// Tiles of each block along a side of `tiles`: blocks of one size, so that the last is not a sliver.
int block_side(int tiles, int most) {
  int blocks = std::max(1, (tiles + most - 1) / most);
  return (tiles + blocks - 1) / blocks;
}

void lay_out(Layout& layout, const Work& w, Set& set, bool gradient) {
  int64_t rows = int64_t{set.tiles} * kTile;
  for (int k = 0; k < 2; ++k) layout.take(set.label[k], set.n), layout.take(set.order[k], set.n);
  layout.take(set.position, set.n);
  layout.take(set.first, set.n), layout.take(set.last, set.n), layout.take(set.own, set.n);
  layout.take(set.inverse, set.n);
  layout.take(set.unit, w.parts * rows * w.width);
  layout.take(set.tile_sum, int64_t{set.tiles} * w.width);
  set.sum[kPlus] = set.sum[kMinus] = nullptr, set.touched = nullptr;
  if (!gradient) return;
  layout.take(set.sum[kPlus], rows * w.width), layout.take(set.sum[kMinus], rows * w.width);
  layout.take(set.touched, int64_t{2} * set.tiles * w.slices);
}

// `gradient`: of x, of ref_x. Sizes are the same with and without a workspace.
Plan make_plan(const Problem& p, const bool (&gradient)[2], void* workspace, const Tuning& tuning) {
  Plan plan{};
  Work& w = plan.work;
  w.symmetric = p.symmetric, w.has_own = !p.symmetric && p.row_offset >= 0;
  w.per_side = p.per_side;
  w.d = p.d, w.row_offset = p.row_offset;
  w.width = static_cast<int>(round_up(std::max<int64_t>(p.d, 1), kDepth));
  w.slices = (w.width + kSlice - 1) / kSlice;
  w.parts = p.fp16 ? 1 : 2;
  w.partials = 2 * std::max(1, p.sm_count);
  for (int side = 0; side < 2; ++side)
    w.margin[side] = static_cast<float>(p.margin[side]), w.lambda[side] = p.lambda[side];
  for (int k = 0; k < 2; ++k) {
    bool rows = k == 0 || p.symmetric;
    w.set[k].x = rows ? p.x : p.ref_x, w.set[k].y = rows ? p.y : p.ref_y, w.set[k].n = rows ? p.n : p.m;
    w.set[k].tiles = static_cast<int>(round_up(w.set[k].n, kTile) / kTile);
    plan.side[k] = block_side(w.set[k].tiles, tuning.block);
  }
  Layout layout(workspace);
  lay_out(layout, w, w.set[0], gradient[0]);
  if (p.symmetric) w.set[1] = w.set[0];
  else lay_out(layout, w, w.set[1], gradient[1]);
  layout.take(w.state, 1), layout.take(w.partial, w.partials);
  int64_t tiles = int64_t{plan.side[0]} * plan.side[1];
  layout.take(w.record, tiles);
  layout.take(w.mask, gradient[0] || gradient[1] ? tiles * 2 * kTile : 0);
  layout.take(w.occupied, tiles * 2);
  plan.bytes = layout.used();
  return plan;
}

unsigned blocks(int64_t size, int64_t each) {
  return static_cast<unsigned>(std::max<int64_t>(1, (size + each - 1) / each));
}

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

cudaError_t prologue(const Work& w, Type type, bool gradient, const Tuning& tuning, cudaStream_t stream) {
  const unsigned sets = w.symmetric ? 1 : 2;
  cudaError_t error = sort_labels(w, sets, tuning, stream);
  if (error != cudaSuccess) return error;
  int tiles = std::max(w.set[0].tiles, w.set[1].tiles);
  auto kernel = type == Type::kHalf ? normalise<Half> : type == Type::kBFloat16 ? normalise<BFloat16>
      : normalise<float>;
  error = launch(kernel, dim3(blocks(int64_t{tiles} * kTile, kWarps), sets), dim3(kThreads), 0, stream, w);
  if (error != cudaSuccess || !gradient || tiles == 0) return error;
  dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(w.width / kDepth), sets);
  return launch(sum_tiles, grid, dim3(kThreads), kThreads * sizeof(float2), stream, w);
}

// Whether the device, its driver and the code compiled for it allow products by warpgroups; if so, describes x^ for
// them.
bool use_sm90(const Problem& p, Plan& plan) {
  const Work& w = plan.work;
  if (p.sm < 90 || p.sm > 99 || most_threads(similarity_sm90) < kThreadsSm90) return false;
  for (int k = 0; k < 2; ++k) {
    int64_t rows = int64_t{w.parts} * w.set[k].tiles * kTile;
    if (rows == 0 || rows + 2 * kTile > INT32_MAX || !describe(plan.maps.of[k], w.set[k].unit, rows,
        w.width)) return false;
  }
  return true;
}

cudaError_t one_block(const Plan& plan, const Block& block, cudaStream_t stream) {
  const Work& w = plan.work;
  int rows = block.i1 - block.i0, columns = block.j1 - block.j0;
  int64_t tiles = int64_t{rows} * columns;
  unsigned grid = static_cast<unsigned>(std::min<int64_t>(tiles, w.partials));
  cudaError_t error;
  if (plan.sm90) {  // one block of threads fills a multiprocessor
    grid = static_cast<unsigned>(std::min<int64_t>((tiles + 1) / 2, w.partials / 2));
    error = launch(similarity_sm90, dim3(grid), dim3(kThreadsSm90), sizeof(SimilaritySm90Memory), stream, w, block,
        plan.maps);
  } else {
    error = launch(similarity, dim3(grid), dim3(kThreads), sizeof(SimilarityMemory), stream, w, block);
  }
  int owners = (w.set[0].sum[0] != nullptr ? rows : 0) + (w.set[1].sum[0] != nullptr && !block.diagonal ? columns : 0);
  if (error != cudaSuccess || owners == 0) return error;
  auto kernel = plan.sm90 ? masked_sum_sm90 : masked_sum;
  return launch(kernel, dim3(static_cast<unsigned>(owners) * w.slices, 2), dim3(kThreads), sizeof(MaskedSumMemory),
      stream, w, block);
}

cudaError_t enqueue(const Plan& plan, Type type, cudaStream_t stream, const Tuning& tuning) {
  const Work& w = plan.work;
  cudaError_t error = prologue(w, type, w.set[0].sum[0] != nullptr || w.set[1].sum[0] != nullptr, tuning, stream);
  for (int i = 0; i < w.set[0].tiles; i += plan.side[0])
    for (int j = w.symmetric ? i : 0; j < w.set[1].tiles && error == cudaSuccess; j += plan.side[1]) {
      Block block{i, std::min(i + plan.side[0], w.set[0].tiles), j, std::min(j + plan.side[1], w.set[1].tiles),
          w.symmetric && i == j};
      error = one_block(plan, block, stream);
    }
  if (error != cudaSuccess) return error;
  int64_t rows = std::max(w.set[0].n, w.set[1].n);
  unsigned grid = static_cast<unsigned>(std::min<int64_t>(blocks(rows, kWarps), int64_t{4} * w.partials));
  return launch(finish, dim3(grid, w.symmetric ? 1 : 2, w.per_side ? 2 : 1), dim3(kThreads), kThreads * sizeof(Totals),
      stream, w);
}

// The gradients for which there is room in the workspace: all that the form of the problem can have.
int64_t bytes_of(const Problem& problem, const Tuning& tuning) {
  return make_plan(problem, {true, !problem.symmetric}, nullptr, tuning).bytes;
}

const char* run(const Problem& problem, const Result& result, void* workspace, cudaStream_t stream,
    const Tuning& tuning) {
  if (std::max(problem.n, problem.m) > (int64_t{1} << 31) - 2 * kTile) return "more than 2^31 - 256 embeddings";
  if (problem.d > 65535 * int64_t{kDepth}) return "embeddings of more than 4,194,240 dimensions";
  Plan plan = make_plan(problem, {result.grad_x != nullptr, !problem.symmetric && result.grad_ref != nullptr},
      workspace, tuning);
  Work& w = plan.work;
  w.set[0].grad = result.grad_x, w.set[1].grad = problem.symmetric ? result.grad_x : result.grad_ref;
  w.loss = result.loss, w.penalty = result.penalty, w.count = result.count;
  plan.sm90 = use_sm90(problem, plan);
  cudaError_t error = enqueue(plan, problem.type, stream, tuning);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t workspace_bytes(const Problem& problem) { return bytes_of(problem, {}); }

const char* tcm_loss(const Problem& problem, const Result& result, void* workspace, cudaStream_t stream) {
  return run(problem, result, workspace, stream, {});
}

}  // namespace tcm::cuda
