// Similarities of a rectangle of tiles on Hopper: the product by warpgroups (wgmma), fed by the copy engine.
//
// 128 x 256 at a time, two neighbouring tiles of a row. One warpgroup has a thread that copies ahead, through a ring of
// three or four stages of 48 KB; two compute, each 64 x 256 of the product in 128 accumulators per thread, and then
// show the two tiles to a visitor. A stage of 64 columns is 2 * 128 * 256 * 64 flop: 1,024 cycles at 4,096 flop a
// cycle, in which 48 KB come from L2 (48 bytes a cycle and multiprocessor) and wgmma reads 80 bytes a cycle of shared
// memory, of 128. Where a visitor looks at each half of the rows by itself (kLead), one warpgroup multiplies, at the
// full rate, while the other looks. csrc/cuda/cycles.md has the times that follow: counted, not measured.
#pragma once

#include "ptx_sm90.cuh"
#include "tile.cuh"

namespace tcm::cuda {
namespace {

constexpr int kThreadsSm90 = 128 + kThreads;  // the warpgroup that copies, and the workers

template <class Visitor>
struct SimilaritySm90Memory {
  static constexpr int kRing = Visitor::kRing;
  unsigned char stage[kRing][3][kBoxRows * kBoxColumns * 2];  // the row tile, two column tiles; each 1,024-byte aligned
  Barrier full[kRing], empty[kRing], ahead, tried;
  bool failed;  // the trial of a screen
  typename Visitor::template Memory<2> tile;
};
static_assert(kBoxRows == kTile && kBoxColumns == kDepth);

struct TensorMaps {
  TensorMap of[2];  // x^ of rows and of columns, [parts * tiles * kTile, width]
};

// Place in the ring of the n-th step: its stage, and the parity of its turn there.
template <int kRing>
struct Ring {
  int stage = 0, parity = 0;
  __device__ void next() {
    if (++stage == kRing) stage = 0, parity ^= 1;
  }
};

// Whether a screen is to end, as the first team has found; for the second and for the thread that copies.
template <class Visitor>
__device__ __forceinline__ bool trial_failed(SimilaritySm90Memory<Visitor>& memory) {
  barrier_wait(memory.tried, 0);
  return memory.failed;
}

// One thread: copies all steps of all tiles, each as soon as its stage is empty. Parts as in `load_step`.
template <class Visitor>
__device__ __forceinline__ void copy_steps(const Work& w, const Rectangle& rectangle, const TensorMaps& maps,
                                           SimilaritySm90Memory<Visitor>& memory) {
  const int of_part = w.width / kDepth, parts = w.parts == 2 ? 3 : 1;
  const int low_rows = w.set[0].tiles * kTile, low_columns = w.set[1].tiles * kTile;  // where the low part begins
  Ring<Visitor::kRing> ring;
  typename Visitor::template Order<2> order(w, rectangle);
  [[maybe_unused]] int number = 0;
  for (bool more = order.find(); more; more = order.next()) {
    if constexpr (Visitor::kScreens) {
      if (number++ == Trial::kTiles && trial_failed(memory)) return;
    }
    for (int part = 0; part < parts; ++part) {
      const int row = order.i * kTile + (part == 1 ? low_rows : 0);
      const int column_row = order.j * kTile + (part == 0 && parts == 3 ? low_columns : 0);
      for (int step = 0; step < of_part; ++step, ring.next()) {
        barrier_wait(memory.empty[ring.stage], ring.parity ^ 1);
        Barrier& full = memory.full[ring.stage];
        barrier_expect(full, sizeof memory.stage[0]);
        copy_box(memory.stage[ring.stage][0], maps.of[0], full, row, step * kDepth);
        copy_box(memory.stage[ring.stage][1], maps.of[1], full, column_row, step * kDepth);
        copy_box(memory.stage[ring.stage][2], maps.of[1], full, column_row + kTile, step * kDepth);
      }
    }
  }
}

// The workers: all products, each pair of tiles then shown to the visitor.
template <class Visitor>
__device__ __forceinline__ void work_steps(const Work& w, const Rectangle& rectangle, const Visitor& visitor,
                                           SimilaritySm90Memory<Visitor>& memory) {
  const int of_part = w.width / kDepth, steps = of_part * (w.parts == 2 ? 3 : 1);
  const int half = worker<kColumns>() / 128 * (64 * 128);  // bytes to the warpgroup's rows
  const bool speaks = threadIdx.x % 32 == 0;               // for its warp
  // [tile, word, 8 columns, 2 h + e]. The zeros are never read, but without them ptxas 12.6 and 12.8 serialise the
  // products (C7515); where a visitor moves similarities about, every ptxas does unless they are there for each tile.
  float s[128] = {};
  Ring<Visitor::kRing> ring;
  typename Visitor::template Order<2> order(w, rectangle);
  [[maybe_unused]] Trial trial;
  // The second warpgroup begins when the first is kLead steps ahead, and stays behind it: so one looks while the other
  // multiplies. Steps to go until then, and one, since a step is over when the next has been waited for.
  int lead = Visitor::kLead == 0 ? 0 : Visitor::kLead + 1;
  for (bool more = order.find(); more; more = order.next()) {
    if (lead > 0 && worker<kColumns>() >= 128) barrier_wait(memory.ahead, 0), lead = 0;
    if constexpr (Visitor::kMoves) {
#pragma unroll
      for (int k = 0; k < 128; ++k) s[k] = 0;
    }
    bool prepared = false;
    for (int from = 0, to = w.parts == 2 ? 2 * of_part : of_part; from < steps; from = to, to = steps) {
      int held = 0;  // the stage before, which the products under way still read
      for (int step = from; step < to; ++step, ring.next()) {
        barrier_wait(memory.full[ring.stage], ring.parity);
        const uint64_t a = operand(memory.stage[ring.stage][0] + half), b = operand(memory.stage[ring.stage][1]);
        warpgroup_fence();
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) warpgroup_multiply(s, operand_at(a, k), operand_at(b, k), (step | k) != 0);
        warpgroup_commit();
        warpgroup_wait<1>();
        if (step > from && speaks) barrier_arrive(memory.empty[held]);
        held = ring.stage;
        if (lead > 0 && --lead == 0 && worker<kColumns>() == 0) barrier_arrive(memory.ahead);
      }
      if (to == steps) prepared = visitor.template prepare<kColumns>(w, memory.tile, order.i, order.j);
      warpgroup_finish(s);
      if (lead > 0 && worker<kColumns>() == 0) barrier_arrive(memory.ahead);
      lead = 0;
      if (speaks) barrier_arrive(memory.empty[held]);
      if (to < steps) {
#pragma unroll
        for (int k = 0; k < 128; ++k) s[k] *= 1 / kLowScale;
      }
    }
    const auto visit = [&] {
      return visitor.template visit<kColumns>(w, rectangle, memory.tile, reinterpret_cast<float (&)[2][4][4][4]>(s),
                                              order.i, order.j, prepared);
    };
    if constexpr (!Visitor::kScreens) {
      visit();
    } else if (trial.over(visit())) {
      if (worker<kColumns>() == 0) memory.failed = trial.failed(), barrier_arrive(memory.tried);
      if (!(worker<kColumns>() < 128 ? trial.failed() : trial_failed(memory))) continue;
      if (worker<kColumns>() == 0 && order.next()) visitor.leave(w, rectangle, order);
      break;
    }
  }
  visitor.template end<kColumns>(w, memory.tile);
}

// Compiled for anything but sm_90a it does nothing and admits too few threads: `most_threads` tells.
template <class Visitor>
__global__ void __launch_bounds__(TCM_SM90 ? kThreadsSm90 : 32, 1)
    similarity_sm90(const __grid_constant__ Work w, const __grid_constant__ Rectangle rectangle,
                    const __grid_constant__ Visitor visitor, const __grid_constant__ TensorMaps maps) {
#if TCM_SM90
  auto& memory = *reinterpret_cast<SimilaritySm90Memory<Visitor>*>(shared_memory());
  if (threadIdx.x == 0) {
    for (int k = 0; k < Visitor::kRing; ++k) barrier_init(memory.full[k], 1), barrier_init(memory.empty[k], kWarps);
    barrier_init(memory.ahead, 1);
    barrier_init(memory.tried, 1);
    barriers_ready();
  }
  if (threadIdx.x >= 128) visitor.template begin<kColumns>(w, memory.tile);
  __syncthreads();
  if (threadIdx.x < 128) {
    fewer_registers<40>();
    if (threadIdx.x == 0) copy_steps(w, rectangle, maps, memory);
  } else {
    more_registers<232>();
    work_steps(w, rectangle, visitor, memory);
  }
#endif
}

}  // namespace
}  // namespace tcm::cuda
