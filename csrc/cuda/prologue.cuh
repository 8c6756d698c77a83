// From the input to sorted unit vectors. Bound by memory: x is read once (its second reading hits the cache), x^
// written once; at N = 65,536, D = 512 in 16 bits 134 MB, about 1 % of the similarity product's time.
#pragma once

#include "work.h"

namespace tcm::cuda {
namespace {

constexpr int kSorted = 32;  // labels that one block of threads of `rank_labels` places

__device__ __forceinline__ double side_of(const Sides& sides, int side) {
  return sides.device == nullptr ? sides.value[side] : sides.device[side];
}

__device__ __forceinline__ State initial_state(const Work& w) {
  State state{};
  for (int side = 0; side < 2; ++side) {
    const double margin = side_of(w.margin, side), weight = side_of(w.weight, side);
    state.margin[side] = static_cast<float>(margin), state.weight[side] = weight;
    if (!isfinite(margin) || !isfinite(weight)) state.non_finite = 1;  // nobody else sees those that are on the device
  }
  return state;
}

// Sorts each run of `chunk` labels (all, if that is n or more) into label[to], order[to]: a label's place is the number
// of those before it. Each lane counts them for one label, each warp in its share of the run: n * chunk comparisons.
// Also sets State, and the zeros that later kernels add to. Negative labels are large as unsigned numbers: last.
__global__ void __launch_bounds__(kThreads) rank_labels(const __grid_constant__ Work w, int64_t chunk, int to) {
  int* below = reinterpret_cast<int*>(shared_memory());  // [kWarps, 32]
  const Embeddings& set = w.set[blockIdx.y];
  int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (blockIdx.y == 0) {
    if (thread == 0) *w.state = initial_state(w);
    const int64_t step = int64_t{kThreads} * gridDim.x;
    for (int64_t k = thread; k < w.partials; k += step) w.partial[k] = {};
    for (int64_t k = thread; k < w.undecided_words; k += step) w.undecided[k] = 0;
  }
  if (set.touched != nullptr) {
    const int64_t step = int64_t{kThreads} * gridDim.x;
    for (int64_t k = thread; k < int64_t{2} * set.tiles * w.slices; k += step) set.touched[k] = 0;
    for (int64_t k = thread; k < int64_t{2} * set.tiles; k += step) set.marked[k] = 0;
  }

  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kSorted + lane;
  if (blockIdx.x * static_cast<int64_t>(kSorted) >= set.n) return;
  int64_t begin = i / chunk * chunk, end = min(begin + chunk, set.n), share = (end - begin + kWarps - 1) / kWarps;
  uint64_t mine = i < set.n ? set.y[i] : 0;
  int count = 0;
  if (i < set.n) {
    int64_t stop = min(end, begin + (warp + 1) * share);
#pragma unroll 4
    for (int64_t j = begin + warp * share; j < stop; ++j) {
      uint64_t other = set.y[j];
      count += other < mine || (other == mine && j < i);
    }
  }
  below[warp * 32 + lane] = count;
  __syncthreads();
  if (warp == 0 && i < set.n) {
    int64_t place = begin;
    for (int k = 0; k < kWarps; ++k) place += below[k * 32 + lane];
    set.label[to][place] = mine, set.order[to][place] = static_cast<int32_t>(i);
    if (chunk >= set.n) set.position[i] = static_cast<int32_t>(place);
  }
}

// Merges neighbouring sorted runs of `run` labels, from [from] to [1 - from]. The place of a label is its own number in
// its run and that of those before it in the other, found by bisection.
__global__ void __launch_bounds__(kThreads) merge_labels(const __grid_constant__ Work w, int64_t run, int from) {
  const Embeddings& set = w.set[blockIdx.y];
  const uint64_t* label = set.label[from];
  int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= set.n) return;
  int64_t begin = k / (2 * run) * (2 * run), middle = min(begin + run, set.n), end = min(begin + 2 * run, set.n);
  uint64_t mine = label[k];
  bool second = k >= middle;  // among equal labels the first run's come first
  int64_t low = second ? begin : middle, high = second ? middle : end, start = low;
  while (low < high) {
    int64_t half = (low + high) / 2;
    if (label[half] < mine || (second && label[half] == mine)) low = half + 1;
    else high = half;
  }
  int64_t place = begin + (k - (second ? middle : begin)) + (low - start);
  int32_t i = set.order[from][k];
  set.label[1 - from][place] = mine, set.order[1 - from][place] = i;
  set.position[i] = static_cast<int32_t>(place);  // the last pass has the last word
}

// Number of labels [n] (sorted) below `mine`, or `equal`: not above it. The lanes of a warp
// look together, at 32 places in each round.
__device__ __forceinline__ int64_t count_below(const uint64_t* label, int64_t n, uint64_t mine, bool equal) {
  int64_t low = 0, high = n;
  while (low < high) {
    int64_t step = (high - low + 31) / 32, probe = low + (threadIdx.x % 32 + 1) * step - 1;
    bool below = probe < high && (label[probe] < mine || (equal && label[probe] == mine));
    low += __popc(__ballot_sync(~0u, below)) * step;
    high = min(high, low + step - 1);
  }
  return low;
}

// Eight neighbours of a row of x [d] from column c on; zeros past its end.
template <class T>
__device__ __forceinline__ void load_8(const T* x, int64_t c, int64_t d, bool whole, float (&v)[8]) {
  if (whole && c + 8 <= d) {  // aligned: one or two reads of 16 bytes
    union {
      uint4 raw[sizeof(T) / 2];
      T element[8];
    } u;
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(T) / 2); ++k) u.raw[k] = reinterpret_cast<const uint4*>(x + c)[k];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = to_float(u.element[k]);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = c + k < d ? to_float(x[c + k]) : 0.0f;
  }
}

// One warp per sorted row: x^, |x|, the range of its positives. In fp64, in which no square of an fp32 number over- or
// underflows and x^ is rounded but once.
template <class T>
__global__ void __launch_bounds__(kThreads) normalise(const __grid_constant__ Work w) {
  const Embeddings &set = w.set[blockIdx.y], &other = w.set[1 - blockIdx.y];
  int lane = threadIdx.x % 32;
  int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (k >= static_cast<int64_t>(set.tiles) * kTile) return;
  bool takes_part = k < set.n && set.label[0][k] >> 63 == 0;
  const T* x = takes_part ? static_cast<const T*>(set.x) + set.order[0][k] * w.d : nullptr;
  bool whole = w.d % 8 == 0 && reinterpret_cast<uintptr_t>(set.x) % 16 == 0;
  double norm = 0, inverse = 0;
  if (takes_part) {
    double squares = 0;
    for (int64_t c = lane * 8; c < w.d; c += 256) {
      float v[8];
      load_8(x, c, w.d, whole, v);
#pragma unroll
      for (int e = 0; e < 8; ++e) squares += static_cast<double>(v[e]) * v[e];
    }
    norm = sqrt(warp_sum(squares));
    bool finite = norm <= 1e300;  // false for NaN; no fp32 row is that long
    inverse = !finite || norm == 0 ? 0 : 1 / max(norm, kEps);
    if (lane == 0 && !finite) atomicOr(&w.state->non_finite, 1);
  }
  int64_t part = static_cast<int64_t>(set.tiles) * kTile * w.width;
  for (int64_t c = lane * 8; c < w.width; c += 256) {
    float v[8] = {};
    if (inverse != 0) load_8(x, c, w.d, whole, v);
    union {
      uint4 raw;
      Half element[8];
    } high, low;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      double unit = v[e] * inverse;
      high.element[e] = to_half(unit);
      low.element[e] = to_half((unit - to_float(high.element[e])) * kLowScale);
    }
    Half* out = set.unit + k * w.width + c;
    *reinterpret_cast<uint4*>(out) = high.raw;
    if (w.parts == 2) *reinterpret_cast<uint4*>(out + part) = low.raw;
  }
  if (k >= set.n) return;
  int64_t first = 0, last = 0;
  if (takes_part) {
    first = count_below(other.label[0], other.n, set.label[0][k], false);
    last = count_below(other.label[0], other.n, set.label[0][k], true);
  }
  if (lane != 0) return;
  set.inverse[k] = inverse;
  set.first[k] = static_cast<int32_t>(first), set.last[k] = static_cast<int32_t>(last);
  int64_t column = set.order[0][k] + w.row_offset;
  set.own[k] = w.symmetric ? static_cast<int32_t>(k) : w.has_own && blockIdx.y == 0 ? other.position[column] : -1;
  if (takes_part && (k + 1 == set.n || set.label[0][k + 1] >> 63 != 0)) {
    w.state->valid[blockIdx.y] = static_cast<int>(k + 1);
    if (w.symmetric) w.state->valid[1] = static_cast<int>(k + 1);
  }
}

// Sums of x^ over each tile of rows, kDepth columns per block of threads: 8 groups of 16 rows, then the 8 sums, in order.
__global__ void __launch_bounds__(kThreads) sum_tiles(const __grid_constant__ Work w) {
  float2* partial = reinterpret_cast<float2*>(shared_memory());  // [8, 32]
  const Embeddings& set = w.set[blockIdx.z];
  if (blockIdx.x >= static_cast<unsigned>(set.tiles)) return;
  int pair = threadIdx.x % 32, group = threadIdx.x / 32;
  int64_t rows = static_cast<int64_t>(set.tiles) * kTile;
  float2 sum{0, 0};
  for (int k = 0; k < kTile / kWarps; ++k) {
    int64_t row = static_cast<int64_t>(blockIdx.x) * kTile + group * (kTile / kWarps) + k;
    for (int part = 0; part < w.parts; ++part) {
      const Half* unit = set.unit + (part * rows + row) * w.width + blockIdx.y * kDepth + 2 * pair;
      uint32_t two = *reinterpret_cast<const uint32_t*>(unit);
      float scale = part == 0 ? 1.0f : 1 / kLowScale;
      sum.x += scale * to_float(low(two)), sum.y += scale * to_float(high(two));
    }
  }
  partial[group * 32 + pair] = sum;
  __syncthreads();
  if (group != 0) return;
  for (int k = 1; k < kWarps; ++k) sum.x += partial[k * 32 + pair].x, sum.y += partial[k * 32 + pair].y;
  float* out = set.tile_sum + static_cast<int64_t>(blockIdx.x) * w.width + blockIdx.y * kDepth + 2 * pair;
  *reinterpret_cast<float2*>(out) = sum;
}

}  // namespace
}  // namespace tcm::cuda
