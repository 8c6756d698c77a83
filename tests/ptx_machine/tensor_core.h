// The arithmetic of tensor cores: sums of 16 products of halves.
#pragma once

#include "state.h"

namespace ptx_machine {

inline float half_value(u32 bits) {  // of the low 16 bits
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (u32 k = 0; k < values.size(); ++k)
      values[k] = static_cast<float>(std::bit_cast<_Float16>(static_cast<u16>(k)));
    return values;
  }();
  return table[bits & 0xffff];
}

// How a generation's tensor cores cut sums off: `terms` products at a time and the sum so far are each cut off `extra`
// bits below the last place (of 24 bits) of the largest of them, and their sum at its own last place. A model, after
// Fasi et al., "Numerical behavior of NVIDIA tensor cores" (2021), and Khattak and Mikaitis, arXiv 2512.07004.
struct CutOff {
  int terms, extra;
};
constexpr CutOff kAmpere{8, 1}, kHopper{16, 2};

inline float toward_zero(double x) {
  const float f = static_cast<float>(x);
  return std::fabs(static_cast<double>(f)) > std::fabs(x) ? std::nextafterf(f, 0.0f) : f;
}

// sum[c] += a[0] b[0][c] + .. + a[15] b[15][c], for eight columns.
inline void add_products(const double* a, const double (*b)[8], float (&sum)[8], CutOff cut) {
  if (sums == Sums::kExact) {  // and rounded once
    double total[8] = {};
    for (int k = 0; k < 16; ++k)
      for (int c = 0; c < 8; ++c) total[c] += a[k] * b[k][c];
    for (int c = 0; c < 8; ++c) sum[c] = static_cast<float>(total[c] + sum[c]);
    return;
  }
  for (int first = 0; first < 16; first += cut.terms) {
    double most[8];
    for (int c = 0; c < 8; ++c) most[c] = std::fabs(sum[c]);
    for (int k = first; k < first + cut.terms; ++k)
      for (int c = 0; c < 8; ++c) most[c] = std::max(most[c], std::fabs(a[k] * b[k][c]));
    double scale[8], total[8];
    for (int c = 0; c < 8; ++c) {
      const int exponent = static_cast<int>(std::bit_cast<u64>(most[c]) >> 52);  // 2^(exponent - 1023) <= most
      scale[c] = std::bit_cast<double>(static_cast<u64>(2 * 1023 + 23 + cut.extra - std::max(exponent, 800)) << 52);
      total[c] = std::trunc(sum[c] * scale[c]);
    }
    for (int k = first; k < first + cut.terms; ++k)
      for (int c = 0; c < 8; ++c) total[c] += std::trunc(a[k] * b[k][c] * scale[c]);
    for (int c = 0; c < 8; ++c) sum[c] = toward_zero(total[c] / scale[c]);
  }
}

}  // namespace ptx_machine
