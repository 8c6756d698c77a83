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
#include "loss_cases.h"

// Draws the case's problem and checks it. False: draw again.
template <class real>
bool check_drawn(const Case& c, std::mt19937_64& random) {
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
  Batch<real> batch;
  draw(c.n, &batch.x, &batch.y), draw(c.m, &batch.ref_x, &batch.ref_y);
  return check(c, batch);
}

// Rows with exact similarities, multiples of 1/4: four components of +-1/2 or one of +-1 (or none), times a power of two.
template <class real>
struct ExactRows {
  std::vector<real> x;
  std::vector<int64_t> y;
  std::vector<real> norm;

  ExactRows(int64_t n, int64_t d, int64_t labels, std::mt19937_64& random) : x(n * d, 0), y(n), norm(n, 1) {
    for (int64_t i = 0; i < n; ++i) {
      int parts = random() % 2 ? 4 : random() % 8 ? 1 : 0;
      for (int done = 0; done < parts;) {
        real& component = x[i * d + random() % d];
        if (component != 0) continue;
        component = std::ldexp(random() % 2 ? real{1} : real{-1}, static_cast<int>(i % 5) - (parts == 4));
        ++done;
      }
      y[i] = static_cast<int64_t>(random() % (labels + 1)) - (random() % 8 == 0);
      if (parts > 0) norm[i] = std::ldexp(real{1}, static_cast<int>(i % 5));
    }
  }
};

// The pair counts of random rows, on every instruction set, against a double loop: exactly, for similarities are exact.
template <class real>
void check_counts(std::mt19937_64& random) {
  const int64_t sizes[] = {0, 1, 2, 63, 64, 65, 130, 300, 520, 700};
  auto pick = [&](const auto& values) { return values[random() % std::size(values)]; };
  bool symmetric = random() % 2;
  int64_t n = pick(sizes), m = symmetric ? n : pick(sizes), d = pick((const int64_t[]){4, 5, 16, 65});
  int64_t labels = pick((const int64_t[]){1, 3, 40, 1000}), bits = pick((const int64_t[]){0, 3, 9});
  int64_t classes = static_cast<int64_t>(random() % (labels + 1));
  Case c{.n = n,
         .m = m,
         .d = d,
         .classes = classes,
         .symmetric = symmetric,
         .transposed = random() % 2 == 0,
         .threads = pick((const int[]){1, 2, 3, 5})};
  ExactRows<real> rows(n, d, labels, random), others(symmetric ? 0 : m, d, labels, random);
  const ExactRows<real>& columns = symmetric ? rows : others;
  std::vector<real> thresholds;
  int64_t lowest = random() % 2 ? 0 : 16;  // in eighths: all pairs have a threshold below them, or few have
  for (int64_t k = random() % 12; k-- > 0;)
    thresholds.push_back(static_cast<real>(lowest + random() % (21 - lowest)) / 8 - real{1.25});
  std::sort(thresholds.begin(), thresholds.end());
  int64_t bins = (int64_t{2} << bits) + 1, t = thresholds.size();

  constexpr real kNone = -std::numeric_limits<real>::infinity();
  std::vector<int64_t> count[2], class_count[2];
  std::vector<real> best[2], ref_best[2];
  for (int side : {kPlus, kMinus}) {
    count[side].assign(bins, 0), class_count[side].assign((classes + 1) * t, 0);
    best[side].assign(n, kNone), ref_best[side].assign(m, kNone);
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = symmetric ? i + 1 : 0; j < m; ++j) {
      int64_t first = rows.y[i], second = columns.y[j];
      if (first < 0 || second < 0) continue;
      real s = 0;
      for (int64_t k = 0; k < d; ++k) s += rows.x[i * d + k] * columns.x[j * d + k];
      s /= rows.norm[i] * columns.norm[j];
      int side = first == second ? kPlus : kMinus;
      ++count[side][static_cast<int64_t>(std::floor(s * (bins / 2))) + bins / 2];
      real& other = (symmetric ? best : ref_best)[side][j];
      best[side][i] = std::max(best[side][i], s), other = std::max(other, s);
      int64_t cell = std::upper_bound(thresholds.begin(), thresholds.end(), s) - thresholds.begin() - 1;
      if (cell < 0) continue;
      ++class_count[side][std::min(first, classes) * t + cell];
      if (side == kMinus) ++class_count[side][std::min(second, classes) * t + cell];
    }
  for (int isa = 0; isa <= static_cast<int>(tcm::cpu::best_isa()); ++isa) {
    std::vector<int64_t> got[2], class_got[2], progress(2, -1);
    std::vector<real> best_got[2], ref_got[2];
    for (int side : {kPlus, kMinus}) {
      got[side].assign(bins, -7), class_got[side].assign((classes + 1) * t, -7);
      best_got[side].assign(n, 7), ref_got[side].assign(m, 7);
    }
    tcm::CountProblem<real> problem{
        .symmetric = symmetric,
        .n = n,
        .m = m,
        .d = d,
        .classes = classes,
        .thresholds = t,
        .x = rows.x.data(),
        .y = rows.y.data(),
        .ref_x = others.x.data(),
        .ref_y = others.y.data(),
        .threshold = thresholds.data(),
        .bits = static_cast<int>(bits),
    };
    tcm::CountResult<real> result{
        .count = {got[0].data(), got[1].data()},
        .class_count = {class_got[0].data(), class_got[1].data()},
        .best = {best_got[0].data(), best_got[1].data()},
        .ref_best = {ref_got[0].data(), ref_got[1].data()},
        .progress = random() % 2 ? progress.data() : nullptr,
    };
    tcm::cpu::counts(problem, result, host<real>(c.threads, c.transposed, false), static_cast<tcm::cpu::Isa>(isa));
    for (int side : {kPlus, kMinus}) {
      for (int64_t k = 0; k < bins; ++k)
        if (got[side][k] != count[side][k]) fail(c, "pairs of a cell", got[side][k], count[side][k]);
      for (int64_t k = 0; k < (classes + 1) * t; ++k)
        if (class_got[side][k] != class_count[side][k])
          fail(c, "pairs of a class", class_got[side][k], class_count[side][k]);
      for (int64_t i = 0; i < n; ++i)
        if (best_got[side][i] != best[side][i]) fail(c, "largest similarity", best_got[side][i], best[side][i]);
      for (int64_t j = 0; j < m && !symmetric; ++j)
        if (ref_got[side][j] != ref_best[side][j])
          fail(c, "largest similarity of a column", ref_got[side][j], ref_best[side][j]);
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
    auto broken = host<float>(threads, false, false);
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
    for (bool symmetric : {true, false}) {
      calls = 0, thrown = false;
      std::vector<int64_t> bins(6);
      std::vector<float> best(4400);
      float *at = best.data(), *ref_at = at + 2200;
      try {
        tcm::cpu::counts<float>(
            {symmetric, 1100, 1100, 2, 0, 0, x.data(), labels.data(), x.data(), labels.data(), nullptr, 0},
            {{bins.data(), bins.data() + 3}, {}, {at, at + 1100}, {ref_at, ref_at + 1100}, nullptr}, broken,
            tcm::cpu::best_isa());
      } catch (const std::runtime_error&) {
        thrown = true;
      }
      if (!thrown) break;
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
    auto plain = host<float>(1, transposed, false), lowered = plain;
    lowered.product = [&](const float* a, int64_t m, const float* b, int64_t n, int64_t d, int64_t b_stride, float* s,
                          int64_t stride) {
      plain.product(rounded(a, m * d).data(), m, rounded(b, n * d).data(), n, d, b_stride, s, stride);
    };
    if (!tcm::cpu::exact(plain)) std::printf("an exact product was refused\n"), std::exit(1);
    if (tcm::cpu::exact(lowered)) std::printf("a product in bfloat16 was let pass\n"), std::exit(1);
  }
  if (!tcm::cpu::exact(host<double>(1, false, false))) std::printf("an exact product was refused\n"), std::exit(1);
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
    c.squared = random() % 2, c.penalties = random() % 2, c.transposed = random() % 2, c.codes = random() % 2;
    c.threads = pick((const int[]){1, 2, 3, 5});
    done += random() % 2 ? check_drawn<float>(c, random) : check_drawn<double>(c, random);
    if (random() % 4 == 0) random() % 2 ? check_counts<float>(random) : check_counts<double>(random);
  }
  failing_product();
  inexact_product();
  std::printf("%d cases agree\n", cases);
}
