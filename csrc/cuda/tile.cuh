// The work on the similarities of a tile, whichever way they were made: 256 threads, the workers, hold 64 each.
//
// Two ways to hold them, by warp w, g = lane / 4 and t = lane % 4. Value [i][j][2 h + e] of a thread is
//   kRows     row w / 4 * 64 + i * 16 + h * 8 + g, column w % 4 * 32 + j * 8 + 2 t + e   (mma.sync, 64 x 32 per warp)
//   kColumns  row w * 16 + h * 8 + g,              column i * 32 + j * 8 + 2 t + e        (wgmma, 16 x 128 per warp)
#pragma once

#include "work.h"

namespace tcm::cuda {
namespace {

constexpr int kGroup = 8;  // row tiles that neighbouring blocks of threads share: see `TileOrder`

enum Held { kRows, kColumns };

struct LossMemory {
  uint32_t mask[2][kTile][4];          // pairs of each row: positives, negatives; then hard pairs: rows, columns
  alignas(16) unsigned count[kWarps];  // of a tile: positives in the low half, negatives in the high half
  Partial total[kWarps];               // of all tiles so far; each the first lane's of its warp
  float margin[2];
};

// The tiles of a rectangle in order, kAcross neighbours of a row at a time, every gridDim.x-th of these from blockIdx.x on;
// those wholly below the diagonal are passed over. Eight row tiles go together, column by column: the tiles in work at
// one time then share rows and columns in L2.
template <int kAcross>
struct TileOrder {
  const Work& w;
  const Rectangle& rectangle;
  int group = 0, offset = static_cast<int>(blockIdx.x), i = 0, j = 0;

  __device__ TileOrder(const Work& of, const Rectangle& in) : w(of), rectangle(in) {}
  __device__ bool find() {  // the tile at `offset`, or the next one; those without a valid row are left out
    const int i1 = min(rectangle.i1, (w.state->valid[0] + kTile - 1) / kTile);
    const int j1 = min(rectangle.j1, (w.state->valid[1] + kTile - 1) / kTile);
    for (;;) {
      int top = rectangle.i0 + kGroup * group;
      if (top >= i1) return false;
      int height = min(kGroup, i1 - top), left = rectangle.diagonal ? top : rectangle.j0;
      int size = height * max(0, (j1 - left + kAcross - 1) / kAcross);
      if (offset >= size) {
        offset -= size, ++group;
        continue;
      }
      i = top + offset % height, j = left + offset / height * kAcross;
      if (!rectangle.diagonal || i < j + kAcross) return true;
      offset += static_cast<int>(gridDim.x);
    }
  }
  __device__ bool next() {
    offset += static_cast<int>(gridDim.x);
    return find();
  }
};

template <Held kHeld>
__device__ __forceinline__ int worker() {
  return static_cast<int>(threadIdx.x) - (kHeld == kColumns ? 128 : 0);
}

// Counts and sums the hard pairs of one side among a thread's similarities. The sum is taken as a tree, 9 additions
// deep. Bit j * 4 + 16 e of bits [i][h] is set for a hard pair: its mask_bit in its word of the row, lowered by t.
// kAll: all pairs are negatives; else memory.mask [side] tells which pairs are of the side.
template <Held kHeld, int kSide, bool kAll>
__device__ __forceinline__ void scan(float margin, const LossMemory& memory, const float (&s)[4][4][4], int warp,
                                     int lane, uint32_t (&bits)[4][2], int& count, float& penalty) {
  penalty = 0, count = 0;
  const int row = (kHeld == kRows ? warp / 4 * 64 : warp * 16) + lane / 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float of_rows = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t pairs = ~0u;
      if constexpr (!kAll) {
        if constexpr (kHeld == kRows) pairs = memory.mask[kSide][row + i * 16 + h * 8][warp % 4] >> lane % 4;
        else pairs = memory.mask[kSide][row + h * 8][i] >> lane % 4;
      }
      float of_row = 0;
      uint32_t hard = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float of_two = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t bit = 1u << mask_bit(j * 8 + e);
          const float value = s[i][j][2 * h + e];
          float violation = kSide == kPlus ? margin - value : value - margin;  // its sign is exact
          if (!(pairs & bit)) violation = -1.0f;
          hard |= violation >= 0.0f ? bit : 0;
          of_two += max(violation, 0.0f);
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

// The whole word, of which the lanes of equal lane % 4, or of equal lane / 4, have a part each.
__device__ __forceinline__ uint32_t join_rows(uint32_t word) {
  word |= __shfl_xor_sync(~0u, word, 4);
  word |= __shfl_xor_sync(~0u, word, 8);
  return word | __shfl_xor_sync(~0u, word, 16);
}
__device__ __forceinline__ uint32_t join_columns(uint32_t word) {
  word |= __shfl_xor_sync(~0u, word, 1);
  return word | __shfl_xor_sync(~0u, word, 2);
}

// The workers' bits (of `scan`) to memory.mask, as rows and as columns.
template <Held kHeld>
__device__ __forceinline__ void write_masks(LossMemory& memory, const uint32_t (&bits)[4][2], int warp, int lane) {
  const int g = lane / 4, t = lane % 4, row = kHeld == kRows ? warp / 4 * 64 : warp * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t word = join_columns(bits[i][h] << t);
      if (t != 0) continue;
      if constexpr (kHeld == kRows) memory.mask[0][row + i * 16 + h * 8 + g][warp % 4] = word;
      else memory.mask[0][row + h * 8 + g][i] = word;
    }
  if constexpr (kHeld == kRows) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // 32 rows
          uint32_t word = 0;
#pragma unroll
          for (int k = 0; k < 4; ++k)  // mask_bit of row 16 * (k / 2) + 8 * (k % 2)
            word |= (bits[2 * half + k / 2][k % 2] >> mask_bit(j * 8 + e) & 1) << (k / 2 * 8 + k % 2 * 4);
          word = join_rows(word << mask_bit(g));
          if (g == 0) memory.mask[1][warp % 4 * 32 + j * 8 + t * 2 + e][row / 32 + half] = word;
        }
  } else {
    // A warp has 16 of a word's 32 rows: in even warps bytes 0 and 2, in odd ones 1 and 3. Two columns are joined at
    // once.
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t word = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int h = 0; h < 2; ++h) word |= (bits[i][h] >> mask_bit(j * 8 + e) & 1) << (e * 8 + h * 4);
        word = join_rows(word << mask_bit(g));
        if (g != 0) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint8_t* bytes = reinterpret_cast<uint8_t*>(&memory.mask[1][i * 32 + j * 8 + t * 2 + e][warp / 2]);
          bytes[warp % 2] = static_cast<uint8_t>(word >> e * 8);
          bytes[warp % 2 + 2] = static_cast<uint8_t>(word >> (e * 8 + 16));
        }
      }
  }
}

// Of a tile's row: the columns of its positives, first <= column < last, and its own column, which need not be in the tile.
struct RowPairs {
  bool valid;
  int first = 0, last = 0, own = -1;
};

// Whether a tile holds more than plain negatives, for all workers; and what the thread's row has to do with it.
template <Held kHeld>
__device__ __forceinline__ bool is_special(const Work& w, int tile_i, int tile_j, int rows, int columns,
                                           RowPairs& pairs) {
  const int thread = afresh(worker<kHeld>()), row = tile_i * kTile + thread, left = tile_j * kTile;
  pairs.valid = thread < rows;
  if (pairs.valid) {
    pairs.first = w.set[0].first[row] - left, pairs.last = w.set[0].last[row] - left;
    pairs.own = w.set[0].own[row] - left;
  }
  const bool positives = pairs.first < min(pairs.last, kTile) && pairs.last > 0;
  return workers_any(rows < kTile || columns < kTile || positives || (0 <= pairs.own && pairs.own < kTile));
}

// Whether a tile holds more than plain negatives; if so, `mask` tells which pairs are positives and which negatives. A
// row's positives are a range of columns; it has no pair with itself (kAbove: nor with a row before it); padding has
// none. For all workers.
template <Held kHeld, bool kAbove = false>
__device__ __forceinline__ bool note_pairs(const Work& w, uint32_t (&mask)[2][kTile][4], int tile_i, int tile_j,
                                           int rows, int columns) {
  RowPairs row;
  if (!is_special<kHeld>(w, tile_i, tile_j, rows, columns, row)) return false;
  const int thread = afresh(worker<kHeld>());
  if (thread < kTile)
    for (int k = 0; k < 4; ++k) {
      uint32_t pairs = mask_range(0, row.valid ? columns - 32 * k : 0);
      pairs &= ~mask_range(kAbove ? 0 : row.own - 32 * k, row.own - 32 * k + 1);
      uint32_t same = mask_range(row.first - 32 * k, row.last - 32 * k);
      mask[kPlus][thread][k] = pairs & same, mask[kMinus][thread][k] = pairs & ~same;
    }
  workers_sync();
  return true;
}

// The largest of a thread's similarities, as four chains.
__device__ __forceinline__ float largest(const float (&s)[4][4][4]) {
  float top[4] = {s[0][0][0], s[0][0][1], s[0][0][2], s[0][0][3]};
#pragma unroll
  for (int k = 4; k < 64; ++k) top[k % 4] = max(top[k % 4], s[k / 16][k / 4 % 4][k % 4]);
  return max(max(top[0], top[1]), max(top[2], top[3]));
}

// Adds a tile's hard pairs that the warp has found, which stand for `times` as many, to its totals. The result: positives
// in the low half, negatives in the high half.
__device__ __forceinline__ unsigned add_to_totals(LossMemory& memory, int warp, int lane, int times,
                                                  const int (&found)[2], const float (&penalty)[2]) {
  unsigned both = static_cast<unsigned>(found[kPlus]) | static_cast<unsigned>(found[kMinus]) << 16;
  if (!__any_sync(~0u, both != 0)) return 0;
  for (int k = 16; k > 0; k /= 2) both += __shfl_xor_sync(~0u, both, k);
  for (int side = 0; side < 2; ++side) {
    const double of_warp = warp_sum(penalty[side]);
    if (lane != 0) continue;
    memory.total[warp].penalty[side] += times * of_warp;
    memory.total[warp].count[side] += times * static_cast<int64_t>(both >> side * 16 & 0xffff);
  }
  return both;
}

// Tells `masked_sum` that the tile of G of this side has something to add.
__device__ __forceinline__ void mark(const Embeddings& set, int tile, int side, int rectangle) {
  if (set.marked != nullptr) atomicMax(set.marked + side * set.tiles + tile, rectangle);
}

// Writes a tile's record.
__device__ __forceinline__ void write_record(const Work& w, const Rectangle& rectangle, int tile_i, int tile_j,
                                             const int (&count)[2]) {
  w.record[rectangle.tile(tile_i, tile_j)] = make_int2(count[kPlus], count[kMinus]);
  for (int side = 0; side < 2; ++side)
    if (count[side] != 0) {
      mark(w.set[0], tile_i, side, rectangle.number);
      mark(w.set[1], tile_j, side, rectangle.number);
    }
}

// The masks of memory.mask to the workspace, and which rows and columns have a hard pair.
__device__ __forceinline__ void store_masks(const Work& w, const LossMemory& memory, int tile, int thread) {
  const int of = thread / kTile, k = thread % kTile;
  const uint4 mask = *reinterpret_cast<const uint4*>(memory.mask[of][k]);
  w.mask[(static_cast<int64_t>(tile) * 2 + of) * kTile + k] = mask;
  const unsigned occupied = __ballot_sync(~0u, (mask.x | mask.y | mask.z | mask.w) != 0);
  if (thread % 32 == 0) reinterpret_cast<unsigned*>(w.occupied)[(tile * 2 + of) * 4 + k / 32] = occupied;
}

// Counts and sums the hard pairs of tile (tile_i, tile_j), whose similarities the workers hold; writes its record, and
// the masks of a tile that is neither empty nor full.
template <Held kHeld>
__device__ __forceinline__ void examine(const Work& w, const Rectangle& rectangle, LossMemory& memory,
                                        const float (&s)[4][4][4], int tile_i, int tile_j) {
  const int rows = valid_rows(w.state->valid[0], tile_i), columns = valid_rows(w.state->valid[1], tile_j);
  const bool special = note_pairs<kHeld>(w, memory.mask, tile_i, tile_j, rows, columns);
  const int thread = afresh(worker<kHeld>()), lane = thread % 32, warp = thread / 32;
  uint32_t bits[4][2] = {};
  int found[2] = {0, 0};
  float penalty[2] = {0, 0};
  if (special) {
    scan<kHeld, kMinus, false>(memory.margin[kMinus], memory, s, warp, lane, bits, found[kMinus], penalty[kMinus]);
    scan<kHeld, kPlus, false>(memory.margin[kPlus], memory, s, warp, lane, bits, found[kPlus], penalty[kPlus]);
  } else if (__any_sync(~0u, largest(s) >= memory.margin[kMinus])) {
    scan<kHeld, kMinus, true>(memory.margin[kMinus], memory, s, warp, lane, bits, found[kMinus], penalty[kMinus]);
  }
  const int times = w.symmetric && tile_i != tile_j ? 2 : 1;  // (j, i) too
  const unsigned both = add_to_totals(memory, warp, lane, times, found, penalty);
  if (lane == 0) memory.count[warp] = both;
  const bool any = workers_any(both != 0);
  int count[2] = {0, 0};
  if (any)
    for (int k = 0; k < kWarps; ++k) count[kPlus] += memory.count[k] & 0xffff, count[kMinus] += memory.count[k] >> 16;
  if (thread == 0) write_record(w, rectangle, tile_i, tile_j, count);
  const bool keep = w.set[0].sum[0] != nullptr || w.set[1].sum[0] != nullptr;
  const int all = rows * columns;
  if (!any || !keep || count[kPlus] == all || count[kMinus] == all) return;
  write_masks<kHeld>(memory, bits, warp, lane);
  workers_sync();
  store_masks(w, memory, rectangle.tile(tile_i, tile_j), thread);
}

// Adds the warps' totals, in order, to the block of threads' part in the result. For one thread.
__device__ __forceinline__ void add_totals(const Work& w, const LossMemory& memory) {
  Partial& partial = w.partial[blockIdx.x];
  for (int side = 0; side < 2; ++side) {
    double penalty = 0;
    int64_t count = 0;
    for (int k = 0; k < kWarps; ++k) penalty += memory.total[k].penalty[side], count += memory.total[k].count[side];
    partial.penalty[side] += penalty, partial.count[side] += count;
  }
}

// A visitor is given the tiles of `similarity` and `similarity_sm90` one by one. This one finds the loss.
struct LossVisitor {
  using Memory = LossMemory;
  static constexpr int kRing = 4;        // stages of copies on Hopper: as many as fit beside Memory
  static constexpr bool kMoves = false;  // whether similarities are moved among a thread's registers

  // For all workers: before the first tile, with a barrier to follow; for each tile; after the last.
  template <Held kHeld>
  __device__ __forceinline__ void begin(const Work& w, LossMemory& memory) const {
    if (worker<kHeld>() < kWarps) memory.total[worker<kHeld>()] = {};
    if (worker<kHeld>() < 2) memory.margin[worker<kHeld>()] = w.state->margin[worker<kHeld>()];
  }
  template <Held kHeld>
  __device__ __forceinline__ void visit(const Work& w, const Rectangle& rectangle, LossMemory& memory,
                                        const float (&s)[4][4][4], int tile_i, int tile_j) const {
    examine<kHeld>(w, rectangle, memory, s, tile_i, tile_j);
  }
  template <Held kHeld>
  __device__ __forceinline__ void end(const Work& w, LossMemory& memory) const {
    workers_sync();  // the warps' totals are there
    if (worker<kHeld>() == 0) add_totals(w, memory);
  }
};

}  // namespace
}  // namespace tcm::cuda
