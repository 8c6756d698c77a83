#include "counts.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "embeddings.h"

// How the counts are found:
// 1. Sort rows by class and normalise them (`Embeddings`): the positives of a row are one range of columns.
// 2. Walk the upper triangle in tiles of similarities (a matrix product each). Every pair is counted once in its
//    thread's grid. Only pairs from the first threshold on are counted by class too: a few in a hundred, typically.
// 3. A tile has rows of few classes (they are sorted), so their counts fit the second-level cache: they are taken in
//    tables of the tile's own and added to the result tile by tile, under locks that are rarely contended.
// Everything is an integer or a maximum, so the result does not depend on timing.

namespace tcm::cpu {
namespace {

constexpr int kCountTile = 512;  // rows and columns of the largest tile
constexpr int kRun = 4;          // tiles in a row that one thread takes at once: they share their rows' tables
constexpr int kClassLock = 64;   // classes behind one lock

template <class real>
class CountWalk {
 public:
  CountWalk(const CountProblem<real>& problem, const CountResult<real>& result, const Host<real>& host, Isa isa)
      : p_(problem), result_(result), host_(host), loops_(pair_loops<real>(isa)), half_(int32_t{1} << problem.bits) {}

  void run() {
    prepare();
    if (!rows_.finite) throw std::invalid_argument("embeddings must be finite");
    make_starts();
    for (int side : {kPlus, kMinus}) {
      std::fill_n(result_.count[side], p_.cells(), 0);
      std::fill_n(result_.class_count[side], (p_.classes + 1) * p_.thresholds, 0);
      std::fill_n(result_.best[side], p_.n, -std::numeric_limits<real>::infinity());
    }
    walk();
  }

 private:
  // The counts of one side of a tile, [its classes, thresholds].
  struct Table {
    int64_t first = 0;            // its first class
    int64_t size = 0;             // its classes; those from p_.classes on are one
    std::vector<uint32_t> count;  // a run has less than 2^32 pairs
  };

  struct Scratch {            // of one thread
    Array<real> s;            // [tile, tile]
    Array<int64_t> count[2];  // [cells]
    Array<real> best[2];      // [size] by sorted row
    Table row_table[2], column_table;
    bool row_table_used[2];
    int32_t cell[kCountTile], listed[kCountTile], column_base[kCountTile];
  };

  // Step 1.
  void prepare() {
    constexpr int kPerThread = 4;  // tiles on a side for each thread, so that all threads have work to the end
    int64_t tile = (p_.n / (kPerThread * host_.threads) + 63) / 64 * 64;
    rows_.sort(p_.y, p_.n, p_.d, static_cast<int>(std::clamp<int64_t>(tile, 64, kCountTile)), host_.transposed);
    host_.parallel(rows_.panels, [&](int64_t from, int64_t to) {
      for (int64_t panel = from; panel < to; ++panel) rows_.load(loops_, p_.x, p_.y, panel);
    });
    last_.resize(rows_.size);
    for (int64_t k = rows_.size; k-- > 0;)
      last_[k] = k + 1 < rows_.size && rows_.label[k + 1] == rows_.label[k] ? last_[k + 1] : k + 1;
  }

  // start_[k]: number of thresholds at or below the lower end of cell k. From there the exact comparison goes on.
  void make_starts() {
    first_cell_ = 2 * half_ + 1;
    if (p_.thresholds == 0) return;
    start_.resize(p_.cells());
    int32_t t = 0;
    for (int64_t k = 0; k < p_.cells(); ++k) {
      real low = k == 0 ? -std::numeric_limits<real>::infinity() : static_cast<real>(k - half_) / half_;
      while (t < p_.thresholds && p_.threshold[t] <= low) ++t;
      start_[k] = t;
    }
    real first = std::clamp<real>(p_.threshold[0], -1, 1);
    first_cell_ = static_cast<int32_t>(std::floor(first * half_)) + half_;
  }

  // Steps 2 and 3.
  void walk() {
    int64_t panels = rows_.panels;
    if (result_.progress) result_.progress[0] = 0, result_.progress[1] = panels * (panels + 1) / 2;
    std::vector<std::pair<int64_t, int64_t>> runs;  // row panel, first column panel
    for (int64_t i = 0; i < panels; ++i)
      for (int64_t j = i; j < panels; j += kRun) runs.emplace_back(i, j);
    std::vector<std::mutex>(p_.classes / kClassLock + 1).swap(locks_);
    std::vector<Scratch> scratches(host_.threads);
    for (Scratch& w : scratches) allocate(w);
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::exception_ptr error;
    host_.parallel(host_.threads, [&](int64_t from, int64_t to) {
      for (int64_t worker = from; worker < to; ++worker) try {
          Scratch& w = scratches[worker];
          for (auto& best : w.best) std::fill_n(best.get(), rows_.size, -std::numeric_limits<real>::infinity());
          for (int64_t t; !failed && (t = next++) < static_cast<int64_t>(runs.size());) {
            auto [i, j] = runs[t];
            one_run(i, j, std::min(panels, j + kRun), w);
          }
          std::lock_guard lock(mutex);
          merge(w);
        } catch (...) {
          std::lock_guard lock(mutex);
          if (!error) error = std::current_exception();
          failed = true;
        }
    });
    if (error) std::rethrow_exception(error);
  }

  // Before threads are at work, so that they can lack memory only for the needs of `Host`.
  void allocate(Scratch& w) {
    w.s.allocate(int64_t{rows_.tile} * rows_.tile);
    for (int side : {kPlus, kMinus}) w.count[side].allocate(p_.cells()), w.best[side].allocate(rows_.size);
    int64_t longest = 0;
    for (int64_t panel = 0; panel < rows_.panels; ++panel) longest = std::max(longest, classes_of(panel));
    for (Table* table : {&w.row_table[kPlus], &w.row_table[kMinus], &w.column_table})
      table->count.reserve(longest * p_.thresholds);
  }

  void one_run(int64_t i, int64_t from, int64_t to, Scratch& w) {
    for (int side : {kPlus, kMinus}) reset(w.row_table[side], i), w.row_table_used[side] = false;
    for (int64_t j = from; j < to; ++j) {
      multiply(i, j, w);
      reset(w.column_table, j);
      for (int column = 0; column < rows_.rows(j); ++column)
        w.column_base[column] = static_cast<int32_t>(offset(w.column_table, rows_.begin(j) + column));
      bool any = false;
      for (int row = 0; row < rows_.rows(i); ++row) any |= count_row(i, j, row, w);
      if (any) flush(w.column_table, kMinus);
      w.row_table_used[kMinus] |= any;
      if (result_.progress) std::atomic_ref(result_.progress[0]).fetch_add(1, std::memory_order_relaxed);
    }
    for (int side : {kPlus, kMinus})
      if (w.row_table_used[side]) flush(w.row_table[side], side);
  }

  void reset(Table& table, int64_t panel) {
    table.first = class_of(rows_.begin(panel)), table.size = classes_of(panel);
    table.count.assign(table.size * p_.thresholds, 0);
  }

  // From the first class of a panel to its last.
  int64_t classes_of(int64_t panel) const {
    int64_t begin = rows_.begin(panel);
    return class_of(begin + rows_.rows(panel) - 1) + 1 - class_of(begin);
  }

  int64_t class_of(int64_t k) const { return std::min(rows_.label[k], p_.classes); }

  // Where `table` has the counts of sorted row k.
  int64_t offset(const Table& table, int64_t k) const { return (class_of(k) - table.first) * p_.thresholds; }

  void flush(const Table& table, int side) {
    const uint32_t* count = table.count.data();
    for (int64_t c = 0; c < table.size;) {
      int64_t id = table.first + c, end = std::min(table.size, c + kClassLock - id % kClassLock);
      std::lock_guard lock(locks_[id / kClassLock]);
      int64_t* total = result_.class_count[side] + id * p_.thresholds;
      for (int64_t k = c * p_.thresholds; k < end * p_.thresholds; ++k) *total++ += count[k];
      c = end;
    }
  }

  // w.s = the tile's similarities, on the diagonal only those above it.
  void multiply(int64_t i, int64_t j, Scratch& w) {
    int64_t m = rows_.rows(i), n = rows_.rows(j), strip = i == j ? kStrip : m;
    for (int64_t row = 0; row < m; row += strip) {
      int64_t column = rows_.begin(j) + (i == j ? row : 0), end = rows_.begin(j) + n;
      similarities(host_, loops_, rows_, rows_.begin(i) + row, rows_.begin(i) + std::min(strip, m - row) + row, rows_,
                   column, end, w.s.get() + row * rows_.tile - rows_.begin(j), rows_.tile);
    }
  }

  // Counts a row of a tile: negatives on both sides of the range of its own class. True if any has a class's count.
  bool count_row(int64_t i, int64_t j, int row, Scratch& w) {
    int64_t k = rows_.begin(i) + row, begin = rows_.begin(j), n = rows_.rows(j);
    int start = i == j ? row + 1 : 0;  // above the diagonal
    int64_t first = i == j ? start : rows_.label[begin] == rows_.label[k] ? 0 : n;
    int a = static_cast<int>(first), b = static_cast<int>(std::clamp<int64_t>(last_[k] - begin, a, n));
    count_positives(k, j, row, a, b, w);
    bool left = count_negatives(k, j, row, start, a, w), right = count_negatives(k, j, row, b, static_cast<int>(n), w);
    return left || right;
  }

  void count_positives(int64_t k, int64_t j, int row, int from, int to, Scratch& w) {
    if (from >= to) return;
    const real* s = w.s.get() + int64_t{row} * rows_.tile;
    real* best = w.best[kPlus].get();
    int64_t* count = w.count[kPlus].get();
    real top = loops_.cell_row(s + from, to - from, half_, w.cell + from, best + rows_.begin(j) + from);
    best[k] = std::max(best[k], top);
    uint32_t* table = w.row_table[kPlus].count.data() + offset(w.row_table[kPlus], k);
    for (int column = from; column < to; ++column) {
      int32_t cell = w.cell[column];
      ++count[cell];
      if (cell < first_cell_) continue;
      if (int t = threshold_of(cell, s[column]); t >= 0) ++table[t], w.row_table_used[kPlus] = true;
    }
  }

  bool count_negatives(int64_t k, int64_t j, int row, int from, int to, Scratch& w) {
    if (from >= to) return false;
    const real* s = w.s.get() + int64_t{row} * rows_.tile;
    real* best = w.best[kMinus].get();
    real top = loops_.cell_row(s + from, to - from, half_, w.cell + from, best + rows_.begin(j) + from);
    best[k] = std::max(best[k], top);
    int64_t* count = w.count[kMinus].get();
    int listed = 0;
    for (int column = from; column < to; ++column) {
      int32_t cell = w.cell[column];
      ++count[cell];
      w.listed[listed] = column;
      listed += cell >= first_cell_;
    }
    uint32_t* table = w.row_table[kMinus].count.data() + offset(w.row_table[kMinus], k);
    uint32_t* columns = w.column_table.count.data();
    for (int l = 0; l < listed; ++l) {
      int column = w.listed[l], t = threshold_of(w.cell[column], s[column]);
      if (t >= 0) ++table[t], ++columns[w.column_base[column] + t];
    }
    return listed > 0;
  }

  // The last threshold that is at most s, which lies in cell `cell`; -1 if none is.
  int threshold_of(int32_t cell, real s) const {
    int t = start_[cell];
    while (t < p_.thresholds && p_.threshold[t] <= s) ++t;
    return t - 1;
  }

  void merge(const Scratch& w) {
    for (int side : {kPlus, kMinus}) {
      for (int64_t k = 0; k < p_.cells(); ++k) result_.count[side][k] += w.count[side].get()[k];
      for (int64_t k = 0; k < rows_.size; ++k) {
        real& best = result_.best[side][rows_.order[k]];
        best = std::max(best, w.best[side].get()[k]);
      }
    }
  }

  const CountProblem<real>& p_;
  const CountResult<real>& result_;
  const Host<real>& host_;
  const PairLoops<real>& loops_;
  int32_t half_, first_cell_;
  Embeddings<real> rows_;
  std::vector<int64_t> last_;   // [size] end of the sorted rows of row k's class
  std::vector<int32_t> start_;  // [cells] see make_starts()
  std::vector<std::mutex> locks_;
};

}  // namespace

template <class real>
void counts(const CountProblem<real>& problem, const CountResult<real>& result, const Host<real>& host, Isa isa) {
  CountWalk<real>(problem, result, host, isa).run();
}
template void counts(const CountProblem<float>&, const CountResult<float>&, const Host<float>&, Isa);
template void counts(const CountProblem<double>&, const CountResult<double>&, const Host<double>&, Isa);

}  // namespace tcm::cpu
