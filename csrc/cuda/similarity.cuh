// Similarities of a block of tiles: a product by mma.sync, its hard pairs counted, summed and kept as bits.
//
// A tile is 128 x 128, each of 8 warps makes 64 x 32 of it (64 accumulators a thread), in steps of 64 columns of x^.
// With two blocks of threads a multiprocessor (68 KB of shared memory, at most 128 registers each) the one computes while
// the other waits or scans. 2 * 128^2 * D flop a tile against 2 * 128 * D * 2 bytes from L2: 32 bytes a cycle on an A100
// (1,024 multiplications a cycle and multiprocessor), of about 47. For fp32 accuracy the product runs over 3 D columns:
// high low + low high first, then scaled down, then high high on top; no second accumulator, and 3.0 times the work.
#pragma once

#include "work.h"

namespace tcm::cuda {
namespace {

constexpr int kOperand = kTile * kDepth * 2;  // bytes of one operand of a step
constexpr int kGroup = 8;                     // row tiles that neighbouring blocks of threads share: see `Walk`

// Shared memory of `similarity`.
struct SimilarityMemory {
  unsigned char stage[2][2][kOperand];  // [row, 16-byte chunk], chunks swizzled
  uint32_t mask[2][kTile][4];                 // pairs of each row: positives, negatives; then hard pairs: rows, columns
  double penalty[2][kWarps];
  unsigned count[kWarps];                     // positives in the low half, negatives in the high half
  Partial total;                              // of all tiles so far
};

// Chunk `c` (of 8 halves) of row `r`, rows of 128 bytes: eight rows of one chunk lie in eight different groups of banks.
__device__ __forceinline__ int swizzled(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

// The tiles of a block in order, every gridDim.x-th from blockIdx.x on; those below the diagonal are passed over. Eight
// row tiles go together, column by column: the tiles in work at one time then share rows and columns in L2.
struct Walk {
  const Work& w;
  const Block& block;
  int group = 0, offset = static_cast<int>(blockIdx.x), i = 0, j = 0;

  __device__ Walk(const Work& of, const Block& in) : w(of), block(in) {}
  __device__ bool find() {  // the tile at `offset`, or the next one; those without a valid row are left out
    const int i1 = min(block.i1, (w.state->valid[0] + kTile - 1) / kTile);
    const int j1 = min(block.j1, (w.state->valid[1] + kTile - 1) / kTile);
    for (;;) {
      int top = block.i0 + kGroup * group;
      if (top >= i1) return false;
      int height = min(kGroup, i1 - top), left = block.diagonal ? top : block.j0;
      int size = height * max(0, j1 - left);
      if (offset >= size) {
        offset -= size, ++group;
        continue;
      }
      i = top + offset % height, j = left + offset / height;
      if (!block.diagonal || i <= j) return true;
      offset += static_cast<int>(gridDim.x);
    }
  }
  __device__ bool next() {
    offset += static_cast<int>(gridDim.x);
    return find();
  }
};

__device__ __forceinline__ void load_operand(const Set& set, unsigned char* to, int width, bool low_part, int tile, int column) {
  int64_t row = (low_part ? int64_t{set.tiles} * kTile : 0) + int64_t{tile} * kTile;
  int r = threadIdx.x / 8, c = threadIdx.x % 8;
  const Half* from = set.unit + (row + r) * width + column + c * 8;
  unsigned char* at = to + swizzled(r, c);  // rows of the same number modulo 8 are swizzled alike
#pragma unroll
  for (int k = 0; k < kTile * 8 / kThreads; ++k)
    copy_16(at + k * kThreads / 8 * 128, from + static_cast<int64_t>(k * kThreads / 8) * width, 16);
}

// Starts the copies of step `step` of a tile's product. One part: high high; two: high low, low high, high high.
__device__ __forceinline__ void load_step(const Work& w, SimilarityMemory& memory, int stage, int i, int j, int step) {
  int of_part = w.width / kDepth, part = (step >= of_part) + (step >= 2 * of_part);
  int column = (step - part * of_part) * kDepth;
  load_operand(w.set[0], memory.stage[stage][0], w.width, part == 1, i, column);
  load_operand(w.set[1], memory.stage[stage][1], w.width, part == 0 && w.parts == 2, j, column);
}

// Counts and sums the hard pairs of one side among the thread's 64 similarities, those of rows i * 16 + h * 8 and columns
// j * 8 + e from its own place on: `place` is its row, lane % 4 * 2 its column in word `word` of the masks. The sum is
// taken as a tree, 9 additions deep. A hard pair's bit is set in bits [i][h], shifted by lane % 4.
// kAll: all pairs are negatives; else memory.mask [side] tells which pairs are of the side.
template <int kSide, bool kAll>
__device__ __forceinline__ void scan(float margin, const SimilarityMemory& memory, const float (&s)[4][4][4], int place, int word,
                                     uint32_t (&bits)[4][2], int& count, float& penalty) {
  penalty = 0, count = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float of_rows = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t pairs = kAll ? ~0u : memory.mask[kSide][place + i * 16 + h * 8][word] >> threadIdx.x % 4;
      float of_row = 0;
      uint32_t hard = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float of_two = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t bit = 1u << mask_bit(j * 8 + e);
          const float value = s[i][j][2 * h + e];
          float over = kSide == kPlus ? margin - value : value - margin;  // hard if not negative: its sign is exact
          if (!(pairs & bit)) over = -1.0f;
          hard |= over >= 0.0f ? bit : 0;
          of_two += max(over, 0.0f);
        }
        of_row += of_two;
      }
      of_rows += of_row;
      bits[i][h] |= hard;
      count += __popc(hard);
    }
    penalty += of_rows;
  }
}

// The warp's bits (of `scan`; 64 x 32 pairs) to memory.mask, as rows and as columns. A word of a row is shared by the
// four lanes of its columns, one of a column by the eight lanes of its rows.
__device__ __forceinline__ void write_masks(SimilarityMemory& memory, const uint32_t (&bits)[4][2], int row, int column) {
  const int lane = afresh(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t word = bits[i][h] << t;
      word |= __shfl_xor_sync(~0u, word, 1);
      word |= __shfl_xor_sync(~0u, word, 2);
      if (t == 0) memory.mask[0][row + i * 16 + h * 8 + g][column / 32] = word;
    }
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // 32 rows
        uint32_t word = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          int i = 2 * half + k / 2, h = k % 2;
          word |= (bits[i][h] >> (j * 4 + 16 * e) & 1) << (k / 2 * 8 + h * 4);  // mask_bit(16 * (k / 2) + 8 * h)
        }
        word <<= mask_bit(g);
        word |= __shfl_xor_sync(~0u, word, 4);
        word |= __shfl_xor_sync(~0u, word, 8);
        word |= __shfl_xor_sync(~0u, word, 16);
        if (g == 0) memory.mask[1][column + j * 8 + t * 2 + e][row / 32 + half] = word;
      }
}

// Whether a tile holds more than plain negatives; if so, memory.mask tells which pairs are positives and which negatives.
// A row's positives are a range of columns; it has no pair with itself; padding has none. For all threads of the block.
__device__ __forceinline__ bool note_pairs(const Work& w, SimilarityMemory& memory, int tile_i, int tile_j, int rows, int columns) {
  const int thread = afresh(threadIdx.x), row = tile_i * kTile + thread, left = tile_j * kTile;
  const bool valid = thread < rows;
  int first = 0, last = 0, own = -1;
  if (valid) first = w.set[0].first[row] - left, last = w.set[0].last[row] - left, own = w.set[0].own[row] - left;
  bool special = rows < kTile || columns < kTile || (first < min(last, kTile) && last > 0) || (0 <= own && own < kTile);
  special = __syncthreads_or(special);
  if (!special) return false;
  if (thread < kTile)
    for (int k = 0; k < 4; ++k) {
      uint32_t pairs = mask_range(0, valid ? columns - 32 * k : 0) & ~mask_range(own - 32 * k, own - 32 * k + 1);
      uint32_t same = mask_range(first - 32 * k, last - 32 * k);
      memory.mask[kPlus][thread][k] = pairs & same, memory.mask[kMinus][thread][k] = pairs & ~same;
    }
  __syncthreads();
  return true;
}

// Counts and sums the hard pairs of tile (tile_i, tile_j), whose similarities the threads hold; writes its record, and
// the masks of a tile that is neither empty nor full.
__device__ __forceinline__ void examine(const Work& w, const Block& block, SimilarityMemory& memory, const float (&s)[4][4][4],
                                        int tile_i, int tile_j) {
  const int rows = valid_rows(w.state->valid[0], tile_i), columns = valid_rows(w.state->valid[1], tile_j);
  const bool special = note_pairs(w, memory, tile_i, tile_j, rows, columns);
  const int thread = afresh(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32, row = warp_row + lane / 4;
  uint32_t bits[4][2] = {};
  int found[2] = {0, 0};
  float excess[2] = {0, 0};
  if (special) {
    scan<kMinus, false>(w.margin[kMinus], memory, s, row, warp % 4, bits, found[kMinus], excess[kMinus]);
    scan<kPlus, false>(w.margin[kPlus], memory, s, row, warp % 4, bits, found[kPlus], excess[kPlus]);
  } else {
    scan<kMinus, true>(w.margin[kMinus], memory, s, row, warp % 4, bits, found[kMinus], excess[kMinus]);
  }

  unsigned both = static_cast<unsigned>(found[kPlus]) | static_cast<unsigned>(found[kMinus]) << 16;
  for (int k = 16; k > 0; k /= 2) both += __shfl_xor_sync(~0u, both, k);
  if (both != 0)
    for (int side = 0; side < 2; ++side) {
      double penalty = warp_sum(excess[side]);
      if (lane == 0) memory.penalty[side][warp] = penalty;
    }
  if (lane == 0) memory.count[warp] = both;
  __syncthreads();
  int count[2] = {0, 0};
  for (int k = 0; k < kWarps; ++k) count[kPlus] += memory.count[k] & 0xffff, count[kMinus] += memory.count[k] >> 16;
  const int tile = block.tile(tile_i, tile_j), all = rows * columns;
  if (thread == 0) {
    int pairs = w.symmetric && tile_i != tile_j ? 2 : 1;  // (j, i) too
    for (int side = 0; side < 2; ++side) {
      memory.total.count[side] += static_cast<int64_t>(pairs) * count[side];
      for (int k = 0; k < kWarps; ++k)
        if (memory.count[k] != 0) memory.total.penalty[side] += pairs * memory.penalty[side][k];
    }
    w.record[tile] = make_int2(count[kPlus], count[kMinus]);
  }

  const bool keep = w.set[0].sum[0] != nullptr || w.set[1].sum[0] != nullptr;
  if (!keep || count[kPlus] + count[kMinus] == 0 || count[kPlus] == all || count[kMinus] == all) return;
  write_masks(memory, bits, warp_row, warp_column);
  __syncthreads();
  const int side = thread / kTile, k = thread % kTile;
  const uint4 mask = *reinterpret_cast<const uint4*>(memory.mask[side][k]);
  w.mask[(static_cast<int64_t>(tile) * 2 + side) * kTile + k] = mask;
  const unsigned occupied = __ballot_sync(~0u, (mask.x | mask.y | mask.z | mask.w) != 0);
  if (lane == 0) reinterpret_cast<unsigned*>(w.occupied)[(tile * 2 + side) * 4 + k / 32] = occupied;
}

__global__ void __launch_bounds__(kThreads, 2) similarity(const __grid_constant__ Work w, const __grid_constant__ Block block) {
  SimilarityMemory& memory = *reinterpret_cast<SimilarityMemory*>(shared_memory());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
  const int of_part = w.width / kDepth, steps = of_part * (w.parts == 2 ? 3 : 1);

  // The steps of all tiles are one sequence, copied one step ahead: a tile's first one while the last tile is scanned.
  Walk walk(w, block);
  bool more = walk.find();
  if (more) load_step(w, memory, 0, walk.i, walk.j, 0);
  copies_commit();
  if (thread == 0) memory.total = {};
  int stage = 0;
  while (more) {
    const int tile_i = walk.i, tile_j = walk.j;
    more = walk.next();

    // 1. The product.
    float s[4][4][4] = {};
    for (int step = 0; step < steps; ++step) {
      copies_wait<0>();
      __syncthreads();  // the stage is there for all, and the other one has been read by all
      if (step + 1 < steps) load_step(w, memory, 1 - stage, tile_i, tile_j, step + 1);
      else if (more) load_step(w, memory, 1 - stage, walk.i, walk.j, 0);
      copies_commit();
      // Lane's row and chunk of the operands at k = 0. The chunk of k is that one with 2 k exclusive-or'ed, which is left
      // to the loop: eight invariant addresses would cost more registers than there are.
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

    examine(w, block, memory, s, tile_i, tile_j);
  }
  copies_wait<0>();
  if (thread == 0) {
    Partial& partial = w.partial[blockIdx.x];
    for (int side = 0; side < 2; ++side) {
      partial.penalty[side] += memory.total.penalty[side];
      partial.count[side] += memory.total.count[side];
    }
  }
}

}  // namespace
}  // namespace tcm::cuda
