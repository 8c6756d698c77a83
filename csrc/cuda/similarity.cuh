// Similarities of a rectangle of tiles: a product by mma.sync, each tile then seen by a visitor (of tile.cuh, say).
//
// A tile is 128 x 128, each of 8 warps makes 64 x 32 of it (64 accumulators per thread), in steps of 64 columns of x^.
// With two blocks of threads on a multiprocessor (68 KB of shared memory, at most 128 registers each) the one computes
// while the other waits or scans. 2 * 128^2 * D flop per tile against 2 * 128 * D * 2 bytes from L2: 32 bytes per cycle on
// an A100 (1,024 multiplications a cycle and multiprocessor), of about 47. For fp32 accuracy the product runs over 3 D
// columns: high low + low high first, then scaled down, then high high on top; no second accumulator, and 3.0 times the
// work.
#pragma once

#include "tile.cuh"

namespace tcm::cuda {
namespace {

constexpr int kOperand = kTile * kDepth * 2;  // bytes of one operand of a step

using Stages = unsigned char[2][2][kOperand];  // [row, 16-byte chunk], chunks swizzled

// Shared memory of `similarity`.
template <class Visitor>
struct SimilarityMemory {
  Stages stage;
  typename Visitor::template Memory<1> tile;
};

// Chunk `c` (of 8 halves) of row `r`, rows of 128 bytes: eight rows of one chunk lie in eight different groups of
// banks.
__device__ __forceinline__ int swizzled(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

__device__ __forceinline__ void load_operand(const Embeddings& set, unsigned char* to, int width, bool low_part,
                                             int tile, int column) {
  int64_t row = (low_part ? int64_t{set.tiles} * kTile : 0) + int64_t{tile} * kTile;
  int r = threadIdx.x / 8, c = threadIdx.x % 8;
  const Half* from = set.unit + (row + r) * width + column + c * 8;
  unsigned char* at = to + swizzled(r, c);  // rows of the same number modulo 8 are swizzled alike
#pragma unroll
  for (int k = 0; k < kTile * 8 / kThreads; ++k)
    copy_16(at + k * kThreads / 8 * 128, from + static_cast<int64_t>(k * kThreads / 8) * width, 16);
}

// Starts the copies of step `step` of a tile's product. One part: high high; two: high low, low high, high high.
__device__ __forceinline__ void load_step(const Work& w, Stages& memory, int stage, int i, int j, int step) {
  int of_part = w.width / kDepth, part = (step >= of_part) + (step >= 2 * of_part);
  int column = (step - part * of_part) * kDepth;
  load_operand(w.set[0], memory[stage][0], w.width, part == 1, i, column);
  load_operand(w.set[1], memory[stage][1], w.width, part == 0 && w.parts == 2, j, column);
}

template <class Visitor>
__global__ void __launch_bounds__(kThreads, 2)
    similarity(const __grid_constant__ Work w, const __grid_constant__ Rectangle rectangle,
               const __grid_constant__ Visitor visitor) {
  auto& memory = *reinterpret_cast<SimilarityMemory<Visitor>*>(shared_memory());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
  const int of_part = w.width / kDepth, steps = of_part * (w.parts == 2 ? 3 : 1);

  // The steps of all tiles are one sequence, copied one step ahead: a tile's first one while the last tile is scanned.
  typename Visitor::template Order<1> order(w, rectangle);
  bool more = order.find();
  if (more) load_step(w, memory.stage, 0, order.i, order.j, 0);
  copies_commit();
  visitor.template begin<kRows>(w, memory.tile);
  int stage = 0;
  [[maybe_unused]] Trial trial;
  while (more) {
    const int tile_i = order.i, tile_j = order.j;
    more = order.next();

    // 1. The product.
    float s[4][4][4] = {};
    for (int step = 0; step < steps; ++step) {
      copies_wait<0>();
      __syncthreads();  // the stage is there for all, and the other one has been read by all
      if (step + 1 < steps) load_step(w, memory.stage, 1 - stage, tile_i, tile_j, step + 1);
      else if (more) load_step(w, memory.stage, 1 - stage, order.i, order.j, 0);
      copies_commit();
      // Lane's row and chunk of the operands at k = 0. The chunk of k is that one with 2 k exclusive-or'ed, which is
      // left to the loop: eight invariant addresses would cost more registers than there are.
      const int a_at = (stage * 2 + 0) * kOperand + swizzled(warp_row + lane % 16, lane / 16);
      const int b_at = (stage * 2 + 1) * kOperand + swizzled(warp_column + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        uint32_t a[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) load_matrices<false>(a[i], memory.stage[0][0] + (a_at ^ k << 5) + i * 16 * 128);
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          uint32_t b[4];
          load_matrices<false>(b, memory.stage[0][0] + (b_at ^ k << 5) + j * 8 * 128);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            multiply_add(s[i][j], a[i], b[0], b[1]);
            multiply_add(s[i][j + 1], a[i], b[2], b[3]);
          }
        }
      }
      stage = 1 - stage;
      if (step + 1 == 2 * of_part) {  // only with two parts
#pragma unroll
        for (int k = 0; k < 64; ++k) s[k / 16][k / 4 % 4][k % 4] *= 1 / kLowScale;
      }
    }

    const auto prepared = visitor.template prepare<kRows>(w, memory.tile, tile_i, tile_j);
    const auto visit = [&] {
      return visitor.template visit<kRows>(w, rectangle, memory.tile, reinterpret_cast<float (&)[1][4][4][4]>(s),
                                           tile_i, tile_j, prepared);
    };
    if constexpr (!Visitor::kScreens) {
      visit();
    } else if (trial.over(visit()) && trial.failed()) {
      if (thread == 0 && more) visitor.leave(w, rectangle, order);
      break;
    }
  }
  copies_wait<0>();
  visitor.template end<kRows>(w, memory.tile);
}

}  // namespace
}  // namespace tcm::cuda
