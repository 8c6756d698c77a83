// Masked sums of a rectangle of tiles: G_I += M_IJ X^_J, and by symmetry, or for the reference set, G_J += M_IJ^T X^_I.
//
// A tile of G (128 rows, 128 columns, one side) belongs to one block of threads, which takes the tiles of similarities
// of its row or column in order: no atomics, the same bits each time. Of these
//   empty tiles   cost nothing;
//   mixed tiles   are a product by mma.sync, or on Hopper wgmma: the bits become halves 0 and 1 in registers, operand
//                 `a`; 2 * 128^3 flop for 34 KB from L2, 17 bytes a cycle on an A100, 33 at wgmma's rate;
//   sparse tiles  (up to kSparse hard pairs) are summed pair by pair: 256 bytes per pair from L2, which at 1e-3 hard pairs
//                 and N = 65,536, D = 512 are 4.4 GB, against 6.6e12 flop of the products;
//   full tiles    add one sum over the tile, the same for all rows.
#pragma once

#include "ptx_sm90.cuh"
#include "work.h"

namespace tcm::cuda {
namespace {

static_assert(kRectangle <= kThreads, "a thread looks at one tile of its owner's row or column");
constexpr int kQueue = 256;               // pairs that a warp collects before it adds them
constexpr int kOwnRows = kTile / kWarps;  // rows of a warp in the second half
constexpr int kPitch = kSlice + 4;  // floats from one row of the staged sums to the next: they start in different banks

enum ItemClass { kEmpty = -1, kMixed, kFew, kFull };

// An item of an owner's list, a tile of similarities: the source's number in the rectangle (`kNumber`), and these bits.
constexpr int kTransposed = 0x4000;  // the source is a row of the rectangle: masks are read by columns
constexpr int kBoth = 0x8000;        // it has hard pairs of both sides
constexpr int kNumber = 0xff;
constexpr int kNoneIn = 0x100;  // half h of the rows of the rectangle's tile has no hard pair: << 2 h
constexpr int kAllIn = 0x200;   // all of its pairs are hard, and on one side; of halves like these no mask is written
constexpr int kKnown = 0xf00;
static_assert(kRectangle <= kNumber);

// The owner of a slice of tile `tile` of G of a side of `set`; adds up x^ of `other`, whose tiles in the rectangle begin
// with `base`.
struct Owner {
  int tile, set, other, base;
  int width, row, column;  // columns of the rectangle; the owner's place in it
  int slice, side;         // of the columns of x^; positives or negatives

  __device__ int source(int item) const { return base + (item & kNumber); }
  __device__ int number(int item) const {  // of the tile in the rectangle
    return item & kTransposed ? (item & kNumber) * width + column : row * width + (item & kNumber);
  }
  __device__ int64_t masks(int item) const { return number(item) * int64_t{2} + (item & kTransposed ? 1 : 0); }
};

// Shared memory of `masked_sum`.
struct MaskedSumMemory {
  union {
    struct {
      unsigned char unit[2][kTile * kSlice * 2];  // x^ [64 columns, row, 16-byte chunk], chunks swizzled
      uint4 mask[2][kTile];
    } stage;
    float sum[kTile * kPitch];
  };
  float shared_sum[2][kSlice];     // the sum over full tiles, by halves of the list
  uint32_t queue[kWarps][kQueue];  // own row and source row of a pair
  uint16_t item[3][kRectangle];    // tiles by class, in order: see `Owner`
  int before[3][kWarps], size[3];  // how many in each warp; how many in all
  Owner owner;                     // here, since its registers are needed for sums
};

__device__ __forceinline__ Owner find_owner(const Work& w, const Rectangle& rectangle, int number, int slice,
                                            int side) {
  int rows = w.set[0].sum[0] == nullptr ? 0 : rectangle.i1 - rectangle.i0, width = rectangle.j1 - rectangle.j0;
  if (number < rows) return {rectangle.i0 + number, 0, 1, rectangle.j0, width, number, number, slice, side};
  return {rectangle.j0 + number - rows, 1, 0, rectangle.i0, width, number - rows, number - rows, slice, side};
}

// The bits of sorted row `row` of `set` in the tile that begins with tile `source` of the other set.
__device__ __forceinline__ uint4 of_side(const Embeddings& set, int64_t row, int source, int side, uint4 bits) {
  bool valid = row < set.n;
  int first = valid ? set.first[row] - source * kTile : 0, last = valid ? set.last[row] - source * kTile : 0;
  uint32_t flip = side == kPlus ? 0 : ~0u;
  return make_uint4(bits.x & (mask_range(first, last) ^ flip), bits.y & (mask_range(first - 32, last - 32) ^ flip),
                    bits.z & (mask_range(first - 64, last - 64) ^ flip),
                    bits.w & (mask_range(first - 96, last - 96) ^ flip));
}

// Whether the masks of half a tile with so many hard pairs are known without having been written.
__device__ __forceinline__ int known(int plus, int minus) {
  constexpr int kPairs = kHalf * kTile;
  return plus + minus == 0 ? kNoneIn : plus == kPairs || minus == kPairs ? kAllIn : 0;
}

// The mask of a row or column of an item.
__device__ __forceinline__ uint4 load_mask(const Work& w, const Owner& owner, int item, int row) {
  const uint4* mask = w.mask + owner.masks(item) * kTile + row;
  if (!(item & kKnown)) return *mask;
  uint2 half[2];  // of a column; of a row both are of the half that it lies in
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int state = item >> 2 * (item & kTransposed ? k : row / kHalf);
    if (state & kAllIn) half[k] = make_uint2(~0u, ~0u);
    else if (state & kNoneIn) half[k] = make_uint2(0, 0);
    else half[k] = reinterpret_cast<const uint2*>(mask)[k];
  }
  return make_uint4(half[0].x, half[0].y, half[1].x, half[1].y);
}

// Sorts the owner's tiles into memory.item by class, in order; memory.size tells how many there are of each. On the
// diagonal those before the owner lie in its column, the others in its row.
template <bool kSm90>
__device__ __forceinline__ void classify(const Work& w, const Rectangle& rectangle, const Owner& owner,
                                         MaskedSumMemory& memory) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, item = threadIdx.x, kind = kEmpty;
  if (item < (owner.set == 0 ? rectangle.j1 - rectangle.j0 : rectangle.i1 - rectangle.i0)) {
    if (owner.set == 1 || (rectangle.diagonal && owner.base + item < owner.tile)) item |= kTransposed;
    int all = valid_rows(w.state->valid[owner.set], owner.tile);
    all *= valid_rows(w.state->valid[owner.other], owner.source(item));
    // No record of a tile without pairs.
    int4 halves = all == 0 ? make_int4(0, 0, 0, 0) : reinterpret_cast<const int4*>(w.record)[owner.number(item)];
    const int2 record = make_int2(halves.x + halves.z, halves.y + halves.w);
    if constexpr (kSm90) item |= known(halves.x, halves.y) | known(halves.z, halves.w) << 2;
    int count = owner.side == kPlus ? record.x : record.y;
    if (count > 0) kind = count == all ? kFull : record.x + record.y <= kSparse ? kFew : kMixed;
    if (record.x > 0 && record.y > 0) item |= kBoth;
  }
  unsigned ballot[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    ballot[k] = __ballot_sync(~0u, kind == k);
    if (lane == 0) memory.before[k][warp] = __popc(ballot[k]);
  }
  __syncthreads();
  for (int k = 0; k < 3; ++k) {
    int place = __popc(ballot[k] & ((1u << lane) - 1)), size = 0;
    for (int other = 0; other < kWarps; ++other) {
      if (other < warp) place += memory.before[k][other];
      size += memory.before[k][other];
    }
    if (kind == k) memory.item[k][place] = static_cast<uint16_t>(item);
    if (threadIdx.x == 0) memory.size[k] = size;
  }
  __syncthreads();
}

__device__ __forceinline__ int chunk_of(int r, int c) {
  return c / 8 * (kTile * 128) + r * 128 + ((c % 8 ^ (r & 7)) << 4);
}

// Copies x^ of one mixed tile (rows of the source, this slice's columns; zeros past the last) and its masks.
__device__ __forceinline__ void load_item(const Work& w, const Owner& owner, int item, int part, int stage,
                                          MaskedSumMemory& memory) {
  const Embeddings& from = w.set[owner.other];
  int64_t row = static_cast<int64_t>(part) * from.tiles * kTile + static_cast<int64_t>(owner.source(item)) * kTile;
  const int thread = afresh(threadIdx.x), r = thread / 16, c = thread % 16;
  const bool inside = owner.slice * kSlice + c * 8 < w.width;
  const Half* unit = from.unit + (inside ? (row + r) * w.width + owner.slice * kSlice + c * 8 : 0);
  const int64_t pitch = inside ? int64_t{kThreads / 16} * w.width : 0;
  unsigned char* to = memory.stage.unit[stage] + chunk_of(r, c);  // rows of the same number modulo 8 are swizzled alike
#pragma unroll
  for (int k = 0; k < kTile * 16 / kThreads; ++k, unit += pitch)
    copy_16(to + k * kThreads / 16 * 128, unit, inside ? 16 : 0);
  if (thread >= kTile) return;
  uint4* mask = &memory.stage.mask[stage][thread];
  if (item & kKnown) *mask = load_mask(w, owner, item, thread);
  else copy_16(mask, w.mask + owner.masks(item) * kTile + thread, 16);
}

// Two bits of a mask as two halves: `one`, or 0.
__device__ __forceinline__ uint32_t two_halves(uint32_t word, int shift, uint32_t one) {
  return (word >> shift & 0x10001) * one;
}

// A thread's part of the products. By warp w, g = lane / 4 and t = lane % 4, value [k] is
//   mma.sync  row w / 2 * 32 + k / 32 * 16 + h * 8 + g, column w % 2 * 64 + k / 4 % 8 * 8 + 2 t + e   (32 x 64 per warp)
//   wgmma     row w * 16 + h * 8 + g,                    column k / 4 * 8 + 2 t + e                     (16 x 128 per warp)
// with h = k / 2 % 2 and e = k % 2.
struct Products {
  float sum[64];
};

// Adds one tile's product by mma.sync: the bits of 32 columns of two groups of 16 rows at a time.
__device__ __forceinline__ void multiply_tile(const MaskedSumMemory& memory, int stage, uint32_t one,
                                              Products& products) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row = threadIdx.x / 64 * 32, column = threadIdx.x / 32 % 2 * 64;
  auto& sum = reinterpret_cast<float (&)[2][8][4]>(products.sum);
  // chunk_of the lane's row and first chunk; those of j have 2 j exclusive-or'ed, see `similarity`.
  const int at = stage * (kTile * kSlice * 2) + chunk_of(lane % 16, column / 8 + lane / 16);
#pragma unroll 2
  for (int k = 0; k < kTile / 32; ++k) {
    uint32_t word[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        word[i][h] = reinterpret_cast<const uint32_t*>(&memory.stage.mask[stage][row + i * 16 + h * 8 + g])[k] >> t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          a[i][h] = two_halves(word[i][h], half * 8, one), a[i][h + 2] = two_halves(word[i][h], half * 8 + 4, one);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t b[4];
        load_matrices<true>(b, memory.stage.unit[0] + (at ^ j << 5) + (k * 32 + half * 16) * 128);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_add(sum[i][2 * j], a[i], b[0], b[1]);
          multiply_add(sum[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
}

// The same by warpgroups: a warp's bits become its 16 rows of the operand in registers, eight of them for one wait.
__device__ __forceinline__ void multiply_tile_sm90(const MaskedSumMemory& memory, int stage, uint32_t one,
                                                   Products& products) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = threadIdx.x / 32 * 16;
  uint32_t a[kTile / 16][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint4 mask = memory.stage.mask[stage][row + h * 8 + g];
    const uint32_t word[4] = {mask.x >> t, mask.y >> t, mask.z >> t, mask.w >> t};
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k)
      a[k][h] = two_halves(word[k / 2], k % 2 * 8, one), a[k][h + 2] = two_halves(word[k / 2], k % 2 * 8 + 4, one);
  }
  warpgroup_fence();
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k)
    warpgroup_multiply(products.sum, a[k], operand_across(memory.stage.unit[stage], k * 16));
  warpgroup_commit();
  warpgroup_finish(products.sum);
}

// The products of the mixed tiles, each tile copied while the one before is multiplied.
template <bool kSm90>
__device__ __forceinline__ void add_products(const Work& w, const Owner& owner, MaskedSumMemory& memory,
                                             Products& products) {
  // Two parts: the low ones of all tiles first, while the sums are small. Tensor cores round each addition toward zero.
  const bool two = w.parts == 2;
  auto steps = [&] { return memory.size[kMixed] << two; };
  auto part = [&](int step) { return two && step < memory.size[kMixed] ? 1 : 0; };
  auto item_at = [&](int step) -> int {
    return memory.item[kMixed][two && step >= memory.size[kMixed] ? step - memory.size[kMixed] : step];
  };
  load_item(w, owner, item_at(0), part(0), 0, memory);
  copies_commit();
  for (int step = 0; step < steps(); ++step) {
    copies_wait<0>();
    if constexpr (kSm90) writes_to_products();
    __syncthreads();  // the stage is there for all, and the other one has been read by all
    int next = step + 1, stage = step % 2;
    if (next < steps()) load_item(w, owner, item_at(next), part(next), 1 - stage, memory);
    copies_commit();
    int item = item_at(step);
    if (item & kBoth) {
      if (threadIdx.x < kTile) {
        uint4& mask = memory.stage.mask[stage][threadIdx.x];
        int64_t own = static_cast<int64_t>(owner.tile) * kTile + threadIdx.x;
        mask = of_side(w.set[owner.set], own, owner.source(item), owner.side, mask);
      }
      __syncthreads();
    }
    uint32_t one = part(step) == 0 ? 0x3c00 : 0x1000;  // 1, or 1 / kLowScale
    if constexpr (kSm90) multiply_tile_sm90(memory, stage, one, products);
    else multiply_tile(memory, stage, one, products);
  }
  copies_wait<0>();
}

// Four neighbours of a row of x^.
__device__ __forceinline__ float4 load_unit(const Embeddings& set, int64_t row, int column, int width, int parts) {
  float4 v;
  const Half* from = set.unit + row * width + column;
  uint2 four = *reinterpret_cast<const uint2*>(from);
  v = make_float4(to_float(low(four.x)), to_float(high(four.x)), to_float(low(four.y)), to_float(high(four.y)));
  if (parts == 2) {
    four = *reinterpret_cast<const uint2*>(from + static_cast<int64_t>(set.tiles) * kTile * width);
    v.x += to_float(low(four.x)) / kLowScale, v.y += to_float(high(four.x)) / kLowScale;
    v.z += to_float(low(four.y)) / kLowScale, v.w += to_float(high(four.y)) / kLowScale;
  }
  return v;
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The sparse tiles, for the 16 rows of the warp: pairs are queued, and added eight at a time so that eight loads are
// under way. A lane has four columns.
struct SparseTiles {
  const Work& w;
  const Owner& owner;
  MaskedSumMemory& memory;
  int lane, warp, queued = 0;

  // `sum` (of four columns) of row `row` of the warp.
  __device__ float4& cell(int row) {
    return *reinterpret_cast<float4*>(memory.sum + (warp * kOwnRows + row) * kPitch + lane * 4);
  }

  __device__ void flush(int64_t base) {
    __syncwarp();  // the queue is written
    int column = owner.slice * kSlice + lane * 4, row = -1;
    bool inside = column < w.width;
    float4 run = make_float4(0, 0, 0, 0);
    for (int k = 0; k < queued; k += 8) {
      float4 v[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        uint32_t pair = memory.queue[warp][min(k + e, queued - 1)];
        const int64_t from = base + (pair & 0xffff);
        if (inside && k + e < queued) v[e] = load_unit(w.set[owner.other], from, column, w.width, w.parts);
        else v[e] = make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (k + e >= queued) break;
        int of = static_cast<int>(memory.queue[warp][k + e] >> 16);
        if (of != row) {
          if (row >= 0) cell(row) = cell(row) + run;
          row = of, run = make_float4(0, 0, 0, 0);
        }
        run = run + v[e];
      }
    }
    if (row >= 0) cell(row) = cell(row) + run;
    queued = 0;
    __syncwarp();  // the queue has been read
  }

  // Queues the lanes' pairs: of row `row` with the rows of the set bits, counted from `offset` rows after the base.
  __device__ void queue(uint4 mask, int row, int offset, int64_t base) {
    int count = __popc(mask.x) + __popc(mask.y) + __popc(mask.z) + __popc(mask.w);
    while (__any_sync(~0u, count > 0)) {
      int until = count;
      for (int k = 1; k < 32; k *= 2) {
        int before = __shfl_up_sync(~0u, until, k);
        if (lane >= k) until += before;
      }
      bool fits = queued + until <= kQueue;
      if (fits && count > 0) {
        int place = queued + until - count;
        uint32_t word[4] = {mask.x, mask.y, mask.z, mask.w};
#pragma unroll
        for (int k = 0; k < 4; ++k)
          for (uint32_t rest = word[k]; rest != 0; rest &= rest - 1)
            memory.queue[warp][place++] = row << 16 | (offset + 32 * k + mask_column(__ffs(rest) - 1));
        count = 0;
      }
      unsigned done = __ballot_sync(~0u, fits);  // the first lanes
      if (done != 0) queued += __shfl_sync(~0u, until, __popc(done) - 1);
      if (done != ~0u) flush(base);
    }
  }

  // Which of 32 rows or columns of an item have a hard pair. Of a sparse tile no half is complete.
  __device__ unsigned occupied(int item, int word) const {
    const unsigned* of = reinterpret_cast<const unsigned*>(w.occupied + owner.number(item) * int64_t{3}) + word;
    if (!(item & kTransposed)) return item >> 2 * (word / 2) & kNoneIn ? 0 : of[0];
    return (item & kNoneIn ? 0 : of[4]) | (item >> 2 & kNoneIn ? 0 : of[8]);
  }

  __device__ void run() {
    int64_t own = static_cast<int64_t>(owner.tile) * kTile + warp * kOwnRows;
    int64_t base = static_cast<int64_t>(owner.base) * kTile;
    for (int begin = 0; begin < memory.size[kFew]; begin += 32) {
      bool has = begin + lane < memory.size[kFew];
      int item = has ? memory.item[kFew][begin + lane] : 0;
      unsigned rows = 0;  // of the warp, those with a pair in this lane's tile
      if (has) rows = occupied(item, warp / 2) >> (warp % 2 * kOwnRows) & 0xffff;
      for (int row = 0; row < kOwnRows; row += 4) {
        if (!__any_sync(~0u, (rows >> row & 15) != 0)) continue;
        uint4 mask[4];
#pragma unroll
        for (int k = 0; k < 4; ++k)
          mask[k] =
              rows >> (row + k) & 1 ? load_mask(w, owner, item, warp * kOwnRows + row + k) : make_uint4(0, 0, 0, 0);
#pragma unroll 1
        for (int k = 0; k < 4; ++k) {
          if (item & kBoth) mask[0] = of_side(w.set[owner.set], own + row + k, owner.source(item), owner.side, mask[0]);
          queue(mask[0], row + k, (item & kNumber) * kTile, base);
          mask[0] = mask[1], mask[1] = mask[2], mask[2] = mask[3];  // indexed by constants: they stay in registers
        }
      }
    }
    flush(base);
  }
};

// The kernel's body. Grid: owners * slices, sides.
template <bool kSm90>
__device__ __forceinline__ void add_masked(const Work& w, const Rectangle& rectangle) {
  MaskedSumMemory& memory = *reinterpret_cast<MaskedSumMemory*>(shared_memory());
  if (threadIdx.x == 0)
    memory.owner = find_owner(w, rectangle, blockIdx.x / w.slices, blockIdx.x % w.slices, blockIdx.y);
  __syncthreads();
  const Owner& owner = memory.owner;
  const Embeddings& set = w.set[owner.set];
  if (set.marked[owner.side * set.tiles + owner.tile] != rectangle.number) return;  // as most where few pairs are hard

  // 1. The lists of tiles to add.
  classify<kSm90>(w, rectangle, owner, memory);

  // 2. Full tiles: a thread has a column and every other tile.
  {
    int column = threadIdx.x % kSlice, half = threadIdx.x / kSlice;
    float sum = 0;
    if (owner.slice * kSlice + column < w.width) {
      const float* tile_sum = w.set[owner.other].tile_sum + owner.slice * kSlice + column;
#pragma unroll 4
      for (int k = half; k < memory.size[kFull]; k += 2)
        sum += tile_sum[static_cast<int64_t>(owner.source(memory.item[kFull][k])) * w.width];
    }
    memory.shared_sum[half][column] = sum;
  }

  // 3. Mixed tiles, whose sums go from registers to shared memory: a warp then has 16 whole rows.
  Products products = {};
  if (memory.size[kMixed] > 0) add_products<kSm90>(w, owner, memory, products);
  __syncthreads();
  const int lane = afresh(threadIdx.x) % 32, warp = afresh(threadIdx.x) / 32;
#pragma unroll
  for (int k = 0; k < 64; k += 2) {
    int row = (kSm90 ? warp * 16 : warp / 2 * 32 + k / 32 * 16) + k / 2 % 2 * 8 + lane / 4;
    int column = (kSm90 ? k / 4 * 8 : warp % 2 * 64 + k / 4 % 8 * 8) + lane % 4 * 2;
    *reinterpret_cast<float2*>(memory.sum + row * kPitch + column) = make_float2(products.sum[k], products.sum[k + 1]);
  }
  __syncthreads();

  // 4. Sparse tiles.
  SparseTiles pairs{w, owner, memory, lane, warp};
  if (memory.size[kFew] > 0) pairs.run();

  // 5. All into G.
  uint8_t* touched = set.touched + (static_cast<int64_t>(owner.side) * set.tiles + owner.tile) * w.slices + owner.slice;
  const bool add = *touched != 0;
  __syncthreads();  // all have read it
  if (threadIdx.x == 0) *touched = 1;
  int column = owner.slice * kSlice + lane * 4;
  if (column >= w.width) return;
  float4 shared = *reinterpret_cast<const float4*>(&memory.shared_sum[0][lane * 4]) +
                  *reinterpret_cast<const float4*>(&memory.shared_sum[1][lane * 4]);
  for (int k = 0; k < kOwnRows; ++k) {
    int64_t row = static_cast<int64_t>(owner.tile) * kTile + warp * kOwnRows + k;
    float4* out = reinterpret_cast<float4*>(set.sum[owner.side] + row * w.width + column);
    float4 total = pairs.cell(k) + shared;
    *out = add ? *out + total : total;
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    masked_sum(const __grid_constant__ Work w, const __grid_constant__ Rectangle rectangle) {
  add_masked<false>(w, rectangle);
}

// By warpgroups; like `similarity_sm90` it does nothing where it is compiled for anything but sm_90a.
__global__ void __launch_bounds__(kThreads, 2)
    masked_sum_sm90(const __grid_constant__ Work w, const __grid_constant__ Rectangle rectangle) {
#if TCM_SM90
  add_masked<true>(w, rectangle);
#endif
}

}  // namespace
}  // namespace tcm::cuda
