// Problems of the loss against a double loop over their pairs, decision by decision; and a host without torch for the
// kernels: threads of its own and plain matrix products.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../../csrc/cpu/loss.h"

using tcm::kMinus;
using tcm::kPlus;

struct Case {
  int64_t n, m, d, classes, row_offset;
  bool symmetric, grad_x, grad_ref, squared, penalties, transposed, codes;
  double margin[2], cone;
  int threads;
};

template <class real>
struct Batch {
  std::vector<real> x, ref_x;     // [n, d], [m, d]
  std::vector<int64_t> y, ref_y;  // [n], [m]
};

struct Gradient {
  std::vector<double> value, reach;  // reach: sum of the magnitudes that were added up, the yardstick of rounding
};

struct Answer {
  double loss;
  long double penalty[2];
  int64_t count[2];
  Gradient grad_x, grad_ref;
};

constexpr int64_t kStep = 256;  // of sums: see `Host`

template <class real>
void product(const real* a, int64_t m, const real* b, int64_t n, int64_t d, int64_t b_stride, real* s, int64_t stride) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      real sum = 0;
      for (int64_t k = 0; k < d;) {
        real part = 0;
        for (int64_t end = std::min(k + kStep, d); k < end; ++k) part += a[i * d + k] * b[j * b_stride + k];
        sum += part;
      }
      s[i * stride + j] = sum;
    }
}

template <class real>
void transposed_product(const real* a, int64_t m, const real* b, int64_t n, int64_t d, int64_t b_stride, real* s,
                        int64_t stride) {
  if (m % 16 || n % 16) std::printf("%ld x %ld are not multiples of 16\n", m, n), std::exit(1);
  std::vector<real> part(n);
  for (int64_t i = 0; i < m; ++i) {
    std::fill_n(s + i * stride, n, real{0});
    for (int64_t k = 0; k < d;) {
      std::fill(part.begin(), part.end(), real{0});
      for (int64_t end = std::min(k + kStep, d); k < end; ++k)
        for (int64_t j = 0; j < n; ++j) part[j] += a[i * d + k] * b[k * b_stride + j];
      for (int64_t j = 0; j < n; ++j) s[i * stride + j] += part[j];
    }
  }
}

template <class real>
void add_product(const real* a, int64_t m, int64_t n, const real* b, int64_t d, real* c) {
  if (m % 64 || n % 64) std::printf("%ld x %ld are not multiples of 64\n", m, n), std::exit(1);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k < d; ++k) c[i * d + k] += a[i * n + j] * b[j * d + k];
}

inline void code_product(const uint8_t* a, int64_t m, const int8_t* b, int64_t n, int64_t k, int32_t* s,
                         int64_t stride) {
  bool aligned = (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 64 == 0;
  if (n != 64 || k % 64 || !aligned) std::printf("a product of codes that are badly laid out\n"), std::exit(1);
  for (int64_t i = 0; i < m; ++i) {
    int32_t sum[64] = {};
    for (int64_t l = 0; l < k; l += 4)
      for (int64_t j = 0; j < 64; ++j)
        for (int64_t c = 0; c < 4; ++c) sum[j] += a[i * k + l + c] * b[(l / 4 * 64 + j) * 4 + c];
    std::copy_n(sum, 64, s + i * stride);
  }
}

template <class real>
tcm::cpu::Host<real> host(int threads, bool transposed, bool codes) {
  auto parallel_for = [threads](int64_t size, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        int64_t from = size * t / threads, to = size * (t + 1) / threads;
        if (from < to) body(from, to);
      });
    for (auto& thread : pool) thread.join();
  };
  tcm::cpu::Host<real> host{
      .threads = threads,
      .parallel_for = parallel_for,
      .product = transposed ? transposed_product<real> : product<real>,
      .transposed = transposed,
      .add_product = add_product<real>,
  };
  if (codes) host.code_product = code_product, host.always_codes = true;
  return host;
}

// Rows x [n, d] of unit length, as the kernel has them: rounded to `real`.
template <class real>
std::vector<double> units(const real* x, int64_t n, int64_t d) {
  std::vector<double> u(n * d);
  for (int64_t i = 0; i < n; ++i) {
    long double squares = 0;
    for (int64_t k = 0; k < d; ++k) squares += static_cast<long double>(x[i * d + k]) * x[i * d + k];
    long double norm = std::max(std::sqrt(squares), static_cast<long double>(tcm::kEps));
    for (int64_t k = 0; k < d; ++k) u[i * d + k] = static_cast<real>(x[i * d + k] / norm);
  }
  return u;
}

// The similarity of two rows; a pair is decided by it rounded to `real`.
inline double similarity(const double* u, const double* v, int64_t d) {
  double s = 0;
  for (int64_t k = 0; k < d; ++k) s += u[k] * v[k];
  return s;
}

template <class real>
bool is_pair(const tcm::Problem<real>& p, int64_t i, int64_t j) {
  int64_t label = p.symmetric ? p.y[j] : p.ref_y[j], offset = p.symmetric ? 0 : p.row_offset;
  return p.y[i] >= 0 && label >= 0 && !(offset >= 0 && j == offset + i);
}

template <class real>
int side_of(const tcm::Problem<real>& p, int64_t i, int64_t j) {
  return p.y[i] == (p.symmetric ? p.y : p.ref_y)[j] ? kPlus : kMinus;
}

// The definition, pair by pair, in double; the gradients of both penalties, one after the other, or of the loss.
// False if a decision is not clear: in float64 within rounding of a margin; in float32, where exact similarities decide,
// within the rounding of a sum in float64.
template <class real>
bool oracle(const tcm::Problem<real>& p, bool penalties, Answer* out) {
  auto u = units(p.x, p.n, p.d), v = p.symmetric ? u : units(p.ref_x, p.m, p.d);
  std::vector<double> gu[2], gv[2];
  std::vector<double> row_reach[2], column_reach[2];  // sum of the weights of a row's hard pairs, and of their errors
  for (int side : {kPlus, kMinus}) {
    row_reach[side].assign(p.n, 0), column_reach[side].assign(p.m, 0);
    gu[side].assign(p.n * p.d, 0), gv[side].assign(p.m * p.d, 0);
    out->penalty[side] = 0, out->count[side] = 0;
  }
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t j = 0; j < p.m; ++j) {
      if (!is_pair(p, i, j)) continue;
      int side = side_of(p, i, j);
      double exact = similarity(&u[i * p.d], &v[j * p.d], p.d), margin = static_cast<real>(p.margin.value[side]);
      auto violation_at = [&](double s) {
        return side == kPlus ? margin - static_cast<real>(s) : static_cast<real>(s) - margin;
      };
      double blur = std::is_same_v<real, double> ? 32 * std::numeric_limits<real>::epsilon() : 1e-14;
      if ((violation_at(exact - blur) >= 0) != (violation_at(exact + blur) >= 0)) return false;
      double violation = violation_at(exact);
      if (violation < 0) continue;
      double slope = p.squared ? 2 * violation : 1, reach = p.squared ? slope + 1 : 1;
      out->penalty[side] += p.squared ? violation * violation : violation, out->count[side] += 1;
      row_reach[side][i] += reach, column_reach[side][j] += reach;
      for (int64_t k = 0; k < p.d; ++k)
        gu[side][i * p.d + k] += slope * v[j * p.d + k], gv[side][j * p.d + k] += slope * u[i * p.d + k];
    }
  std::array<double, 2> weights;
  out->loss = 0;
  for (int side : {kPlus, kMinus}) {
    weights[side] = p.weight.value[side] / std::max<int64_t>(out->count[side], 1);
    out->loss += weights[side] * out->penalty[side];
  }
  auto gradient = [&](const real* x, const std::vector<double>& unit, std::vector<double>* g,
                      std::vector<double>* sizes, int64_t n, std::array<double, 2> weight, Gradient* out) {
    size_t begin = out->value.size();
    out->value.resize(begin + n * p.d), out->reach.resize(begin + n * p.d);
    for (int64_t i = 0; i < n; ++i) {
      double norm = 0, along = 0, *grad = &out->value[begin + i * p.d], *reach = &out->reach[begin + i * p.d];
      for (int64_t k = 0; k < p.d; ++k) {
        norm = std::hypot(norm, x[i * p.d + k]);
        grad[k] = weight[kMinus] * g[kMinus][i * p.d + k] - weight[kPlus] * g[kPlus][i * p.d + k];
        along += grad[k] * unit[i * p.d + k];
      }
      if (norm < tcm::kEps) along = 0;  // the divisor does not depend on x
      for (int64_t k = 0; k < p.d; ++k) {
        grad[k] = norm == 0 ? 0 : (grad[k] - along * unit[i * p.d + k]) / std::max(norm, tcm::kEps);
        reach[k] = (weight[kMinus] * sizes[kMinus][i] + weight[kPlus] * sizes[kPlus][i]) / std::max(norm, tcm::kEps);
      }
    }
  };
  if (p.symmetric)
    for (int side : {kPlus, kMinus}) {
      for (size_t k = 0; k < gu[side].size(); ++k) gu[side][k] += gv[side][k];
      for (int64_t i = 0; i < p.n; ++i) row_reach[side][i] *= 2;
    }
  using Weights = std::vector<std::array<double, 2>>;
  for (auto& weight : penalties ? Weights{{1, 0}, {0, 1}} : Weights{weights}) {
    gradient(p.x, u, gu, row_reach, p.n, weight, &out->grad_x);
    if (!p.symmetric) gradient(p.ref_x, v, gv, column_reach, p.m, weight, &out->grad_ref);
  }
  return true;
}

inline void fail(const Case& c, const char* what, double got, double wanted) {
  std::printf(
      "%s: got %.17g, wanted %.17g (n %ld m %ld d %ld classes %ld offset %ld symmetric %d squared %d penalties %d "
      "transposed %d codes %d threads %d margins %.9g %.9g)\n",
      what, got, wanted, c.n, c.m, c.d, c.classes, c.row_offset, c.symmetric, c.squared, c.penalties, c.transposed,
      c.codes, c.threads, c.margin[kPlus], c.margin[kMinus]);
  std::exit(1);
}

// Within 16 roundings, or a quarter of those of a sum of `d` numbers: they add up where all numbers are alike.
template <class real>
void compare(const Case& c, const char* what, real got, double wanted, double reach) {
  double roundings = std::max<double>(16, std::min(c.d, kStep) / 4.0);
  if (!(std::abs(got - wanted) <= roundings * std::numeric_limits<real>::epsilon() * (reach + 1e-30)))
    fail(c, what, got, wanted);
}

template <class real>
void compare(const Case& c, const char* what, const std::vector<real>& got, const Gradient& wanted) {
  for (size_t k = 0; k < got.size(); ++k) compare(c, what, got[k], wanted.value[k], wanted.reach[k]);
}

template <class real>
tcm::Problem<real> problem_of(const Case& c, const Batch<real>& b) {
  return {
      .symmetric = c.symmetric,
      .n = c.n,
      .m = c.symmetric ? c.n : c.m,
      .d = c.d,
      .x = b.x.data(),
      .y = b.y.data(),
      .ref_x = b.ref_x.data(),
      .ref_y = b.ref_y.data(),
      .row_offset = c.row_offset,
      .margin = {.value = {c.margin[kPlus], c.margin[kMinus]}},
      .weight = {.value = {1.5, 0.5}},
      .squared = c.squared,
      .fp16 = false,
  };
}

// Gradients and loss of one run, which agree with `wanted`.
template <class real>
std::vector<real> run(const Case& c, const tcm::Problem<real>& problem, const Answer& wanted, tcm::cpu::Isa isa) {
  constexpr real kPoison = std::numeric_limits<real>::quiet_NaN();
  real loss = kPoison;
  double penalty[2] = {kPoison, kPoison};
  int64_t count[2] = {-1, -1};
  int64_t sides = c.penalties ? 2 : 1;
  std::vector<real> grad_x(c.grad_x ? sides * c.n * c.d : 0, kPoison),
      grad_ref(c.grad_ref ? sides * c.m * c.d : 0, kPoison);
  tcm::Result<real> result{c.penalties ? nullptr : &loss, c.grad_x ? grad_x.data() : nullptr,
                           c.grad_ref ? grad_ref.data() : nullptr, penalty, count};
  tcm::cpu::loss(problem, result, host<real>(c.threads, c.transposed, c.codes), isa);
  for (int side : {kPlus, kMinus}) {
    if (count[side] != wanted.count[side]) fail(c, "count", count[side], wanted.count[side]);
    compare(c, "penalty", static_cast<real>(penalty[side]), wanted.penalty[side],
            (c.squared ? 12 : 3) * wanted.count[side]);
  }
  if (!c.penalties) compare(c, "loss", loss, wanted.loss, c.squared ? 24 : 6);
  compare(c, "grad_x", grad_x, wanted.grad_x);
  compare(c, "grad_ref", grad_ref, wanted.grad_ref);
  grad_x.insert(grad_x.end(), grad_ref.begin(), grad_ref.end());
  if (!c.penalties) grad_x.push_back(loss);
  return grad_x;
}

// The case's problem on every instruction set that this processor has, twice. False if its answer is not clear: draw
// again.
template <class real>
bool check(const Case& c, const Batch<real>& batch) {
  auto problem = problem_of(c, batch);
  Answer wanted;
  if (!oracle(problem, c.penalties, &wanted)) return false;
  for (int k = 0; k <= static_cast<int>(tcm::cpu::best_isa()); ++k) {
    auto isa = static_cast<tcm::cpu::Isa>(k);
    if (run(c, problem, wanted, isa) != run(c, problem, wanted, isa)) fail(c, "second run differs", 0, 0);
  }
  return true;
}
