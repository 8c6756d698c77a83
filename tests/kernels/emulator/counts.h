// One emulated count: memory as a device would have it, filled with NaNs, and the kernels' results.
#pragma once

#include "../../../csrc/cuda/pair_counts.cu"
#include "../../../csrc/cuda/prologue.cu"

#include <cstring>
#include <memory>
#include <vector>

namespace tcm::cuda {

struct CountOutcome {
  std::vector<int64_t> count, class_count;  // [2, cells], [2, classes + 1, thresholds]
  std::vector<float> best;                  // [2, n]
};

inline CountOutcome emulate_counts(const PairCountProblem& problem, const Tuning& tuning) {
  CountOutcome out;
  out.count.assign(2 * ((int64_t{2} << problem.bits) + 1), -1);
  out.class_count.assign(2 * (problem.classes + 1) * problem.thresholds, -1);
  out.best.resize(2 * problem.n);
  std::memset(out.best.data(), 0xff, out.best.size() * sizeof(float));
  int64_t bytes = workspace_bytes(problem);
  std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(256, bytes), &std::free);
  std::memset(workspace.get(), 0xff, bytes);
  PairCountResult result{out.count.data(), out.class_count.data(), out.best.data()};
  const char* error = run_counts(problem, result, workspace.get(), nullptr, tuning);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(workspace.get(), bytes);
#endif
  if (error != nullptr) throw std::runtime_error(error);
  return out;
}

}  // namespace tcm::cuda
