// From sums to results: reads G+ and G- where they were written, writes the gradient once. Bound by memory.
#pragma once

#include "work.h"

namespace tcm::cuda {
namespace {

struct Totals {
  double penalty[2];
  int64_t count[2];
};

// Sum of all partials, in a fixed order, for all threads of the block.
__device__ __forceinline__ Totals add_partials(const Work& w) {
  Totals* memory = reinterpret_cast<Totals*>(shared_memory());  // [kThreads]
  Totals mine = {};
  for (int k = threadIdx.x; k < w.partials; k += kThreads)
    for (int side = 0; side < 2; ++side)
      mine.penalty[side] += w.partial[k].penalty[side], mine.count[side] += w.partial[k].count[side];
  memory[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half)
      for (int side = 0; side < 2; ++side) {
        memory[threadIdx.x].penalty[side] += memory[threadIdx.x + half].penalty[side];
        memory[threadIdx.x].count[side] += memory[threadIdx.x + half].count[side];
      }
    __syncthreads();
  }
  return memory[0];
}

// One warp per row: dL/dx = (g - (g . x^) x^) / max(|x|, kEps) with g = w- G- - w+ G+ (twice that where the rows are the
// columns). Rows that take no part get 0; where an embedding is not finite all others get NaN. The gradients of
// the penalties have w+ and w- = 1 and 0, then 0 and 1 (blockIdx.z), whatever the counts.
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ Work w) {
  const Totals total = add_partials(w);
  const bool finite = w.state->non_finite == 0;
  const double nan = NAN;
  double weight[2], loss = finite ? 0 : nan;
  for (int side = 0; side < 2; ++side) {
    weight[side] = total.count[side] == 0 ? 0 : w.state->weight[side] / static_cast<double>(total.count[side]);
    loss += weight[side] * total.penalty[side];
  }
  if (blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0) {
    if (w.loss != nullptr) *w.loss = static_cast<float>(loss);
    for (int side = 0; side < 2; ++side) {
      if (w.penalty != nullptr) w.penalty[side] = finite ? total.penalty[side] : nan;
      if (w.count != nullptr) w.count[side] = total.count[side];
    }
  }
  const Embeddings& set = w.set[blockIdx.y];
  if (set.grad == nullptr) return;
  const float factor = w.symmetric ? 2.0f : 1.0f;
  float plus = factor * static_cast<float>(weight[kPlus]), minus = factor * static_cast<float>(weight[kMinus]);
  if (w.gradients == 2) plus = blockIdx.z == kPlus ? factor : 0, minus = blockIdx.z == kMinus ? factor : 0;
  const uint8_t reads[2] = {plus != 0, minus != 0};  // and-ed with `touched`: a condition of its own would be a branch
  const int lane = threadIdx.x % 32;
  const int64_t part = static_cast<int64_t>(set.tiles) * kTile * w.width;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; k < set.n;
       k += static_cast<int64_t>(gridDim.x) * kWarps) {
    float* grad = set.grad + (blockIdx.z * set.n + set.order[0][k]) * w.d;
    const double inverse = set.inverse[k];
    const bool takes_part = k < w.state->valid[blockIdx.y];
    if (!takes_part || !finite || inverse == 0) {
      for (int64_t c = lane; c < w.d; c += 32) grad[c] = takes_part && !finite ? static_cast<float>(nan) : 0.0f;
      continue;
    }
    const uint8_t* touched = set.touched + k / kTile * w.slices;
    auto unit = [&](int64_t c) {
      const Half* x = set.unit + k * w.width + c;
      return w.parts == 1 ? to_float(x[0]) : to_float(x[0]) + to_float(x[part]) / kLowScale;
    };
    auto sum = [&](int64_t c) {
      float g = 0;
      if (touched[static_cast<int64_t>(set.tiles) * w.slices + c / kSlice] & reads[kMinus])
        g = minus * set.sum[kMinus][k * w.width + c];
      if (touched[c / kSlice] & reads[kPlus]) g -= plus * set.sum[kPlus][k * w.width + c];
      return g;
    };
    float along = 0;
    if (inverse < 1 / kEps) {  // else the divisor is kEps whatever x is: nothing to project away
      for (int64_t c = lane; c < w.d; c += 32) along += sum(c) * unit(c);
      along = static_cast<float>(warp_sum(along));
    }
    for (int64_t c = lane; c < w.d; c += 32) grad[c] = (sum(c) - along * unit(c)) * static_cast<float>(inverse);
  }
}

}  // namespace
}  // namespace tcm::cuda
