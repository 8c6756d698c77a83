// Rows or columns as both kernels want them, sorted by label and of unit length; their memory; and the products that
// make similarities of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../memory.h"
#include "../problem.h"
#include "host.h"
#include "pair_loops.h"

namespace tcm::cpu {

constexpr int kStrip = 128;  // rows of one product on the diagonal, which stops short of the part below it

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kLine = 64;  // of the cache: matrix instructions are five times slower on operands that straddle them

// Memory not touched yet comes in huge pages: 512 times fewer page faults, 2 % of the whole loss at N = 8192.
inline void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Zeros. Pages that are not touched take no memory. On Linux an array of a huge page or more is a mapping of its own:
// malloc, once it has seen large blocks come and go, keeps those of up to 32 MiB when they are freed.
template <class T>
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;
  ~Array() { reset(); }

  void allocate(int64_t size) {
    reset();
    bytes_ = std::max<size_t>(size * sizeof(T), 1);
#ifdef __linux__
    if (bytes_ >= kHugePage) {
      memory_ = mmap(nullptr, bytes_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory_ == MAP_FAILED) memory_ = nullptr, throw OutOfMemory(bytes_, kPurpose);
      data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + kHugePage - 1) / kHugePage * kHugePage);
      use_huge_pages(data_, bytes_);
      return;
    }
#endif
    memory_ = std::calloc(bytes_ + kLine, 1);
    if (!memory_) throw OutOfMemory(bytes_, kPurpose);
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + kLine - 1) / kLine * kLine);
  }
  // The same without zeros, from blocks that were freed before: where everything is written, new pages cost more.
  void allocate_used(int64_t size) {
    reset();
    bytes_ = 0;
    memory_ = std::malloc(size * sizeof(T) + kLine);
    if (!memory_) throw OutOfMemory(size * sizeof(T), kPurpose);
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + kLine - 1) / kLine * kLine);
  }
  void reset() {
#ifdef __linux__
    if (memory_ && bytes_ >= kHugePage) munmap(memory_, bytes_ + kHugePage), memory_ = nullptr;
#endif
    std::free(memory_);
    memory_ = nullptr, data_ = nullptr;
  }
  T* get() const { return data_; }

 private:
  static constexpr const char* kPurpose = "an array of the kernel";
  void* memory_ = nullptr;
  T* data_ = nullptr;
  size_t bytes_ = 0;
};

inline double norm_of(const auto* x, int64_t d, double* peak) {  // |x| / peak, peak = max |x_k|, for any finite x
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
double normalise(const PairLoops<real>& loops, const real* x, int64_t d, real* unit) {
  double squares = loops.squares(x, d), peak = 1, norm = std::sqrt(squares);
  if (!(squares > 1e-200 && squares < 1e200)) norm = norm_of(x, d, &peak);  // over- or underflow, zero, not finite
  if (norm * peak < kEps) peak = 1, norm = norm == 0 ? 0 : kEps;
  double inverse = norm == 0 ? 0 : 1 / norm;
  if (peak == 1) {
    loops.scale(x, d, inverse, unit);
  } else {
    for (int64_t k = 0; k < d; ++k) unit[k] = static_cast<real>(x[k] / peak * inverse);
  }
  return inverse / peak;
}

// Rows or columns: those with a label >= 0, sorted by label, unit length, in panels of `tile` rows.
template <class real>
struct Embeddings {
  int64_t size, d, panels;
  int tile;
  std::vector<int64_t> order;   // [size] input row of sorted row k
  std::vector<int64_t> label;   // [size]
  std::vector<double> inverse;  // [size] 1 / max(|x|, kEps); 0 for a zero row
  Array<real> unit;             // [panels * tile, d] x^, then zeros
  std::atomic<bool> finite{true};

  int64_t begin(int64_t panel) const { return panel * tile; }
  int rows(int64_t panel) const { return static_cast<int>(std::min<int64_t>(tile, size - panel * tile)); }
  const real* unit_at(int64_t panel) const { return unit.get() + begin(panel) * d; }

  // Sorts; the rows themselves come with `load`, panel by panel.
  void sort(const int64_t* y, int64_t n, int64_t width, int tile_rows, bool transpose) {
    order.reserve(n);
    for (int64_t i = 0; i < n; ++i)
      if (y[i] >= 0) order.push_back(i);
    std::sort(order.begin(), order.end(), [y](int64_t a, int64_t b) { return y[a] != y[b] ? y[a] < y[b] : a < b; });
    size = order.size(), d = width, tile = tile_rows, panels = (size + tile - 1) / tile;
    label.resize(size), inverse.resize(size);
    unit.allocate_used(panels * tile * d);
    std::fill_n(unit.get() + size * d, (panels * tile - size) * d, real{0});
    if (transpose) transposed_.allocate(panels * tile * d), is_transposed_.reset(new std::once_flag[panels]);
  }

  void load(const PairLoops<real>& loops, const real* x, const int64_t* y, int64_t panel) {
    for (int64_t k = begin(panel); k < begin(panel) + rows(panel); ++k) {
      label[k] = y[order[k]];
      inverse[k] = normalise(loops, x + order[k] * d, d, unit.get() + k * d);
      if (std::isnan(inverse[k])) finite = false;
    }
  }

  // x^ [d, tile] of a panel transposed, if `sort` was told so: done, and taking memory, where it is first asked for.
  const real* transposed_at(const PairLoops<real>& loops, int64_t panel) const {
    real* out = transposed_.get() + begin(panel) * d;
    std::call_once(is_transposed_[panel], [&] { loops.transpose(unit_at(panel), tile, d, out); });
    return out;
  }
  void forget_transposed() { transposed_.reset(); }

 private:
  Array<real> transposed_;
  std::unique_ptr<std::once_flag[]> is_transposed_;
};

// s[j], s[j + 1], ... of row i, and of each row to `end_i` in the next `stride` of s: the similarities of sorted rows
// [i, end_i) and columns [j, end_j). s may be written up to the next multiple of 16 beyond both ends.
template <class real>
void similarities(const Host<real>& host, const PairLoops<real>& loops, const Embeddings<real>& rows, int64_t i,
                  int64_t end_i, const Embeddings<real>& columns, int64_t j, int64_t end_j, real* s, int64_t stride) {
  int64_t d = rows.d, tile = columns.tile;
  const real* a = rows.unit.get() + i * d;
  if (!host.transposed) {  // one product of several panels is faster than one each: operands are packed less often
    host.product(a, end_i - i, columns.unit.get() + j * d, end_j - j, d, d, s + j, stride);
    return;
  }
  auto padded = [](int64_t size) { return (size + 15) / 16 * 16; };  // few sizes, so that few kernels are generated
  for (int64_t end; j < end_j; j = end) {
    end = std::min((j / tile + 1) * tile, end_j);
    const real* b = columns.transposed_at(loops, j / tile) + j % tile;
    host.product(a, padded(end_i - i), b, padded(end - j), d, tile, s + j, stride);
  }
}

}  // namespace tcm::cpu
