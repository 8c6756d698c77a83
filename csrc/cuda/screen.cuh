// fp32 accuracy at the price of one product: which tiles can have a hard pair is decided by their high parts alone.
//
// x^ = high + low / kLowScale, and |x^_i . x^_j - high_i . high_j| is at most `screen_bound`, whatever the vectors
// (docs/how-it-works.md has the proof). So a tile is done if by its one product high high no pair is within that bound
// of its margin, or beyond it: it has no hard pair. The others, of which there are few where few pairs are hard, are
// multiplied in full as if there were no screen, so that it changes no count and no gradient.
// 1. similarity with `ScreenVisitor`: an empty record for a tile that is done, a bit for one that is not.
// 2. list_undecided: the bits as a list.
// 3. similarity with `UndecidedVisitor`: the listed tiles, three products each.
// A screen that decides little costs a third more: a block of threads that finds most of its first tiles undecided
// leaves its others unseen, to be multiplied in full.
#pragma once

#include "tile.cuh"

namespace tcm::cuda {
namespace {

// How far high_i . high_j may be from the similarity of three products, both as the device sums them. `width`: terms.
// Every number here is a multiple of 2^-21, and exact.
inline float screen_bound(int64_t width) { return 0x1p-10f + 0x1p-19f + static_cast<float>(width) * 0x1p-21f; }

// Tells `list_undecided` of a tile. For one thread.
__device__ __forceinline__ void leave_undecided(const Work& w, const Rectangle& rectangle, int tile_i, int tile_j) {
  const int place = rectangle.place(tile_i, tile_j);
  atomicOr(w.undecided + place / 32, 1u << place % 32);
}

// Looks for pairs that may be hard: those beyond margins that are wider by the bound.
struct ScreenVisitor {
  template <int kTiles>
  using Memory = LossMemory<kTiles>;
  template <int kAcross>
  using Order = TileOrder<kAcross>;
  static constexpr int kRing = LossVisitor::kRing;
  static constexpr int kLead = LossVisitor::kLead;
  static constexpr bool kMoves = false;
  static constexpr bool kScreens = true;

  float bound;

  template <Held kHeld, int kTiles>
  __device__ __forceinline__ void begin(const Work& w, LossMemory<kTiles>& memory) const {
    LossVisitor{}.begin<kHeld>(w, memory);
    const int thread = worker<kHeld>();  // which has just written its margin; both are rounded outwards
    if (thread == kPlus) memory.margin[kPlus] = -__fadd_rd(-memory.margin[kPlus], -bound);
    if (thread == kMinus) memory.margin[kMinus] = __fadd_rd(memory.margin[kMinus], -bound);
  }
  template <Held kHeld, int kTiles>
  __device__ __forceinline__ bool prepare(const Work& w, LossMemory<kTiles>& memory, int tile_i, int tile_j) const {
    return LossVisitor{}.prepare<kHeld>(w, memory, tile_i, tile_j);
  }

  // Whether a pair of the team's may be hard: the same for all of a team.
  template <Held kHeld, int kTiles>
  __device__ __forceinline__ bool visit(const Work& w, const Rectangle& rectangle, LossMemory<kTiles>& memory,
                                        const float (&s)[kTiles][4][4][4], int tile_i, int tile_j,
                                        bool prepared) const {
    const Team<kHeld> of = team<kHeld>();
    bool found = false;
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      if (!present(rectangle, tile_i, tile_j + k, memory.valid[1])) continue;
      uint32_t hard[2] = {};
      if (prepared) found = scan_tile<kHeld>(memory, s[k], k, true, 0, hard) != 0 || found;
      else found = largest(s[k]) >= memory.margin[kMinus] || found;
    }
    found = of.any(found);
    if (worker<kHeld>() != of.number * Team<kHeld>::kWorkers) return found;
    if (found) leave_undecided(w, rectangle, tile_i, tile_j);
    else write_empty_records(w, rectangle, memory, tile_i, tile_j, of);
    return found;
  }
  // Leaves the tile that `order` is at and all further ones undecided. For one thread.
  template <class Tiles>
  __device__ __forceinline__ void leave(const Work& w, const Rectangle& rectangle, Tiles& order) const {
    do leave_undecided(w, rectangle, order.i, order.j);
    while (order.next());
  }
  template <Held kHeld, int kTiles>
  __device__ __forceinline__ void end(const Work&, LossMemory<kTiles>&) const {}
};

// Lists the places of undecided tiles, in order, and clears their bits for the next rectangle. One block of threads, each
// with some neighbouring words.
__global__ void __launch_bounds__(kThreads)
    list_undecided(const __grid_constant__ Work w, const __grid_constant__ Rectangle rectangle) {
  int* of_warp = reinterpret_cast<int*>(shared_memory());  // [kWarps] tiles
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int words = (rectangle.places() + 31) / 32, each = (words + kThreads - 1) / kThreads;
  const int begin = min(thread * each, words), end = min(begin + each, words);
  int mine = 0;
  for (int k = begin; k < end; ++k) mine += __popc(w.undecided[k]);
  int place = mine;  // of the thread's first tile in the list, when all before it have been added
  for (int k = 1; k < 32; k *= 2) {
    const int left = __shfl_up_sync(~0u, place, k);
    if (lane >= k) place += left;
  }
  if (lane == 31) of_warp[warp] = place;
  __syncthreads();
  place -= mine;
  for (int k = 0; k < warp; ++k) place += of_warp[k];
  for (int k = begin; k < end; ++k) {
    for (uint32_t bits = w.undecided[k]; bits != 0; bits &= bits - 1) w.listed[place++] = k * 32 + __ffs(bits) - 1;
    w.undecided[k] = 0;
  }
  if (thread == kThreads - 1) *w.listed_size = place;
}

// The listed tiles, every gridDim.x-th from blockIdx.x on.
struct ListedOrder {
  const Work& w;
  const Rectangle& rectangle;
  int number = static_cast<int>(blockIdx.x), i = 0, j = 0;

  __device__ ListedOrder(const Work& of, const Rectangle& in) : w(of), rectangle(in) {}
  __device__ bool find() {
    if (number >= *w.listed_size) return false;
    const int place = w.listed[number];
    i = rectangle.row_at(place), j = rectangle.column_at(place);
    return true;
  }
  __device__ bool next() {
    number += static_cast<int>(gridDim.x);
    return find();
  }
};

// The loss of the tiles that the screen has left.
struct UndecidedVisitor : LossVisitor {
  template <int kAcross>
  using Order = ListedOrder;
};

}  // namespace
}  // namespace tcm::cuda
