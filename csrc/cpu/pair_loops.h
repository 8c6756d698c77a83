// The loops over pairs and rows that take time, compiled for several instruction sets.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace tcm::cpu {

constexpr int kTile = 256;          // rows and columns of the largest tile
constexpr int kWords = kTile / 64;  // 64-bit words in one row of a tile's mask of hard pairs

// Hard pairs and the sum of their penalties, with what its roundings lost (Neumaier, 1974): a batch has billions of pairs.
struct Penalty {
  int64_t count = 0;
  double sum = 0, lost = 0;

  void add(const Penalty& part) {
    double both = sum + part.sum;
    lost += part.lost + (std::abs(sum) >= std::abs(part.sum) ? sum - both + part.sum : part.sum - both + sum);
    count += part.count, sum = both;
  }
  double total() const { return std::isfinite(lost) ? sum + lost : sum; }
};

// The terms of one row of the gradient: masked sums [d] over hard positives and negatives, its own and shared ones.
template <class real>
struct RowSums {
  const real *plus, *shared_plus, *minus, *shared_minus;
};

// Columns in eight bits, see codes.h, and how a row is compared with them.
struct CodeColumns {
  const float *scale, *error;
  const int32_t* shift;
};
struct CodeRow {
  float scale, slope, from;
};

// A pair is hard where its violation, sign * (s - margin), is not negative: sign is -1 for positives and +1 for
// negatives. NaN is never hard.
template <class real>
struct PairLoops {
  // Hard pairs among s [n] and the sum of their violations.
  Penalty (*scan_row)(const real* s, int n, real margin, real sign);
  // The same with the sum of its squares.
  Penalty (*scan_squared)(const real* s, int n, real margin, real sign);
  // cell [n] = floor(s * half) + half, kept within [0, 2 half]: the cells of a grid of 2 half steps on [-1, 1];
  // best [n] = max(best, s); returns the largest s. `half` is a power of two, so the product is exact.
  real (*cell_row)(const real* s, int n, int32_t half, int32_t* cell, real* best);
  // Bit j of bits [words]: is pair j of s [64 words] hard?
  void (*mask_row)(const real* s, int words, real margin, real sign, uint64_t* bits);
  // g [d] += weight * the sum of the rows `list` [length] of x.
  void (*row_sum)(const int64_t* list, int length, const real* x, int64_t d, real weight, real* g);
  // g [m, d] += weight * M x, with M [m, n] the 0/1 matrix in bits [m, kWords] and x [n, d]: pair by pair,
  void (*sparse_sum)(const uint64_t* bits, int m, const real* x, int64_t d, real weight, real* g);
  // and at a cost that hardly depends on the number of pairs.
  void (*dense_sum)(const uint64_t* bits, int m, int n, const real* x, int64_t d, real weight, real* g);
  // weight [n] = twice the violation of s [n] where it is hard, else 0: the slope of its square.
  void (*weigh_row)(const real* s, int n, real margin, real sign, real* weight);
  // g [m, d] += W x, with W [m, n], n up to kTile, and x [n, d]: pair by pair, those of weight 0 left out.
  void (*weighted_sum)(const real* weight, int m, int n, const real* x, int64_t d, real* g);
  // out [d, n] = x [n, d] transposed, n a multiple of 16.
  void (*transpose)(const real* x, int64_t n, int64_t d, real* out);
  // x . y, of d numbers, in float64: the same for (y, x).
  double (*exact_dot)(const real* x, const real* y, int64_t d);
  // The same as far as `real` goes.
  real (*dot)(const real* x, const real* y, int64_t d);
  // Whether any of s [n] lies within `window` of the margin.
  bool (*is_near)(const real* s, int n, real margin, real window);
  // code [d] = round(x / scale) + 128 with scale = max |x| / 127, and shift = 128 times the sum of the codes less 128;
  // returns |x - scale (code - 128)|. Adds x to sum [d], and its squares to `squares`.
  double (*encode)(const real* x, int64_t d, uint8_t* code, float* scale, int32_t* shift, double* sum, double* squares);
  // The least and the largest of product - shift, both [n].
  void (*code_range)(const int32_t* product, const int32_t* shift, int n, int32_t* least, int32_t* most);
  // Bit j of bits [words]: row.scale * (scale[j] * (product[j] - shift[j])) + row.slope * error[j] >= row.from?
  void (*code_mask)(const int32_t* product, const CodeColumns& columns, int words, const CodeRow& row, uint64_t* bits);
  // Sum of squares of x [d].
  double (*squares)(const real* x, int64_t d);
  // out [d] = x [d] * factor
  void (*scale)(const real* x, int64_t d, double factor, real* out);
  // out [d] = (g - (g . unit) unit) * inverse with g = w_minus * minus - w_plus * plus; unit null: g * inverse.
  void (*gradient_row)(const RowSums<real>& sums, const real* unit, int64_t d, real w_plus, real w_minus,
                       double inverse, real* out);
};

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa best_isa();  // of those that this processor has
const char* name(Isa isa);

template <class real>
const PairLoops<real>& pair_loops(Isa isa);

// Sets bits [from, to) of a row of a mask.
inline void range_mask(int from, int to, uint64_t* bits) {
  for (int word = 0; word < kWords; ++word) {
    int a = std::clamp(from - 64 * word, 0, 64), b = std::clamp(to - 64 * word, 0, 64);
    uint64_t below_b = b == 64 ? ~uint64_t{0} : (uint64_t{1} << b) - 1;
    uint64_t below_a = a == 64 ? ~uint64_t{0} : (uint64_t{1} << a) - 1;
    bits[word] = below_b & ~below_a;
  }
}

// body(row, column) for each bit of `bits` [m, kWords].
template <class Body>
void for_bits(const uint64_t* bits, int m, const Body& body) {
  for (int row = 0; row < m; ++row)
    for (int word = 0; word < kWords; ++word)
      for (uint64_t rest = bits[row * kWords + word]; rest; rest &= rest - 1)
        body(row, 64 * word + __builtin_ctzll(rest));
}

// The first 64 words rows and columns of out [kTile, kWords] = those of bits [kTile, kWords] transposed.
void transpose_mask(const uint64_t* bits, int words, uint64_t* out);

}  // namespace tcm::cpu
