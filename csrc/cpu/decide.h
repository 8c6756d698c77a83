// Which pairs of a tile are hard, by codes in eight bits (codes.h): they decide nearly all pairs, and the few that are in
// question are decided one by one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "codes.h"
#include "pairs.h"

namespace tcm::cpu {

constexpr int kLeastCoded = 256;  // rows and columns from which codes pay
constexpr int kCodedPairs = 16;   // of so many pairs one at most is decided by itself, else a product is faster

// Of one thread: products of codes [tile, tile]; pairs of a tile that may be hard, and that surely are. Bits [tile, kWords].
struct CodeScratch {
  Array<int32_t> product;
  Array<uint64_t> possible[2], sure[2];

  void allocate(int64_t tile) {
    product.allocate(tile * tile);
    for (int side : {kPlus, kMinus}) possible[side].allocate(tile * kWords), sure[side].allocate(tile * kWords);
  }
};

template <class real>
class Decisions {
 public:
  Decisions(const Pairs<real>& pairs, const Host<real>& host) : pairs_(pairs), host_(host) {}

  // Whether codes are there and are expected to save time: a look at few pairs, the same ones at every call.
  bool pay() const {
    const Embeddings<real>&rows = pairs_.rows, &columns = pairs_.columns;
    if (!host_.code_product || rows.d >= kMostWidth || rows.size == 0 || columns.size == 0) return false;
    // NaN: nothing is hard, nor surely not hard.
    if (std::isnan(pairs_.margin(kPlus)) || std::isnan(pairs_.margin(kMinus))) return false;
    if (host_.always_codes) return true;
    if (std::min(rows.size, columns.size) < kLeastCoded) return false;
    int64_t all = rows.panels * columns.panels, tiles = std::clamp<int64_t>(all / 8, 1, 32), dear = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      int64_t tile = (2 * t + 1) * all / (2 * tiles);
      dear += is_dear(tile / columns.panels, tile % columns.panels);
    }
    return 2 * dear <= tiles;
  }

  void encode() {
    encode(pairs_.rows, row_codes_);
    if (!pairs_.symmetric) encode(pairs_.columns, column_codes_);
  }

  void forget_codes() { row_codes_.reset(), column_codes_.reset(); }

  // Finds a tile's hard pairs, into `hard`, and the sum of their penalties. False, and nothing is found, if too many pairs
  // are in question.
  bool decide(Tile<real>& t, const Array<uint64_t> (&hard)[2], CodeScratch& scratch) const {
    multiply_codes(t, scratch);
    int64_t most = std::max<int64_t>(t.m * t.n / kCodedPairs, 1), possible[2] = {}, sure[2] = {}, all = 0;
    for (int row = 0; row < t.m; ++row) {
      decide_row(t, row, scratch, possible, sure);
      all += t.n - std::get<0>(pairs_.segments(t, row));
      for (int side : {kPlus, kMinus})
        if (possible[side] > most && (pairs_.p.squared || all - sure[side] > most)) return false;
    }
    for (int side : {kPlus, kMinus}) {
      t.hard[side] = hard[side].get();
      if (possible[side] > most) {
        take_sure(t, side, scratch);
      } else if (possible[side] > 0) {
        take_possible(t, side, scratch);
      }
    }
    return true;
  }

 private:
  const Codes& column_codes() const { return pairs_.symmetric ? row_codes_ : column_codes_; }

  // Whether codes will leave too much of the tile in question, by a sample of its pairs.
  bool is_dear(int64_t panel_i, int64_t panel_j) const {
    constexpr int kPairs = 32, kStep = 5;  // a row and a column in each 32nd of their panels
    const Embeddings<real>&rows = pairs_.rows, &columns = pairs_.columns;
    int possible = 0, unsure = 0;
    for (int k = 0; k < kPairs; ++k) {
      int64_t i = rows.begin(panel_i) + (2 * k + 1) * rows.rows(panel_i) / (2 * kPairs);
      int64_t j = columns.begin(panel_j) + (2 * (kStep * k % kPairs) + 1) * columns.rows(panel_j) / (2 * kPairs);
      int side = rows.label[i] == columns.label[j] ? kPlus : kMinus;
      double violation = pairs_.violation_of(side, pairs_.similarity(i, j, side)),
             error = code_error(rows, i) + code_error(columns, j);
      possible += violation >= -error, unsure += side == kPlus || violation < error;
    }
    return std::min(possible, unsure) * kCodedPairs > kPairs;
  }

  // About the error of the codes of a row, for a guess.
  static double code_error(const Embeddings<real>& e, int64_t row) {
    const real* unit = e.unit.get() + row * e.d;
    real peak = 0;
    for (int64_t k = 0; k < e.d; ++k) peak = std::max(peak, std::abs(unit[k]));
    return peak / 127 * std::sqrt(e.d / 12.0);
  }

  void encode(const Embeddings<real>& e, Codes& codes) {
    codes.allocate(e);
    host_.parallel(e.panels, [&](int64_t from, int64_t to) {
      for (int64_t panel = from; panel < to; ++panel) codes.load(pairs_.loops, e, panel);
    });
  }

  // scratch.product; on the diagonal not all of the part below it.
  void multiply_codes(const Tile<real>& t, CodeScratch& scratch) const {
    const Codes &a = row_codes_, &b = column_codes();
    int tile = pairs_.rows.tile;
    for (int j = 0; j < t.n; j += kCodeBlock)
      host_.code_product(a.left.get() + pairs_.rows.begin(t.i) * a.width, pairs_.is_diagonal(t) ? j + kCodeBlock : tile,
                         b.right.get() + (pairs_.columns.begin(t.j) + j) * b.width, kCodeBlock, a.width,
                         scratch.product.get() + j, tile);
  }

  // scratch.possible and sure of one row, and their numbers.
  void decide_row(const Tile<real>& t, int row, CodeScratch& scratch, int64_t* possible, int64_t* sure) const {
    const Codes &a = row_codes_, &b = column_codes();
    const Codes::Panel& panel = b.panel[t.j];
    int64_t i = pairs_.rows.begin(t.i) + row, begin = pairs_.columns.begin(t.j);
    int words = (t.n + 63) / 64;
    const int32_t* product = scratch.product.get() + row * pairs_.rows.tile;
    CodeColumns column{b.scale.get() + begin, b.error.get() + begin, b.shift.get() + begin};
    float scale = a.scale.get()[i], error = a.error.get()[i];
    // Sets `bits` to the pairs whose similarity may reach the margin, or with sign = -1 surely exceeds it.
    auto reach = [&](int side, float sign, uint64_t* bits) {
      float base = sign * (error + kCodeSlack), from = static_cast<float>(pairs_.margin(side)) - base;
      pairs_.loops.code_mask(product, column, words, {scale, sign * (1 + error), from}, bits);
    };
    uint64_t *may[2], *must[2];
    for (int side : {kPlus, kMinus}) {
      may[side] = scratch.possible[side].get() + row * kWords, must[side] = scratch.sure[side].get() + row * kWords;
      std::fill_n(may[side], kWords, 0), std::fill_n(must[side], kWords, 0);
    }
    auto [start, first, last] = pairs_.segments(t, row);
    int32_t least, most;
    int from = start / kCodeBlock * kCodeBlock;  // before it, on the diagonal, there may be another tile's products
    pairs_.loops.code_range(product + from, column.shift + from, 64 * words - from, &least, &most);
    double bound = error + (1.0 + error) * panel.error + kCodeSlack, m = pairs_.margin(kMinus);
    double high = scale * (most > 0 ? panel.most_scale : panel.least_scale) * most;
    double low = scale * (least > 0 ? panel.least_scale : panel.most_scale) * least;
    if (high + bound < m && first == last) return;  // most rows
    uint64_t all[kWords], positive[kWords];
    range_mask(start, t.n, all), range_mask(first, last, positive);
    if (int64_t own = pairs_.own(t, row); own >= 0)
      all[own / 64] &= ~(uint64_t{1} << own % 64), positive[own / 64] &= all[own / 64];
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
  void take_possible(Tile<real>& t, int side, CodeScratch& scratch) const {
    uint64_t* hard = t.hard[side];
    std::fill_n(hard, pairs_.rows.tile * kWords, 0);
    for_bits(scratch.possible[side].get(), t.m, [&](int row, int column) {
      real s = pairs_.similarity(pairs_.rows.begin(t.i) + row, pairs_.columns.begin(t.j) + column, side);
      double violation = pairs_.violation_of(side, s);
      if (!(violation >= 0)) return;
      hard[row * kWords + column / 64] |= uint64_t{1} << column % 64;
      t.s[row * t.stride + column] = s;
      t.penalty[side].add({1, pairs_.p.squared ? violation * violation : violation});
    });
  }

  // The same where most pairs of the tile are surely hard: from the sum of all similarities those of the others go off.
  void take_sure(Tile<real>& t, int side, CodeScratch& scratch) const {
    int64_t d = pairs_.rows.d;
    const double *a = row_codes_.sum.get() + t.i * d, *b = column_codes().sum.get() + t.j * d;
    double sum = 0;
    for (int64_t k = 0; k < d; ++k) sum += a[k] * b[k];
    if (pairs_.is_diagonal(t)) sum = (sum - row_codes_.panel[t.i].squares) / 2;
    uint64_t *hard = t.hard[side], *others = scratch.possible[side].get();
    const uint64_t* sure = scratch.sure[side].get();
    std::fill_n(hard, pairs_.rows.tile * kWords, 0), std::copy_n(sure, t.m * kWords, hard);
    int64_t count = 0;
    for (int row = 0; row < t.m; ++row) {
      uint64_t rest[kWords];
      range_mask(std::get<0>(pairs_.segments(t, row)), t.n, rest);
      for (int word = 0; word < kWords; ++word)
        count += __builtin_popcountll(sure[row * kWords + word]), rest[word] &= ~sure[row * kWords + word];
      for_bits(rest, 1, [&](int, int column) {
        real s = pairs_.similarity(pairs_.rows.begin(t.i) + row, pairs_.columns.begin(t.j) + column, side);
        uint64_t bit = uint64_t{1} << column % 64;
        if (others[row * kWords + column / 64] & bit && pairs_.violation_of(side, s) >= 0) {
          hard[row * kWords + column / 64] |= bit, ++count;
        } else {
          sum -= s;
        }
      });
    }
    double m = pairs_.margin(side);
    t.penalty[side] = {count, side == kPlus ? m * count - sum : sum - m * count};
  }

  const Pairs<real>& pairs_;
  const Host<real>& host_;
  Codes row_codes_, column_codes_;  // where rows are columns, the first alone
};

}  // namespace tcm::cpu
