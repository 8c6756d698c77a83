// The CPU kernels' host: the threads and matrix products that they are given. So they know nothing of torch.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace tcm::cpu {

template <class real>
struct Host {
  int threads;
  // Runs body(begin, end) over [0, size) in up to `threads` threads; body must not throw.
  std::function<void(int64_t size, const std::function<void(int64_t begin, int64_t end)>& body)> parallel_for;
  // s [m, n], rows `stride` apart, = a [m, d] times the transpose of b [n, d]; with `transposed` b is that transpose,
  // [d, n], its rows `b_stride` apart, and m and n are multiples of 16. Called by several threads at once.
  std::function<void(const real* a, int64_t m, const real* b, int64_t n, int64_t d, int64_t b_stride, real* s,
                     int64_t stride)>
      product;
  bool transposed = false;
  // c [m, d] += a [m, n] b [n, d], m and n multiples of 64. Called by several threads at once.
  std::function<void(const real* a, int64_t m, int64_t n, const real* b, int64_t d, real* c)> add_product;

  // s [m, n] = a [m, k] b, exactly, with b [k / 4, n, 4], for n = 64 and k a multiple of 64, a and b aligned to 64 bytes;
  // null where the processor has nothing faster than float32 for it. Called by several threads at once; each calls
  // `release_code_product` when it has done.
  std::function<void(const uint8_t* a, int64_t m, const int8_t* b, int64_t n, int64_t k, int32_t* s, int64_t stride)>
      code_product;
  std::function<void()> release_code_product = [] {};
  bool always_codes = false;  // use codes even where they are not expected to pay: for tests

  void parallel(int64_t size, const std::function<void(int64_t begin, int64_t end)>& body) const {
    if (threads == 1) return body(0, size);
    parallel_for(size, body);
  }
};

// Whether products use all bits of their operands. A process may let its libraries use fewer: torch's
// set_float32_matmul_precision("medium") turns float32 to bfloat16 where the processor multiplies that faster.
template <class real>
bool exact(const Host<real>& host) {
  constexpr int64_t kSize = 32;  // of a product that is large enough for such libraries
  constexpr real kOne = 1 + std::numeric_limits<real>::epsilon();
  constexpr auto diagonal = [](real value) {
    std::vector<real> matrix(kSize * kSize);
    for (int64_t k = 0; k < kSize; ++k) matrix[k * kSize + k] = value;
    return matrix;
  };
  static const std::vector<real> a = diagonal(kOne), b = diagonal(1);
  real s[kSize * kSize];
  host.product(a.data(), kSize, b.data(), kSize, kSize, kSize, s, kSize);
  for (int64_t k = 0; k < kSize; ++k)
    if (s[k * kSize + k] != kOne) return false;
  return true;
}

}  // namespace tcm::cpu
