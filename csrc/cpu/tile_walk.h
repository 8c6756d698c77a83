// The TCM loss on a CPU: one walk over the similarity tiles. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <functional>

#include "../tcm_fused.h"
#include "pair_loops.h"

namespace tcm::cpu {

// What the walk needs from its host: threads and matrix products.
template <class real>
struct Host {
  int threads;
  // Runs body(begin, end) over [0, size) in up to `threads` threads; body must not throw.
  std::function<void(int64_t size, const std::function<void(int64_t begin, int64_t end)>& body)> parallel_for;
  // s [m, n], rows `stride` apart, = a [m, d] times the transpose of b [n, d]; with `transposed` b is that transpose,
  // [d, n], its rows `b_stride` apart, and m and n are multiples of 16. Called by several threads at once.
  std::function<void(const real* a, int64_t m, const real* b, int64_t n, int64_t d, int64_t b_stride, real* s,
                     int64_t stride)>
      product;
  bool transposed = false;
};

// Throws what the host throws, and std::bad_alloc. The bits of the result depend on the problem, on
// host.threads and on the instruction set, on nothing else.
template <class real>
void tcm_loss(const Problem<real>& problem, const Result<real>& result, const Host<real>& host, Isa isa);

}  // namespace tcm::cpu
