#include "loss.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <vector>

#include "codes.h"
#include "embeddings.h"
#include "terms.h"

// How the loss is found:
// 1. Sort rows and columns by label and normalise them (`Embeddings`). The positives of a row are then one
//    range of columns, and away from the diagonal a tile needs no look at labels.
// 2. Cut both into panels of `tile` rows. Each pair of panels (the upper triangle where rows are columns) is a tile
//    of similarities: a matrix product, made for a group of panels at once. Count its hard pairs, sum their penalties.
//    Where the processor multiplies bytes faster, a tile's codes come first (codes.h): they decide nearly all pairs, and
//    the few that are in question are decided one by one, or else the tile is multiplied after all.
// 3. Add the masked sums M X^ to the panels' gradients: nothing for an empty tile; pair by pair for few hard
//    pairs; by table look-up for many; and where few are not hard, the panel's column sum less those. A row that
//    differs from its tile in that takes its own hard pairs: no row's gradient is a small difference of large sums.
//    With squared penalties the masks become weights: a matrix product, or pair by pair for few hard pairs.
// 4. Scale by the counts, project off the unit sphere's normal, undo the sort.
// Panels take their sums in a fixed order (`Turn`), so the result does not depend on timing.

namespace tcm::cpu {
namespace {

constexpr int kGroup = 2;          // panels on each side of one matrix product
constexpr int kDensePairs = 8;     // pairs of a dense sum that cost as much as one of a sparse sum (measured: 7)
constexpr int kWeightedPairs = 4;  // the same where pairs have weights (measured: 4)
constexpr int kLeastCoded = 256;   // rows and columns from which codes pay
constexpr int kCodedPairs = 16;    // of so many pairs one at most is decided by itself, else a product is faster

// Rows or columns with the sums of their gradient.
template <class real>
struct EmbeddingSums : Embeddings<real> {
  Codes codes;               // allocated where they decide
  Array<real> panel_sum;     // [panels, d] sum of x^ over each panel
  Array<double> exact_sum;   // the same in float64, with codes
  std::vector<double> norm;  // [panels] sum of |x^|^2 over each panel, with codes
  bool wants_gradient = false;
  std::vector<std::vector<uint64_t>> terms;  // [panels] few terms of the gradient, see terms.h; more are in `sum`
  Array<real> sum[2];          // [panels * tile, d] masked or weighted sums over hard positives, hard negatives
  Array<real> shared[2];       // [panels, d] added to the sums of every row of a panel, but of those set apart
  std::vector<char> apart[2];  // [size] rows set apart
  std::vector<char> summed[2], shares[2];        // [panels] whether `sum`, `shared` are more than zero
  std::unique_ptr<std::atomic<int64_t>[]> turn;  // [groups] see `Turn`

  int64_t groups() const { return (this->panels + kGroup - 1) / kGroup; }
  int64_t group_end(int64_t group) const { return std::min(this->panels, kGroup * (group + 1)); }  // its last panel + 1
};

// A group's sums are added to in a fixed order: whoever has a sum for it waits until the turn is its own.
struct Turn {
  std::atomic<int64_t>* turn;
  int64_t mine, next;
};

// How far a product of unit vectors may be off. Sums are made in steps of 256 numbers, and then of steps; or, by `dot`,
// in 32 parts or more.
template <class real>
real rounding(int64_t d) {
  int64_t additions = std::max(std::min<int64_t>(d, 256) + d / 256, d / 32) + 8;
  return static_cast<real>(additions) * std::numeric_limits<real>::epsilon() / 2;
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
class LossWalk {
 public:
  LossWalk(const Problem<real>& problem, const Result<real>& result, const Host<real>& host, Isa isa)
      : p_(problem),
        result_(result),
        host_(host),
        loops_(pair_loops<real>(isa)),
        symmetric_(problem.symmetric),
        near_(rounding<real>(problem.d)) {}

  void run() {
    int64_t longest = std::max(p_.n, symmetric_ ? 0 : p_.m);
    int tile =
        static_cast<int>(std::clamp<int64_t>((longest / (4 * kGroup * host_.threads) + 63) / 64 * 64, 64, kTile));
    prepare(rows_, p_.x, p_.y, p_.n, tile, result_.grad_x != nullptr);
    if (!symmetric_) prepare(other_, p_.ref_x, p_.ref_y, p_.m, tile, result_.grad_ref != nullptr);
    if (rows_.finite && columns().finite) {
      match();
      if (codes_pay()) encode();
      tiles();
    }
    for (EmbeddingSums<real>* e : {&rows_, &other_})
      e->codes.reset(), e->forget_transposed();  // the gradient comes instead
    finish();
  }

 private:
  struct Tile {  // similarities of row panel i and column panel j
    int64_t i, j;
    int m, n;
    real* s;  // [m, n], rows `stride` apart; of a tile that its codes decided, those of hard pairs
    int stride;
    uint64_t* hard[2];  // [kTile, kWords] the hard pairs of a tile that its codes decided; else null
    Penalty penalty[2];
    std::array<bool, kTile> any[2];  // whether a row has hard pairs
  };

  struct Scratch {                                                        // of one thread
    Array<real> s;                                                        // [kGroup tile, kGroup tile]
    uint64_t mask[kTile * kWords] = {}, transposed[kTile * kWords] = {};  // words past the tile stay 0
    uint64_t missing[kTile * kWords], hard[kTile * kWords];               // see add_most
    Array<real> weight, transposed_weight;                                // [tile, tile] see make_weights
    // With codes: their products [tile, tile]; pairs of a tile that may be hard, and that surely are; the hard pairs of each
    // tile of a group. Bits, [kTile, kWords] each.
    Array<int32_t> code_product;
    Array<uint64_t> possible[2], sure[2], decided[kGroup * kGroup][2];
  };

  EmbeddingSums<real>& columns() { return symmetric_ ? rows_ : other_; }
  const EmbeddingSums<real>& columns() const { return symmetric_ ? rows_ : other_; }

  // Step 1.
  void prepare(EmbeddingSums<real>& e, const real* x, const int64_t* y, int64_t n, int tile, bool wants_gradient) {
    e.sort(y, n, p_.d, tile, host_.transposed && &e == &columns());
    e.panel_sum.allocate(e.panels * e.d);
    e.wants_gradient = wants_gradient;
    e.turn.reset(new std::atomic<int64_t>[e.groups()]);
    for (int64_t group = 0; group < e.groups(); ++group) e.turn[group] = 0;
    for (int side : {kPlus, kMinus}) {
      e.summed[side].resize(e.panels), e.shares[side].resize(e.panels);
      if (!wants_gradient) continue;
      e.terms.resize(e.panels);
      e.sum[side].allocate(e.panels * e.tile * e.d), e.shared[side].allocate(e.panels * e.d),
          e.apart[side].resize(e.size);
    }
    host_.parallel(e.panels, [&](int64_t from, int64_t to) {
      for (int64_t panel = from; panel < to; ++panel) {
        e.load(loops_, x, y, panel);
        real* panel_sum = e.panel_sum.get() + panel * e.d;
        const real* unit = e.unit_at(panel);
        for (int k = 0; k < e.rows(panel); ++k, unit += e.d)
          for (int64_t c = 0; c < e.d; ++c) panel_sum[c] += unit[c];
      }
    });
  }

  // For each row the range of columns of its label, and the column that is the row itself.
  void match() {
    const auto& column_label = columns().label;
    first_.resize(rows_.size), last_.resize(rows_.size);
    int64_t first = 0, last = 0;
    for (int64_t k = 0; k < rows_.size; ++k) {
      int64_t label = rows_.label[k];
      while (first < columns().size && column_label[first] < label) ++first;
      last = std::max(last, first);
      while (last < columns().size && column_label[last] == label) ++last;
      first_[k] = first, last_[k] = last;
    }
    if (symmetric_ || p_.row_offset < 0) return;
    std::vector<int64_t> position(p_.m, -1);  // sorted position of a column
    for (int64_t k = 0; k < columns().size; ++k) position[columns().order[k]] = k;
    own_.resize(rows_.size);
    for (int64_t k = 0; k < rows_.size; ++k) own_[k] = position[rows_.order[k] + p_.row_offset];
  }

  // Step 2. Threads take groups in order; the order makes neighbours touch different panels.
  void tiles() {
    int64_t rows = rows_.groups(), cols = columns().groups();
    if (rows == 0 || cols == 0) return;
    panel_penalty_.assign(2 * rows_.panels, {});
    // Round r visits the groups (a, b) with b = r - a (symmetric: every group once a round) or b = a + r, modulo the
    // longer side, a on the shorter. There group a has its turn in round r, and b is visited by a = b, b - 1, ...
    bool rows_short = rows <= cols;
    int64_t shorter = std::min(rows, cols), longer = std::max(rows, cols);
    if (!symmetric_) {
      auto& turn = rows_short ? columns().turn : rows_.turn;
      for (int64_t b = 0; b < longer; ++b) turn[b] = std::min(b, shorter - 1);
    }
    std::vector<Scratch> scratches(host_.threads);
    for (Scratch& scratch : scratches) allocate(scratch);
    std::atomic<int64_t> next{0};
    host_.parallel(host_.threads, [&](int64_t from, int64_t to) {
      for (int64_t worker = from; worker < to; ++worker) try {
          Scratch& scratch = scratches[worker];
          for (int64_t t; !failed_ && (t = next++) < longer * shorter;) {
            int64_t r = t / shorter, a = t % shorter, b = (symmetric_ ? r - a + longer : a + r) % longer;
            if (symmetric_ && a > b) continue;
            Turn turn_a{nullptr, r, r + 1}, turn_b{nullptr, a, a == 0 ? shorter - 1 : a - 1};
            if (symmetric_) turn_b = turn_a;
            if (symmetric_ || rows_short) {
              one_group(a, b, turn_a, turn_b, scratch);
            } else {
              one_group(b, a, turn_b, turn_a, scratch);
            }
          }
        } catch (...) {
          std::lock_guard lock(error_mutex_);
          if (!error_) error_ = std::current_exception();
          failed_ = true;
        }
      if (by_codes_) host_.release_code_product();
    });
    if (error_) std::rethrow_exception(error_);
  }

  // Before threads are at work, so that they can lack memory only for the needs of `Host`.
  void allocate(Scratch& scratch) {
    int64_t tile = rows_.tile;
    scratch.s.allocate(kGroup * kGroup * tile * tile);
    if (p_.squared) scratch.weight.allocate(tile * tile), scratch.transposed_weight.allocate(tile * tile);
    if (!by_codes_) return;
    scratch.code_product.allocate(tile * tile);
    for (int side : {kPlus, kMinus}) {
      scratch.possible[side].allocate(tile * kWords), scratch.sure[side].allocate(tile * kWords);
      for (auto& hard : scratch.decided) hard[side].allocate(tile * kWords);
    }
  }

  // The tiles of row group `a` and column group `b`; on the diagonal only those above it.
  void one_group(int64_t a, int64_t b, Turn row_turn, Turn column_turn, Scratch& scratch) {
    bool diagonal = symmetric_ && a == b;
    Tile tiles[kGroup * kGroup];
    int size = 0, stride = kGroup * rows_.tile;
    int64_t end_i = rows_.group_end(a), end_j = columns().group_end(b);
    for (int64_t i = kGroup * a; i < end_i; ++i)
      for (int64_t j = diagonal ? i : kGroup * b; j < end_j; ++j) {
        real* s = scratch.s.get() + (i - kGroup * a) * rows_.tile * stride + (j - kGroup * b) * rows_.tile;
        tiles[size++] = {i, j, rows_.rows(i), columns().rows(j), s, stride, {}, {}};
      }
    if (!by_codes_) multiply(tiles[0], end_i, end_j, diagonal);
    for (int k = 0; k < size; ++k) {
      Tile& t = tiles[k];
      if (by_codes_ && decide(t, scratch.decided[k], scratch)) continue;
      if (by_codes_) multiply(t, t.i + 1, t.j + 1, symmetric_ && t.i == t.j);
      scan(t);
    }

    row_turn.turn = &rows_.turn[a], column_turn.turn = &columns().turn[b];
    // In the symmetric form rows and columns share their turns, whether a gradient is wanted or not.
    bool takes_column_turn = symmetric_ ? !diagonal : columns().wants_gradient;
    wait(row_turn);
    if (takes_column_turn) wait(column_turn);
    if (failed_) return;
    for (int k = 0; k < size; ++k) accumulate(tiles[k], scratch);
    row_turn.turn->store(row_turn.next, std::memory_order_release);
    if (takes_column_turn) column_turn.turn->store(column_turn.next, std::memory_order_release);
  }

  // Similarities of the row panels from the first tile's to `last_i`, without it, and of such column panels. On the
  // diagonal strips stop short of the part below it.
  void multiply(const Tile& first, int64_t last_i, int64_t last_j, bool diagonal) {
    int64_t begin_i = rows_.begin(first.i), end_i = rows_.begin(last_i - 1) + rows_.rows(last_i - 1),
            begin_j = columns().begin(first.j), end_j = columns().begin(last_j - 1) + columns().rows(last_j - 1),
            strip = diagonal ? kStrip : end_i - begin_i;
    for (int64_t i = begin_i; i < end_i; i += strip) {
      int64_t j = diagonal ? begin_j + i - begin_i : begin_j;
      real* s = first.s + (i - begin_i) * first.stride - begin_j;
      similarities(host_, loops_, rows_, i, std::min(i + strip, end_i), columns(), j, end_j, s, first.stride);
    }
  }

  // Whether codes are there and are expected to save time: a look at few pairs, the same ones at every call.
  bool codes_pay() const {
    if (!host_.code_product || p_.d >= kMostWidth || rows_.size == 0 || columns().size == 0) return false;
    if (std::isnan(margin(kPlus)) || std::isnan(margin(kMinus))) return false;  // nothing is hard, nor surely not hard
    if (host_.always_codes) return true;
    if (std::min(rows_.size, columns().size) < kLeastCoded) return false;
    int64_t all = rows_.panels * columns().panels, tiles = std::clamp<int64_t>(all / 8, 1, 32), dear = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      int64_t tile = (2 * t + 1) * all / (2 * tiles);
      dear += is_dear(tile / columns().panels, tile % columns().panels);
    }
    return 2 * dear <= tiles;
  }

  // Whether codes will leave too much of the tile in question, by a sample of its pairs.
  bool is_dear(int64_t panel_i, int64_t panel_j) const {
    constexpr int kPairs = 32, kStep = 5;  // a row and a column in each 32nd of their panels
    int possible = 0, unsure = 0;
    for (int k = 0; k < kPairs; ++k) {
      int64_t i = rows_.begin(panel_i) + (2 * k + 1) * rows_.rows(panel_i) / (2 * kPairs);
      int64_t j = columns().begin(panel_j) + (2 * (kStep * k % kPairs) + 1) * columns().rows(panel_j) / (2 * kPairs);
      int side = rows_.label[i] == columns().label[j] ? kPlus : kMinus;
      double violation = violation_of(side, similarity(i, j, side)),
             error = code_error(rows_, i) + code_error(columns(), j);
      possible += violation >= -error, unsure += side == kPlus || violation < error;
    }
    return std::min(possible, unsure) * kCodedPairs > kPairs;
  }

  // About the error of the codes of a row, for a guess.
  static double code_error(const EmbeddingSums<real>& e, int64_t row) {
    const real* unit = e.unit.get() + row * e.d;
    real peak = 0;
    for (int64_t k = 0; k < e.d; ++k) peak = std::max(peak, std::abs(unit[k]));
    return peak / 127 * std::sqrt(e.d / 12.0);
  }

  void encode() {
    by_codes_ = true;
    encode(rows_);
    if (!symmetric_) encode(other_);
  }

  void encode(EmbeddingSums<real>& e) {
    e.codes.allocate(e), e.exact_sum.allocate(e.panels * e.d), e.norm.resize(e.panels);
    host_.parallel(e.panels, [&](int64_t from, int64_t to) {
      for (int64_t panel = from; panel < to; ++panel) {
        e.codes.load(loops_, e, panel);
        double* sum = e.exact_sum.get() + panel * e.d;
        const real* unit = e.unit_at(panel);
        for (int k = 0; k < e.rows(panel); ++k, unit += e.d) {
          for (int64_t c = 0; c < e.d; ++c) sum[c] += unit[c];
          e.norm[panel] += loops_.squares(unit, e.d);
        }
      }
    });
  }

  // The similarity of a sorted row and column. Within rounding of the margin it is that in float64, rounded: wherever the
  // pair is met, in whatever product and by whichever rank, it is decided alike.
  real similarity(int64_t row, int64_t column, int side) const {
    const real *x = rows_.unit.get() + row * p_.d, *y = columns().unit.get() + column * p_.d;
    real s = loops_.dot(x, y, p_.d);
    return std::abs(s - margin(side)) > near_ ? s : static_cast<real>(loops_.exact_dot(x, y, p_.d));
  }

  // Finds a tile's hard pairs and the sum of their penalties by codes. False, and nothing is found, if too many pairs are
  // in question.
  bool decide(Tile& t, const Array<uint64_t> (&hard)[2], Scratch& scratch) {
    multiply_codes(t, scratch);
    int64_t most = std::max<int64_t>(t.m * t.n / kCodedPairs, 1), possible[2] = {}, sure[2] = {}, pairs = 0;
    for (int row = 0; row < t.m; ++row) {
      auto [start, a, b] = segments(t, row);
      decide_row(t, row, scratch, possible, sure);
      pairs += t.n - start;
      for (int side : {kPlus, kMinus})
        if (possible[side] > most && (p_.squared || pairs - sure[side] > most)) return false;
    }
    for (int side : {kPlus, kMinus}) {
      t.hard[side] = hard[side].get();
      if (possible[side] <= most) {
        take_possible(t, side, possible[side] > 0, scratch);
      } else {
        take_sure(t, side, scratch);
      }
    }
    return true;
  }

  // scratch.code_product; on the diagonal not all of the part below it.
  void multiply_codes(const Tile& t, Scratch& scratch) {
    const Codes &a = rows_.codes, &b = columns().codes;
    bool diagonal = symmetric_ && t.i == t.j;
    for (int j = 0; j < t.n; j += kCodeBlock)
      host_.code_product(a.left.get() + rows_.begin(t.i) * a.width, diagonal ? j + kCodeBlock : rows_.tile,
                         b.right.get() + (columns().begin(t.j) + j) * b.width, kCodeBlock, a.width,
                         scratch.code_product.get() + j, rows_.tile);
  }

  // scratch.possible and sure of one row, and their numbers.
  void decide_row(const Tile& t, int row, Scratch& scratch, int64_t* possible, int64_t* sure) const {
    const Codes &a = rows_.codes, &b = columns().codes;
    const Codes::Panel& panel = b.panel[t.j];
    int64_t i = rows_.begin(t.i) + row, begin = columns().begin(t.j);
    int words = (t.n + 63) / 64;
    const int32_t* product = scratch.code_product.get() + row * rows_.tile;
    CodeColumns column{b.scale.get() + begin, b.error.get() + begin, b.shift.get() + begin};
    float scale = a.scale.get()[i], error = a.error.get()[i];
    // Sets `bits` to the pairs whose similarity may reach the margin, or with sign = -1 surely exceeds it.
    auto reach = [&](int side, float sign, uint64_t* bits) {
      float base = sign * (error + kCodeSlack);
      loops_.code_mask(product, column, words, {scale, sign * (1 + error), static_cast<float>(margin(side)) - base},
                       bits);
    };
    uint64_t *may[2], *must[2];
    for (int side : {kPlus, kMinus}) {
      may[side] = scratch.possible[side].get() + row * kWords, must[side] = scratch.sure[side].get() + row * kWords;
      std::fill_n(may[side], kWords, 0), std::fill_n(must[side], kWords, 0);
    }
    auto [start, first, last] = segments(t, row);
    int32_t least, most;
    int from = start / kCodeBlock * kCodeBlock;  // before it, on the diagonal, there may be another tile's products
    loops_.code_range(product + from, column.shift + from, 64 * words - from, &least, &most);
    double bound = error + (1.0 + error) * panel.error + kCodeSlack, m = margin(kMinus);
    double high = scale * (most > 0 ? panel.most_scale : panel.least_scale) * most;
    double low = scale * (least > 0 ? panel.least_scale : panel.most_scale) * least;
    if (high + bound < m && first == last) return;  // most rows
    uint64_t all[kWords], positive[kWords];
    range_mask(start, t.n, all), range_mask(first, last, positive);
    if (int64_t own = own_.empty() ? -1 : own_[i] - begin; 0 <= own && own < t.n) {
      all[own / 64] &= ~(uint64_t{1} << own % 64), positive[own / 64] &= all[own / 64];
    }
    if (high + bound >= m) {
      if (low - bound >= m) {
        std::copy_n(all, kWords, may[kMinus]), std::copy_n(all, kWords, must[kMinus]);
      } else {
        reach(kMinus, 1, may[kMinus]), reach(kMinus, -1, must[kMinus]);
      }
    }
    if (first < last) reach(kPlus, 1, must[kPlus]), reach(kPlus, -1, may[kPlus]);
    for (int word = 0; word < kWords; ++word) {
      may[kMinus][word] &= all[word] & ~positive[word], must[kMinus][word] &= all[word] & ~positive[word];
      may[kPlus][word] = positive[word] & ~may[kPlus][word], must[kPlus][word] = positive[word] & ~must[kPlus][word];
      for (int side : {kPlus, kMinus})
        possible[side] += __builtin_popcountll(may[side][word]), sure[side] += __builtin_popcountll(must[side][word]);
    }
  }

  // Decides every possible pair of one side by its similarity.
  void take_possible(Tile& t, int side, bool any, Scratch& scratch) const {
    if (!any) return;
    uint64_t* hard = t.hard[side];
    std::fill_n(hard, rows_.tile * kWords, 0);
    for_bits(scratch.possible[side].get(), t.m, [&](int row, int column) {
      real s = similarity(rows_.begin(t.i) + row, columns().begin(t.j) + column, side);
      double violation = violation_of(side, s);
      if (!(violation >= 0)) return;
      hard[row * kWords + column / 64] |= uint64_t{1} << column % 64;
      t.s[row * t.stride + column] = s;
      add(t.penalty[side], {1, p_.squared ? violation * violation : violation});
    });
  }

  // The same where most pairs of the tile are surely hard: from the sum of all similarities those of the others go off.
  void take_sure(Tile& t, int side, Scratch& scratch) const {
    bool diagonal = symmetric_ && t.i == t.j;
    const double *a = rows_.exact_sum.get() + t.i * p_.d, *b = columns().exact_sum.get() + t.j * p_.d;
    double sum = 0;
    for (int64_t k = 0; k < p_.d; ++k) sum += a[k] * b[k];
    if (diagonal) sum = (sum - rows_.norm[t.i]) / 2;
    uint64_t *hard = t.hard[side], *others = scratch.possible[side].get();
    const uint64_t* sure = scratch.sure[side].get();
    std::fill_n(hard, rows_.tile * kWords, 0), std::copy_n(sure, t.m * kWords, hard);
    int64_t count = 0;
    for (int row = 0; row < t.m; ++row) {
      uint64_t all[kWords];
      range_mask(std::get<0>(segments(t, row)), t.n, all);
      for (int word = 0; word < kWords; ++word)
        count += __builtin_popcountll(sure[row * kWords + word]), all[word] &= ~sure[row * kWords + word];
      for_bits(all, 1, [&](int, int column) {
        real s = similarity(rows_.begin(t.i) + row, columns().begin(t.j) + column, side);
        uint64_t bit = uint64_t{1} << column % 64;
        if (others[row * kWords + column / 64] & bit && violation_of(side, s) >= 0) {
          hard[row * kWords + column / 64] |= bit, ++count;
        } else {
          sum -= s;
        }
      });
    }
    double m = margin(side);
    t.penalty[side] = {count, side == kPlus ? m * count - sum : sum - m * count};
  }

  // body(row, column) for each bit of `bits` [m, kWords].
  template <class Body>
  static void for_bits(const uint64_t* bits, int m, const Body& body) {
    for (int row = 0; row < m; ++row)
      for (int word = 0; word < kWords; ++word)
        for (uint64_t rest = bits[row * kWords + word]; rest; rest &= rest - 1)
          body(row, 64 * word + __builtin_ctzll(rest));
  }

  double violation_of(int side, real s) const {
    double above = static_cast<double>(s) - margin(side);
    return side == kPlus ? -above : above;
  }

  // Counts a tile's hard pairs and sums their penalties.
  void scan(Tile& t) {
    auto scan_row = p_.squared ? loops_.scan_squared : loops_.scan_row;
    for (int row = 0; row < t.m; ++row) {
      real* s = t.s + row * t.stride;
      int64_t own = own_.empty() ? -1 : own_[rows_.begin(t.i) + row] - columns().begin(t.j);
      if (0 <= own && own < t.n) s[own] = std::numeric_limits<real>::quiet_NaN();  // never hard
      auto [start, a, b] = segments(t, row);
      settle(t, row, start, a, kMinus), settle(t, row, a, b, kPlus), settle(t, row, b, t.n, kMinus);
      Penalty plus = scan_row(s + a, b - a, margin(kPlus), -1);
      Penalty minus = scan_row(s + start, a - start, margin(kMinus), 1);
      add(minus, scan_row(s + b, t.n - b, margin(kMinus), 1));
      t.any[kPlus][row] = plus.count > 0, t.any[kMinus][row] = minus.count > 0;
      add(t.penalty[kPlus], plus), add(t.penalty[kMinus], minus);
    }
  }

  // Replaces similarities of columns [from, to) of a row that lie within rounding of the margin.
  void settle(const Tile& t, int row, int from, int to, int side) const {
    real *s = t.s + row * t.stride, m = margin(side);
    if (std::is_same_v<real, double> || !loops_.is_near(s + from, to - from, m, near_)) return;
    for (int j = from; j < to; ++j)
      if (std::abs(s[j] - m) <= near_) s[j] = similarity(rows_.begin(t.i) + row, columns().begin(t.j) + j, side);
  }

  // Step 3.
  void accumulate(const Tile& t, Scratch& scratch) {
    bool diagonal = symmetric_ && t.i == t.j;
    for (int side : {kPlus, kMinus}) {
      int64_t count = t.penalty[side].count, pairs = symmetric_ ? 2 : 1;  // symmetric: (i, j) stands for (j, i) too
      add(panel_penalty_[2 * t.i + side], {pairs * count, pairs * t.penalty[side].sum});
      bool to_rows = rows_.wants_gradient, to_columns = !diagonal && columns().wants_gradient;
      if (count == 0 || !(to_rows || to_columns)) continue;
      if (diagonal) count *= 2;
      if (p_.squared) {
        make_weights(t, side, scratch);
        if (to_rows) add_weighted(rows_, t.i, columns(), t.j, side, count, scratch.weight.get());
        if (!to_columns) continue;
        loops_.transpose(scratch.weight.get(), rows_.tile, rows_.tile, scratch.transposed_weight.get());
        add_weighted(columns(), t.j, rows_, t.i, side, count, scratch.transposed_weight.get());
        continue;
      }
      bool most = kDensePairs * (t.m * t.n - count) < t.m * t.n;
      int64_t listed = most ? t.m * t.n - count : count;
      if (listed > 0) make_mask(t, side, most, scratch);
      if (to_rows) add_masked(rows_, t.i, columns(), t.j, side, most, listed, scratch.mask, scratch);
      if (!to_columns) continue;
      if (listed > 0) transpose_mask(scratch.mask, rows_.tile / 64, scratch.transposed);
      add_masked(columns(), t.j, rows_, t.i, side, most, listed, scratch.transposed, scratch);
    }
  }

  // Adds M X^ to one side's sums of panel `i` of `to`, X^ being panel `j` of `from`. The mask holds the `listed` pairs
  // of M, or with `most` those that M lacks.
  void add_masked(EmbeddingSums<real>& to, int64_t i, const EmbeddingSums<real>& from, int64_t j, int side, bool most,
                  int64_t listed, const uint64_t* mask, Scratch& scratch) {
    int m = to.rows(i), n = from.rows(j);
    if (most) {
      add_most(to, i, from, j, side, listed > 0 ? mask : nullptr, scratch);
    } else if (kDensePairs * listed < m * n) {
      add_pairs(to, i, from, j, side, false, mask);
    } else {
      to.summed[side][i] = 1;
      loops_.dense_sum(mask, m, n, from.unit_at(j), p_.d, 1, to.sum[side].get() + to.begin(i) * p_.d);
    }
  }

  // The same pair by pair; with `lacks` they are subtracted. Few are kept as terms.
  void add_pairs(EmbeddingSums<real>& to, int64_t i, const EmbeddingSums<real>& from, int64_t j, int side, bool lacks,
                 const uint64_t* mask) {
    std::vector<uint64_t>& terms = to.terms[i];
    size_t room = to.tile * p_.d / 4, count = 0;  // half of the panel's own memory
    for (int k = 0; k < to.rows(i) * kWords; ++k) count += mask[k] ? __builtin_popcountll(mask[k]) : 0;
    if (terms.size() + count > room) sum_terms(to, i, from);
    if (8 * count > room || to.summed[side][i]) {
      to.summed[side][i] = 1;
      loops_.sparse_sum(mask, to.rows(i), from.unit_at(j), p_.d, lacks ? -1 : 1,
                        to.sum[side].get() + to.begin(i) * p_.d);
      return;
    }
    for_bits(mask, to.rows(i),
             [&](int row, int column) { terms.push_back(Term{row, side, lacks, from.begin(j) + column}.code()); });
  }

  // Moves a panel's terms into its sums.
  void sum_terms(EmbeddingSums<real>& to, int64_t i, const EmbeddingSums<real>& from) const {
    std::vector<uint64_t>&terms = to.terms[i], spare(terms.size());
    gather(terms, spare);
    const uint64_t *term = terms.data(), *end = term + terms.size();
    while (term < end) {
      Term first = Term::of(*term);
      to.summed[first.side][i] = 1;
      term = add_terms(term, end, from, to.sum[first.side].get() + (to.begin(i) + first.row) * p_.d);
    }
    std::vector<uint64_t>().swap(terms);
  }

  // Adds the first of the terms, and those after it that differ from it in the column alone, to g [d]; where they end.
  const uint64_t* add_terms(const uint64_t* term, const uint64_t* end, const EmbeddingSums<real>& from, real* g) const {
    constexpr int kMost = 64;
    int64_t list[kMost];
    Term first = Term::of(*term);
    int length = 0;
    for (; term < end && length < kMost && *term >> 48 == first.code() >> 48; ++term)
      list[length++] = Term::of(*term).column;
    loops_.row_sum(list, length, from.unit.get(), p_.d, first.lacks ? -1 : 1, g);
    return term;
  }

  // The same where M is nearly full: the panel's column sum for all rows at once, less the pairs that M lacks (null:
  // none). A row that lacks more than half takes its hard pairs instead, and from then on no part in the shared sum.
  void add_most(EmbeddingSums<real>& to, int64_t i, const EmbeddingSums<real>& from, int64_t j, int side,
                const uint64_t* lacks, Scratch& scratch) {
    int m = to.rows(i), n = from.rows(j);
    real *shared = to.shared[side].get() + i * p_.d, *sum = to.sum[side].get() + to.begin(i) * p_.d;
    const real* panel_sum = from.panel_sum.get() + j * p_.d;
    auto add_row = [&](const real* row, real* out) {
      for (int64_t c = 0; c < p_.d; ++c) out[c] += row[c];
    };
    uint64_t all[kWords];
    range_mask(0, n, all);
    if (lacks) std::copy_n(lacks, m * kWords, scratch.missing), std::fill_n(scratch.hard, m * kWords, 0);
    for (int row = 0; row < m; ++row) {
      char& apart = to.apart[side][to.begin(i) + row];
      uint64_t *missing = scratch.missing + row * kWords, *hard = scratch.hard + row * kWords;
      int count = 0;
      for (int word = 0; lacks && word < kWords; ++word) count += __builtin_popcountll(missing[word]);
      if (2 * count <= n) {
        if (apart) add_row(panel_sum, sum + row * p_.d);
        continue;
      }
      if (!apart) add_row(shared, sum + row * p_.d);
      apart = 1, to.summed[side][i] = 1;
      for (int word = 0; word < kWords; ++word) hard[word] = all[word] & ~missing[word], missing[word] = 0;
    }
    add_row(panel_sum, shared), to.shares[side][i] = 1;
    if (!lacks) return;
    add_pairs(to, i, from, j, side, true, scratch.missing);
    add_pairs(to, i, from, j, side, false, scratch.hard);
  }

  // scratch.mask [kTile, kWords]: the tile's hard pairs of one side, or with `inverted` all its other pairs.
  void make_mask(const Tile& t, int side, bool inverted, Scratch& scratch) {
    uint64_t all[kWords], positive[kWords], *mask = scratch.mask;
    if (t.hard[side]) {
      std::copy_n(t.hard[side], rows_.tile * kWords, mask);
    } else {
      std::fill_n(mask, rows_.tile * kWords, 0);
    }
    for (int row = 0; !t.hard[side] && row < t.m; ++row) {
      if (!t.any[side][row]) continue;
      uint64_t* bits = mask + row * kWords;
      auto [start, a, b] = segments(t, row);
      range_mask(start, t.n, all), range_mask(a, b, positive);
      loops_.mask_row(t.s + row * t.stride, (t.n + 63) / 64, margin(side), side == kPlus ? -1 : 1, bits);
      for (int word = 0; word < kWords; ++word)
        bits[word] &= side == kPlus ? positive[word] : all[word] & ~positive[word];
    }
    if (symmetric_ && t.i == t.j) {  // only the upper triangle is there
      transpose_mask(mask, rows_.tile / 64, scratch.transposed);
      for (int row = 0; row < t.m; ++row)
        for (int word = 0; word < rows_.tile / 64; ++word)
          mask[row * kWords + word] |= scratch.transposed[row * kWords + word];
    }
    if (!inverted) return;
    range_mask(0, t.n, all);
    for (int k = 0; k < t.m * kWords; ++k) mask[k] = all[k % kWords] & ~mask[k];
  }

  // A tile's columns [start, n) count for its row `row`; those in [a, b) have the row's label.
  std::tuple<int, int, int> segments(const Tile& t, int row) const {
    int64_t k = rows_.begin(t.i) + row, begin = rows_.begin(t.j);  // panels of rows and columns are equally long
    int64_t start = symmetric_ && t.i == t.j ? row + 1 : 0;        // above the diagonal
    return {start, std::clamp<int64_t>(first_[k] - begin, start, t.n),
            std::clamp<int64_t>(last_[k] - begin, start, t.n)};
  }

  // scratch.weight [tile, tile]: twice the violation of the tile's hard pairs of one side, 0 for all others.
  void make_weights(const Tile& t, int side, Scratch& scratch) {
    int tile = rows_.tile;
    real *weight = scratch.weight.get(), *transposed = scratch.transposed_weight.get();
    std::fill_n(weight, tile * tile, real{0});
    if (t.hard[side])
      for_bits(t.hard[side], t.m, [&](int row, int j) {
        weight[row * tile + j] = static_cast<real>(2 * violation_of(side, t.s[row * t.stride + j]));
      });
    for (int row = 0; !t.hard[side] && row < t.m; ++row) {
      if (!t.any[side][row]) continue;
      const real* s = t.s + row * t.stride;
      auto weigh = [&](int from, int to) {
        loops_.weigh_row(s + from, to - from, margin(side), side == kPlus ? -1 : 1, weight + row * tile + from);
      };
      auto [start, a, b] = segments(t, row);
      if (side == kPlus) weigh(a, b);
      if (side == kMinus) weigh(start, a), weigh(b, t.n);
    }
    if (!symmetric_ || t.i != t.j) return;  // else only the upper triangle is there
    loops_.transpose(weight, tile, tile, transposed);
    for (int k = 0; k < tile * tile; ++k) weight[k] += transposed[k];
  }

  // Adds W X^ to one side's sums of panel `i` of `to`, X^ being panel `j` of `from` and W having `count` hard pairs.
  void add_weighted(EmbeddingSums<real>& to, int64_t i, const EmbeddingSums<real>& from, int64_t j, int side,
                    int64_t count, const real* weight) {
    int m = to.rows(i), n = from.rows(j), tile = to.tile;
    real* sum = to.sum[side].get() + to.begin(i) * p_.d;
    to.summed[side][i] = 1;
    if (kWeightedPairs * count < m * n) {
      loops_.weighted_sum(weight, m, tile, from.unit_at(j), p_.d, sum);
    } else {
      host_.add_product(weight, tile, tile, from.unit_at(j), p_.d, sum);
    }
  }

  void wait(const Turn& t) const {
    while (t.turn->load(std::memory_order_acquire) != t.mine && !failed_) std::this_thread::yield();
  }

  static void add(Penalty& total, const Penalty& part) { total.count += part.count, total.sum += part.sum; }
  // Beyond 2 a margin makes all pairs hard or none, however far: the sums stay small and precise, see finish().
  double near_margin(int side) const {
    return p_.squared ? p_.margin.value[side] : std::clamp(p_.margin.value[side], -2.0, 2.0);
  }
  real margin(int side) const { return static_cast<real>(near_margin(side)); }

  // Step 4.
  void finish() {
    bool finite = rows_.finite && columns().finite;
    // In compiled code nobody has looked at the numbers before.
    for (int side : {kPlus, kMinus})
      finite &= std::isfinite(p_.margin.value[side]) && std::isfinite(p_.weight.value[side]);
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    double loss = finite ? 0 : kNan, weight[2];
    for (int side : {kPlus, kMinus}) {
      Penalty total;
      for (size_t k = side; k < panel_penalty_.size(); k += 2) add(total, panel_penalty_[k]);
      double beyond = p_.margin.value[side] - near_margin(side);
      total.sum += (side == kPlus ? beyond : -beyond) * total.count;
      weight[side] = !finite ? kNan : total.count ? p_.weight.value[side] / total.count : 0;
      loss += weight[side] * total.sum;
      result_.count[side] = total.count, result_.penalty[side] = finite ? total.sum : kNan;
    }
    if (result_.loss) *result_.loss = static_cast<real>(loss);
    double both_orders = symmetric_ ? 2 : 1, one = finite ? both_orders : kNan;
    std::vector<std::array<double, 2>> weights{{both_orders * weight[kPlus], both_orders * weight[kMinus]}};
    if (result_.gradients() == 2) weights = {{one, 0}, {0, one}};
    for (size_t k = 0; k < weights.size(); ++k) {
      if (result_.grad_x) write_gradient(rows_, columns(), p_.y, p_.n, weights[k], result_.grad_x + k * p_.n * p_.d);
      if (result_.grad_ref)
        write_gradient(columns(), rows_, p_.ref_y, p_.m, weights[k], result_.grad_ref + k * p_.m * p_.d);
    }
  }

  // grad [n, d]: (g - (g . x^) x^) / max(|x|, kEps) with g = w- G- - w+ G+, in the order of the input.
  void write_gradient(EmbeddingSums<real>& e, const EmbeddingSums<real>& from, const int64_t* y, int64_t n,
                      std::array<double, 2> weight, real* grad) {
    use_huge_pages(grad, n * e.d * sizeof(real));
    for (int64_t i = 0; i < n; ++i)
      if (y[i] < 0) std::fill_n(grad + i * e.d, e.d, real{0});
    bool finite = !std::isnan(weight[kPlus] + weight[kMinus]);
    if (!finite) {
      for (int64_t i : e.order) std::fill_n(grad + i * e.d, e.d, std::numeric_limits<real>::quiet_NaN());
      return;
    }
    real w_plus = static_cast<real>(weight[kPlus]), w_minus = static_cast<real>(weight[kMinus]);
    std::vector<real> zeros(e.d), rows(2 * e.d * host_.threads);
    size_t most = 0;
    for (const auto& terms : e.terms) most = std::max(most, terms.size());
    std::vector<std::vector<uint64_t>> spares(host_.threads);
    for (auto& spare : spares) spare.resize(most);
    host_.parallel(host_.threads, [&](int64_t worker, int64_t last) {
      for (; worker < last; ++worker)
        for (int64_t panel = worker; panel < e.panels; panel += host_.threads) {
          std::vector<uint64_t>& terms = e.terms[panel];
          gather(terms, spares[worker]);
          const uint64_t *term = terms.data(), *end = term + terms.size();
          for (int row = 0; row < e.rows(panel); ++row) {
            int64_t k = e.begin(panel) + row;
            const real *own[2] = {zeros.data(), zeros.data()}, *shared[2] = {zeros.data(), zeros.data()};
            bool any = false;
            for (int side : {kPlus, kMinus}) {
              // Memory that was not written to is not read: it does not exist yet.
              if (e.summed[side][panel]) any = true, own[side] = e.sum[side].get() + k * e.d;
              if (e.shares[side][panel] && !e.apart[side][k])
                any = true, shared[side] = e.shared[side].get() + panel * e.d;
              if (auto is_own =
                      [&] { return term < end && Term::of(*term).row == row && Term::of(*term).side == side; };
                  is_own()) {
                real* sum = rows.data() + (2 * worker + side) * e.d;
                std::copy_n(own[side], e.d, sum);
                while (is_own()) term = add_terms(term, end, from, sum);
                any = true, own[side] = sum;
              }
            }
            real* out = grad + e.order[k] * e.d;
            if (!any) {
              std::fill_n(out, e.d, real{0});
              continue;
            }
            RowSums<real> sums{own[kPlus], shared[kPlus], own[kMinus], shared[kMinus]};
            bool constant_norm = e.inverse[k] >= 1 / kEps;  // below kEps the divisor does not depend on x
            loops_.gradient_row(sums, constant_norm ? nullptr : e.unit.get() + k * e.d, e.d, w_plus, w_minus,
                                e.inverse[k], out);
          }
        }
    });
  }

  const Problem<real>& p_;
  const Result<real>& result_;
  const Host<real>& host_;
  const PairLoops<real>& loops_;
  bool symmetric_, by_codes_ = false;
  real near_;  // how far a similarity may be off by rounding
  EmbeddingSums<real> rows_, other_;
  std::vector<int64_t> first_, last_, own_;  // [rows] see match(); own_ is empty if no row is among the columns
  std::vector<Penalty> panel_penalty_;       // [row panels, 2]
  std::atomic<bool> failed_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace

template <class real>
void loss(const Problem<real>& problem, const Result<real>& result, const Host<real>& host, Isa isa) {
  LossWalk<real>(problem, result, host, isa).run();
}
template void loss(const Problem<float>&, const Result<float>&, const Host<float>&, Isa);
template void loss(const Problem<double>&, const Result<double>&, const Host<double>&, Isa);

}  // namespace tcm::cpu
