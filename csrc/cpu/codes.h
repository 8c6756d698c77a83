// Rows in eight bits. With codes q_i in [-127, 127]^d and a scale a_i for each row, x^_i = a_i q_i + r_i and
//
//   |s_ij - a_i a_j (q_i . q_j)| = |a_i q_i . r_j + r_i . x^_j| <= e_i + e_j + e_i e_j,   e_i >= |r_i|.
//
// Products of codes are exact, and take a quarter of the time of those in float32, or far less. A pair that is farther
// from its margin than the bound is thereby decided; docs/how-it-works.md has the proof.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "embeddings.h"

namespace tcm::cpu {

constexpr int kCodeBlock = 64;           // columns of one product; `width` is a multiple of it
constexpr int64_t kMostWidth = 1 << 16;  // 255 * 127 * width < 2^31
// Added to the bound for the roundings of float32: four on the way from an integer to the comparison with a margin, of
// numbers below 2, that of s itself, and the lengths of x^, which are 1 but for one.
constexpr float kCodeSlack = 2e-6f;

struct Codes {
  // Of the rows of one panel: the largest and smallest scale, the largest error, the sum of |x^|^2.
  struct Panel {
    float most_scale = 0, least_scale = std::numeric_limits<float>::infinity(), error = 0;
    double squares = 0;
  };

  int64_t width = 0;
  Array<uint8_t> left;   // [panels * tile, width] q + 128: unsigned times signed is right on every processor
  Array<int8_t> right;   // [panels * tile / 64, width / 4, 64, 4] q
  Array<float> scale;    // [panels * tile] a
  Array<float> error;    // [panels * tile] e
  Array<int32_t> shift;  // [panels * tile] 128 times the sum of q: how much too large a product with `left` is
  Array<double> sum;     // [panels, d] of x^ over each panel
  std::vector<Panel> panel;

  template <class real>
  void allocate(const Embeddings<real>& e) {
    int64_t rows = e.panels * e.tile;
    width = (e.d + kCodeBlock - 1) / kCodeBlock * kCodeBlock;
    left.allocate(rows * width), right.allocate(rows * width);
    scale.allocate(rows), error.allocate(rows), shift.allocate(rows);
    sum.allocate(e.panels * e.d), panel.resize(e.panels);
  }

  void reset() { left.reset(), right.reset(), scale.reset(), error.reset(), shift.reset(), sum.reset(); }

  // Encodes and sums the rows of panel `p`.
  template <class real>
  void load(const PairLoops<real>& loops, const Embeddings<real>& e, int64_t p) {
    int64_t begin = e.begin(p);
    std::memset(left.get() + begin * width, 128, e.tile * width);
    for (int64_t k = begin; k < begin + e.rows(p); ++k) {
      const real* unit = e.unit.get() + k * e.d;
      double rest = loops.encode(unit, e.d, left.get() + k * width, &scale.get()[k], &shift.get()[k],
                                 sum.get() + p * e.d, &panel[p].squares);
      error.get()[k] = std::nextafter(static_cast<float>(rest * (1 + 1e-6)), std::numeric_limits<float>::infinity());
      panel[p].most_scale = std::max(panel[p].most_scale, scale.get()[k]);
      panel[p].least_scale = std::min(panel[p].least_scale, scale.get()[k]);
      panel[p].error = std::max(panel[p].error, error.get()[k]);
    }
    for (int64_t block = begin; block < begin + e.tile; block += kCodeBlock) pack(block);
  }

 private:
  // right = left - 128, four codes of a column beside each other.
  void pack(int64_t begin) {
    constexpr int kLine = 16;  // words of a cache line
    const uint8_t* from = left.get() + begin * width;
    int8_t* to = right.get() + begin * width;
    for (int64_t k = 0; k < width / 4; k += kLine)
      for (int j = 0; j < kCodeBlock; ++j) {
        uint32_t line[kLine];
        std::memcpy(line, from + j * width + 4 * k, sizeof(line));
        for (int w = 0; w < kLine; ++w) {
          uint32_t word = line[w] ^ 0x80808080;
          std::memcpy(to + ((k + w) * kCodeBlock + j) * 4, &word, sizeof(word));
        }
      }
  }
};

}  // namespace tcm::cpu
