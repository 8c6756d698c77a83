// Rows or columns with the masked sums M X^ of their gradient, and how these are added up:
// - pair by pair for few hard pairs, as terms (terms.h) while they are few;
// - by table look-up for many;
// - where few are not hard, the other panel's column sum less those. A row that differs from its tile in that takes its own
//   hard pairs: no row's gradient is a small difference of large sums;
// - with squared penalties masks become weights: a matrix product, or pair by pair for few hard pairs.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "embeddings.h"
#include "terms.h"

namespace tcm::cpu {

constexpr int kGroup = 2;          // panels on each side of one matrix product
constexpr int kDensePairs = 8;     // pairs of a dense sum that cost as much as one of a sparse sum (measured: 7)
constexpr int kWeightedPairs = 4;  // the same where pairs have weights (measured: 4)

template <class real>
class EmbeddingSums : public Embeddings<real> {
 public:
  bool wants_gradient = false;
  std::unique_ptr<std::atomic<int64_t>[]> turn;  // [groups] whose turn it is to add to a group of panels

  EmbeddingSums(const Host<real>& host, const PairLoops<real>& loops) : host_(host), loops_(loops) {}

  int64_t groups() const { return (this->panels + kGroup - 1) / kGroup; }
  int64_t group_end(int64_t group) const { return std::min(this->panels, kGroup * (group + 1)); }  // its last panel + 1

  void prepare(const real* x, const int64_t* y, int64_t n, int64_t width, int tile_rows, bool transpose,
               bool gradient) {
    this->sort(y, n, width, tile_rows, transpose);
    panel_sum_.allocate(this->panels * this->d);
    wants_gradient = gradient;
    turn.reset(new std::atomic<int64_t>[groups()]);
    for (int64_t group = 0; group < groups(); ++group) turn[group] = 0;
    if (wants_gradient) terms_.resize(this->panels);
    for (Side& side : sides_) {
      side.summed.resize(this->panels), side.shares.resize(this->panels);
      if (!wants_gradient) continue;
      side.sum.allocate(this->panels * this->tile * this->d), side.shared.allocate(this->panels * this->d);
      side.apart.resize(this->size);
    }
    host_.parallel(this->panels, [&](int64_t from, int64_t to) {
      for (int64_t panel = from; panel < to; ++panel) {
        this->load(loops_, x, y, panel);
        const real* unit = this->unit_at(panel);
        for (int k = 0; k < this->rows(panel); ++k) add_row(unit + k * this->d, panel_sum_.get() + panel * this->d);
      }
    });
  }

  // Adds M X^ to one side's sums of panel `i`, X^ being panel `j` of `from`. The mask [kTile, kWords] holds the `listed`
  // pairs of M, or with `most` those that M lacks.
  void add_masked(int64_t i, const EmbeddingSums& from, int64_t j, int side, bool most, int64_t listed,
                  const uint64_t* mask) {
    int m = this->rows(i), n = from.rows(j);
    if (most) {
      add_most(i, from, j, side, listed > 0 ? mask : nullptr);
    } else if (kDensePairs * listed < m * n) {
      add_pairs(i, from, j, side, false, mask);
    } else {
      sides_[side].summed[i] = 1;
      loops_.dense_sum(mask, m, n, from.unit_at(j), this->d, 1, sum_at(side, this->begin(i)));
    }
  }

  // Adds W X^ to one side's sums of panel `i`, X^ being panel `j` of `from` and W [tile, tile] having `count` hard pairs.
  void add_weighted(int64_t i, const EmbeddingSums& from, int64_t j, int side, int64_t count, const real* weight) {
    int m = this->rows(i), n = from.rows(j);
    sides_[side].summed[i] = 1;
    if (kWeightedPairs * count < m * n) {
      loops_.weighted_sum(weight, m, this->tile, from.unit_at(j), this->d, sum_at(side, this->begin(i)));
    } else {
      host_.add_product(weight, this->tile, this->tile, from.unit_at(j), this->d, sum_at(side, this->begin(i)));
    }
  }

  // grad [n, d]: (g - (g . x^) x^) / max(|x|, kEps) with g = w- G- - w+ G+, in the order of the input.
  void write_gradient(const EmbeddingSums& from, const int64_t* y, int64_t n, std::array<double, 2> weight,
                      real* grad) {
    int64_t d = this->d;
    use_huge_pages(grad, n * d * sizeof(real));
    for (int64_t i = 0; i < n; ++i)
      if (y[i] < 0) std::fill_n(grad + i * d, d, real{0});
    if (std::isnan(weight[kPlus] + weight[kMinus])) {
      for (int64_t i : this->order) std::fill_n(grad + i * d, d, std::numeric_limits<real>::quiet_NaN());
      return;
    }
    size_t most = 0;
    for (const auto& terms : terms_) most = std::max(most, terms.size());
    std::vector<RowScratch> scratches(host_.threads);  // before threads are at work, which must not lack memory
    for (RowScratch& scratch : scratches)
      scratch.zeros.resize(d), scratch.sums.resize(2 * d), scratch.spare.resize(most);
    host_.parallel(host_.threads, [&](int64_t worker, int64_t last) {
      for (; worker < last; ++worker)
        for (int64_t panel = worker; panel < this->panels; panel += host_.threads)
          write_panel(panel, from, weight, scratches[worker], grad);
    });
  }

 private:
  struct Side {                        // of hard positives, of hard negatives
    Array<real> sum;                   // [panels * tile, d] masked or weighted sums
    Array<real> shared;                // [panels, d] added to the sums of every row of a panel, but of those set apart
    std::vector<char> apart;           // [size] rows set apart
    std::vector<char> summed, shares;  // [panels] whether `sum`, `shared` are more than zero
  };

  struct RowScratch {  // of one thread
    std::vector<real> zeros, sums;
    std::vector<uint64_t> spare;
  };

  real* sum_at(int side, int64_t row) { return sides_[side].sum.get() + row * this->d; }

  void add_row(const real* row, real* out) const {
    for (int64_t c = 0; c < this->d; ++c) out[c] += row[c];
  }

  // Adds M X^ pair by pair; with `lacks` they are subtracted. Few are kept as terms.
  void add_pairs(int64_t i, const EmbeddingSums& from, int64_t j, int side, bool lacks, const uint64_t* mask) {
    std::vector<uint64_t>& terms = terms_[i];
    size_t room = this->tile * this->d / 4, count = 0;  // half of the panel's own memory
    for (int k = 0; k < this->rows(i) * kWords; ++k) count += mask[k] ? __builtin_popcountll(mask[k]) : 0;
    if (count == 0) return;
    bool many = 8 * count > room;
    if (!many && !sides_[side].summed[i] && terms.size() + count > room) sum_terms(i, from);
    if (many || sides_[side].summed[i]) {
      sides_[side].summed[i] = 1;
      loops_.sparse_sum(mask, this->rows(i), from.unit_at(j), this->d, lacks ? -1 : 1, sum_at(side, this->begin(i)));
      return;
    }
    terms.reserve(room);  // pages that are not touched take no memory; growth would leave holes
    for_bits(mask, this->rows(i),
             [&](int row, int column) { terms.push_back(Term{row, side, lacks, from.begin(j) + column}.code()); });
  }

  // Moves a panel's terms of one side, which has most of them, into its sums: the other's take less memory as they are.
  void sum_terms(int64_t i, const EmbeddingSums& from) {
    std::vector<uint64_t>& terms = terms_[i];
    auto is_minus = [](uint64_t term) { return Term::of(term).side == kMinus; };
    size_t minus = std::count_if(terms.begin(), terms.end(), is_minus), plus = terms.size() - minus;
    int side = minus >= plus ? kMinus : kPlus;
    std::vector<uint64_t> moved, others;
    moved.reserve(std::max(minus, plus)), others.reserve(std::min(minus, plus));
    for (uint64_t term : terms) (Term::of(term).side == side ? moved : others).push_back(term);
    terms.swap(others);  // of which the memory serves once more
    others.resize(moved.size());
    gather(moved, others);
    sides_[side].summed[i] = 1;
    const uint64_t *term = moved.data(), *end = term + moved.size();
    while (term < end) term = add_terms(term, end, from, sum_at(side, this->begin(i) + Term::of(*term).row));
  }

  // Adds the first of the terms, and those after it that differ from it in the column alone, to g [d]; where they end.
  const uint64_t* add_terms(const uint64_t* term, const uint64_t* end, const EmbeddingSums& from, real* g) const {
    constexpr int kMost = 64;
    int64_t list[kMost];
    Term first = Term::of(*term);
    int length = 0;
    for (; term < end && length < kMost && *term >> 48 == first.code() >> 48; ++term)
      list[length++] = Term::of(*term).column;
    loops_.row_sum(list, length, from.unit.get(), this->d, first.lacks ? -1 : 1, g);
    return term;
  }

  // Adds M X^ where M is nearly full: the panel's column sum for all rows at once, less the pairs that M lacks (null:
  // none). A row that lacks more than half takes its hard pairs instead, and from then on no part in the shared sum.
  void add_most(int64_t i, const EmbeddingSums& from, int64_t j, int side, const uint64_t* lacks) {
    int m = this->rows(i), n = from.rows(j);
    real *shared = sides_[side].shared.get() + i * this->d, *sum = sum_at(side, this->begin(i));
    const real* panel_sum = from.panel_sum_.get() + j * this->d;
    uint64_t all[kWords], missing[kTile * kWords], hard[kTile * kWords];
    range_mask(0, n, all);
    if (lacks) std::copy_n(lacks, m * kWords, missing), std::fill_n(hard, m * kWords, 0);
    for (int row = 0; row < m; ++row) {
      char& apart = sides_[side].apart[this->begin(i) + row];
      uint64_t *row_missing = missing + row * kWords, *row_hard = hard + row * kWords;
      int count = 0;
      for (int word = 0; lacks && word < kWords; ++word) count += __builtin_popcountll(row_missing[word]);
      if (2 * count <= n) {
        if (apart) add_row(panel_sum, sum + row * this->d);
        continue;
      }
      if (!apart) add_row(shared, sum + row * this->d);
      apart = 1, sides_[side].summed[i] = 1;
      for (int word = 0; word < kWords; ++word) row_hard[word] = all[word] & ~row_missing[word], row_missing[word] = 0;
    }
    add_row(panel_sum, shared), sides_[side].shares[i] = 1;
    if (!lacks) return;
    add_pairs(i, from, j, side, true, missing);
    add_pairs(i, from, j, side, false, hard);
  }

  // The rows of one panel of write_gradient.
  void write_panel(int64_t panel, const EmbeddingSums& from, std::array<double, 2> weight, RowScratch& scratch,
                   real* grad) {
    int64_t d = this->d;
    std::vector<uint64_t>& terms = terms_[panel];
    gather(terms, scratch.spare);
    const uint64_t *term = terms.data(), *end = term + terms.size();
    for (int row = 0; row < this->rows(panel); ++row) {
      int64_t k = this->begin(panel) + row;
      const real *own[2], *shared[2];
      bool any = false;
      for (int s : {kPlus, kMinus}) {
        const Side& side = sides_[s];
        own[s] = shared[s] = scratch.zeros.data();
        // Memory that was not written to is not read: it does not exist yet. Sums of weight 0 may be infinite.
        bool counts = weight[s] != 0;
        if (counts && side.summed[panel]) any = true, own[s] = side.sum.get() + k * d;
        if (counts && side.shares[panel] && !side.apart[k]) any = true, shared[s] = side.shared.get() + panel * d;
        auto is_own = [&] { return term < end && Term::of(*term).row == row && Term::of(*term).side == s; };
        if (!is_own()) continue;
        real* sum = scratch.sums.data() + s * d;
        std::copy_n(own[s], d, sum);
        while (is_own()) term = add_terms(term, end, from, sum);
        if (counts) any = true, own[s] = sum;
      }
      real* out = grad + this->order[k] * d;
      if (!any) {
        std::fill_n(out, d, real{0});
        continue;
      }
      bool constant_norm = this->inverse[k] >= 1 / kEps;  // below kEps the divisor does not depend on x
      RowSums<real> sums{own[kPlus], shared[kPlus], own[kMinus], shared[kMinus]};
      loops_.gradient_row(sums, constant_norm ? nullptr : this->unit.get() + k * d, d, static_cast<real>(weight[kPlus]),
                          static_cast<real>(weight[kMinus]), this->inverse[k], out);
    }
  }

  const Host<real>& host_;
  const PairLoops<real>& loops_;
  Array<real> panel_sum_;                     // [panels, d] sum of x^ over each panel
  std::vector<std::vector<uint64_t>> terms_;  // [panels] few terms of the gradient, see terms.h; more are in `sum`
  std::array<Side, 2> sides_;
};

}  // namespace tcm::cpu
