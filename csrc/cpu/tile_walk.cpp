#include "tile_walk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

// How the walk goes:
// 1. Sort rows and columns by label and normalise them (`Embeddings`). The positives of a row are then one
//    range of columns, and away from the diagonal a tile needs no look at labels.
// 2. Cut both into panels of `tile` rows. For each pair of panels (the upper triangle where rows are columns)
//    one matrix product gives a tile of similarities; count the hard pairs and sum their excess.
// 3. Add the masked sums M X^ to the panels' gradients: nothing for an empty tile; pair by pair for few hard
//    pairs; by table look-up for many; and where most pairs are hard, the panel's column sum less the rest.
// 4. Scale by the counts, project off the unit sphere's normal, undo the sort.
// Panels take their tiles' sums in a fixed order (`Turn`), so the result does not depend on timing.

namespace tcm::cpu {
namespace {

// calloc'ed: pages that stay zero are never touched.
template <class T>
class Array {
 public:
  void allocate(int64_t size) {
    data_.reset(static_cast<T*>(std::calloc(std::max<int64_t>(size, 1), sizeof(T))));
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// Rows or columns: those with a label >= 0, sorted by label, unit length, and their gradient.
template <class real>
struct Embeddings {
  int64_t size, d, panels;
  int tile;
  std::vector<int64_t> order;    // [size] input row of sorted row k
  std::vector<int64_t> label;    // [size]
  std::vector<double> inverse;   // [size] 1 / max(|x|, kEps); 0 for a zero row
  Array<real> unit;              // [size, d] x^
  Array<real> panel_sum;         // [panels, d] sum of x^ over each panel
  std::atomic<bool> finite{true};

  bool wants_gradient = false;
  Array<real> sum[2];            // [size, d] masked sums over hard positives, hard negatives
  Array<real> shared[2];         // [panels, d] what every row of a panel gets besides
  std::vector<char> touched;     // [panels] whether sum or shared are more than zero
  std::unique_ptr<std::atomic<int64_t>[]> turn;  // [panels] see `Turn`

  int64_t begin(int64_t panel) const { return panel * tile; }
  int rows(int64_t panel) const { return static_cast<int>(std::min<int64_t>(tile, size - panel * tile)); }
  const real* unit_at(int64_t panel) const { return unit.get() + begin(panel) * d; }
};

// A panel's sums are added to in a fixed order: a tile waits until the panel's turn is its own.
struct Turn {
  std::atomic<int64_t>* turn;
  int64_t mine, next;
};

double norm_of(const auto* x, int64_t d, double* peak) {  // |x| / peak, peak = max |x_k|, for any finite x
  *peak = 0;
  for (int64_t k = 0; k < d; ++k) {
    double a = std::abs(static_cast<double>(x[k]));
    if (!(a <= std::numeric_limits<double>::max())) return std::numeric_limits<double>::quiet_NaN();
    *peak = std::max(*peak, a);
  }
  if (*peak == 0) return 0;
  double squares = 0;
  for (int64_t k = 0; k < d; ++k) squares += (x[k] / *peak) * (x[k] / *peak);
  return std::sqrt(squares);
}

// unit [d] = x / max(|x|, kEps); the factor, 0 for a zero row, NaN if x is not finite.
template <class real>
double normalise(const real* x, int64_t d, real* unit) {
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t k = 0; k < d; ++k) squares += static_cast<double>(x[k]) * x[k];
  double peak = 1, norm = std::sqrt(squares);
  if (!(squares > 1e-200 && squares < 1e200)) norm = norm_of(x, d, &peak);  // over- or underflow, zero, not finite
  if (norm * peak < kEps) peak = 1, norm = norm == 0 ? 0 : kEps;
  double inverse = norm == 0 ? 0 : 1 / norm;
  for (int64_t k = 0; k < d; ++k) unit[k] = static_cast<real>(x[k] / peak * inverse);
  return inverse / peak;
}

// Sets bits [from, to) of a row of a mask.
void range_mask(int from, int to, uint64_t* bits) {
  for (int word = 0; word < kWords; ++word) {
    int a = std::clamp(from - 64 * word, 0, 64), b = std::clamp(to - 64 * word, 0, 64);
    uint64_t below_b = b == 64 ? ~uint64_t{0} : (uint64_t{1} << b) - 1;
    uint64_t below_a = a == 64 ? ~uint64_t{0} : (uint64_t{1} << a) - 1;
    bits[word] = below_b & ~below_a;
  }
}

template <class real>
class Walk {
 public:
  Walk(const Problem<real>& problem, const Result<real>& result, const Host<real>& host, Isa isa)
      : p_(problem), result_(result), host_(host), loops_(pair_loops<real>(isa)), symmetric_(problem.symmetric) {}

  void run() {
    int64_t longest = std::max(p_.n, symmetric_ ? 0 : p_.m);
    int tile = static_cast<int>(std::clamp<int64_t>((longest / (4 * host_.threads) + 63) / 64 * 64, 64, kTile));
    prepare(rows_, p_.x, p_.y, p_.n, tile, result_.grad_x != nullptr);
    if (!symmetric_) prepare(other_, p_.ref_x, p_.ref_y, p_.m, tile, result_.grad_ref != nullptr);
    if (rows_.finite && columns().finite) {
      match();
      tiles();
    }
    finish();
  }

 private:
  struct Scratch {  // one a thread
    Array<real> s;  // [kTile, kTile]
    uint64_t mask[kTile * kWords], transposed[kTile * kWords];
  };

  Embeddings<real>& columns() { return symmetric_ ? rows_ : other_; }

  void parallel(int64_t size, const std::function<void(int64_t, int64_t)>& body) {
    if (host_.threads == 1) return body(0, size);
    host_.parallel_for(size, body);
  }

  // Step 1.
  void prepare(Embeddings<real>& e, const real* x, const int64_t* y, int64_t n, int tile, bool wants_gradient) {
    e.order.reserve(n);
    for (int64_t i = 0; i < n; ++i)
      if (y[i] >= 0) e.order.push_back(i);
    std::sort(e.order.begin(), e.order.end(), [y](int64_t a, int64_t b) { return y[a] != y[b] ? y[a] < y[b] : a < b; });
    e.size = e.order.size(), e.d = p_.d, e.tile = tile, e.panels = (e.size + tile - 1) / tile;
    e.label.resize(e.size), e.inverse.resize(e.size);
    e.unit.allocate(e.size * e.d), e.panel_sum.allocate(e.panels * e.d);
    e.wants_gradient = wants_gradient;
    e.touched.resize(e.panels), e.turn.reset(new std::atomic<int64_t>[e.panels]);
    for (int64_t panel = 0; panel < e.panels; ++panel) e.turn[panel] = 0;
    if (wants_gradient)
      for (int side : {kPlus, kMinus}) e.sum[side].allocate(e.size * e.d), e.shared[side].allocate(e.panels * e.d);
    parallel(e.panels, [&](int64_t from, int64_t to) {
      for (int64_t panel = from; panel < to; ++panel) {
        real* panel_sum = e.panel_sum.get() + panel * e.d;
        for (int64_t k = e.begin(panel); k < e.begin(panel) + e.rows(panel); ++k) {
          real* unit = e.unit.get() + k * e.d;
          e.label[k] = y[e.order[k]];
          e.inverse[k] = normalise(x + e.order[k] * e.d, e.d, unit);
          if (std::isnan(e.inverse[k])) e.finite = false;
          for (int64_t c = 0; c < e.d; ++c) panel_sum[c] += unit[c];
        }
      }
    });
  }

  // For each row the range of columns of its label, and the column that is the row itself.
  void match() {
    const auto& column_label = columns().label;
    first_.resize(rows_.size), last_.resize(rows_.size), own_.assign(rows_.size, -1);
    int64_t first = 0, last = 0;
    for (int64_t k = 0; k < rows_.size; ++k) {
      int64_t label = rows_.label[k];
      while (first < columns().size && column_label[first] < label) ++first;
      last = std::max(last, first);
      while (last < columns().size && column_label[last] == label) ++last;
      first_[k] = first, last_[k] = last;
    }
    if (symmetric_) return std::iota(own_.begin(), own_.end(), 0);
    if (p_.row_offset < 0) return;
    std::vector<int64_t> position(p_.m, -1);  // sorted position of a column
    for (int64_t k = 0; k < columns().size; ++k) position[columns().order[k]] = k;
    for (int64_t k = 0; k < rows_.size; ++k) own_[k] = position[rows_.order[k] + p_.row_offset];
  }

  // Step 2. Threads take tiles in order; the order makes neighbours touch different panels.
  void tiles() {
    int64_t rows = rows_.panels, cols = columns().panels;
    if (rows == 0 || cols == 0) return;
    panel_penalty_.assign(2 * rows, {});
    // Round r visits the tiles (a, b) with b = r - a (symmetric: every panel once a round) or b = a + r, modulo the
    // longer side, a on the shorter. There panel a has its turn in round r, and panel b is visited by a = b, b - 1, ...
    bool rows_short = rows <= cols;
    int64_t shorter = std::min(rows, cols), longer = std::max(rows, cols);
    if (!symmetric_) {
      auto& turn = rows_short ? columns().turn : rows_.turn;
      for (int64_t b = 0; b < longer; ++b) turn[b] = std::min(b, shorter - 1);
    }
    std::atomic<int64_t> next{0};
    parallel(host_.threads, [&](int64_t from, int64_t to) {
      for (int64_t worker = from; worker < to; ++worker) try {
          Scratch scratch;
          scratch.s.allocate(kTile * kTile);
          for (int64_t t; !failed_ && (t = next++) < longer * shorter;) {
            int64_t r = t / shorter, a = t % shorter, b = (symmetric_ ? r - a + longer : a + r) % longer;
            if (symmetric_ && a > b) continue;
            Turn turn_a{nullptr, r, r + 1}, turn_b{nullptr, a, a == 0 ? shorter - 1 : a - 1};
            if (symmetric_) turn_b = turn_a;
            if (symmetric_ || rows_short) {
              one_tile(a, b, turn_a, turn_b, scratch);
            } else {
              one_tile(b, a, turn_b, turn_a, scratch);
            }
          }
        } catch (...) {
          std::lock_guard lock(error_mutex_);
          if (!error_) error_ = std::current_exception();
          failed_ = true;
        }
    });
    if (error_) std::rethrow_exception(error_);
  }

  // The tile of row panel i and column panel j.
  void one_tile(int64_t i, int64_t j, Turn row_turn, Turn column_turn, Scratch& scratch) {
    int m = rows_.rows(i), n = columns().rows(j);
    bool diagonal = symmetric_ && i == j;
    real* s = scratch.s.get();
    host_.product(rows_.unit_at(i), m, columns().unit_at(j), n, p_.d, s);
    constexpr real kNever = std::numeric_limits<real>::quiet_NaN();  // no similarity: never hard
    for (int row = 0; row < m; ++row) {
      int64_t own = own_[rows_.begin(i) + row] - columns().begin(j);
      if (0 <= own && own < n) s[row * kTile + own] = kNever;
      std::fill(s + row * kTile + n, s + row * kTile + (n + 63) / 64 * 64, kNever);
    }
    Penalty penalty[2] = {};
    for (int row = 0; row < m; ++row) {
      auto [a, b] = positives(i, row, j, n);
      const real* s_row = s + row * kTile;
      add(penalty[kPlus], loops_.scan_row(s_row + a, b - a, margin(kPlus), -1));
      add(penalty[kMinus], loops_.scan_row(s_row, a, margin(kMinus), 1));
      add(penalty[kMinus], loops_.scan_row(s_row + b, n - b, margin(kMinus), 1));
    }

    row_turn.turn = &rows_.turn[i], column_turn.turn = &columns().turn[j];
    bool columns_too = columns().wants_gradient && !diagonal;
    bool takes_column_turn = symmetric_ ? !diagonal : columns_too;  // symmetric: it is some row panel's turn as well
    wait(row_turn);
    if (takes_column_turn) wait(column_turn);
    if (failed_) return;
    for (int side : {kPlus, kMinus}) {
      int64_t pairs = symmetric_ && !diagonal ? 2 : 1;  // (i, j) and (j, i)
      add(panel_penalty_[2 * i + side], {pairs * penalty[side].count, pairs * penalty[side].sum});
      if (penalty[side].count > 0) accumulate(side, i, j, penalty[side].count, columns_too, scratch);
    }
    row_turn.turn->store(row_turn.next, std::memory_order_release);
    if (takes_column_turn) column_turn.turn->store(column_turn.next, std::memory_order_release);
  }

  // Step 3: adds M X^_j to the gradient of row panel i and, if asked, M^T X^_i to that of column panel j.
  void accumulate(int side, int64_t i, int64_t j, int64_t count, bool columns_too, Scratch& scratch) {
    if (!rows_.wants_gradient && !columns_too) return;
    int m = rows_.rows(i), n = columns().rows(j);
    bool most = 2 * count > m * n;  // all pairs, less those that are not hard
    int64_t listed = most ? m * n - count : count;
    real weight = most ? -1 : 1;
    if (rows_.wants_gradient) {
      rows_.touched[i] = 1;
      if (most) add_panel_sum(rows_.shared[side].get() + i * p_.d, columns(), j);
    }
    if (columns_too) {
      columns().touched[j] = 1;
      if (most) add_panel_sum(columns().shared[side].get() + j * p_.d, rows_, i);
    }
    if (listed == 0) return;
    make_mask(side, i, j, most, scratch);
    bool sparse = 8 * listed < m * n;  // measured: a listed pair costs as much as 7 pairs of the dense sum
    if (rows_.wants_gradient) {
      real* g = rows_.sum[side].get() + rows_.begin(i) * p_.d;
      if (sparse) loops_.sparse_sum(scratch.mask, m, columns().unit_at(j), p_.d, weight, g);
      else loops_.dense_sum(scratch.mask, m, n, columns().unit_at(j), p_.d, weight, g);
    }
    if (columns_too) {
      real* g = columns().sum[side].get() + columns().begin(j) * p_.d;
      transpose_mask(scratch.mask, scratch.transposed);
      if (sparse) loops_.sparse_sum(scratch.transposed, n, rows_.unit_at(i), p_.d, weight, g);
      else loops_.dense_sum(scratch.transposed, n, m, rows_.unit_at(i), p_.d, weight, g);
    }
  }

  // scratch.mask [kTile, kWords]: the tile's hard pairs of one side, or with `inverted` all its other pairs.
  void make_mask(int side, int64_t i, int64_t j, bool inverted, Scratch& scratch) {
    int m = rows_.rows(i), n = columns().rows(j);
    uint64_t all[kWords], positive[kWords];
    range_mask(0, n, all);
    std::memset(scratch.mask, 0, sizeof(scratch.mask));
    for (int row = 0; row < m; ++row) {
      uint64_t* bits = scratch.mask + row * kWords;
      auto [a, b] = positives(i, row, j, n);
      range_mask(a, b, positive);
      loops_.mask_row(scratch.s.get() + row * kTile, margin(side), side == kPlus ? -1 : 1, bits);
      for (int word = 0; word < kWords; ++word) {
        bits[word] &= side == kPlus ? positive[word] : all[word] & ~positive[word];
        if (inverted) bits[word] = all[word] & ~bits[word];
      }
    }
  }

  // Range of the columns of panel j, counted from its first, that have the label of `row` of panel i.
  std::pair<int, int> positives(int64_t i, int row, int64_t j, int n) const {
    int64_t k = rows_.begin(i) + row, begin = rows_.begin(j);  // panels of rows and columns are equally long
    return {static_cast<int>(std::clamp<int64_t>(first_[k] - begin, 0, n)),
            static_cast<int>(std::clamp<int64_t>(last_[k] - begin, 0, n))};
  }

  void add_panel_sum(real* shared, const Embeddings<real>& e, int64_t panel) {
    const real* sum = e.panel_sum.get() + panel * e.d;
    for (int64_t c = 0; c < e.d; ++c) shared[c] += sum[c];
  }

  void wait(const Turn& t) const {
    while (t.turn->load(std::memory_order_acquire) != t.mine && !failed_) std::this_thread::yield();
  }

  static void add(Penalty& total, const Penalty& part) { total.count += part.count, total.sum += part.sum; }
  real margin(int side) const { return static_cast<real>(p_.margin[side]); }

  // Step 4.
  void finish() {
    bool finite = rows_.finite && columns().finite;
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    double loss = finite ? 0 : kNan, weight[2];
    for (int side : {kPlus, kMinus}) {
      Penalty total;
      for (size_t k = side; k < panel_penalty_.size(); k += 2) add(total, panel_penalty_[k]);
      weight[side] = !finite ? kNan : total.count ? p_.lambda[side] / total.count : 0;
      loss += weight[side] * total.sum;
      result_.count[side] = total.count, result_.penalty[side] = finite ? total.sum : kNan;
    }
    *result_.loss = static_cast<real>(loss);
    if (symmetric_) weight[kPlus] *= 2, weight[kMinus] *= 2;
    if (result_.grad_x) write_gradient(rows_, p_.y, p_.n, weight, result_.grad_x);
    if (result_.grad_ref) write_gradient(columns(), p_.ref_y, p_.m, weight, result_.grad_ref);
  }

  // grad [n, d]: (g - (g . x^) x^) / max(|x|, kEps) with g = w- G- - w+ G+, in the order of the input.
  void write_gradient(Embeddings<real>& e, const int64_t* y, int64_t n, const double* weight, real* grad) {
    for (int64_t i = 0; i < n; ++i)
      if (y[i] < 0) std::fill_n(grad + i * e.d, e.d, real{0});
    bool finite = !std::isnan(weight[kMinus]);
    real w_plus = static_cast<real>(weight[kPlus]), w_minus = static_cast<real>(weight[kMinus]);
    parallel(e.panels, [&](int64_t from, int64_t to) {
      for (int64_t panel = from; panel < to; ++panel) {
        const real *shared_plus = e.shared[kPlus].get() + panel * e.d, *shared_minus = e.shared[kMinus].get() + panel * e.d;
        for (int64_t k = e.begin(panel); k < e.begin(panel) + e.rows(panel); ++k) {
          real* out = grad + e.order[k] * e.d;
          if (!finite || !e.touched[panel]) {
            std::fill_n(out, e.d, finite ? real{0} : std::numeric_limits<real>::quiet_NaN());
            continue;
          }
          const real *plus = e.sum[kPlus].get() + k * e.d, *minus = e.sum[kMinus].get() + k * e.d;
          const real* unit = e.unit.get() + k * e.d;
          double along = 0;
#pragma omp simd reduction(+ : along)
          for (int64_t c = 0; c < e.d; ++c) {
            real g = w_minus * (minus[c] + shared_minus[c]) - w_plus * (plus[c] + shared_plus[c]);
            along += static_cast<double>(g) * unit[c];
            out[c] = g;
          }
          double inverse = e.inverse[k];
          real a = inverse < 1 / kEps ? static_cast<real>(along) : real{0};  // below kEps the divisor is a constant
          for (int64_t c = 0; c < e.d; ++c) out[c] = static_cast<real>((out[c] - a * unit[c]) * inverse);
        }
      }
    });
  }

  const Problem<real>& p_;
  const Result<real>& result_;
  const Host<real>& host_;
  const PairLoops<real>& loops_;
  bool symmetric_;
  Embeddings<real> rows_, other_;
  std::vector<int64_t> first_, last_, own_;  // [rows] see match()
  std::vector<Penalty> panel_penalty_;       // [row panels, 2]
  std::atomic<bool> failed_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace

template <class real>
void tcm_loss(const Problem<real>& problem, const Result<real>& result, const Host<real>& host, Isa isa) {
  Walk<real>(problem, result, host, isa).run();
}
template void tcm_loss(const Problem<float>&, const Result<float>&, const Host<float>&, Isa);
template void tcm_loss(const Problem<double>&, const Result<double>&, const Host<double>&, Isa);

}  // namespace tcm::cpu
