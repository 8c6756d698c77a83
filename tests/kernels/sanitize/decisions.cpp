// Asserts that every pair is decided by its similarity in float64, rounded: in batches that are made to mislead the codes
// (rows whose rounding errors lie along the other row, ragged rows, one huge entry, codes without error) with margins at or
// beside some pair's similarity. decisions COUNT [SEED]; exit 0: all agree, with codes and without.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "loss_cases.h"

namespace {

using Random = std::mt19937_64;

enum Kind { kRandom, kAligned, kExact, kRagged, kHuge, kAlike, kLine, kKinds };

auto pick(Random& random, const auto& values) { return values[random() % std::size(values)]; }
bool chance(Random& random, double share) { return std::uniform_real_distribution<>()(random) < share; }
double uniform(Random& random, double from, double to) { return std::uniform_real_distribution<>(from, to)(random); }

// Draws rows of dimension d that have something in common: that makes some of their similarities large.
class Rows {
 public:
  Rows(int64_t d, Random& random)
      : d_(d),
        random_(random),
        axis_(d),
        cone_(pick(random, (const double[]){0, 0.3, 1, 10, 1000})),
        flips_(pick(random, (const double[]){0, 0.02, 0.5})),
        steps_(pick(random, (const int[]){5, 20, 60, 100})),
        even_(chance(random, 0.7)),
        apart_(draw_apart()) {
    for (auto& a : axis_) a = normal_(random_);
  }

  // Rows a and b, which are partners: the rounding errors of one lie along the other.
  void draw(Kind kind, double* a, double* b) {
    if (kind == kAligned) return aligned(a, b);
    draw(kind, a), draw(kind, b);
  }

 private:
  void draw(Kind kind, double* x) {
    for (int64_t k = 0; k < d_; ++k) {
      double noise = normal_(random_), sign = axis_[k] < 0 ? -1 : 1;
      if (kind == kRandom || kind == kHuge) x[k] = noise + cone_ * axis_[k];
      if (kind == kExact) x[k] = sign * (chance(random_, 0.5) ? 127 : chance(random_, 0.1) ? -1 : 0);
      if (kind == kRagged) x[k] = sign * std::exp(4 * noise);
      if (kind == kAlike) x[k] = axis_[k] + 1e-3 * noise;
      if (kind == kLine) x[k] = axis_[k];
    }
    if (kind == kHuge) x[random_() % std::min<int64_t>(d_, 3)] *= std::pow(10, uniform(random_, 0, 6));
    if (kind == kLine && chance(random_, 0.5)) std::transform(x, x + d_, x, std::negate<>());
  }

  // x = q + r with q = K sign, and r = 0.49 of a step along the signs of the partner, or against them. One entry is 127,
  // so that a step is 1. Where the signs are all alike or all opposite the bound is reached, e_i e_j and all.
  void aligned(double* a, double* b) {
    std::vector<double> signs(d_), partner(d_);
    if (!even_) apart_ = draw_apart();
    double toward = chance(random_, 0.5) ? 0.49 : -0.49;
    for (int64_t k = 0; k < d_; ++k) {
      signs[k] = (axis_[k] < 0 ? -1 : 1) * (chance(random_, flips_) ? -1 : 1);
      partner[k] = signs[k] * (chance(random_, apart_) ? -1 : 1);
    }
    int64_t peak = random_() % d_;
    int here = even_ ? steps_ : 1 + static_cast<int>(random_() % steps_);
    int there = even_ ? steps_ : 1 + static_cast<int>(random_() % steps_);
    for (int64_t k = 0; k < d_; ++k) {
      a[k] = here * signs[k] + toward * partner[k], b[k] = there * partner[k] + toward * signs[k];
      if (k == peak) a[k] = 127 * signs[k];
      if (k == (peak + 1) % d_) b[k] = 127 * partner[k];
    }
  }

  double draw_apart() { return pick(random_, (const double[]){0, 1, uniform(random_, 0, 0.5)}); }

  int64_t d_;
  Random& random_;
  std::normal_distribution<double> normal_;
  std::vector<double> axis_;
  double cone_, flips_;
  int steps_;
  bool even_;     // whether aligned rows have the same scale, and partners the same similarity
  double apart_;  // share of signs in which partners differ
};

// Two sets of rows of one kind each, or now and then of another; some of them zero, or of extreme length.
void draw(const Case& c, Random& random, Batch<float>* batch) {
  Rows rows(c.d, random);
  auto kind = [&] { return static_cast<Kind>(random() % kKinds); };
  Kind usual = c.d > 1000 || chance(random, 0.4) ? kAligned : kind();
  bool extreme = chance(random, 0.1);
  int64_t pairs = c.symmetric ? (c.n + 1) / 2 : std::max(c.n, c.m);
  std::vector<double> a(c.d), b(c.d);
  auto append = [&](int64_t most, const std::vector<double>& row, std::vector<float>* x, std::vector<int64_t>* y) {
    if (static_cast<int64_t>(y->size()) == most) return;
    double peak = 0, scale = std::exp(2 * std::normal_distribution<>()(random));
    for (double value : row) peak = std::max(peak, std::abs(value));
    if (extreme && peak > 0) scale = pick(random, (const double[]){0, 1e-40, 1e-12, 1e30}) / peak;
    for (double value : row) x->push_back(static_cast<float>(value * scale));
    y->push_back(static_cast<int64_t>(random() % c.classes) - (random() % 8 == 0) * c.classes);
  };
  *batch = {};
  for (int64_t k = 0; k < pairs; ++k) {
    rows.draw(chance(random, 0.1) ? kind() : usual, a.data(), b.data());
    append(c.n, a, &batch->x, &batch->y);
    if (c.symmetric) {
      append(c.n, b, &batch->x, &batch->y);
    } else {
      append(c.m, b, &batch->ref_x, &batch->ref_y);
    }
  }
}

// Margins at or beside similarities of pairs, among them the least and the largest.
void aim(Case& c, const Batch<float>& batch, Random& random) {
  auto problem = problem_of(c, batch);
  auto u = units(problem.x, problem.n, c.d), v = c.symmetric ? u : units(problem.ref_x, problem.m, c.d);
  std::vector<float> found[2];
  for (int64_t i = 0; i < problem.n; ++i)
    for (int64_t j = 0; j < problem.m; ++j)
      if (is_pair(problem, i, j))
        found[side_of(problem, i, j)].push_back(static_cast<float>(similarity(&u[i * c.d], &v[j * c.d], c.d)));
  for (int side : {kPlus, kMinus}) {
    auto& s = found[side];
    std::sort(s.begin(), s.end());
    if (s.empty() || chance(random, 0.05)) {
      c.margin[side] = pick(random, (const double[]){-2.5, -1, -0.5, 0, 0.5, 1, 2.5});
      continue;
    }
    size_t place = pick(random, (const size_t[]){0, random() % s.size(), s.size() - 1});
    float at = s[place], away = chance(random, 0.5) ? 2.0f : -2.0f;
    c.margin[side] = at + pick(random, (const double[]){0, 0, 1e-7, 1e-6, 1e-5, 1e-4}) * away / 2;
    if (chance(random, 0.25)) c.margin[side] = std::nextafter(at, away);
    if (chance(random, 0.1)) c.margin[side] = (at + s[(place + 1) % s.size()]) / 2;
  }
}

}  // namespace

int main(int argc, char** argv) {
  int batches = argc > 1 ? std::atoi(argv[1]) : 1000;
  uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  std::printf("seed %lu\n", seed);
  Random random(seed);
  for (int done = 0; done < batches;) {
    Case c{};
    c.n = 1 + random() % pick(random, (const int[]){2, 4, 8, 30}),
    c.m = 1 + random() % pick(random, (const int[]){2, 8, 30});
    c.d = pick(random, (const int64_t[]){1, 2, 16, 64, 65, 130});
    if (chance(random, 0.02)) c.n = 60 + random() % 260, c.m = 60 + random() % 100;
    if (chance(random, 0.008)) c.n = 520 + random() % 40, c.m = 70, c.d = 16;  // tiles of several blocks of codes
    if (chance(random, 0.05)) c.n = 1 + random() % 3, c.m = pick(random, (const int[]){1, 2, 64}), c.d = 2048;
    c.classes = pick(random, (const int64_t[]){1, 2, 1000, 1000});
    c.symmetric = random() % 2, c.grad_x = random() % 4, c.grad_ref = !c.symmetric && random() % 2;
    if (c.symmetric) c.m = c.n;
    c.row_offset = !c.symmetric && c.m >= c.n && random() % 2 ? static_cast<int64_t>(random() % (c.m - c.n + 1)) : -1;
    c.squared = random() % 4 == 0, c.penalties = random() % 4 == 0, c.transposed = random() % 2;
    c.threads = c.n > 60 ? 1 + static_cast<int>(random() % 3) : 1;
    Batch<float> batch;
    draw(c, random, &batch), aim(c, batch, random);
    auto problem = problem_of(c, batch);
    Answer wanted;
    if (!oracle(problem, c.penalties, &wanted)) continue;
    auto isa = static_cast<tcm::cpu::Isa>(random() % (1 + static_cast<int>(tcm::cpu::best_isa())));
    for (bool codes : {true, false}) c.codes = codes, run(c, problem, wanted, isa);
    ++done;
  }
  std::printf("%d batches agree\n", batches);
}
