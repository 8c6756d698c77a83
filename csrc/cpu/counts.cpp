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
// 1. Sort rows and columns by class and normalise them (`Embeddings`): the positives of a row are one range of columns.
// 2. Walk all pairs, or where the columns are the rows the upper triangle, in tiles of similarities (a matrix product
//    each). Every pair is counted once in its thread's grid. Only pairs from the first threshold on are counted by
//    class too: a few in a hundred, typically.
// 3. A tile has rows of few classes (they are sorted), so their counts fit the second-level cache: they are taken in
//    tables of the tile's own and added to the result tile by tile, under locks that are rarely contended.
// Everything is an integer or a maximum, so the result does not depend on timing.

namespace tcm::cpu {
namespace {

constexpr int kCountTile = 256;  // rows and columns of the largest tile
constexpr int kRun = 8;          // tiles in a row that one thread takes at once: they share their rows' tables
constexpr int kClassLock = 64;   // classes behind one lock

// Rows or columns, with the classes that there are among them.
template <class real>
struct ClassedEmbeddings : Embeddings<real> {
  std::vector<int64_t> classes;  // ascending; all from CountProblem::classes on are one
  std::vector<int64_t> place;    // [size] of a sorted row's class in `classes`
  int64_t longest = 0;           // classes of a panel, at most

  void number(int64_t counted) {
    place.resize(this->size);
    for (int64_t k = 0; k < this->size; ++k) {
      int64_t id = std::min(this->label[k], counted);
      if (classes.empty() || classes.back() != id) classes.push_back(id);
      place[k] = static_cast<int64_t>(classes.size()) - 1;
    }
    for (int64_t panel = 0; panel < this->panels; ++panel) longest = std::max(longest, classes_of(panel));
  }
  int64_t classes_of(int64_t panel) const {
    int64_t begin = this->begin(panel);
    return place[begin + this->rows(panel) - 1] + 1 - place[begin];
  }
};

template <class real>
class CountWalk {
 public:
  CountWalk(const CountProblem<real>& problem, const CountResult<real>& result, const Host<real>& host, Isa isa)
      : p_(problem),
        result_(result),
        host_(host),
        loops_(pair_loops<real>(isa)),
        half_(int32_t{1} << problem.bits),
        columns_(problem.symmetric ? rows_ : ref_) {}

  void run() {
    prepare(rows_, p_.x, p_.y, p_.n, p_.symmetric && host_.transposed);
    if (!p_.symmetric) prepare(ref_, p_.ref_x, p_.ref_y, p_.m, host_.transposed);
    if (!rows_.finite || !columns_.finite) throw std::invalid_argument("embeddings must be finite");
    make_ranges();
    make_starts();
    for (int side : {kPlus, kMinus}) {
      std::fill_n(result_.count[side], p_.cells(), 0);
      std::fill_n(result_.class_count[side], (p_.classes + 1) * p_.thresholds, 0);
      std::fill_n(result_.best[side], p_.n, kNone);
      if (!p_.symmetric) std::fill_n(result_.ref_best[side], p_.m, kNone);
    }
    walk();
  }

 private:
  using Set = ClassedEmbeddings<real>;
  static constexpr real kNone = -std::numeric_limits<real>::infinity();

  // The counts of one side of a tile, [its classes, thresholds].
  struct Table {
    const Set* set = nullptr;
    int64_t first = 0;            // place of its first class
    int64_t size = 0;             // its classes
    std::vector<uint32_t> count;  // a run has less than 2^32 pairs
  };

  using Low = uint8_t;  // small, so that the cells in use stay in the cache

  struct Scratch {            // of one thread
    Array<real> s;            // [row tile, column tile]
    Array<Low> low[2];        // [cells] counts, of which what is carried over goes to `high`
    Array<int64_t> high[2];   // [cells]
    Array<real> best[2];      // [rows] by sorted row
    Array<real> ref_best[2];  // [columns] by sorted column; not allocated where these are the rows
    Table row_table[2], column_table;
    bool row_table_used[2];
    int32_t cell[kCountTile], listed[kCountTile], column_base[kCountTile];
  };

  // Step 1.
  void prepare(Set& set, const real* x, const int64_t* y, int64_t n, bool transposed) {
    constexpr int kPerThread = 4;  // tiles on a side for each thread, so that all threads have work to the end
    int64_t tile = (n / (kPerThread * host_.threads) + 63) / 64 * 64;
    set.sort(y, n, p_.d, static_cast<int>(std::clamp<int64_t>(tile, 64, kCountTile)), transposed);
    host_.parallel(set.panels, [&](int64_t from, int64_t to) {
      for (int64_t panel = from; panel < to; ++panel) set.load(loops_, x, y, panel);
    });
    set.number(p_.classes);
  }

  // The columns of each row's class.
  void make_ranges() {
    first_.resize(rows_.size), last_.resize(rows_.size);
    int64_t a = 0, b = 0;
    for (int64_t k = 0; k < rows_.size; ++k) {
      while (a < columns_.size && columns_.label[a] < rows_.label[k]) ++a;
      while (b < columns_.size && columns_.label[b] <= rows_.label[k]) ++b;
      first_[k] = a, last_[k] = b;
    }
  }

  // start_[k]: number of thresholds at or below the lower end of cell k. From there the exact comparison goes on.
  void make_starts() {
    first_cell_ = 2 * half_ + 1;
    if (p_.thresholds == 0) return;
    start_.resize(p_.cells());
    threshold_.assign(p_.threshold, p_.threshold + p_.thresholds);
    threshold_.push_back(std::numeric_limits<real>::infinity());
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
    int64_t across = columns_.panels, tiles = rows_.panels * across;
    if (p_.symmetric) tiles = (tiles + across) / 2;
    if (result_.progress) result_.progress[0] = 0, result_.progress[1] = tiles;
    std::vector<std::pair<int64_t, int64_t>> runs;  // row panel, first column panel
    for (int64_t i = 0; i < rows_.panels; ++i)
      for (int64_t j = p_.symmetric ? i : 0; j < across; j += kRun) runs.emplace_back(i, j);
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
          for (int side : {kPlus, kMinus}) {
            std::fill_n(w.best[side].get(), rows_.size, kNone);
            if (!p_.symmetric) std::fill_n(w.ref_best[side].get(), columns_.size, kNone);
          }
          for (int64_t t; !failed && (t = next++) < static_cast<int64_t>(runs.size());) {
            auto [i, j] = runs[t];
            one_run(i, j, std::min(across, j + kRun), w);
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
    w.s.allocate(int64_t{rows_.tile} * columns_.tile);
    for (int side : {kPlus, kMinus}) {
      w.low[side].allocate(p_.cells()), w.high[side].allocate(p_.cells()), w.best[side].allocate(rows_.size);
      if (!p_.symmetric) w.ref_best[side].allocate(columns_.size);
      w.row_table[side].set = &rows_, w.row_table[side].count.reserve(rows_.longest * p_.thresholds);
    }
    w.column_table.set = &columns_, w.column_table.count.reserve(columns_.longest * p_.thresholds);
  }

  void one_run(int64_t i, int64_t from, int64_t to, Scratch& w) {
    for (int side : {kPlus, kMinus}) reset(w.row_table[side], i), w.row_table_used[side] = false;
    for (int64_t j = from; j < to; ++j) {
      multiply(i, j, w);
      reset(w.column_table, j);
      for (int column = 0; column < columns_.rows(j); ++column)
        w.column_base[column] = static_cast<int32_t>(offset(w.column_table, columns_.begin(j) + column));
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
    table.first = table.set->place[table.set->begin(panel)], table.size = table.set->classes_of(panel);
    table.count.assign(table.size * p_.thresholds, 0);
  }

  // Where `table` has the counts of sorted row k.
  int64_t offset(const Table& table, int64_t k) const { return (table.set->place[k] - table.first) * p_.thresholds; }

  void flush(const Table& table, int side) {
    const int64_t *id = table.set->classes.data() + table.first, size = p_.thresholds;
    const uint32_t* count = table.count.data();
    for (int64_t c = 0; c < table.size;) {
      int64_t lock = id[c] / kClassLock;
      std::lock_guard guard(locks_[lock]);
      for (; c < table.size && id[c] / kClassLock == lock; ++c, count += size) {
        int64_t* total = result_.class_count[side] + id[c] * size;
#pragma omp simd
        for (int64_t t = 0; t < size; ++t) total[t] += count[t];
      }
    }
  }

  // w.s = the tile's similarities, on the diagonal only those above it.
  void multiply(int64_t i, int64_t j, Scratch& w) {
    bool diagonal = p_.symmetric && i == j;
    int64_t m = rows_.rows(i), n = columns_.rows(j), tile = columns_.tile, strip = diagonal ? kStrip : m;
    for (int64_t row = 0; row < m; row += strip) {
      int64_t column = columns_.begin(j) + (diagonal ? row : 0), end = columns_.begin(j) + n;
      similarities(host_, loops_, rows_, rows_.begin(i) + row, rows_.begin(i) + std::min(strip, m - row) + row,
                   columns_, column, end, w.s.get() + row * tile - columns_.begin(j), tile);
    }
  }

  // Counts a row of a tile: negatives on both sides of the range of its own class. True if any has a class's count.
  bool count_row(int64_t i, int64_t j, int row, Scratch& w) {
    int64_t k = rows_.begin(i) + row, begin = columns_.begin(j), n = columns_.rows(j);
    int start = p_.symmetric && i == j ? row + 1 : 0;  // above the diagonal
    int a = static_cast<int>(std::clamp<int64_t>(first_[k] - begin, start, n));
    int b = static_cast<int>(std::clamp<int64_t>(last_[k] - begin, a, n));
    count_positives(k, j, row, a, b, w);
    bool left = count_negatives(k, j, row, start, a, w), right = count_negatives(k, j, row, b, static_cast<int>(n), w);
    return left || right;
  }

  const real* row_of(const Scratch& w, int row) const { return w.s.get() + int64_t{row} * columns_.tile; }
  real* column_best(const Scratch& w, int side) const { return (p_.symmetric ? w.best : w.ref_best)[side].get(); }

  void count_positives(int64_t k, int64_t j, int row, int from, int to, Scratch& w) {
    if (from >= to) return;
    const real* s = row_of(w, row);
    real *best = w.best[kPlus].get(), *other = column_best(w, kPlus) + columns_.begin(j);
    real top = loops_.cell_row(s + from, to - from, half_, w.cell + from, other + from);
    best[k] = std::max(best[k], top);
    uint32_t* table = w.row_table[kPlus].count.data() + offset(w.row_table[kPlus], k);
    Low* low = w.low[kPlus].get();
    int64_t* high = w.high[kPlus].get();
    for (int column = from; column < to; ++column) {
      int32_t cell = w.cell[column];
      count(cell, low, high);
      if (cell < first_cell_) continue;
      if (int t = threshold_of(cell, s[column]); t >= 0) ++table[t], w.row_table_used[kPlus] = true;
    }
  }

  bool count_negatives(int64_t k, int64_t j, int row, int from, int to, Scratch& w) {
    if (from >= to) return false;
    const real* s = row_of(w, row);
    real *best = w.best[kMinus].get(), *other = column_best(w, kMinus) + columns_.begin(j);
    real top = loops_.cell_row(s + from, to - from, half_, w.cell + from, other + from);
    best[k] = std::max(best[k], top);
    Low* low = w.low[kMinus].get();
    int64_t* high = w.high[kMinus].get();
    int listed = 0;
    for (int column = from; column < to; ++column) {
      int32_t cell = w.cell[column];
      count(cell, low, high);
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

  static void count(int32_t cell, Low* low, int64_t* high) {
    if (++low[cell] == 0) high[cell] += int64_t{std::numeric_limits<Low>::max()} + 1;
  }

  // The last threshold that is at most s, which lies in cell `cell`; -1 if none is.
  int threshold_of(int32_t cell, real s) const {
    int t = start_[cell];
    t += threshold_[t] <= s;  // mostly all: a jump that is not foreseen costs more
    while (threshold_[t] <= s) ++t;
    return t - 1;
  }

  void merge(const Scratch& w) {
    for (int side : {kPlus, kMinus}) {
      for (int64_t k = 0; k < p_.cells(); ++k) result_.count[side][k] += w.high[side].get()[k] + w.low[side].get()[k];
      raise(rows_, w.best[side].get(), result_.best[side]);
      if (!p_.symmetric) raise(columns_, w.ref_best[side].get(), result_.ref_best[side]);
    }
  }

  static void raise(const Set& set, const real* best, real* total) {
    for (int64_t k = 0; k < set.size; ++k) total[set.order[k]] = std::max(total[set.order[k]], best[k]);
  }

  const CountProblem<real>& p_;
  const CountResult<real>& result_;
  const Host<real>& host_;
  const PairLoops<real>& loops_;
  int32_t half_, first_cell_;
  Set rows_, ref_;  // the second only where the columns are others
  const Set& columns_;
  std::vector<int64_t> first_, last_;  // [rows] the columns of row k's class
  std::vector<int32_t> start_;         // [cells] see make_starts()
  std::vector<real> threshold_;        // [thresholds + 1] the last is infinite
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
