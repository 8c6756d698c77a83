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

constexpr int kStages = 2;
constexpr int kOperand = kTile * kDepth * 2;  // bytes of one operand of a step
constexpr int kGroup = 8;                     // row tiles that neighbouring blocks of threads share: see `Walk`

constexpr int kNoRow = INT32_MIN;             // as `own`: a row past the end, which is in no pair

// Shared memory of `similarity`.
struct SimilarityMemory {
  unsigned char stage[kStages][2][kOperand];  // [row, 16-byte chunk], chunks swizzled
  uint32_t mask[2][kTile][4];                 // bits of each row, of each column
  int first[kTile], last[kTile], own[kTile];  // of the tile's rows, as columns of the tile
  double penalty[2][kWarps];
  unsigned count[kWarps];                     // positives in the low half, negatives in the high half
};

// Chunk `c` (of 8 halves) of row `r`, rows of 128 bytes: eight rows of one chunk lie in eight different groups of banks.
__device__ __forceinline__ int swizzled(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

// The tiles of a block in order, every gridDim.x-th from blockIdx.x on; those below the diagonal are passed over. Eight
// row tiles go together, column by column: the tiles in work at one time then share rows and columns in L2.
struct Walk {
  Block block;  // clipped to the tiles that have valid rows
  int group = 0, offset = 0, i = 0, j = 0;

  __device__ Walk(const Work& w, const Block& b) : block(b), offset(static_cast<int>(blockIdx.x)) {
    block.i1 = min(b.i1, (w.state->valid[0] + kTile - 1) / kTile);
    block.j1 = min(b.j1, (w.state->valid[1] + kTile - 1) / kTile);
  }
  __device__ bool find() {  // the tile at `offset`, or the next one
    for (;;) {
      int top = block.i0 + kGroup * group;
      if (top >= block.i1) return false;
      int height = min(kGroup, block.i1 - top), left = block.diagonal ? top : block.j0;
      int size = height * max(0, block.j1 - left);
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

// Copies ahead: the stages of all tiles of a walk are one sequence, so that the next tile's first stage is under way
// while this one is scanned.
struct Loader {
  Walk walk;
  bool more;
  int step = 0, stage = 0;

  __device__ explicit Loader(const Walk& w) : walk(w), more(walk.find()) {}
  __device__ void operator()(const Work& w, SimilarityMemory& memory, int steps) {
    if (more) {
      int of_part = w.width / kDepth, part = step / of_part, column = step % of_part * kDepth;
      // parts 1: high high; 2: high low, low high, high high
      operand(w.set[0], memory.stage[stage][0], w.width, part == 1, walk.i, column);
      operand(w.set[1], memory.stage[stage][1], w.width, part == 0 && w.parts == 2, walk.j, column);
      if (++step == steps) step = 0, more = walk.next();
      stage = (stage + 1) % kStages;
    }
    copies_commit();
  }
  __device__ static void operand(const Set& set, unsigned char* to, int width, bool low_part, int tile, int column) {
    int64_t row = (low_part ? int64_t{set.tiles} * kTile : 0) + int64_t{tile} * kTile;
    const Half* from = set.unit + row * width + column;
    int r = threadIdx.x / 8, c = threadIdx.x % 8;
#pragma unroll
    for (int k = 0; k < kTile * 8 / kThreads; ++k, r += kThreads / 8)
      copy_16(to + swizzled(r, c), from + static_cast<int64_t>(r) * width + c * 8, 16);
  }
};

struct Tally {  // hard pairs
  int count[2] = {0, 0};
  float penalty[2] = {0, 0};
};

// The thread's 64 similarities: rows r = i * 16 + h * 8 of the warp's, columns j * 8 + e, from (row, column) on. Sums
// are taken as a tree, 9 additions deep. bits [i][h] has bit mask_bit(column in the warp's 32) for each hard pair.
// kPlain: all pairs are negatives that take part.
template <bool kPlain>
__device__ __forceinline__ Tally scan(const Work& w, const SimilarityMemory& memory, const float (&s)[4][4][4], int row,
                                      int column, int columns, uint32_t (&bits)[4][2]) {
  const float plus = w.margin[kPlus], minus = w.margin[kMinus];
  Tally tally;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float of_rows[2] = {0, 0};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int first = 0, last = 0, own = 0, end = columns;
      if constexpr (!kPlain) {
        int r = row + i * 16 + h * 8;
        first = memory.first[r], last = memory.last[r], own = memory.own[r];
        if (own == kNoRow) end = 0;
      }
      float of_row[2] = {0, 0};
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float of_two[2] = {0, 0};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float value = s[i][j][2 * h + e];
          uint32_t bit = 1u << (j * 4 + 16 * e);
          if constexpr (kPlain) {
            bool hard = value >= minus;
            word |= hard ? bit : 0;
            of_two[kMinus] += hard ? value - minus : 0.0f;
          } else {
            int c = column + j * 8 + e;
            bool pair = c < end && c != own, positive = first <= c && c < last;
            bool hard = pair && (positive ? value <= plus : value >= minus);
            word |= hard ? bit : 0;
            tally.count[kPlus] += hard && positive;
            of_two[kPlus] += hard && positive ? plus - value : 0.0f;
            of_two[kMinus] += hard && !positive ? value - minus : 0.0f;
          }
        }
        of_row[kPlus] += of_two[kPlus], of_row[kMinus] += of_two[kMinus];
      }
      of_rows[kPlus] += of_row[kPlus], of_rows[kMinus] += of_row[kMinus];
      bits[i][h] = word;
      tally.count[kMinus] += __popc(word);
    }
    tally.penalty[kPlus] += of_rows[kPlus], tally.penalty[kMinus] += of_rows[kMinus];
  }
  tally.count[kMinus] -= tally.count[kPlus];
  return tally;
}

// The warp's bits (of `scan`; 64 x 32 pairs) to memory.mask, as rows and as columns. A word of a row is shared by the
// four lanes of its columns, one of a column by the eight lanes of its rows.
__device__ __forceinline__ void write_masks(SimilarityMemory& memory, const uint32_t (&bits)[4][2], int row, int column) {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
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

__global__ void __launch_bounds__(kThreads, 2) similarity(const __grid_constant__ Work w, const __grid_constant__ Block block) {
  SimilarityMemory& memory = *reinterpret_cast<SimilarityMemory*>(shared_memory());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
  const int of_part = w.width / kDepth, steps = of_part * (w.parts == 2 ? 3 : 1);
  const bool keep = w.set[0].sum[0] != nullptr || w.set[1].sum[0] != nullptr;

  Walk walk(w, block);
  Loader load(walk);
  for (int k = 0; k < kStages - 1; ++k) load(w, memory, steps);
  int stage = 0;
  Partial total = {};  // of thread 0
  for (bool more = walk.find(); more; more = walk.next()) {
    const int rows = valid_rows(w.state->valid[0], walk.i), columns = valid_rows(w.state->valid[1], walk.j);

    // 1. The product.
    float s[4][4][4] = {};
    for (int step = 0; step < steps; ++step) {
      copies_wait<kStages - 2>();
      __syncthreads();  // the stage is there for all, and the one that is loaded next has been read by all
      load(w, memory, steps);
      const unsigned char *a_stage = memory.stage[stage][0], *b_stage = memory.stage[stage][1];
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        uint32_t a[4][4], b[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) load_matrices<false>(a[i], a_stage + swizzled(warp_row + i * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < 2; ++j)
          load_matrices<false>(b[j], b_stage + swizzled(warp_column + j * 16 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) multiply_add(s[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
      stage = (stage + 1) % kStages;
      if (step + 1 == 2 * of_part) {  // only with two parts
#pragma unroll
        for (int k = 0; k < 64; ++k) s[k / 16][k / 4 % 4][k % 4] *= 1 / kLowScale;
      }
    }

    // 2. Which pairs are not plain negatives: the rows' positives and the row itself among these columns, and padding.
    bool special = rows < kTile || columns < kTile;
    if (thread < kTile) {
      int64_t row = static_cast<int64_t>(walk.i) * kTile + thread, left = static_cast<int64_t>(walk.j) * kTile;
      bool valid = thread < rows;
      int first = valid ? static_cast<int>(w.set[0].first[row] - left) : 0;
      int last = valid ? static_cast<int>(w.set[0].last[row] - left) : 0;
      int own = !valid ? kNoRow : w.set[0].own[row] < 0 ? -1 : static_cast<int>(w.set[0].own[row] - left);
      special |= (first < last && first < kTile && last > 0) || (0 <= own && own < kTile);
      memory.first[thread] = first, memory.last[thread] = last, memory.own[thread] = own;
    }
    special = __syncthreads_or(special);

    // 3. The scan, and the tile's totals.
    uint32_t bits[4][2];
    Tally tally;
    int row = warp_row + lane / 4, column = warp_column + lane % 4 * 2;
    if (special) {
      tally = scan<false>(w, memory, s, row, column, columns, bits);
    } else {
      tally = scan<true>(w, memory, s, row, column, columns, bits);
    }
    unsigned both = static_cast<unsigned>(tally.count[kPlus]) | static_cast<unsigned>(tally.count[kMinus]) << 16;
    for (int k = 16; k > 0; k /= 2) both += __shfl_xor_sync(~0u, both, k);
    if (both != 0) {
      for (int side = 0; side < 2; ++side) {
        double penalty = warp_sum(tally.penalty[side]);
        if (lane == 0) memory.penalty[side][warp] = penalty;
      }
    }
    if (lane == 0) memory.count[warp] = both;
    __syncthreads();
    int count[2] = {0, 0};
    for (int k = 0; k < kWarps; ++k) count[kPlus] += memory.count[k] & 0xffff, count[kMinus] += memory.count[k] >> 16;
    int tile = block.tile(walk.i, walk.j);
    if (thread == 0) {
      int pairs = w.symmetric && walk.i != walk.j ? 2 : 1;  // (j, i) too
      for (int side = 0; side < 2; ++side) {
        total.count[side] += static_cast<int64_t>(pairs) * count[side];
        for (int k = 0; k < kWarps; ++k)
          if (memory.count[k] != 0) total.penalty[side] += pairs * memory.penalty[side][k];
      }
      w.record[tile] = make_int2(count[kPlus], count[kMinus]);
    }

    // 4. The masks of a tile that is neither empty nor full.
    int all = rows * columns;
    if (!keep || count[kPlus] + count[kMinus] == 0 || count[kPlus] == all || count[kMinus] == all) continue;
    write_masks(memory, bits, warp_row, warp_column);
    __syncthreads();
    int side = thread / kTile, k = thread % kTile;
    uint4 mask = *reinterpret_cast<const uint4*>(memory.mask[side][k]);
    w.mask[(static_cast<int64_t>(tile) * 2 + side) * kTile + k] = mask;
    unsigned occupied = __ballot_sync(~0u, (mask.x | mask.y | mask.z | mask.w) != 0);
    if (lane == 0) reinterpret_cast<unsigned*>(w.occupied)[(tile * 2 + side) * 4 + k / 32] = occupied;
  }
  copies_wait<0>();
  if (thread == 0) {
    Partial& partial = w.partial[blockIdx.x];
    for (int side = 0; side < 2; ++side) {
      partial.penalty[side] += total.penalty[side];
      partial.count[side] += total.count[side];
    }
  }
}

}  // namespace
}  // namespace tcm::cuda
