// One emulated call: memory as a device would have it, filled with NaNs, and the kernels' results.
#pragma once

#include "../../../csrc/cuda/prologue.cu"
#include "../../../csrc/cuda/tcm_loss.cu"

#include <cstring>
#include <memory>
#include <vector>

namespace tcm::cuda {

struct Outcome {
  float loss;
  std::vector<float> grad_x, grad_ref;  // empty: not wanted; those of both sides with per_side
  double penalty[2];
  int64_t count[2];
};

inline Outcome emulate(const Problem& problem, bool grad_x, bool grad_ref, const Tuning& tuning) {
  Outcome out;
  std::memset(&out.loss, 0xff, sizeof out.loss), std::memset(out.penalty, 0xff, sizeof out.penalty);
  std::memset(out.count, 0xff, sizeof out.count);
  auto poisoned = [](int64_t size) {
    std::vector<float> v(size);
    std::memset(v.data(), 0xff, size * sizeof(float));
    return v;
  };
  const int64_t sides = problem.per_side ? 2 : 1;
  if (grad_x) out.grad_x = poisoned(sides * problem.n * problem.d);
  if (grad_ref) out.grad_ref = poisoned(sides * problem.m * problem.d);
  int64_t bytes = bytes_of(problem, tuning);
  std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(256, bytes), &std::free);
  std::memset(workspace.get(), 0xff, bytes);
  Result result{&out.loss, grad_x ? out.grad_x.data() : nullptr, grad_ref ? out.grad_ref.data() : nullptr,
      out.penalty, out.count};
  const char* error = run(problem, result, workspace.get(), nullptr, tuning);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(workspace.get(), bytes);
#endif
  if (error != nullptr) throw std::runtime_error(error);
  return out;
}

}  // namespace tcm::cuda
