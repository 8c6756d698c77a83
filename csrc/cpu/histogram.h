// Counts of pairs by similarity, in all and by class, on a CPU. Knows nothing of torch.
#pragma once

#include "embeddings.h"
#include "pair_loops.h"

namespace tcm::cpu {

// The unordered pairs of n rows. Rows of one class are positives of it; a pair of different classes is a negative of
// both. Classes from `classes` on share one row of counts; a row of a negative class is in no count at all.
template <class real>
struct PairCountProblem {
  int64_t n, d, classes, thresholds;
  const real* x;          // [n, d] rows of any length, finite
  const int64_t* y;       // [n] class
  const real* threshold;  // [thresholds] ascending
  int bits;               // the grid on [-1, 1] has steps of 2^-bits
};

template <class real>
struct PairCounts {
  int64_t* count[2];        // [2^(bits + 1) + 1] positives, negatives in each cell [k, k + 1) 2^-bits - 1; the last is s = 1
  int64_t* class_count[2];  // [classes + 1, thresholds] those of each class with threshold k <= s < threshold k + 1
  real* best[2];            // [n] largest similarity to a positive, to a negative; -infinity where there is none
  int64_t* progress;        // [2] blocks done and to do, written as it goes; or null
};

// Throws std::invalid_argument if a row is not finite, what the host throws, and std::bad_alloc.
template <class real>
void count_pairs(const PairCountProblem<real>& problem, const PairCounts<real>& result, const Host<real>& host, Isa isa);

}  // namespace tcm::cpu
