// Runs the CPU kernel without torch, for the sanitizers: threads of its own, a plain matrix product, random
// problems of every form and size against a double loop over the pairs. Exit 0: all agree.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/counts.h"
#include "../../../csrc/cpu/loss.h"

using tcm::kMinus;
using tcm::kPlus;

struct Case {
  int64_t n, m, d, classes, row_offset;
  bool symmetric, grad_x, grad_ref, squared, penalties, transposed;
  double margin[2], cone;
  int threads;
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

template <class real>
void product(const real* a, int64_t m, const real* b, int64_t n, int64_t d, int64_t b_stride, real* s, int64_t stride) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      real sum = 0;
      for (int64_t k = 0; k < d; ++k) sum += a[i * d + k] * b[j * b_stride + k];
      s[i * stride + j] = sum;
    }
}

template <class real>
void transposed_product(const real* a, int64_t m, const real* b, int64_t n, int64_t d, int64_t b_stride, real* s,
                        int64_t stride) {
  if (m % 16 || n % 16) std::printf("%ld x %ld are not multiples of 16\n", m, n), std::exit(1);
  for (int64_t i = 0; i < m; ++i) {
    std::fill_n(s + i * stride, n, real{0});
    for (int64_t k = 0; k < d; ++k)
      for (int64_t j = 0; j < n; ++j) s[i * stride + j] += a[i * d + k] * b[k * b_stride + j];
  }
}

template <class real>
void add_product(const real* a, int64_t m, int64_t n, const real* b, int64_t d, real* c) {
  if (m % 64 || n % 64) std::printf("%ld x %ld are not multiples of 64\n", m, n), std::exit(1);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k < d; ++k) c[i * d + k] += a[i * n + j] * b[j * d + k];
}

template <class real>
tcm::cpu::Host<real> host(int threads, bool transposed) {
  return {threads,
          [threads](int64_t size, const std::function<void(int64_t, int64_t)>& body) {
            std::vector<std::thread> pool;
            for (int t = 0; t < threads; ++t)
              pool.emplace_back([&, t] {
                int64_t from = size * t / threads, to = size * (t + 1) / threads;
                if (from < to) body(from, to);
              });
            for (auto& thread : pool) thread.join();
          },
          transposed ? transposed_product<real> : product<real>, transposed, add_product<real>};
}

// The definition, pair by pair, in double; the gradients of both penalties, one after the other, or of the loss.
// False if a pair is as near to a margin as rounding reaches.
template <class real>
bool oracle(const tcm::Problem<real>& p, bool penalties, Answer* out) {
  auto unit = [&](const real* x, int64_t n) {
    std::vector<double> u(x, x + n * p.d);
    for (int64_t i = 0; i < n; ++i) {
      double norm = 0;
      for (int64_t k = 0; k < p.d; ++k) norm = std::hypot(norm, u[i * p.d + k]);
      for (int64_t k = 0; k < p.d; ++k) u[i * p.d + k] /= std::max(norm, tcm::kEps);
    }
    return u;
  };
  const int64_t* ref_y = p.symmetric ? p.y : p.ref_y;
  int64_t offset = p.symmetric ? 0 : p.row_offset;
  auto u = unit(p.x, p.n), v = p.symmetric ? u : unit(p.ref_x, p.m);
  std::vector<double> gu[2], gv[2];
  std::vector<double> row_reach[2], column_reach[2];  // sum of the weights of a row's hard pairs, and of their errors
  for (int side : {kPlus, kMinus}) {
    row_reach[side].assign(p.n, 0), column_reach[side].assign(p.m, 0);
    gu[side].assign(p.n * p.d, 0), gv[side].assign(p.m * p.d, 0);
    out->penalty[side] = 0, out->count[side] = 0;
  }
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t j = 0; j < p.m; ++j) {
      if (p.y[i] < 0 || ref_y[j] < 0 || (offset >= 0 && j == offset + i)) continue;
      double s = 0;
      for (int64_t k = 0; k < p.d; ++k) s += u[i * p.d + k] * v[j * p.d + k];
      int side = p.y[i] == ref_y[j] ? kPlus : kMinus;
      double violation = side == kPlus ? p.margin.value[kPlus] - s : s - p.margin.value[kMinus];
      if (std::abs(violation) < 32 * std::numeric_limits<real>::epsilon()) return false;
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

void fail(const Case& c, const char* what, double got, double wanted) {
  std::printf(
      "%s: got %.17g, wanted %.17g (n %ld m %ld d %ld classes %ld offset %ld symmetric %d squared %d penalties %d "
      "threads %d margins %g %g)\n",
      what, got, wanted, c.n, c.m, c.d, c.classes, c.row_offset, c.symmetric, c.squared, c.penalties, c.threads,
      c.margin[kPlus], c.margin[kMinus]);
  std::exit(1);
}

template <class real>
void compare(const Case& c, const char* what, real got, double wanted, double reach) {
  if (!(std::abs(got - wanted) <= 16 * std::numeric_limits<real>::epsilon() * (reach + 1e-30)))
    fail(c, what, got, wanted);
}

template <class real>
void compare(const Case& c, const char* what, const std::vector<real>& got, const Gradient& wanted) {
  for (size_t k = 0; k < got.size(); ++k) compare(c, what, got[k], wanted.value[k], wanted.reach[k]);
}

// Draws the case's problem and checks it on every instruction set that this processor has. False: draw again.
template <class real>
bool check(const Case& c, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::vector<double> axis(c.d);
  for (auto& a : axis) a = normal(random);
  auto draw = [&](int64_t n, std::vector<real>* x, std::vector<int64_t>* y) {
    x->resize(n * c.d), y->resize(n);
    for (int64_t i = 0; i < n; ++i) {
      double scale = std::exp(2 * normal(random));
      for (int64_t k = 0; k < c.d; ++k)
        (*x)[i * c.d + k] = static_cast<real>(scale * (normal(random) + c.cone * axis[k]));
      (*y)[i] = static_cast<int64_t>(random() % (c.classes + 1)) - (random() % 8 == 0);
    }
  };
  std::vector<real> x, ref_x;
  std::vector<int64_t> y, ref_y;
  draw(c.n, &x, &y), draw(c.m, &ref_x, &ref_y);
  tcm::Problem<real> problem{c.symmetric,
                             c.n,
                             c.symmetric ? c.n : c.m,
                             c.d,
                             x.data(),
                             y.data(),
                             ref_x.data(),
                             ref_y.data(),
                             c.row_offset,
                             {.value = {c.margin[0], c.margin[1]}},
                             {.value = {1.5, 0.5}},
                             c.squared,
                             false};
  Answer wanted;
  if (!oracle(problem, c.penalties, &wanted)) return false;
  std::vector<real> first;
  for (int isa = 0; isa <= static_cast<int>(tcm::cpu::best_isa()); ++isa)
    for (int repeat = 0; repeat < 2; ++repeat) {
      constexpr real kPoison = std::numeric_limits<real>::quiet_NaN();
      real loss = kPoison;
      double penalty[2] = {kPoison, kPoison};
      int64_t count[2] = {-1, -1};
      int64_t sides = c.penalties ? 2 : 1;
      std::vector<real> grad_x(c.grad_x ? sides * c.n * c.d : 0, kPoison),
          grad_ref(c.grad_ref ? sides * c.m * c.d : 0, kPoison);
      tcm::Result<real> result{c.penalties ? nullptr : &loss, c.grad_x ? grad_x.data() : nullptr,
                               c.grad_ref ? grad_ref.data() : nullptr, penalty, count};
      tcm::cpu::loss(problem, result, host<real>(c.threads, c.transposed), static_cast<tcm::cpu::Isa>(isa));
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
      if (repeat == 0) first = grad_x;
      if (first != grad_x) fail(c, "second run differs", 0, 0);
    }
  return true;
}

// The pair counts of random rows, on every instruction set, against a double loop: exactly, for similarities are exact.
template <class real>
void check_counts(std::mt19937_64& random) {
  const int64_t sizes[] = {0, 1, 2, 63, 64, 65, 130, 300, 520, 700};
  auto pick = [&](const auto& values) { return values[random() % std::size(values)]; };
  int64_t n = pick(sizes), d = pick((const int64_t[]){4, 5, 16, 65}), labels = pick((const int64_t[]){1, 3, 40, 1000});
  int64_t classes = static_cast<int64_t>(random() % (labels + 1)), bits = pick((const int64_t[]){0, 3, 9});
  Case c{
      .n = n, .d = d, .classes = classes, .transposed = random() % 2 == 0, .threads = pick((const int[]){1, 2, 3, 5})};
  std::vector<real> x(n * d, 0), thresholds;
  std::vector<int64_t> y(n);
  for (int64_t i = 0; i < n; ++i) {  // four components of +-1/2 or one of +-1 (or none), times a power of two
    int parts = random() % 2 ? 4 : random() % 8 ? 1 : 0;
    for (int done = 0; done < parts;) {
      real& component = x[i * d + random() % d];
      if (component != 0) continue;
      component = std::ldexp(random() % 2 ? real{1} : real{-1}, static_cast<int>(i % 5) - (parts == 4));
      ++done;
    }
    y[i] = static_cast<int64_t>(random() % (labels + 1)) - (random() % 8 == 0);
  }
  int64_t lowest = random() % 2 ? 0 : 16;  // in eighths: all pairs have a threshold below them, or few have
  for (int64_t k = random() % 12; k-- > 0;)
    thresholds.push_back(static_cast<real>(lowest + random() % (21 - lowest)) / 8 - real{1.25});
  std::sort(thresholds.begin(), thresholds.end());
  int64_t bins = (int64_t{2} << bits) + 1, t = thresholds.size();

  constexpr real kNone = -std::numeric_limits<real>::infinity();
  std::vector<int64_t> count[2], class_count[2];
  std::vector<real> best[2];
  for (int side : {kPlus, kMinus})
    count[side].assign(bins, 0), class_count[side].assign((classes + 1) * t, 0), best[side].assign(n, kNone);
  auto norm = [&](int64_t i) {
    real squares = 0;
    for (int64_t k = 0; k < d; ++k) squares += x[i * d + k] * x[i * d + k];
    return squares > 0 ? std::sqrt(squares) : real{1};
  };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j) {
      if (y[i] < 0 || y[j] < 0) continue;
      real s = 0;
      for (int64_t k = 0; k < d; ++k) s += x[i * d + k] * x[j * d + k];
      s /= norm(i) * norm(j);
      int side = y[i] == y[j] ? kPlus : kMinus;
      ++count[side][static_cast<int64_t>(std::floor(s * (bins / 2))) + bins / 2];
      best[side][i] = std::max(best[side][i], s), best[side][j] = std::max(best[side][j], s);
      int64_t cell = std::upper_bound(thresholds.begin(), thresholds.end(), s) - thresholds.begin() - 1;
      if (cell < 0) continue;
      ++class_count[side][std::min(y[i], classes) * t + cell];
      if (side == kMinus) ++class_count[side][std::min(y[j], classes) * t + cell];
    }
  for (int isa = 0; isa <= static_cast<int>(tcm::cpu::best_isa()); ++isa) {
    std::vector<int64_t> got[2], class_got[2], progress(2, -1);
    std::vector<real> best_got[2];
    for (int side : {kPlus, kMinus})
      got[side].assign(bins, -7), class_got[side].assign((classes + 1) * t, -7), best_got[side].assign(n, 7);
    tcm::CountProblem<real> problem{n, d, classes, t, x.data(), y.data(), thresholds.data(), static_cast<int>(bits)};
    tcm::CountResult<real> result{{got[0].data(), got[1].data()},
                                  {class_got[0].data(), class_got[1].data()},
                                  {best_got[0].data(), best_got[1].data()},
                                  random() % 2 ? progress.data() : nullptr};
    tcm::cpu::counts(problem, result, host<real>(c.threads, c.transposed), static_cast<tcm::cpu::Isa>(isa));
    for (int side : {kPlus, kMinus}) {
      for (int64_t k = 0; k < bins; ++k)
        if (got[side][k] != count[side][k]) fail(c, "pairs of a cell", got[side][k], count[side][k]);
      for (int64_t k = 0; k < (classes + 1) * t; ++k)
        if (class_got[side][k] != class_count[side][k])
          fail(c, "pairs of a class", class_got[side][k], class_count[side][k]);
      for (int64_t i = 0; i < n; ++i)
        if (best_got[side][i] != best[side][i]) fail(c, "largest similarity", best_got[side][i], best[side][i]);
    }
    if (progress[0] != progress[1]) fail(c, "progress", progress[0], progress[1]);
  }
}

// A product that fails must surface as its exception, in every thread count, and not as a hang.
void failing_product() {
  std::vector<float> x(600 * 4, 1.0f), grad(600 * 4);
  std::vector<int64_t> y(600, 0), labels(1100, 0), count(2);
  float loss;
  double penalty[2];
  for (int threads : {1, 3}) {
    auto broken = host<float>(threads, false);
    std::atomic<int> calls{0};
    broken.product = [&](const float* a, int64_t m, const float* b, int64_t n, int64_t d, int64_t b_stride, float* s,
                         int64_t stride) {
      if (++calls == 5) throw std::runtime_error("no product");
      product(a, m, b, n, d, b_stride, s, stride);
    };
    bool thrown = false;
    try {
      tcm::cpu::loss<float>({true,
                             600,
                             600,
                             4,
                             x.data(),
                             y.data(),
                             nullptr,
                             nullptr,
                             -1,
                             {.value = {0.9, 0.5}},
                             {.value = {1, 1}},
                             false,
                             false},
                            {&loss, grad.data(), nullptr, penalty, count.data()}, broken, tcm::cpu::best_isa());
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    if (!thrown) std::printf("a failing product was not reported\n"), std::exit(1);
    calls = 0, thrown = false;
    std::vector<int64_t> bins(6);
    try {
      tcm::cpu::counts<float>({1100, 2, 0, 0, x.data(), labels.data(), nullptr, 0},
                              {{bins.data(), bins.data() + 3}, {}, {grad.data(), grad.data() + 1100}, nullptr}, broken,
                              tcm::cpu::best_isa());
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    if (!thrown) std::printf("a failing product was not reported by the count\n"), std::exit(1);
  }
}

// A product of operands that were rounded to bfloat16 first is found out, in both layouts; one that was not is let pass.
void inexact_product() {
  auto rounded = [](const float* from, int64_t size) {
    std::vector<float> to(from, from + size);
    for (float& value : to) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bits &= 0xffff0000u;
      std::memcpy(&value, &bits, 4);
    }
    return to;
  };
  for (bool transposed : {false, true}) {
    auto plain = host<float>(1, transposed), lowered = plain;
    lowered.product = [&](const float* a, int64_t m, const float* b, int64_t n, int64_t d, int64_t b_stride, float* s,
                          int64_t stride) {
      plain.product(rounded(a, m * d).data(), m, rounded(b, n * d).data(), n, d, b_stride, s, stride);
    };
    if (!tcm::cpu::exact(plain)) std::printf("an exact product was refused\n"), std::exit(1);
    if (tcm::cpu::exact(lowered)) std::printf("a product in bfloat16 was let pass\n"), std::exit(1);
  }
  if (!tcm::cpu::exact(host<double>(1, false))) std::printf("an exact product was refused\n"), std::exit(1);
}

int main(int argc, char** argv) {
  int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  std::printf("seed %lu\n", seed);
  std::mt19937_64 random(seed);
  const int64_t sizes[] = {0, 1, 2, 5, 63, 64, 65, 100, 130, 257, 300, 520};
  const int64_t widths[] = {1, 2, 7, 16, 64, 65, 130};
  const double margins[] = {-1.5, -0.6, -0.1, 0.05, 0.3, 0.7, 0.95, 1.5};
  auto pick = [&](const auto& values) { return values[random() % std::size(values)]; };
  for (int done = 0; done < cases;) {
    Case c{};
    c.n = pick(sizes), c.m = pick(sizes), c.d = pick(widths);
    c.classes = pick((const int64_t[]){1, 3, 40, 1000});
    c.symmetric = random() % 2, c.grad_x = random() % 4, c.grad_ref = !c.symmetric && random() % 2;
    if (c.symmetric) c.m = c.n;
    c.row_offset = !c.symmetric && c.m >= c.n && random() % 2 ? static_cast<int64_t>(random() % (c.m - c.n + 1)) : -1;
    c.margin[kPlus] = pick(margins), c.margin[kMinus] = pick(margins);
    c.cone = pick((const double[]){0, 0, 0.3, 1, 4});
    c.squared = random() % 2, c.penalties = random() % 2, c.transposed = random() % 2;
    c.threads = pick((const int[]){1, 2, 3, 5});
    done += random() % 2 ? check<float>(c, random) : check<double>(c, random);
    if (random() % 4 == 0) random() % 2 ? check_counts<float>(random) : check_counts<double>(random);
  }
  failing_product();
  inexact_product();
  std::printf("%d cases agree\n", cases);
}
