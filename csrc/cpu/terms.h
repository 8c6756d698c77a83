// The terms of the gradient of a panel of rows, while they are few: a list needs less memory than sums, and no sum is
// written and read again for each tile.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "pair_loops.h"

namespace tcm::cpu {

// Of row `row` of the panel and side `side`: plus, or with `lacks` minus, the unit row `column` of the other set.
struct Term {
  int row, side;
  bool lacks;
  int64_t column;

  // Terms of one row, side and sign have the first 16 bits in common.
  uint64_t code() const {
    return static_cast<uint64_t>(row) << 50 | static_cast<uint64_t>(2 * side + lacks) << 48 | column;
  }
  static Term of(uint64_t code) {
    return {static_cast<int>(code >> 50), static_cast<int>(code >> 49 & 1), (code >> 48 & 1) != 0,
            static_cast<int64_t>(code & ((uint64_t{1} << 48) - 1))};
  }
};

// Orders codes of terms by row, side and sign, and leaves the order of columns as it is; `spare` has room for all.
inline void gather(std::vector<uint64_t>& terms, std::vector<uint64_t>& spare) {
  std::array<uint32_t, 4 * kTile + 1> begin{};
  for (uint64_t term : terms) ++begin[(term >> 48) + 1];
  for (int k = 0; k < 4 * kTile; ++k) begin[k + 1] += begin[k];
  for (uint64_t term : terms) spare[begin[term >> 48]++] = term;
  std::copy_n(spare.begin(), terms.size(), terms.begin());
}

}  // namespace tcm::cpu
