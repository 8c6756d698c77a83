// The pairs of rows and columns: which there are, which are positives, and their similarities.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "embeddings.h"

namespace tcm::cpu {

// How far a product of unit vectors may be off. Sums are made in steps of 256 numbers, and then of steps; or, by `dot`,
// in 32 parts or more.
template <class real>
real rounding(int64_t d) {
  int64_t additions = std::max(std::min<int64_t>(d, 256) + d / 256, d / 32) + 8;
  return static_cast<real>(additions) * std::numeric_limits<real>::epsilon() / 2;
}

template <class real>
struct Tile {  // similarities of row panel i and column panel j
  int64_t i, j;
  int m, n;
  real* s;  // [m, n], rows `stride` apart; of a tile that its codes decided, those of hard pairs
  int stride;
  uint64_t* hard[2] = {};  // [kTile, kWords] the hard pairs of a tile that its codes decided; else null
  Penalty penalty[2];
  std::array<bool, kTile> any[2] = {};  // whether a row has hard pairs
};

template <class real>
class Pairs {
 public:
  const Problem<real>& p;
  const PairLoops<real>& loops;
  const Embeddings<real>&rows, &columns;
  const bool symmetric;
  const real near;  // how far a similarity may be off by rounding

  Pairs(const Problem<real>& problem, const PairLoops<real>& pair_loops, const Embeddings<real>& of_rows,
        const Embeddings<real>& of_columns)
      : p(problem),
        loops(pair_loops),
        rows(of_rows),
        columns(of_columns),
        symmetric(problem.symmetric),
        near(rounding<real>(problem.d)) {}

  // For each row finds the range of columns of its label, and the column that is the row itself.
  void match() {
    first_.resize(rows.size), last_.resize(rows.size);
    int64_t first = 0, last = 0;
    for (int64_t k = 0; k < rows.size; ++k) {
      int64_t label = rows.label[k];
      while (first < columns.size && columns.label[first] < label) ++first;
      last = std::max(last, first);
      while (last < columns.size && columns.label[last] == label) ++last;
      first_[k] = first, last_[k] = last;
    }
    if (symmetric || p.row_offset < 0) return;
    std::vector<int64_t> position(p.m, -1);  // sorted position of a column
    for (int64_t k = 0; k < columns.size; ++k) position[columns.order[k]] = k;
    own_.resize(rows.size);
    for (int64_t k = 0; k < rows.size; ++k) own_[k] = position[rows.order[k] + p.row_offset];
  }

  // Only the upper triangle of a tile on the diagonal is there.
  bool is_diagonal(const Tile<real>& t) const { return symmetric && t.i == t.j; }

  // A tile's columns [start, n) count for its row `row`; those in [a, b) have the row's label.
  std::tuple<int, int, int> segments(const Tile<real>& t, int row) const {
    int64_t k = rows.begin(t.i) + row, begin = rows.begin(t.j);  // panels of rows and columns are equally long
    int64_t start = is_diagonal(t) ? row + 1 : 0;                // above the diagonal
    return {start, std::clamp<int64_t>(first_[k] - begin, start, t.n),
            std::clamp<int64_t>(last_[k] - begin, start, t.n)};
  }

  // The tile's column that is its row `row` itself, which counts for no pair; -1 if there is none.
  int64_t own(const Tile<real>& t, int row) const {
    int64_t column = own_.empty() ? -1 : own_[rows.begin(t.i) + row] - columns.begin(t.j);
    return column < t.n ? column : -1;
  }

  // Beyond 2 a margin makes all pairs hard or none, however far: the sums stay small and precise.
  double near_margin(int side) const {
    return p.squared ? p.margin.value[side] : std::clamp(p.margin.value[side], -2.0, 2.0);
  }
  real margin(int side) const { return static_cast<real>(near_margin(side)); }

  double violation_of(int side, real s) const {
    double above = static_cast<double>(s) - margin(side);
    return side == kPlus ? -above : above;
  }

  // The similarity of a sorted row and column. Within rounding of the margin it is that in float64, rounded: wherever the
  // pair is met, in whatever product and by whichever rank, it is decided alike.
  real similarity(int64_t row, int64_t column, int side) const {
    const real *x = rows.unit.get() + row * p.d, *y = columns.unit.get() + column * p.d;
    real s = loops.dot(x, y, p.d);
    return std::abs(s - margin(side)) > near ? s : static_cast<real>(loops.exact_dot(x, y, p.d));
  }

 private:
  std::vector<int64_t> first_, last_, own_;  // [rows] see match(); own_ is empty if no row is among the columns
};

}  // namespace tcm::cpu
