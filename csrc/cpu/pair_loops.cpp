#include "pair_loops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#define TCM_INLINE inline __attribute__((always_inline))

namespace tcm::cpu {
namespace {

// A chunk of columns: as much of a row as is accumulated in registers at once, kWidth bytes in each.
template <class real, int kWidth, int kHeld = kWidth == 64 ? 4 : 8>
struct Chunk {
  typedef real Vector __attribute__((vector_size(kWidth)));
  static constexpr int kVectors = kHeld;
  static constexpr int kSize = kVectors * kWidth / sizeof(real);
  Vector v[kVectors];
};

template <class C, class real>
TCM_INLINE C load(const real* p, int size) {
  C c;
  if (size == C::kSize) {
#pragma GCC unroll 8
    for (int k = 0; k < C::kVectors; ++k) std::memcpy(&c.v[k], p + k * (C::kSize / C::kVectors), sizeof(c.v[k]));
  } else {
    real padded[C::kSize] = {};
    std::memcpy(padded, p, size * sizeof(real));
#pragma GCC unroll 8
    for (int k = 0; k < C::kVectors; ++k) std::memcpy(&c.v[k], padded + k * (C::kSize / C::kVectors), sizeof(c.v[k]));
  }
  return c;
}

template <class C, class real>
TCM_INLINE void store(real* p, int size, const C& c) {
  if (size == C::kSize) {
#pragma GCC unroll 8
    for (int k = 0; k < C::kVectors; ++k) std::memcpy(p + k * (C::kSize / C::kVectors), &c.v[k], sizeof(c.v[k]));
  } else {
    std::memcpy(p, &c, size * sizeof(real));
  }
}

template <class C>
TCM_INLINE void add(C& a, const C& b) {
#pragma GCC unroll 8
  for (int k = 0; k < C::kVectors; ++k) a.v[k] += b.v[k];
}

// g[0..size) += weight * sum
template <class C, class real>
TCM_INLINE void add_to(real* g, int size, real weight, const C& sum) {
  C c = load<C>(g, size);
#pragma GCC unroll 8
  for (int k = 0; k < C::kVectors; ++k) c.v[k] += weight * sum.v[k];
  store(g, size, c);
}

template <bool squared, class real>
TCM_INLINE Penalty scan(const real* s, int n, real margin, real sign) {
  int count = 0;
  real sum = 0;
#pragma omp simd reduction(+ : count, sum)
  for (int j = 0; j < n; ++j) {
    real violation = sign * (s[j] - margin);
    count += violation >= 0;
    sum += violation >= 0 ? (squared ? violation * violation : violation) : 0;
  }
  return {count, static_cast<double>(sum)};
}

template <class real>
TCM_INLINE void weigh(const real* s, int n, real margin, real sign, real* weight) {
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    real violation = sign * (s[j] - margin);
    weight[j] = violation >= 0 ? 2 * violation : 0;
  }
}

template <class real>
TCM_INLINE real cells(const real* s, int n, int32_t half, int32_t* cell, real* best) {
  real scale = static_cast<real>(half), largest = -std::numeric_limits<real>::infinity();
#pragma omp simd reduction(max : largest)
  for (int j = 0; j < n; ++j) {
    real scaled = s[j] * scale;
    int32_t down = static_cast<int32_t>(scaled);  // towards zero, so one too many for most that are negative
    down -= scaled < static_cast<real>(down);
    cell[j] = std::clamp(down + half, 0, 2 * half);
    best[j] = s[j] > best[j] ? s[j] : best[j];
    largest = s[j] > largest ? s[j] : largest;
  }
  return largest;
}

template <class real>
TCM_INLINE void mask(const real* s, int words, real margin, real sign, uint64_t* bits) {
  for (int word = 0; word < words; ++word) {
    uint32_t half[2];
    for (int h = 0; h < 2; ++h) {
      uint32_t found = 0;
      const real* p = s + 64 * word + 32 * h;
#pragma omp simd reduction(| : found)
      for (int j = 0; j < 32; ++j) found |= sign * (p[j] - margin) >= 0 ? uint32_t{1} << j : 0;
      half[h] = found;
    }
    bits[word] = half[0] | static_cast<uint64_t>(half[1]) << 32;
  }
}

template <class real, int kWidth>
TCM_INLINE void sum_of_rows(const int64_t* list, int length, const real* x, int64_t d, real weight, real* g) {
  using C = Chunk<real, kWidth>;
  for (int64_t c = 0; length > 0 && c < d; c += C::kSize) {
    int size = static_cast<int>(std::min<int64_t>(C::kSize, d - c));
    C sum = load<C>(x + list[0] * d + c, size);
    for (int k = 1; k < length; ++k) add(sum, load<C>(x + list[k] * d + c, size));
    add_to(g + c, size, weight, sum);
  }
}

template <class real, int kWidth>
TCM_INLINE void sparse_sum(const uint64_t* bits, int m, const real* x, int64_t d, real weight, real* g) {
  for (int i = 0; i < m; ++i, bits += kWords) {
    int64_t list[kTile];
    int length = 0;
    for (int word = 0; word < kWords; ++word)
      for (uint64_t rest = bits[word]; rest; rest &= rest - 1) list[length++] = 64 * word + __builtin_ctzll(rest);
    sum_of_rows<real, kWidth>(list, length, x, d, weight, g + i * d);
  }
}

template <class real, int kWidth>
TCM_INLINE void weighted_sum(const real* weight, int m, int n, const real* x, int64_t d, real* g) {
  using C = Chunk<real, kWidth>;
  for (int i = 0; i < m; ++i, weight += n) {
    int list[kTile], length = 0;
    for (int j = 0; j < n; ++j) list[length] = j, length += weight[j] != 0;
    if (length == 0) continue;
    for (int64_t c = 0; c < d; c += C::kSize) {
      int size = static_cast<int>(std::min<int64_t>(C::kSize, d - c));
      C sum = load<C>(g + i * d + c, size);
      for (int k = 0; k < length; ++k) {
        C row = load<C>(x + list[k] * d + c, size);
        real w = weight[list[k]];
#pragma GCC unroll 8
        for (int v = 0; v < C::kVectors; ++v) sum.v[v] += w * row.v[v];
      }
      store(g + i * d + c, size, sum);
    }
  }
}

// A masked sum over 4 rows of x has 16 possible values: with these in a table, each row of the mask
// costs one addition for 4 pairs and no multiplication, whatever the density (the method of four
// Russians: Arlazarov et al., 1970). The tables of kTables x 4 rows of x, 8 KiB, and the sums of a cache line of
// columns, 16 KiB, fit into the first-level cache together; the rows of g themselves would compete for few of its sets.
template <class real, int kWidth>
TCM_INLINE void dense_sum(const uint64_t* bits, int m, int n, const real* x, int64_t d, real weight, real* g) {
  using C = Chunk<real, kWidth, 64 / kWidth>;
  constexpr int kTables = 8;
  C table[kTables][16], sums[kTile];
  for (int64_t c = 0; c < d; c += C::kSize) {
    int size = static_cast<int>(std::min<int64_t>(C::kSize, d - c));
    for (int i = 0; i < m; ++i) sums[i] = C{};
    for (int j = 0; j < n; j += 4 * kTables) {
      // To the second-level cache, for the next columns and for the end of these: rows lie too far apart to be foreseen.
      for (int k = j; k < std::min(j + 4 * kTables, n); ++k) __builtin_prefetch(x + k * d + c + C::kSize, 0, 2);
      for (int k = j; k < std::min(j + 4 * kTables, m); ++k) __builtin_prefetch(g + k * d + c, 0, 2);
      for (int t = 0; t < kTables; ++t) {
        auto row = [&](int k) __attribute__((always_inline)) {
          int column = j + 4 * t + k;
          return column < n ? load<C>(x + column * d + c, size) : C{};
        };
        C low[4] = {{}, row(0), row(1), {}}, high[4] = {{}, row(2), row(3), {}};
        low[3] = low[1], add(low[3], low[2]), high[3] = high[1], add(high[3], high[2]);
#pragma GCC unroll 16
        for (int e = 0; e < 16; ++e) table[t][e] = low[e % 4], add(table[t][e], high[e / 4]);
      }
      for (int i = 0; i < m; ++i) {
        uint64_t hard = static_cast<uint32_t>(bits[i * kWords + j / 64] >> (j % 64));
        if (hard == 0) continue;
        hard *= sizeof(C);  // so that each four bits, in their place, are the distance of an entry of a table
        C sum = sums[i];
#pragma GCC unroll 8
        for (int t = 0; t < kTables; ++t) {
          const char* entry = reinterpret_cast<const char*>(table[t]) + (hard >> (4 * t) & 15 * sizeof(C));
          add(sum, *reinterpret_cast<const C*>(entry));
        }
        sums[i] = sum;
      }
    }
    for (int i = 0; i < m; ++i) add_to(g + i * d + c, size, weight, sums[i]);
  }
}

template <class real>
TCM_INLINE void transposed(const real* x, int64_t n, int64_t d, real* out) {
  constexpr int kBlock = 16;  // rows whose cache lines are all in use while a column is written
  for (int64_t i = 0; i < n; i += kBlock)
    for (int64_t k = 0; k < d; ++k)
      for (int r = 0; r < kBlock; ++r) out[k * n + i + r] = x[(i + r) * d + k];
}

template <class real, int kWidth>
TCM_INLINE real dot_product(const real* x, const real* y, int64_t d) {
  using C = Chunk<real, kWidth>;
  C sum{};
  auto add_chunk = [&](int64_t c, int size) __attribute__((always_inline)) {
    C a = load<C>(x + c, size), b = load<C>(y + c, size);
#pragma GCC unroll 8
    for (int k = 0; k < C::kVectors; ++k) sum.v[k] += a.v[k] * b.v[k];
  };
  int64_t whole = d / C::kSize * C::kSize;
  for (int64_t c = 0; c < whole; c += C::kSize) add_chunk(c, C::kSize);
  if (whole < d) add_chunk(whole, static_cast<int>(d - whole));
  for (int step = C::kVectors / 2; step; step /= 2)
    for (int k = 0; k < step; ++k) sum.v[k] += sum.v[k + step];
  constexpr int kParts = C::kSize / C::kVectors;
  real parts[kParts];
  std::memcpy(parts, &sum.v[0], sizeof(parts));
#pragma GCC unroll 4
  for (int step = kParts / 2; step; step /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < step; ++k) parts[k] += parts[k + step];
  return parts[0];
}

template <class real>
TCM_INLINE double exact_dot_product(const real* x, const real* y, int64_t d) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(x[k]) * y[k];
  return sum;
}

template <class real>
TCM_INLINE bool any_near(const real* s, int n, real margin, real window) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int j = 0; j < n; ++j) found |= std::abs(s[j] - margin) <= window;
  return found != 0;
}

template <class real>
TCM_INLINE double encoded(const real* x, int64_t d, uint8_t* code, float* scale, int32_t* shift, double* sum,
                          double* squares) {
  real peak = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t k = 0; k < d; ++k) peak = std::max(peak, std::abs(x[k]));
  float a = static_cast<float>(peak) / 127, inverse = 1 / a;
  if (!(a > 0 && inverse < std::numeric_limits<float>::infinity())) a = inverse = 0;  // too small to be divided by
  double rest = 0, all = 0;
  int32_t codes = 0;
#pragma omp simd reduction(+ : rest, all, codes)
  for (int64_t k = 0; k < d; ++k) {
    float rounded = static_cast<float>(x[k]) * inverse + 128.5f;  // within [1, 256): rounded down next
    int32_t c = std::clamp(static_cast<int32_t>(rounded), 1, 255);
    double value = x[k], r = value - static_cast<double>(a) * (c - 128);
    code[k] = static_cast<uint8_t>(c), codes += c - 128, rest += r * r;
    sum[k] += value, all += value * value;
  }
  *scale = a, *shift = 128 * codes, *squares += all;
  return std::sqrt(rest);
}

TCM_INLINE void range_of_codes(const int32_t* product, const int32_t* shift, int n, int32_t* least, int32_t* most) {
  int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int j = 0; j < n; ++j) {
    int32_t q = product[j] - shift[j];
    low = std::min(low, q), high = std::max(high, q);
  }
  *least = low, *most = high;
}

TCM_INLINE void mask_codes(const int32_t* product, const CodeColumns& c, int words, const CodeRow& row,
                           uint64_t* bits) {
  for (int word = 0; word < words; ++word) {
    uint32_t half[2];
    for (int h = 0; h < 2; ++h) {
      uint32_t found = 0;
      int begin = 64 * word + 32 * h;
      const int32_t *p = product + begin, *shift = c.shift + begin;
      const float *scale = c.scale + begin, *error = c.error + begin;
#pragma omp simd reduction(| : found)
      for (int j = 0; j < 32; ++j) {
        float s = row.scale * (scale[j] * static_cast<float>(p[j] - shift[j]));
        found |= s + row.slope * error[j] >= row.from ? uint32_t{1} << j : 0;
      }
      half[h] = found;
    }
    bits[word] = half[0] | static_cast<uint64_t>(half[1]) << 32;
  }
}

template <class real>
TCM_INLINE double sum_of_squares(const real* x, int64_t d) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(x[k]) * x[k];
  return sum;
}

template <class real>
TCM_INLINE void scaled(const real* x, int64_t d, double factor, real* out) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) out[k] = static_cast<real>(x[k] * factor);
}

template <class real>
TCM_INLINE void projected(const RowSums<real>& sums, const real* unit, int64_t d, real w_plus, real w_minus,
                          double inverse, real* out) {
  const real *plus = sums.plus, *shared_plus = sums.shared_plus;
  const real *minus = sums.minus, *shared_minus = sums.shared_minus;
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) out[k] = w_minus * (minus[k] + shared_minus[k]) - w_plus * (plus[k] + shared_plus[k]);
  if (unit == nullptr) return scaled(out, d, inverse, out);
  double along = 0;
#pragma omp simd reduction(+ : along)
  for (int64_t k = 0; k < d; ++k) along += static_cast<double>(out[k]) * unit[k];
  real a = static_cast<real>(along);
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) out[k] = static_cast<real>((out[k] - a * unit[k]) * inverse);
}

#define TCM_PAIR_LOOPS(Name, width, target)                                                                            \
  template <class real>                                                                                                \
  struct Name {                                                                                                        \
    target static Penalty scan_row(const real* s, int n, real margin, real sign) {                                     \
      return scan<false>(s, n, margin, sign);                                                                          \
    }                                                                                                                  \
    target static Penalty scan_squared(const real* s, int n, real margin, real sign) {                                 \
      return scan<true>(s, n, margin, sign);                                                                           \
    }                                                                                                                  \
    target static void weigh_row(const real* s, int n, real margin, real sign, real* weight) {                         \
      weigh(s, n, margin, sign, weight);                                                                               \
    }                                                                                                                  \
    target static void weighted(const real* weight, int m, int n, const real* x, int64_t d, real* g) {                 \
      weighted_sum<real, width>(weight, m, n, x, d, g);                                                                \
    }                                                                                                                  \
    target static real cell_row(const real* s, int n, int32_t half, int32_t* cell, real* best) {                       \
      return cells(s, n, half, cell, best);                                                                            \
    }                                                                                                                  \
    target static void mask_row(const real* s, int words, real margin, real sign, uint64_t* bits) {                    \
      mask(s, words, margin, sign, bits);                                                                              \
    }                                                                                                                  \
    target static void row_sum(const int64_t* list, int length, const real* x, int64_t d, real weight, real* g) {      \
      sum_of_rows<real, width>(list, length, x, d, weight, g);                                                         \
    }                                                                                                                  \
    target static void sparse(const uint64_t* bits, int m, const real* x, int64_t d, real weight, real* g) {           \
      sparse_sum<real, width>(bits, m, x, d, weight, g);                                                               \
    }                                                                                                                  \
    target static void dense(const uint64_t* bits, int m, int n, const real* x, int64_t d, real weight, real* g) {     \
      dense_sum<real, width>(bits, m, n, x, d, weight, g);                                                             \
    }                                                                                                                  \
    target static void transpose(const real* x, int64_t n, int64_t d, real* out) { transposed(x, n, d, out); }         \
    target static double exact_dot(const real* x, const real* y, int64_t d) { return exact_dot_product(x, y, d); }     \
    target static real dot(const real* x, const real* y, int64_t d) { return dot_product<real, width>(x, y, d); }      \
    target static bool is_near(const real* s, int n, real margin, real window) {                                       \
      return any_near(s, n, margin, window);                                                                           \
    }                                                                                                                  \
    target static double encode(const real* x, int64_t d, uint8_t* code, float* scale, int32_t* shift, double* sum,    \
                                double* squares) {                                                                     \
      return encoded(x, d, code, scale, shift, sum, squares);                                                          \
    }                                                                                                                  \
    target static void code_range(const int32_t* product, const int32_t* shift, int n, int32_t* least,                 \
                                  int32_t* most) {                                                                     \
      range_of_codes(product, shift, n, least, most);                                                                  \
    }                                                                                                                  \
    target static void code_mask(const int32_t* product, const CodeColumns& columns, int words, const CodeRow& row,    \
                                 uint64_t* bits) {                                                                     \
      mask_codes(product, columns, words, row, bits);                                                                  \
    }                                                                                                                  \
    target static double squares(const real* x, int64_t d) { return sum_of_squares(x, d); }                            \
    target static void scale(const real* x, int64_t d, double factor, real* out) { scaled(x, d, factor, out); }        \
    target static void gradient_row(const RowSums<real>& sums, const real* unit, int64_t d, real w_plus, real w_minus, \
                                    double inverse, real* out) {                                                       \
      projected(sums, unit, d, w_plus, w_minus, inverse, out);                                                         \
    }                                                                                                                  \
    static constexpr PairLoops<real> kLoops{scan_row,  scan_squared, cell_row,  mask_row,    row_sum,                  \
                                            sparse,    dense,        weigh_row, weighted,    transpose,                \
                                            exact_dot, dot,          is_near,   encode,      code_range,               \
                                            code_mask, squares,      scale,     gradient_row};                         \
  };

TCM_PAIR_LOOPS(Baseline, 16, )
#ifdef __x86_64__
TCM_PAIR_LOOPS(Avx2, 32, __attribute__((target("avx2,fma"))))
TCM_PAIR_LOOPS(Avx512, 64, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

}  // namespace

Isa best_isa() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

const char* name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline"; }

template <class real>
const PairLoops<real>& pair_loops(Isa isa) {
#ifdef __x86_64__
  if (isa == Isa::kAvx512) return Avx512<real>::kLoops;
  if (isa == Isa::kAvx2) return Avx2<real>::kLoops;
#endif
  return Baseline<real>::kLoops;
}
template const PairLoops<float>& pair_loops(Isa);
template const PairLoops<double>& pair_loops(Isa);

void transpose_mask(const uint64_t* bits, int words, uint64_t* out) {
  for (int row = 0; row < words; ++row)
    for (int word = 0; word < words; ++word) {
      uint64_t block[64];  // 64 x 64 bits, transposed by swapping ever smaller off-diagonal squares
      for (int i = 0; i < 64; ++i) block[i] = bits[(64 * row + i) * kWords + word];
      uint64_t low = 0x00000000ffffffffull;
      for (int size = 32; size; size >>= 1, low ^= low << size)
        for (int i = 0; i < 64; i = ((i | size) + 1) & ~size) {
          uint64_t swap = ((block[i] >> size) ^ block[i | size]) & low;
          block[i | size] ^= swap;
          block[i] ^= swap << size;
        }
      for (int i = 0; i < 64; ++i) out[(64 * word + i) * kWords + row] = block[i];
    }
}

}  // namespace tcm::cpu
