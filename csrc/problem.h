// The contract between operators and kernels, the same on every device: which pairs there are, the arguments of a
// kernel and its results. It knows nothing of torch, nor of a device.
//
// A pair (i, j) of a row and a column is positive if y_i == y_j, negative if not; it is left out if a label is negative
// or if j == row_offset + i. With s_ij = x^_i . x^_j its violation is margin[kPlus] - s_ij if it is positive and
// s_ij - margin[kMinus] if not. It is hard if its violation is not negative; its penalty is the violation.
#pragma once

#include <cstdint>

namespace tcm {

constexpr double kEps = 1e-12;  // smallest norm a row is divided by

enum Side { kPlus = 0, kMinus = 1 };  // positives, negatives: index of every pair [2] below

// A number for each side: those at `device`, in the device's memory, if that is not null; else those in here.
struct Sides {
  double value[2] = {0, 0};
  const double* device = nullptr;
};

// `element` is the type of the embeddings; void: one of several, named beside the problem.
template <class element>
struct Problem {
  bool symmetric;  // the columns are the rows: m is n, ref_x and ref_y are not read, row_offset is 0
  int64_t n, m, d;
  const element* x;      // [n, d] rows
  const int64_t* y;      // [n]
  const element* ref_x;  // [m, d] columns
  const int64_t* ref_y;  // [m]
  int64_t row_offset;    // column that is row 0 itself; -1: none
  Sides margin;
  Sides weight;  // of each side's mean penalty in the loss
  bool squared;  // penalties are the squares of the violations
  bool fp16;     // one fp16 product is enough; a device that has nothing less than fp32 takes no notice
};

// `loss` and the gradients of the loss, [n, d] and [m, d]; or, where `loss` is null, the gradients of penalty[kPlus] and
// of penalty[kMinus], [2, n, d] and [2, m, d], in which weights have no part.
template <class real>
struct Result {
  real* loss;       // []
  real* grad_x;     // by x; null: not wanted
  real* grad_ref;   // by ref_x; null: not wanted
  double* penalty;  // [2] sums over the hard pairs
  int64_t* count;   // [2] hard pairs, ordered

  int gradients() const { return loss != nullptr ? 1 : 2; }
};

// Pairs counted by similarity: the unordered ones of n rows, or each of n rows with each of m columns. Those of one class
// are positives of it; a pair of different classes is a negative of both. Classes from `classes` on share one row of
// counts; a row of a negative class is in no count at all.
template <class real>
struct CountProblem {
  bool symmetric;  // the columns are the rows: m is n, ref_x and ref_y are not read
  int64_t n, m, d, classes, thresholds;
  const real* x;          // [n, d] rows of any length
  const int64_t* y;       // [n] class
  const real* ref_x;      // [m, d] columns
  const int64_t* ref_y;   // [m]
  const real* threshold;  // [thresholds] ascending
  int bits;               // the grid on [-1, 1] has steps of 2^-bits, 0 to 20

  int64_t cells() const { return (int64_t{2} << bits) + 1; }
};

template <class real>
struct CountResult {
  int64_t* count[2];        // [cells] pairs in each cell [k, k + 1) 2^-bits - 1; the last is s >= 1
  int64_t* class_count[2];  // [classes + 1, thresholds] those of each class with threshold k <= s < threshold k + 1
  real* best[2];            // [n] largest similarity to a positive, to a negative; -infinity where there is none
  real* ref_best[2];        // [m] those of the columns; not written where the columns are the rows
  int64_t* progress;        // [2] tiles done and to do, written on the way where the kernel can; or null
};

}  // namespace tcm
