// The contract between the operators and the kernels: what a problem is and what a kernel writes.
#pragma once

#include <cstdint>

namespace tcm {

constexpr double kEps = 1e-12;  // smallest norm a row is divided by

enum Side { kPlus = 0, kMinus = 1 };  // positives, negatives: index of every pair [2] below

// A pair (i, j) is positive if y_i == y_j, negative if not; it is left out if a label is negative or if
// j == row_offset + i. A positive is hard if s_ij <= margin[kPlus], a negative if s_ij >= margin[kMinus].
template <class real>
struct Problem {
  bool symmetric;          // the columns are the rows: m is n, ref_x and ref_y are not read, row_offset is 0
  int64_t n, m, d;
  const real* x;           // [n, d] rows
  const int64_t* y;        // [n]
  const real* ref_x;       // [m, d] columns
  const int64_t* ref_y;    // [m]
  int64_t row_offset;      // column that is row 0 itself; -1: none
  double margin[2];
  double lambda[2];
  bool squared;            // penalties are the squares of m+ - s and s - m-
};

template <class real>
struct Result {
  bool per_side;     // gradients are those of penalty[kPlus] and of penalty[kMinus], [2, n, d] and [2, m, d]
  real* loss;        // []
  real* grad_x;      // [n, d] dL/dx, or null: not wanted
  real* grad_ref;    // [m, d] dL/dref_x, or null: not wanted
  double* penalty;   // [2] sums of m+ - s and s - m-, or of their squares, over the hard pairs
  int64_t* count;    // [2] hard pairs, ordered
};

}  // namespace tcm
