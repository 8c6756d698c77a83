#include "loss.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "decide.h"
#include "pairs.h"
#include "sums.h"

// How the loss is found:
// 1. Sort rows and columns by label and normalise them (`Embeddings`). The positives of a row are then one
//    range of columns (`Pairs`), and away from the diagonal a tile needs no look at labels.
// 2. Cut both into panels of `tile` rows. Each pair of panels (the upper triangle where rows are columns) is a tile
//    of similarities: a matrix product, made for a group of panels at once. Count its hard pairs, sum their penalties.
//    Where the processor multiplies bytes faster, a tile's codes come first (`Decisions`): they decide nearly all pairs,
//    and the few that are in question are decided one by one, or else the tile is multiplied after all.
// 3. Add the masked sums M X^ to the panels' gradients (`EmbeddingSums`): nothing for an empty tile.
// 4. Scale by the counts, project off the unit sphere's normal, undo the sort.
// Panels take their sums in a fixed order (`Turn`), so the result does not depend on timing.

namespace tcm::cpu {
namespace {

// A group's sums are added to in a fixed order: whoever has a sum for it waits until the turn is its own.
struct Turn {
  std::atomic<int64_t>* turn;
  int64_t mine, next;
};

template <class real>
class LossWalk {
 public:
  LossWalk(const Problem<real>& problem, const Result<real>& result, const Host<real>& host, Isa isa)
      : p_(problem),
        result_(result),
        host_(host),
        loops_(pair_loops<real>(isa)),
        symmetric_(problem.symmetric),
        rows_(host, loops_),
        other_(host, loops_),
        columns_(problem.symmetric ? rows_ : other_),
        pairs_(problem, loops_, rows_, columns_),
        decisions_(pairs_, host) {}

  void run() {
    int64_t longest = std::max(p_.n, symmetric_ ? 0 : p_.m);
    int tile =
        static_cast<int>(std::clamp<int64_t>((longest / (4 * kGroup * host_.threads) + 63) / 64 * 64, 64, kTile));
    auto prepare = [&](EmbeddingSums<real>& e, const real* x, const int64_t* y, int64_t n, const real* gradient) {
      e.prepare(x, y, n, p_.d, tile, host_.transposed && &e == &columns_, gradient != nullptr);
    };
    prepare(rows_, p_.x, p_.y, p_.n, result_.grad_x);
    if (!symmetric_) prepare(other_, p_.ref_x, p_.ref_y, p_.m, result_.grad_ref);
    if (rows_.finite && columns_.finite) {
      pairs_.match();
      by_codes_ = decisions_.pay();
      if (by_codes_) decisions_.encode();
      tiles();
    }
    decisions_.forget_codes(), columns_.forget_transposed();  // the gradient comes instead
    finish();
  }

 private:
  struct Scratch {                                                        // of one thread
    Array<real> s;                                                        // [kGroup tile, kGroup tile]
    uint64_t mask[kTile * kWords] = {}, transposed[kTile * kWords] = {};  // words past the tile stay 0
    Array<real> weight, transposed_weight;                                // [tile, tile] see make_weights
    CodeScratch codes;
    Array<uint64_t> decided[kGroup * kGroup][2];  // [tile, kWords] hard pairs of each tile of a group, by codes
  };

  // Step 2. Threads take groups in order; the order makes neighbours touch different panels.
  void tiles() {
    int64_t rows = rows_.groups(), cols = columns_.groups();
    if (rows == 0 || cols == 0) return;
    panel_penalty_.assign(2 * rows_.panels, {});
    // Round r visits the groups (a, b) with b = r - a (symmetric: every group once a round) or b = a + r, modulo the
    // longer side, a on the shorter. There group a has its turn in round r, and b is visited by a = b, b - 1, ...
    bool rows_short = rows <= cols;
    int64_t shorter = std::min(rows, cols), longer = std::max(rows, cols);
    if (!symmetric_) {
      auto& turn = rows_short ? columns_.turn : rows_.turn;
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
    scratch.codes.allocate(tile);
    for (auto& hard : scratch.decided)
      for (int side : {kPlus, kMinus}) hard[side].allocate(tile * kWords);
  }

  // The tiles of row group `a` and column group `b`; on the diagonal only those above it.
  void one_group(int64_t a, int64_t b, Turn row_turn, Turn column_turn, Scratch& scratch) {
    bool diagonal = symmetric_ && a == b;
    Tile<real> tiles[kGroup * kGroup];
    int size = 0, stride = kGroup * rows_.tile;
    int64_t end_i = rows_.group_end(a), end_j = columns_.group_end(b);
    for (int64_t i = kGroup * a; i < end_i; ++i)
      for (int64_t j = diagonal ? i : kGroup * b; j < end_j; ++j) {
        real* s = scratch.s.get() + (i - kGroup * a) * rows_.tile * stride + (j - kGroup * b) * rows_.tile;
        tiles[size++] = {i, j, rows_.rows(i), columns_.rows(j), s, stride};
      }
    if (!by_codes_) multiply(tiles[0], end_i, end_j, diagonal);
    for (int k = 0; k < size; ++k) {
      Tile<real>& t = tiles[k];
      if (by_codes_ && decisions_.decide(t, scratch.decided[k], scratch.codes)) continue;
      if (by_codes_) multiply(t, t.i + 1, t.j + 1, pairs_.is_diagonal(t));
      scan(t);
    }

    row_turn.turn = &rows_.turn[a], column_turn.turn = &columns_.turn[b];
    // In the symmetric form rows and columns share their turns, whether a gradient is wanted or not.
    bool takes_column_turn = symmetric_ ? !diagonal : columns_.wants_gradient;
    wait(row_turn);
    if (takes_column_turn) wait(column_turn);
    if (failed_) return;
    for (int k = 0; k < size; ++k) accumulate(tiles[k], scratch);
    row_turn.turn->store(row_turn.next, std::memory_order_release);
    if (takes_column_turn) column_turn.turn->store(column_turn.next, std::memory_order_release);
  }

  // Similarities of the row panels from the first tile's to `last_i`, without it, and of such column panels. On the
  // diagonal strips stop short of the part below it.
  void multiply(const Tile<real>& first, int64_t last_i, int64_t last_j, bool diagonal) {
    int64_t begin_i = rows_.begin(first.i), end_i = rows_.begin(last_i - 1) + rows_.rows(last_i - 1),
            begin_j = columns_.begin(first.j), end_j = columns_.begin(last_j - 1) + columns_.rows(last_j - 1),
            strip = diagonal ? kStrip : end_i - begin_i;
    for (int64_t i = begin_i; i < end_i; i += strip) {
      int64_t j = diagonal ? begin_j + i - begin_i : begin_j;
      real* s = first.s + (i - begin_i) * first.stride - begin_j;
      similarities(host_, loops_, rows_, i, std::min(i + strip, end_i), columns_, j, end_j, s, first.stride);
    }
  }

  // Counts a tile's hard pairs and sums their penalties.
  void scan(Tile<real>& t) {
    auto scan_row = p_.squared ? loops_.scan_squared : loops_.scan_row;
    for (int row = 0; row < t.m; ++row) {
      real* s = t.s + row * t.stride;
      if (int64_t own = pairs_.own(t, row); own >= 0) s[own] = std::numeric_limits<real>::quiet_NaN();  // never hard
      auto [start, a, b] = pairs_.segments(t, row);
      settle(t, row, start, a, kMinus), settle(t, row, a, b, kPlus), settle(t, row, b, t.n, kMinus);
      Penalty plus = scan_row(s + a, b - a, pairs_.margin(kPlus), -1);
      Penalty minus = scan_row(s + start, a - start, pairs_.margin(kMinus), 1);
      minus.add(scan_row(s + b, t.n - b, pairs_.margin(kMinus), 1));
      t.any[kPlus][row] = plus.count > 0, t.any[kMinus][row] = minus.count > 0;
      t.penalty[kPlus].add(plus), t.penalty[kMinus].add(minus);
    }
  }

  // Replaces similarities of columns [from, to) of a row that lie within rounding of the margin.
  void settle(const Tile<real>& t, int row, int from, int to, int side) const {
    real *s = t.s + row * t.stride, m = pairs_.margin(side);
    if (std::is_same_v<real, double> || !loops_.is_near(s + from, to - from, m, pairs_.near)) return;
    for (int j = from; j < to; ++j)
      if (std::abs(s[j] - m) <= pairs_.near)
        s[j] = pairs_.similarity(rows_.begin(t.i) + row, columns_.begin(t.j) + j, side);
  }

  // Step 3.
  void accumulate(const Tile<real>& t, Scratch& scratch) {
    bool diagonal = pairs_.is_diagonal(t);
    for (int side : {kPlus, kMinus}) {
      int64_t count = t.penalty[side].count;
      panel_penalty_[2 * t.i + side].add(t.penalty[side]);
      bool to_rows = rows_.wants_gradient, to_columns = !diagonal && columns_.wants_gradient;
      if (count == 0 || !(to_rows || to_columns)) continue;
      if (diagonal) count *= 2;
      if (p_.squared) {
        make_weights(t, side, scratch);
        if (to_rows) rows_.add_weighted(t.i, columns_, t.j, side, count, scratch.weight.get());
        if (!to_columns) continue;
        loops_.transpose(scratch.weight.get(), rows_.tile, rows_.tile, scratch.transposed_weight.get());
        columns_.add_weighted(t.j, rows_, t.i, side, count, scratch.transposed_weight.get());
        continue;
      }
      bool most = kDensePairs * (t.m * t.n - count) < t.m * t.n;
      int64_t listed = most ? t.m * t.n - count : count;
      if (listed > 0) make_mask(t, side, most, scratch);
      if (to_rows) rows_.add_masked(t.i, columns_, t.j, side, most, listed, scratch.mask);
      if (!to_columns) continue;
      if (listed > 0) transpose_mask(scratch.mask, rows_.tile / 64, scratch.transposed);
      columns_.add_masked(t.j, rows_, t.i, side, most, listed, scratch.transposed);
    }
  }

  // scratch.mask [kTile, kWords]: the tile's hard pairs of one side, or with `inverted` all its other pairs.
  void make_mask(const Tile<real>& t, int side, bool inverted, Scratch& scratch) {
    uint64_t all[kWords], positive[kWords], *mask = scratch.mask;
    if (t.hard[side]) {
      std::copy_n(t.hard[side], rows_.tile * kWords, mask);
    } else {
      std::fill_n(mask, rows_.tile * kWords, 0);
    }
    for (int row = 0; !t.hard[side] && row < t.m; ++row) {
      if (!t.any[side][row]) continue;
      uint64_t* bits = mask + row * kWords;
      auto [start, a, b] = pairs_.segments(t, row);
      range_mask(start, t.n, all), range_mask(a, b, positive);
      loops_.mask_row(t.s + row * t.stride, (t.n + 63) / 64, pairs_.margin(side), side == kPlus ? -1 : 1, bits);
      for (int word = 0; word < kWords; ++word)
        bits[word] &= side == kPlus ? positive[word] : all[word] & ~positive[word];
    }
    if (pairs_.is_diagonal(t)) {  // only the upper triangle is there
      transpose_mask(mask, rows_.tile / 64, scratch.transposed);
      for (int row = 0; row < t.m; ++row)
        for (int word = 0; word < rows_.tile / 64; ++word)
          mask[row * kWords + word] |= scratch.transposed[row * kWords + word];
    }
    if (!inverted) return;
    range_mask(0, t.n, all);
    for (int k = 0; k < t.m * kWords; ++k) mask[k] = all[k % kWords] & ~mask[k];
  }

  // scratch.weight [tile, tile]: twice the violation of the tile's hard pairs of one side, 0 for all others.
  void make_weights(const Tile<real>& t, int side, Scratch& scratch) {
    int tile = rows_.tile;
    real *weight = scratch.weight.get(), *transposed = scratch.transposed_weight.get();
    std::fill_n(weight, tile * tile, real{0});
    if (t.hard[side])
      for_bits(t.hard[side], t.m, [&](int row, int j) {
        weight[row * tile + j] = static_cast<real>(2 * pairs_.violation_of(side, t.s[row * t.stride + j]));
      });
    for (int row = 0; !t.hard[side] && row < t.m; ++row) {
      if (!t.any[side][row]) continue;
      const real* s = t.s + row * t.stride;
      auto weigh = [&](int from, int to) {
        loops_.weigh_row(s + from, to - from, pairs_.margin(side), side == kPlus ? -1 : 1, weight + row * tile + from);
      };
      auto [start, a, b] = pairs_.segments(t, row);
      if (side == kPlus) weigh(a, b);
      if (side == kMinus) weigh(start, a), weigh(b, t.n);
    }
    if (!pairs_.is_diagonal(t)) return;  // else only the upper triangle is there
    loops_.transpose(weight, tile, tile, transposed);
    for (int k = 0; k < tile * tile; ++k) weight[k] += transposed[k];
  }

  void wait(const Turn& t) const {
    while (t.turn->load(std::memory_order_acquire) != t.mine && !failed_) std::this_thread::yield();
  }

  // Step 4.
  void finish() {
    bool finite = rows_.finite && columns_.finite;
    // In compiled code nobody has looked at the numbers before.
    for (int side : {kPlus, kMinus})
      finite &= std::isfinite(p_.margin.value[side]) && std::isfinite(p_.weight.value[side]);
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    double both_orders = symmetric_ ? 2 : 1;  // symmetric: (i, j) stands for (j, i) too
    double loss = finite ? 0 : kNan, weight[2];
    for (int side : {kPlus, kMinus}) {
      Penalty total;
      for (size_t k = side; k < panel_penalty_.size(); k += 2) total.add(panel_penalty_[k]);
      double beyond = p_.margin.value[side] - pairs_.near_margin(side);
      total.add({0, (side == kPlus ? beyond : -beyond) * total.count});
      double count = both_orders * total.count, penalty = both_orders * total.total();
      weight[side] = !finite ? kNan : count ? p_.weight.value[side] / count : 0;
      if (weight[side] != 0) loss += weight[side] * penalty;  // else the sum may be infinite
      result_.count[side] = static_cast<int64_t>(both_orders) * total.count;
      result_.penalty[side] = finite ? penalty : kNan;
    }
    if (result_.loss) *result_.loss = static_cast<real>(loss);
    double one = finite ? both_orders : kNan;
    std::vector<std::array<double, 2>> weights{{both_orders * weight[kPlus], both_orders * weight[kMinus]}};
    if (result_.gradients() == 2) weights = {{one, 0}, {0, one}};
    for (size_t k = 0; k < weights.size(); ++k) {
      if (result_.grad_x) rows_.write_gradient(columns_, p_.y, p_.n, weights[k], result_.grad_x + k * p_.n * p_.d);
      if (result_.grad_ref)
        columns_.write_gradient(rows_, p_.ref_y, p_.m, weights[k], result_.grad_ref + k * p_.m * p_.d);
    }
  }

  const Problem<real>& p_;
  const Result<real>& result_;
  const Host<real>& host_;
  const PairLoops<real>& loops_;
  bool symmetric_, by_codes_ = false;
  EmbeddingSums<real> rows_, other_;
  EmbeddingSums<real>& columns_;  // which are the rows in the symmetric form
  Pairs<real> pairs_;
  Decisions<real> decisions_;
  std::vector<Penalty> panel_penalty_;  // [row panels, 2]
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
