// Pairs counted by similarity: a visitor of the tiles of `similarity`, and the kernels before and after it.
//
// A tile's pairs go three ways.
// 1. Every negative in the window, a range of cells around the mean similarity that is as wide as shared memory has
//    room for, is counted there: one atomic addition to a 16-bit counter, two in each word.
// 2. Any that needs more (positives, negatives beyond the window, pairs from the first threshold on) goes to a queue of the
//    warp's, and from there 32 at a time to counts in global memory, by cell and by class. So the long way is walked by
//    full warps, and its code is there a few times only.
// 3. The largest similarity of each row and column of the tile, to positives and to negatives, raises that of the row's
//    in global memory, which is read first: almost all of them raise nothing.
// Counts are integers and the rest is a maximum: no order of threads, and no window, changes a result.
#pragma once

#include "tile.cuh"

namespace tcm::cuda {
namespace {

constexpr int kBatch = 4;                      // pairs of a thread between two looks at the queue
constexpr int kQueue = (kBatch + 1) * 32 - 1;  // pairs of a warp's queue: up to 31 that a look leaves, and a batch
constexpr unsigned kCarry = 1 << 15;           // see `count_near`

// A float as an unsigned number that is larger the larger it is, -0 being 0; and back. No float has key 0.
__device__ __forceinline__ uint32_t key_of(float value) {
  value += 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits >> 31 != 0 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  uint32_t bits = key >> 31 != 0 ? key & ~(1u << 31) : ~key;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

struct QueuedPair {
  float value;
  short row, column;  // of the tile
};

struct alignas(16) CountMemory {
  uint32_t mask[1][2][kTile][4];  // pairs of each row: positives, negatives
  QueuedPair queue[kWarps][kQueue];
  // Then the window: [window / 2] words of two counters.
};

// One look of a warp: at the pairs of one side of a tile.
struct Look {
  int tile_i, tile_j, side;
  bool special;  // memory.mask tells which pairs are of the side; else all are
  int to_place;  // from a similarity's cell, s 2^bits rounded down, to its place in the window
  int window;    // cells that are counted there
  float least;   // first threshold
};

struct CountVisitor {
  template <int kTiles>
  using Memory = CountMemory;
  template <int kAcross>
  using Order = TileOrder<kAcross>;
  static constexpr int kRing = 3;       // the window has the room of the fourth
  static constexpr int kLead = 0;       // the window's counters would overflow
  static constexpr bool kMoves = true;  // see `look`
  static constexpr bool kScreens = false;

  int64_t classes;
  int bits, thresholds;
  int window;               // cells in shared memory; even, less than there are
  const float* threshold;   // [thresholds]
  int* first;               // [] first cell of the window
  int32_t* start;           // [cells + 1] thresholds at or below the lower end of a cell; the last: all
  int32_t* table[2];        // [n] row of class_count of a sorted row, of a sorted column
  uint32_t* best[2][2];     // [n] key of the largest similarity of a sorted row, and of a column, by side
  int64_t* count[2];        // [cells]
  int64_t* class_count[2];  // [classes + 1, thresholds]

  __host__ __device__ int cells() const { return (2 << bits) + 1; }
  __device__ float scale() const { return static_cast<float>(1 << bits); }
  // Cell of a similarity: its lower end is s rounded down to the grid, exactly.
  __device__ int cell_of(float s) const { return min(max(floor_of(s * scale()) + (1 << bits), 0), cells() - 1); }
  __device__ static uint32_t* window_of(CountMemory& memory) { return reinterpret_cast<uint32_t*>(&memory + 1); }

  template <Held kHeld>
  __device__ __forceinline__ void begin(const Work&, CountMemory& memory) const {
    for (int k = worker<kHeld>(); k < window / 2; k += kThreads) window_of(memory)[k] = 0;
  }

  template <Held kHeld>
  __device__ __forceinline__ void end(const Work&, CountMemory& memory) const {
    barrier_sync<kThreads>(1);
    for (int k = worker<kHeld>(); k < window; k += kThreads) {
      unsigned found = window_of(memory)[k / 2] >> k % 2 * 16 & 0xffff;
      if (found != 0) add(count[kMinus] + *first + k, found);
    }
  }

  template <Held kHeld>
  __device__ __forceinline__ bool prepare(const Work&, CountMemory&, int, int) const {
    return false;  // all is left to `visit`: of two tiles there is but one mask at a time
  }

  template <Held kHeld, int kTiles>
  __device__ __forceinline__ void visit(const Work& w, const Rectangle& rectangle, CountMemory& memory,
                                        float (&s)[kTiles][4][4][4], int tile_i, int tile_j, bool) const {
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
      if (present(rectangle, tile_i, tile_j + k, w.state->valid[1]))
        visit_one<kHeld>(w, memory, s[k], tile_i, tile_j + k);
  }

  template <Held kHeld>
  __device__ __forceinline__ void visit_one(const Work& w, CountMemory& memory, float (&s)[4][4][4], int tile_i,
                                            int tile_j) const {
    // Its barrier keeps a warp from being more than a tile ahead of another; `count_near` relies on it.
    const bool special =
        note_pairs<true>(w, memory.mask, tile_i, tile_j, w.state->valid[0], w.state->valid[1], Team<kHeld, kThreads>{});
    const float least = thresholds == 0 ? INFINITY : threshold[0];
    const int to_place = (1 << bits) - *first;
#pragma unroll 1
    for (int side = special ? kPlus : kMinus; side <= kMinus; ++side)
      look<kHeld>(memory, s, {tile_i, tile_j, side, special, to_place, side == kMinus ? window : 0, least});
  }

  static __device__ __forceinline__ void add(int64_t* to, unsigned pairs) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(pairs));
  }

  // Counts a negative of the window. A counter that reaches kCarry hands that on to global memory: others may add to it
  // before it does, but no more than a tile's 2^14 pairs, so it never overflows into its neighbour.
  __device__ __forceinline__ void count_near(CountMemory& memory, unsigned place, int to_place) const {
    const unsigned shift = place % 2 * 16;
    uint32_t* word = window_of(memory) + place / 2;
    if ((atomicAdd(word, 1u << shift) >> shift & 0xffff) != kCarry - 1) return;
    atomicAdd(word, -(kCarry << shift));
    add(count[kMinus] + (1 << bits) - to_place + place, kCarry);
  }

  // The pairs of one side among the similarities that the workers hold, 16 at a time: always those in s[0], into which
  // the next are moved. So the code is there once, not four times, and fits the instruction cache.
  template <Held kHeld>
  __device__ __forceinline__ void look(CountMemory& memory, float (&s)[4][4][4], const Look& at) const {
    const int thread = afresh(worker<kHeld>()), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int warp_row = kHeld == kRows ? warp / 4 * 64 : warp * 16, warp_column = kHeld == kRows ? warp % 4 * 32 : 0;
    const float factor = scale();
    float row_top[2], column_top[8];
    clear(row_top), clear(column_top);
    int queued = 0;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int row = warp_row + (kHeld == kRows ? i * 16 : 0) + g;            // and row + 8
      const int column = warp_column + (kHeld == kRows ? 0 : i * 32) + t * 2;  // and 8 j + e more
      uint32_t pairs[2] = {~0u, ~0u};
      if (at.special)
        for (int h = 0; h < 2; ++h) pairs[h] = memory.mask[0][at.side][row + h * 8][column / 32] >> t;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int h = k / 2, e = k % 2;
          const float value = s[0][j][k];
          const bool pair = (pairs[h] >> mask_bit(j * 8 + e) & 1) != 0;
          const int place = floor_of(value * factor) + at.to_place;
          const bool near = pair && static_cast<unsigned>(place) < static_cast<unsigned>(at.window);
          if (near) count_near(memory, static_cast<unsigned>(place), at.to_place);
          row_top[h] = max(row_top[h], pair ? value : -INFINITY);
          column_top[j * 2 + e] = max(column_top[j * 2 + e], pair ? value : -INFINITY);
          const bool more = pair && (!near || value >= at.least);
          const unsigned lanes = __ballot_sync(~0u, more);
          if (more)
            memory.queue[warp][queued + __popc(lanes & ((1u << lane) - 1))] = {value, static_cast<short>(row + h * 8),
                                                                               static_cast<short>(column + j * 8 + e)};
          queued += __popc(lanes);
        }
        drain(memory.queue[warp], lane, queued, 31, at);
      }
      if constexpr (kHeld == kRows) raise_rows(row_top, row, t, at);
      else raise_columns(column_top, column, g, at);
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const float first_one = s[0][k / 4][k % 4];
#pragma unroll
        for (int next = 0; next < 3; ++next) s[next][k / 4][k % 4] = s[next + 1][k / 4][k % 4];
        s[3][k / 4][k % 4] = first_one;
      }
    }
    drain(memory.queue[warp], lane, queued, 0, at);
    if constexpr (kHeld == kRows) raise_columns(column_top, warp_column + t * 2, g, at);
    else raise_rows(row_top, warp_row + g, t, at);
  }

  template <int kSize>
  static __device__ __forceinline__ void clear(float (&top)[kSize]) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) top[k] = -INFINITY;
  }

  // Of rows `row` and row + 8, whose columns the lanes of equal lane / 4 have; and clears them.
  __device__ __forceinline__ void raise_rows(float (&top)[2], int row, int t, const Look& at) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int k = 1; k < 4; k *= 2) top[h] = max(top[h], __shfl_xor_sync(~0u, top[h], k));
    }
    if (t < 2)
      raise(best[0][at.side] + static_cast<int64_t>(at.tile_i) * kTile + row + t * 8, t == 0 ? top[0] : top[1]);
    clear(top);
  }

  // Of columns `column` + 8 j + e, whose rows the lanes of equal lane % 4 have: each of these speaks for one of the
  // eight columns. Clears them.
  __device__ __forceinline__ void raise_columns(float (&top)[8], int column, int g, const Look& at) const {
    float mine = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int k = 4; k < 32; k *= 2) top[j] = max(top[j], __shfl_xor_sync(~0u, top[j], k));
      if (g == j) mine = top[j];
    }
    raise(best[1][at.side] + static_cast<int64_t>(at.tile_j) * kTile + column + g / 2 * 8 + g % 2, mine);
    clear(top);
  }

  static __device__ __forceinline__ void raise(uint32_t* best, float value) {
    if (value == -INFINITY) return;
    const uint32_t key = key_of(value);
    if (load_relaxed(best) < key) atomicMax(best, key);  // it only grows, so that an old value does no harm
  }

  // Takes 32 pairs at a time from the end of the warp's queue, while more than `keep` are there.
  __device__ __forceinline__ void drain(const QueuedPair (&queue)[kQueue], int lane, int& queued, int keep,
                                        const Look& at) const {
    if (queued <= keep) return;
    __syncwarp();  // they are written
#pragma unroll 1
    do {
      const int from = max(queued - 32, 0), place = from + lane;
      const bool mine = place < queued;
      settle(queue[mine ? place : from], mine, lane, at);
      queued = from;
    } while (queued > keep);
    __syncwarp();  // and read
  }

  __device__ __forceinline__ void settle(const QueuedPair& pair, bool mine, int lane, const Look& at) const {
    // By cell: lanes with the cell of the first one add together, which is all of them where similarities are few.
    const int cell = cell_of(pair.value), place = floor_of(pair.value * scale()) + at.to_place;
    const bool far = mine && static_cast<unsigned>(place) >= static_cast<unsigned>(at.window);
    if (const unsigned lanes = __ballot_sync(~0u, far); lanes != 0) {
      const int speaker = __ffs(lanes) - 1, shared = __shfl_sync(~0u, cell, speaker);
      const unsigned same = __ballot_sync(~0u, far && cell == shared);
      if (lane == speaker) add(count[at.side] + cell, __popc(same));
      else if (far && cell != shared) add(count[at.side] + cell, 1);
    }

    // By class: the last threshold at or below the similarity.
    if (!mine || !(pair.value >= at.least)) return;
    const int last = at_or_below(pair.value, start[cell], start[cell + 1]) - 1;
    const int64_t row = table[0][at.tile_i * kTile + pair.row], column = table[1][at.tile_j * kTile + pair.column];
    add(class_count[at.side] + row * thresholds + last, 1);
    if (at.side == kMinus) add(class_count[at.side] + column * thresholds + last, 1);
  }

  // Number of thresholds at or below `value`, which lies between `low` and `high`.
  __device__ __forceinline__ int at_or_below(float value, int low, int high) const {
#pragma unroll 1
    while (low < high) {
      const int middle = (low + high) / 2;
      if (threshold[middle] <= value) low = middle + 1;
      else high = middle;
    }
    return low;
  }
};

__device__ __forceinline__ double sum_of_column(const Embeddings& set, int width, int column) {
  double sum = 0;
#pragma unroll 8
  for (int tile = 0; tile < set.tiles; ++tile) sum += set.tile_sum[static_cast<int64_t>(tile) * width + column];
  return sum;
}

// The first cell of the window: it is centred on the mean similarity of two rows, which is the product of the sums of x^
// of both sets; of one set less that of each row with itself. One block of threads.
__global__ void __launch_bounds__(kThreads)
    centre_window(const __grid_constant__ Work w, const __grid_constant__ CountVisitor counter) {
  double* partial = reinterpret_cast<double*>(shared_memory());  // [kWarps]
  double product = 0;
  for (int c = threadIdx.x; c < w.width; c += kThreads) {
    const double sum = sum_of_column(w.set[0], w.width, c);
    product += sum * (w.symmetric ? sum : sum_of_column(w.set[1], w.width, c));
  }
  product = warp_sum(product);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = product;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0, rows = w.state->valid[0], columns = w.state->valid[1];
  for (int k = 0; k < kWarps; ++k) total += partial[k];
  if (w.symmetric) total -= rows, columns -= 1;
  double mean = rows * columns > 0 ? total / (rows * columns) : 0;
  int centre = counter.cell_of(static_cast<float>(mean));
  *counter.first = min(max(centre - counter.window / 2, 0), counter.cells() - counter.window);
}

// Zeros for the counts to add to, and the tables that they look up.
__global__ void __launch_bounds__(kThreads)
    prepare_counts(const __grid_constant__ Work w, const __grid_constant__ CountVisitor counter) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t class_counts = (counter.classes + 1) * counter.thresholds;
  for (int side = 0; side < 2; ++side) {
    for (int64_t k = thread; k < counter.cells(); k += step) counter.count[side][k] = 0;
    for (int64_t k = thread; k < class_counts; k += step) counter.class_count[side][k] = 0;
  }
  for (int set = 0; set < (w.symmetric ? 1 : 2); ++set)
    for (int64_t k = thread; k < w.set[set].n; k += step) {
      for (int side = 0; side < 2; ++side) counter.best[set][side][k] = key_of(-INFINITY);
      const uint64_t label = w.set[set].label[0][k], last = counter.classes;
      counter.table[set][k] = static_cast<int32_t>(label < last ? label : last);
    }
  for (int64_t k = thread; k <= counter.cells(); k += step) {
    const float low = static_cast<float>(k - (1 << counter.bits)) / counter.scale();
    // The first cell reaches down to -infinity, the last up.
    const int all = counter.thresholds;
    counter.start[k] = counter.at_or_below(low, k == counter.cells() ? all : 0, k == 0 ? 0 : all);
  }
}

// The largest similarities of a set's rows in the order of the input.
__global__ void __launch_bounds__(kThreads)
    finish_counts(const __grid_constant__ Work w, const __grid_constant__ CountVisitor counter, int set,
                  float* best_plus, float* best_minus) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= w.set[set].n) return;
  for (int side = 0; side < 2; ++side)
    (side == kPlus ? best_plus : best_minus)[w.set[set].order[0][k]] =
        w.state->non_finite == 0 ? value_of(counter.best[set][side][k]) : NAN;
}

}  // namespace
}  // namespace tcm::cuda
