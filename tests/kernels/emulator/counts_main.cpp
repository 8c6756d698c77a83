// The emulated counting kernels alone, for the sanitizers: random problems against a double loop over the pairs.
//
// Similarities are multiples of 1/4, exactly in any precision, and so are many thresholds: every count is exact.
#include <cstdio>

#include "counts.h"

using namespace tcm::cuda;

namespace {

struct Rows {
  std::vector<float> x;      // [n, d]
  std::vector<double> unit;  // [n, d]
  std::vector<int64_t> y;    // [n]
};

// Four neighbouring components of +-1/2 or one of +-1, times a power of two; one row in ten is zero, one label in eight
// negative, and what such a row holds is not looked at.
Rows draw_rows(int64_t n, int64_t d, int64_t classes, int64_t kinds, std::mt19937& random) {
  auto below = [&](int64_t k) { return static_cast<int64_t>(random() % k); };
  Rows r{std::vector<float>(n * d), std::vector<double>(n * d), std::vector<int64_t>(n)};
  for (int64_t i = 0; i < n; ++i) {
    r.y[i] = below(8) == 0 ? -1 - below(3) : below(classes);
    if (i >= kinds) {  // one direction of few
      int64_t like = below(kinds);
      for (int64_t k = 0; k < d; ++k) r.unit[i * d + k] = r.unit[like * d + k];
    } else if (below(10) > 0) {
      int64_t components = d >= 4 && below(5) > 0 ? 4 : 1, start = below(d);
      for (int64_t k = 0; k < components; ++k)
        r.unit[i * d + (start + k) % d] = (below(2) ? 1 : -1) / std::sqrt(static_cast<double>(components));
    }
    double scale = std::ldexp(1.0, static_cast<int>(below(7)) - 3);
    for (int64_t k = 0; k < d; ++k)
      r.x[i * d + k] = r.y[i] < 0 ? std::numeric_limits<float>::quiet_NaN()
                                  : static_cast<float>(r.unit[i * d + k] * scale);
  }
  return r;
}

CountOutcome expected(const PairCountProblem& p, const Rows& rows) {
  CountOutcome e;
  const int64_t cells = (int64_t{2} << p.bits) + 1, tables = (p.classes + 1) * p.thresholds;
  e.count.resize(2 * cells), e.class_count.resize(2 * tables);
  e.best.assign(2 * p.n, -std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t j = i + 1; j < p.n; ++j) {
      if (rows.y[i] < 0 || rows.y[j] < 0) continue;
      double s = 0;
      for (int64_t k = 0; k < p.d; ++k) s += rows.unit[i * p.d + k] * rows.unit[j * p.d + k];
      const int side = rows.y[i] == rows.y[j] ? kPlus : kMinus;
      ++e.count[side * cells + static_cast<int64_t>(std::floor(std::ldexp(s, p.bits))) + cells / 2];
      for (int64_t row : {i, j}) e.best[side * p.n + row] = std::max(e.best[side * p.n + row], static_cast<float>(s));
      const int64_t k = std::upper_bound(p.threshold, p.threshold + p.thresholds, s) - p.threshold - 1;
      if (k < 0) continue;
      ++e.class_count[side * tables + std::min(rows.y[i], p.classes) * p.thresholds + k];
      if (side == kMinus) ++e.class_count[side * tables + std::min(rows.y[j], p.classes) * p.thresholds + k];
    }
  return e;
}

bool check(unsigned seed) {
  std::mt19937 random(seed);
  auto below = [&](int64_t k) { return static_cast<int64_t>(random() % k); };
  const int64_t sizes[] = {1, 31, 127, 129, 150, 260, 300, 420}, widths[] = {1, 5, 64, 65, 140};
  PairCountProblem p{};
  p.n = sizes[below(8)], p.d = widths[below(5)];
  const int64_t labels = below(2) == 0 ? 2 : 50;
  p.classes = below(labels + 2);
  Rows rows = draw_rows(p.n, p.d, labels, below(3) == 0 ? 3 : p.n, random);
  p.x = rows.x.data(), p.y = rows.y.data();
  std::vector<float> thresholds(below(3) == 0 ? 0 : 1 + below(30));
  const int64_t lowest = below(12);  // in eighths, from -1.25 on
  for (float& t : thresholds) t = static_cast<float>(lowest + below(21 - lowest)) / 8 - 1.25f;
  std::sort(thresholds.begin(), thresholds.end());
  p.threshold = thresholds.data(), p.thresholds = static_cast<int64_t>(thresholds.size());
  p.bits = static_cast<int>(below(4)) * 3;
  p.sm = below(2) == 0 ? 80 : 90, p.sm_count = 1 + static_cast<int>(below(4));
  p.shared_per_block = 227 << 10, p.shared_per_sm = 228 << 10;
  Tuning tuning;
  if (below(2) == 0) tuning.one_chunk = 0, tuning.chunk = 32;
  if (below(2) == 0) tuning.window = static_cast<int>(below(20)) * 2;
  using emulator::Schedule;
  emulator::options = {static_cast<Schedule>(below(4)), seed};
  CountOutcome given = emulate_counts(p, tuning), wanted = expected(p, rows);
  const bool good[] = {given.count == wanted.count, given.class_count == wanted.class_count, given.best == wanted.best};
  if (good[0] && good[1] && good[2]) return true;
  std::printf("seed %u: n %ld d %ld classes %ld thresholds %ld bits %d sm %d: counts %d, class counts %d, best %d\n",
              seed, p.n, p.d, p.classes, p.thresholds, p.bits, p.sm, good[0], good[1], good[2]);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  unsigned cases = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 100;
  unsigned first = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0;
  try {
    for (unsigned seed = first; seed < first + cases; ++seed)
      if (!check(seed)) return 1;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("%u cases agree\n", cases);
}
