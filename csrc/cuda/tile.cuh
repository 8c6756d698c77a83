// The work on the similarities of a tile, whichever way they were made: 256 threads, the workers, hold 64 each.
//
// Two ways to hold them, by warp w, g = lane / 4 and t = lane % 4. Value [i][j][2 h + e] of a thread is
//   kRows     row w / 4 * 64 + i * 16 + h * 8 + g, column w % 4 * 32 + j * 8 + 2 t + e   (mma.sync, 64 x 32 per warp)
//   kColumns  row w * 16 + h * 8 + g,              column i * 32 + j * 8 + 2 t + e        (wgmma, 16 x 128 per warp)
#pragma once

#include "work.h"

namespace tcm::cuda {
namespace {

enum Held { kRows, kColumns };

// Workers that look at their similarities together, without regard for others: on Hopper each warpgroup, with half of a
// tile's rows, so that one looks while the other multiplies.
constexpr int kTeams = 2;  // at most
template <Held kHeld, int kSize = kHeld == kRows ? kThreads : 128>
struct Team {
  static constexpr int kWorkers = kSize;
  static constexpr int kHeight = kTile * kSize / kThreads;  // rows
  int number = 0;

  __device__ void sync() const { barrier_sync<kSize>(1 + number); }
  __device__ bool any(bool vote) const { return barrier_any<kSize>(1 + number, vote); }
};

// For kTiles neighbouring tiles at a time. What is of a row or of a warp belongs to the team that has it.
template <int kTiles>
struct LossMemory {
  uint32_t mask[kTiles][2][kTile][4];  // pairs of each row: positives, negatives; [0]: then hard pairs of each row
  uint32_t column[kTiles][kTile][4];   // hard pairs of each column
  alignas(16) unsigned count[kTiles][kWarps];  // hard positives in the low half, hard negatives in the high half
  double penalty[2][kThreads];                 // each worker's, of all tiles so far
  double of_warp[2][kWarps];
  int64_t total[kTeams][2];  // hard pairs of all tiles so far
  float margin[2];
  int valid[2];  // see State
};

// The tiles of a rectangle in order, kAcross neighbours of a row at a time, every gridDim.x-th of these from blockIdx.x
// on; those wholly below the diagonal are passed over. Eight row tiles go together, column by column: the tiles in work
// at one time then share rows and columns in L2.
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

// The first tiles that a screen (screen.cuh) looks at: whether so many of them are undecided that it had better end.
struct Trial {
  static constexpr int kTiles = 4;  // on Hopper pairs of them
  static constexpr int kMany = 3;   // a tile costs one product, a decided one saves two: two thirds would be even
  int seen = 0, undecided = 0;

  __device__ bool over(bool found) {
    undecided += found;
    return ++seen == kTiles;
  }
  __device__ bool failed() const { return undecided >= kMany; }
};

template <Held kHeld>
__device__ __forceinline__ int worker() {
  return static_cast<int>(threadIdx.x) - (kHeld == kColumns ? 128 : 0);
}
template <Held kHeld>
__device__ __forceinline__ Team<kHeld> team() {
  return {kHeld == kRows ? 0 : worker<kHeld>() / Team<kHeld>::kWorkers};
}

// Whether tile (i, j) is one of the rectangle's, given the rows of the columns' set that take part.
__device__ __forceinline__ bool present(const Rectangle& rectangle, int i, int j, int valid_j) {
  return j < rectangle.j1 && !(rectangle.diagonal && i > j) && valid_rows(valid_j, j) > 0;
}

// Where in a word of its own a thread keeps the bit of value [i][j][2 h + e]; there is a word for each h. The order is
// the one that `mask_of_rows` and `mask_of_columns` have least to do with.
__device__ __forceinline__ constexpr int own_bit(int i, int j, int e) { return i * 8 + j % 2 * 4 + e * 2 + j / 2; }

// Counts and sums the hard pairs of one side among a thread's similarities, and sets their own_bit in hard [h]. kAll:
// all pairs are negatives; else `mask` tells which pairs of a row are of the side. A violation that is negative, a pair
// that is not hard, hands its sign bit to the word: one instruction, which shifts it in. The sum is a tree, 9 additions
// deep.
template <Held kHeld, int kSide, bool kAll>
__device__ __forceinline__ void scan(float margin, const uint32_t (&mask)[kTile][4], const float (&s)[4][4][4],
                                     int warp, int lane, uint32_t (&hard)[2], int& count, float& penalty) {
  const int row = (kHeld == kRows ? warp / 4 * 64 : warp * 16) + lane / 4;
  uint32_t others[2] = {};
  penalty = 0;
#pragma unroll
  for (int i = 3; i >= 0; --i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t pairs = ~0u;
      if constexpr (!kAll) {
        if constexpr (kHeld == kRows) pairs = mask[row + i * 16 + h * 8][warp % 4] >> lane % 4;
        else pairs = mask[row + h * 8][i] >> lane % 4;
      }
      float violation[8];  // by own_bit
#pragma unroll
      for (int bit = 7; bit >= 0; --bit) {
        const int j = bit % 2 * 2 + bit / 4, e = bit / 2 % 2;
        const float value = s[i][j][2 * h + e];
        violation[bit] = kSide == kPlus ? margin - value : value - margin;  // its sign is exact
        if (!(pairs & 1u << mask_bit(j * 8 + e))) violation[bit] = -1.0f;
        others[h] = __funnelshift_l(__float_as_uint(violation[bit]), others[h], 1);
        violation[bit] = max(violation[bit], 0.0f);
      }
      penalty += ((violation[0] + violation[1]) + (violation[2] + violation[3])) +
                 ((violation[4] + violation[5]) + (violation[6] + violation[7]));
    }
  count = __popc(~others[0]) + __popc(~others[1]);
  hard[0] |= ~others[0], hard[1] |= ~others[1];
}

// Exchanges a bit of the lane's number with one of a bit's place in the word: lanes a and a + kLane, places b and
// b + kPlace change places.
template <int kLane, int kPlace>
__device__ __forceinline__ uint32_t exchange(uint32_t word, int lane) {
  constexpr uint32_t kLow = kPlace == 16  ? 0x0000ffff
                            : kPlace == 8 ? 0x00ff00ff
                            : kPlace == 4 ? 0x0f0f0f0f
                            : kPlace == 2 ? 0x33333333
                                          : 0x55555555;
  const bool upper = (lane & kLane) != 0;
  const uint32_t other = __shfl_xor_sync(~0u, word, kLane), kept = upper ? ~kLow : kLow;
  return (word & kept) | (__funnelshift_l(other, other, upper ? 32 - kPlace : kPlace) & ~kept);
}

// Exchanges two bits of a bit's place in the word, `kHigh` and `kLow`; kPlaces: those with bit kLow, and not kHigh.
template <int kHigh, int kLow, uint32_t kPlaces>
__device__ __forceinline__ uint32_t exchange_places(uint32_t word) {
  const uint32_t change = (word ^ word >> (kHigh - kLow)) & kPlaces;
  return word ^ change ^ change << (kHigh - kLow);
}

// The workers' hard pairs (of `scan`) as words of rows: lane 4 g + i has the word of value [i][.][2 h + .] of its row,
// of all the four lanes that share it.
__device__ __forceinline__ uint32_t mask_of_rows(uint32_t own, int lane) {
  own = exchange<1, 8>(exchange<2, 16>(own, lane), lane);  // places (i, j % 2, e, j / 2) become (t, j % 2, e, j / 2)
  own = exchange_places<16, 2, 0x0000cccc>(own);
  return exchange_places<8, 1, 0x00aa00aa>(own);  // (e, j / 2, j % 2, t)
}

// The same for columns: byte i of word k is that of column 8 j + 2 t + e of value [i], rows 2 r + k of the warp's with
// bits (h, r), where (e, j, t) are the bits of the lane's number.
__device__ __forceinline__ void mask_of_columns(const uint32_t (&own)[2], int lane, uint32_t (&word)[2]) {
  uint32_t part[2];  // places (i, g % 2, g / 2)
#pragma unroll
  for (int h = 0; h < 2; ++h) part[h] = exchange<4, 4>(exchange<8, 1>(exchange<16, 2>(own[h], lane), lane), lane);
  word[0] = (part[0] & 0x0f0f0f0f) | (part[1] & 0x0f0f0f0f) << 4;
  word[1] = (part[0] >> 4 & 0x0f0f0f0f) | (part[1] & 0xf0f0f0f0);
}

// The workers' hard pairs as rows and as columns.
template <Held kHeld>
__device__ __forceinline__ void write_masks(uint32_t (&rows)[kTile][4], uint32_t (&columns)[kTile][4],
                                            const uint32_t (&hard)[2], int warp, int lane) {
  const int g = lane / 4, i = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t word = mask_of_rows(hard[h], lane);
    if constexpr (kHeld == kRows) rows[warp / 4 * 64 + i * 16 + h * 8 + g][warp % 4] = word;
    else rows[warp * 16 + h * 8 + g][i] = word;
  }
  uint32_t word[2];  // even rows, odd rows: see mask_bit
  mask_of_columns(hard, lane, word);
  const int column = lane / 4 % 4 * 8 + lane % 4 * 2 + lane / 16;
  if constexpr (kHeld == kRows) {  // 64 rows, two words
    uint32_t* to = &columns[warp % 4 * 32 + column][warp / 4 * 2];
    to[0] = (word[0] & 0xffff) | word[1] << 16;
    to[1] = word[0] >> 16 | (word[1] & 0xffff0000);
  } else {  // 16 of a word's 32 rows: in even warps bytes 0 and 2, in odd ones 1 and 3
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint8_t* bytes = reinterpret_cast<uint8_t*>(&columns[k * 32 + column][warp / 2]);
      bytes[warp % 2] = static_cast<uint8_t>(word[0] >> k * 8);
      bytes[warp % 2 + 2] = static_cast<uint8_t>(word[1] >> k * 8);
    }
  }
}

// A row's pairs in a tile to `mask`: columns below `columns`, positives from `first` on below `last`, itself at `own`.
template <bool kAbove>
__device__ __forceinline__ void write_pairs(uint32_t (&mask)[2][kTile][4], int row, int columns, int first, int last,
                                            int own) {
  for (int k = 0; k < 4; ++k) {
    uint32_t pairs = mask_range(0, columns - 32 * k);
    pairs &= ~mask_range(kAbove ? 0 : own - 32 * k, own - 32 * k + 1);
    const uint32_t same = mask_range(first - 32 * k, last - 32 * k);
    mask[kPlus][row][k] = pairs & same, mask[kMinus][row][k] = pairs & ~same;
  }
}

// Whether one of kTiles neighbouring tiles holds more than plain negatives in the team's rows; if so, `mask` tells
// which pairs of each are positives and which negatives. A row's positives are a range of columns; it has no pair with
// itself (kAbove: nor with a row before it); padding has none. For all of a team; each has a row of one of the tiles,
// if there are as many.
template <bool kAbove = false, int kTiles, Held kHeld, int kSize>
__device__ __forceinline__ bool note_pairs(const Work& w, uint32_t (&mask)[kTiles][2][kTile][4], int tile_i, int tile_j,
                                           int valid_i, int valid_j, const Team<kHeld, kSize>& of) {
  constexpr int kHeight = Team<kHeld, kSize>::kHeight;
  const int thread = afresh(worker<kHeld>()) % kSize, tile = thread / kHeight;
  const int row = of.number * kHeight + thread % kHeight, left = (tile_j + tile) * kTile;
  const int columns = valid_rows(valid_j, tile_j + tile);
  const bool valid = tile < kTiles && row < valid_rows(valid_i, tile_i);
  int first = 0, last = 0, own = -1;
  if (valid) {
    const int k = tile_i * kTile + row;
    first = w.set[0].first[k] - left, last = w.set[0].last[k] - left, own = w.set[0].own[k] - left;
  }
  const bool plain = valid && columns == kTile && (first >= min(last, kTile) || last <= 0) && (own < 0 || own >= kTile);
  if (!of.any(tile < kTiles && !plain)) return false;
  if (tile < kTiles) write_pairs<kAbove>(mask[tile], row, valid ? columns : 0, first, last, own);
  of.sync();  // the masks of pairs are there
  return true;
}

// The largest of a thread's similarities, as four chains.
__device__ __forceinline__ float largest(const float (&s)[4][4][4]) {
  float top[4] = {s[0][0][0], s[0][0][1], s[0][0][2], s[0][0][3]};
#pragma unroll
  for (int k = 4; k < 64; ++k) top[k % 4] = max(top[k % 4], s[k / 16][k / 4 % 4][k % 4]);
  return max(max(top[0], top[1]), max(top[2], top[3]));
}

// Hard pairs of a warp, by those of its lanes: positives in the low half, negatives in the high half.
__device__ __forceinline__ unsigned count_of_warp(const int (&found)[2]) {
  unsigned both = static_cast<unsigned>(found[kPlus]) | static_cast<unsigned>(found[kMinus]) << 16;
  return __reduce_add_sync(~0u, both);
}

// Scans a tile that may have hard pairs: sets their own_bit, and adds the penalties, which stand for `times` as many,
// to the worker's. The result is that of `count_of_warp`.
template <Held kHeld, int kTiles>
__device__ __forceinline__ unsigned scan_tile(LossMemory<kTiles>& memory, const float (&s)[4][4][4], int tile,
                                              bool special, int times, uint32_t (&hard)[2]) {
  const int thread = afresh(worker<kHeld>()), lane = thread % 32, warp = thread / 32;
  int found[2] = {0, 0};
  float penalty[2] = {0, 0};
  const uint32_t (&mask)[2][kTile][4] = memory.mask[tile];
  if (special) {
    scan<kHeld, kMinus, false>(memory.margin[kMinus], mask[kMinus], s, warp, lane, hard, found[kMinus],
                               penalty[kMinus]);
    scan<kHeld, kPlus, false>(memory.margin[kPlus], mask[kPlus], s, warp, lane, hard, found[kPlus], penalty[kPlus]);
  } else {
    scan<kHeld, kMinus, true>(memory.margin[kMinus], mask[kMinus], s, warp, lane, hard, found[kMinus], penalty[kMinus]);
  }
  for (int side = 0; side < 2; ++side)
    if (found[side] != 0) memory.penalty[side][thread] += static_cast<float>(times) * penalty[side];
  return count_of_warp(found);
}

// Tells `masked_sum` that the tile of G of this side has something to add.
__device__ __forceinline__ void mark(const Embeddings& set, int tile, int side, int rectangle) {
  if (set.marked != nullptr) atomicMax(set.marked + side * set.tiles + tile, rectangle);
}

// Writes the record of a team's half of a tile, or of a whole tile that one team has. For one worker.
template <Held kHeld>
__device__ __forceinline__ void write_record(const Work& w, const Rectangle& rectangle, int tile_i, int tile_j,
                                             const int (&count)[2], const Team<kHeld>& of) {
  int2* record = w.record + rectangle.tile(tile_i, tile_j) * 2;
  record[of.number] = make_int2(count[kPlus], count[kMinus]);
  if constexpr (kHeld == kRows) record[1] = make_int2(0, 0);
  for (int side = 0; side < 2; ++side)
    if (count[side] != 0) {
      mark(w.set[0], tile_i, side, rectangle.number);
      mark(w.set[1], tile_j, side, rectangle.number);
    }
}

// The records of a team's part of kTiles neighbouring tiles without a hard pair. For one worker.
template <Held kHeld, int kTiles>
__device__ __forceinline__ void write_empty_records(const Work& w, const Rectangle& rectangle,
                                                    const LossMemory<kTiles>& memory, int tile_i, int tile_j,
                                                    const Team<kHeld>& of) {
#pragma unroll
  for (int k = 0; k < kTiles; ++k)
    if (present(rectangle, tile_i, tile_j + k, memory.valid[1]))
      write_record(w, rectangle, tile_i, tile_j + k, {0, 0}, of);
}

// The masks of a team's rows of a tile to the workspace, and which rows and columns have a hard pair there.
template <Held kHeld>
__device__ __forceinline__ void store_masks(const Work& w, const uint32_t (&rows)[kTile][4],
                                            const uint32_t (&columns)[kTile][4], int64_t tile, const Team<kHeld>& of) {
  const int thread = afresh(worker<kHeld>());
  const bool speaks = thread % 32 == 0;
  unsigned* occupied = reinterpret_cast<unsigned*>(w.occupied + tile * 3);
  uint4* masks = w.mask + tile * 2 * kTile;
  if constexpr (kHeld == kRows) {
    const int side = thread / kTile, k = thread % kTile;
    const uint4 mask = *reinterpret_cast<const uint4*>((side == 0 ? rows : columns)[k]);
    masks[side * kTile + k] = mask;
    const unsigned some = __ballot_sync(~0u, (mask.x | mask.y | mask.z | mask.w) != 0);
    if (speaks) occupied[side * 4 + k / 32] = some;
    if (speaks && side == 1) occupied[8 + k / 32] = 0;
  } else {
    const int k = thread % Team<kHeld>::kWorkers;  // a column, and in half of the warps a row
    const uint2 mask = *reinterpret_cast<const uint2*>(&columns[k][of.number * 2]);
    reinterpret_cast<uint2*>(masks + kTile + k)[of.number] = mask;
    unsigned some = __ballot_sync(~0u, (mask.x | mask.y) != 0);
    if (speaks) occupied[4 + of.number * 4 + k / 32] = some;
    if (k >= kHalf) return;
    const int row = of.number * kHalf + k;
    const uint4 whole = *reinterpret_cast<const uint4*>(rows[row]);
    masks[row] = whole;
    some = __ballot_sync(~0u, (whole.x | whole.y | whole.z | whole.w) != 0);
    if (speaks) occupied[row / 32] = some;
  }
}

// The records of a team's part of kTiles neighbouring tiles that have hard pairs, as memory.count tells, and the masks
// of parts that are neither empty nor complete: all pairs of all rows hard, by which `masked_sum` knows the masks.
template <Held kHeld, int kTiles>
__device__ __forceinline__ void keep_tiles(const Work& w, const Rectangle& rectangle, LossMemory<kTiles>& memory,
                                           int tile_i, int tile_j, const uint32_t (&hard)[kTiles][2],
                                           const Team<kHeld>& of) {
  constexpr int kWarps = Team<kHeld>::kWorkers / 32;
  const int thread = afresh(worker<kHeld>()), lane = thread % 32, warp = thread / 32;
  const bool keep = w.set[0].sum[0] != nullptr || w.set[1].sum[0] != nullptr;
  bool mixed[kTiles];
#pragma unroll
  for (int k = 0; k < kTiles; ++k) {
    mixed[k] = false;
    if (!present(rectangle, tile_i, tile_j + k, memory.valid[1])) continue;
    unsigned both = 0;  // up to 2^14 in either half
    for (int other = 0; other < kWarps; ++other) both += memory.count[k][of.number * kWarps + other];
    const int count[2] = {static_cast<int>(both & 0xffff), static_cast<int>(both >> 16)};
    if (thread == of.number * Team<kHeld>::kWorkers) {
      write_record(w, rectangle, tile_i, tile_j + k, count, of);
      const int64_t times = w.symmetric && tile_i != tile_j + k ? 2 : 1;
      for (int side = 0; side < 2; ++side) memory.total[of.number][side] += times * count[side];
    }
    constexpr int kAll = Team<kHeld>::kHeight * kTile;
    mixed[k] = keep && both != 0 && count[kPlus] != kAll && count[kMinus] != kAll;
    if (mixed[k]) write_masks<kHeld>(memory.mask[k][0], memory.column[k], hard[k], warp, lane);
  }
  bool any = false;
  for (int k = 0; k < kTiles; ++k) any = any || mixed[k];
  if (!any) return;
  of.sync();  // the masks are there
#pragma unroll
  for (int k = 0; k < kTiles; ++k)
    if (mixed[k]) store_masks(w, memory.mask[k][0], memory.column[k], rectangle.tile(tile_i, tile_j + k), of);
}

// Counts and sums the hard pairs of kTiles neighbouring tiles from (tile_i, tile_j) on, whose similarities the workers
// hold; writes their records, and the masks of those that are mixed. `special`: of `note_pairs`, whose barrier comes
// between two calls. For all of a team.
template <Held kHeld, int kTiles>
__device__ __forceinline__ void examine(const Work& w, const Rectangle& rectangle, LossMemory<kTiles>& memory,
                                        const float (&s)[kTiles][4][4][4], int tile_i, int tile_j, bool special) {
  const Team<kHeld> of = team<kHeld>();
  uint32_t hard[kTiles][2] = {};
  bool found = false;
#pragma unroll
  for (int k = 0; k < kTiles; ++k) {
    const int thread = afresh(worker<kHeld>());
    unsigned& count = memory.count[k][thread / 32];
    unsigned both = 0;
    if (present(rectangle, tile_i, tile_j + k, memory.valid[1])) {
      // Where the warp's tile before had hard pairs this one is taken to have some too, and not looked at twice.
      if (special || count != 0 || __any_sync(~0u, largest(s[k]) >= memory.margin[kMinus]))
        both = scan_tile<kHeld>(memory, s[k], k, special, w.symmetric && tile_i != tile_j + k ? 2 : 1, hard[k]);
    }
    __syncwarp();  // all have read it
    if (thread % 32 == 0) count = both;
    found = found || both != 0;
  }
  if (of.any(found)) {
    keep_tiles(w, rectangle, memory, tile_i, tile_j, hard, of);
  } else if (worker<kHeld>() == of.number * Team<kHeld>::kWorkers) {
    write_empty_records(w, rectangle, memory, tile_i, tile_j, of);
  }
}

// Adds all that the workers have found, in a fixed order, to the block of threads' part in the result.
template <Held kHeld, int kTiles>
__device__ __forceinline__ void add_totals(const Work& w, LossMemory<kTiles>& memory) {
  const int thread = worker<kHeld>();
  for (int side = 0; side < 2; ++side) {
    const double of_warp = warp_sum(memory.penalty[side][thread]);
    if (thread % 32 == 0) memory.of_warp[side][thread / 32] = of_warp;
  }
  barrier_sync<kThreads>(1 + kTeams);  // the warps' sums are there; a team may be about its own barrier yet
  if (thread != 0) return;
  Partial& partial = w.partial[blockIdx.x];
  for (int side = 0; side < 2; ++side) {
    double penalty = 0;
    for (int k = 0; k < kWarps; ++k) penalty += memory.of_warp[side][k];
    partial.penalty[side] += penalty;
    partial.count[side] += memory.total[0][side] + memory.total[1][side];
  }
}

// A visitor is given the tiles of `similarity` one by one, those of `similarity_sm90` in pairs. This one finds the
// loss.
struct LossVisitor {
  template <int kTiles>
  using Memory = LossMemory<kTiles>;
  template <int kAcross>
  using Order = TileOrder<kAcross>;  // which tiles it is shown
  static constexpr int kRing = 4;    // stages of copies on Hopper: as many as fit beside Memory
  static constexpr int kLead = 2;    // steps of a product by which one team is ahead of the other; 0: they go together
  static constexpr bool kMoves = false;    // whether similarities are moved among a thread's registers
  static constexpr bool kScreens = false;  // whether it may give up: see screen.cuh

  // For all workers: before the first tile, with a barrier to follow; for kTiles neighbouring tiles, what can be done
  // before their similarities are there; then with them, given the result of that; after the last.
  template <Held kHeld, int kTiles>
  __device__ __forceinline__ void begin(const Work& w, LossMemory<kTiles>& memory) const {
    const int thread = worker<kHeld>();
    for (int side = 0; side < 2; ++side) memory.penalty[side][thread] = 0;
    for (int k = 0; k < kTiles; ++k)
      if (thread < kWarps) memory.count[k][thread] = 0;
    if (thread >= 2) return;
    memory.total[0][thread] = memory.total[1][thread] = 0, memory.margin[thread] = w.state->margin[thread],
    memory.valid[thread] = w.state->valid[thread];
  }
  template <Held kHeld, int kTiles>
  __device__ __forceinline__ bool prepare(const Work& w, LossMemory<kTiles>& memory, int tile_i, int tile_j) const {
    return note_pairs(w, memory.mask, tile_i, tile_j, memory.valid[0], memory.valid[1], team<kHeld>());
  }
  template <Held kHeld, int kTiles>
  __device__ __forceinline__ void visit(const Work& w, const Rectangle& rectangle, LossMemory<kTiles>& memory,
                                        const float (&s)[kTiles][4][4][4], int tile_i, int tile_j,
                                        bool prepared) const {
    examine<kHeld>(w, rectangle, memory, s, tile_i, tile_j, prepared);
  }
  template <Held kHeld, int kTiles>
  __device__ __forceinline__ void end(const Work& w, LossMemory<kTiles>& memory) const {
    add_totals<kHeld>(w, memory);
  }
};

}  // namespace
}  // namespace tcm::cuda
