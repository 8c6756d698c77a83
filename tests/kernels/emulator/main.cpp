// The emulated kernels alone, for the sanitizers: random problems against a double loop over the pairs.
//
// Similarities are multiples of 1/4, exactly in any precision, and so are many margins: every decision is exact.
#include <cstdio>

#include "call.h"

using namespace tcm::cuda;

namespace {

struct Rows {
  std::vector<float> x;        // [n, d]
  std::vector<double> unit;    // [n, d]
  std::vector<double> norm;    // [n]
  std::vector<int64_t> y;      // [n]
};

// Four components of +-1/2 or one of +-1, times a power of two; one row in ten is zero, one label in eight negative.
Rows rows(int64_t n, int64_t d, int64_t classes, std::mt19937& random) {
  auto below = [&](int64_t k) { return static_cast<int64_t>(random() % k); };
  Rows r{std::vector<float>(n * d), std::vector<double>(n * d), std::vector<double>(n), std::vector<int64_t>(n)};
  for (int64_t i = 0; i < n; ++i) {
    r.y[i] = below(8) == 0 ? -1 - below(3) : below(classes);
    double scale = std::ldexp(1.0, static_cast<int>(below(7)) - 3);
    if (below(10) == 0) continue;
    int64_t components = d >= 4 && below(5) > 0 ? 4 : 1, start = below(d);
    for (int64_t k = 0; k < components; ++k)  // neighbours, so that rows meet often
      r.unit[i * d + (start + k) % d] = (below(2) ? 1 : -1) / std::sqrt(static_cast<double>(components));
    r.norm[i] = scale;
    for (int64_t k = 0; k < d; ++k) r.x[i * d + k] = static_cast<float>(r.unit[i * d + k] * scale);
  }
  // What takes no part is not looked at.
  for (int64_t i = 0; i < n; ++i)
    if (r.y[i] < 0) std::fill_n(r.x.begin() + i * d, d, std::numeric_limits<float>::quiet_NaN());
  return r;
}

struct Expected {
  double loss = 0, penalty[2] = {0, 0};
  int64_t count[2] = {0, 0};
  std::vector<double> grad_x, grad_ref;
  double scale[2];  // largest element of a gradient before what is along x^ is taken off
};

Expected expected(const Problem& p, const Rows& a, const Rows& b) {
  Expected e{};
  std::vector<double> sum[2][2];  // [rows, columns][side]
  for (int side = 0; side < 2; ++side) sum[0][side].resize(p.n * p.d), sum[1][side].resize(p.m * p.d);
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t j = 0; j < p.m; ++j) {
      int64_t own = p.symmetric ? i : p.row_offset < 0 ? -1 : i + p.row_offset;
      if (a.y[i] < 0 || b.y[j] < 0 || own == j) continue;
      double s = 0;
      for (int64_t k = 0; k < p.d; ++k) s += a.unit[i * p.d + k] * b.unit[j * p.d + k];
      int side = a.y[i] == b.y[j] ? kPlus : kMinus;
      double over = side == kPlus ? p.margin[kPlus] - s : s - p.margin[kMinus];
      if (over < 0) continue;
      ++e.count[side], e.penalty[side] += over;
      for (int64_t k = 0; k < p.d; ++k) {
        sum[0][side][i * p.d + k] += b.unit[j * p.d + k];
        sum[1][side][j * p.d + k] += a.unit[i * p.d + k];
      }
    }
  double weight[2];
  for (int side = 0; side < 2; ++side) {
    weight[side] = e.count[side] ? p.lambda[side] / static_cast<double>(e.count[side]) : 0;
    e.loss += weight[side] * e.penalty[side];
  }
  // Of w[kPlus] penalty[kPlus] + w[kMinus] penalty[kMinus], by the rows of `r`; put after what is in `grad`.
  auto append = [&](std::vector<double>& grad, const double (&w)[2], const Rows& r, std::vector<double> (&of)[2],
                    double& scale) {
    const size_t start = grad.size();
    grad.resize(start + r.unit.size());
    for (size_t i = 0; i < r.norm.size(); ++i) {
      double along = 0, *row = grad.data() + start + i * p.d;
      for (int64_t c = 0, k = i * p.d; c < p.d; ++c, ++k) {
        row[c] = (p.symmetric ? 2 : 1) * (w[kMinus] * of[kMinus][k] - w[kPlus] * of[kPlus][k]);
        along += row[c] * r.unit[k];
        if (r.norm[i] != 0) scale = std::max(scale, std::fabs(row[c]) / r.norm[i]);
      }
      for (int64_t c = 0; c < p.d; ++c)
        row[c] = r.norm[i] == 0 || r.y[i] < 0 ? 0 : (row[c] - along * r.unit[i * p.d + c]) / r.norm[i];
    }
  };
  auto gradient = [&](const Rows& r, std::vector<double> (&of)[2], double& scale) {
    std::vector<double> grad;
    scale = 0;
    if (!p.per_side) append(grad, weight, r, of, scale);
    else append(grad, {1, 0}, r, of, scale), append(grad, {0, 1}, r, of, scale);
    return grad;
  };
  e.grad_x = gradient(a, sum[0], e.scale[0]);
  e.grad_ref = gradient(b, sum[1], e.scale[1]);
  return e;
}

bool close(double a, double b, double scale) { return std::fabs(a - b) <= 2e-6 * scale; }  // false for NaN

bool close(const std::vector<float>& given, const std::vector<double>& wanted, double scale) {
  for (size_t k = 0; k < given.size(); ++k)
    if (!close(given[k], wanted[k], scale)) return false;
  return true;
}

bool check(unsigned seed) {
  std::mt19937 random(seed);
  auto below = [&](int64_t k) { return static_cast<int64_t>(random() % k); };
  const int64_t sizes[] = {1, 31, 127, 129, 150, 260, 300}, widths[] = {1, 5, 64, 65, 140};
  Problem p{};
  p.symmetric = below(2) == 0;
  p.n = sizes[below(7)], p.d = widths[below(5)];
  p.row_offset = p.symmetric || below(2) == 0 ? -1 : below(40);
  p.m = p.symmetric ? p.n : p.row_offset >= 0 ? p.n + 40 : sizes[below(7)];
  p.type = Type::kFloat, p.fp16 = below(2) == 0;
  int64_t classes = below(2) == 0 ? 2 : 50;
  Rows a = rows(p.n, p.d, classes, random), b = p.symmetric ? a : rows(p.m, p.d, classes, random);
  p.x = a.x.data(), p.y = a.y.data(), p.ref_x = b.x.data(), p.ref_y = b.y.data();
  const double margins[] = {-1.5, -0.5, -0.125, 0, 0.25, 0.375, 1, 1.5};
  for (int side = 0; side < 2; ++side) p.margin[side] = margins[below(8)],
      p.lambda[side] = 0.5 + static_cast<double>(below(3));
  p.sm = below(2) == 0 ? 80 : 90, p.sm_count = 1 + static_cast<int>(below(4));
  Tuning tuning;
  tuning.block = 1 + static_cast<int>(below(3));
  if (below(2) == 0) tuning.one_chunk = 0, tuning.chunk = 32;
  bool grad_x = below(4) > 0, grad_ref = !p.symmetric && below(4) > 0;
  using emulator::Schedule;
  emulator::options = {static_cast<Schedule>(below(4)), seed};
  p.per_side = below(2) == 0;

  Outcome given = emulate(p, grad_x, grad_ref, tuning);
  Expected wanted = expected(p, a, b);
  bool good = (p.per_side || close(given.loss, wanted.loss, 1 + std::fabs(wanted.loss))) &&
              close(given.grad_x, wanted.grad_x, wanted.scale[0]) &&
              close(given.grad_ref, wanted.grad_ref, wanted.scale[1]);
  for (int side = 0; side < 2; ++side)
    good = good && given.count[side] == wanted.count[side] && close(given.penalty[side], wanted.penalty[side],
        1 + wanted.penalty[side]);
  if (!good)
    std::printf("seed %u: n %ld m %ld d %ld symmetric %d: loss %g not %g, counts %ld %ld not %ld %ld\n", seed, p.n,
        p.m, p.d,
                p.symmetric, given.loss, wanted.loss, given.count[0], given.count[1], wanted.count[0], wanted.count[1]);
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  unsigned cases = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 100, first = argc > 2
      ? static_cast<unsigned>(std::atoi(argv[2])) : 0;
  try {
    for (unsigned seed = first; seed < first + cases; ++seed)
      if (!check(seed)) return 1;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("%u cases agree\n", cases);
}
