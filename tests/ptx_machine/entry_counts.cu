// The counts, their sizes for tests included, for ctypes.
#include "pair_counts.cu"

extern "C" {
struct FakeCounts {
  int64_t n, d, classes, thresholds, bits, sm, sm_count, shared_per_block, shared_per_sm, window;
  const void *x, *y, *threshold;
  void *count, *class_count, *best;
};
static tcm::cuda::PairCountProblem problem_of(const FakeCounts& f) {
  tcm::cuda::PairCountProblem p{};
  p.n = f.n, p.d = f.d, p.classes = f.classes, p.thresholds = f.thresholds, p.bits = static_cast<int>(f.bits);
  p.x = static_cast<const float*>(f.x), p.y = static_cast<const int64_t*>(f.y),
  p.threshold = static_cast<const float*>(f.threshold);
  p.sm = f.sm, p.sm_count = f.sm_count, p.shared_per_block = f.shared_per_block, p.shared_per_sm = f.shared_per_sm;
  return p;
}
int64_t fake_counts_bytes(const FakeCounts* f) { return tcm::cuda::workspace_bytes(problem_of(*f)); }
const char* fake_counts(const FakeCounts* f, void* workspace) {
  tcm::cuda::PairCountResult r{};
  r.count = static_cast<int64_t*>(f->count), r.class_count = static_cast<int64_t*>(f->class_count),
  r.best = static_cast<float*>(f->best);
  tcm::cuda::Tuning t;
  if (f->window >= 0) t.window = static_cast<int>(f->window);
  return tcm::cuda::run_counts(problem_of(*f), r, workspace, nullptr, t);
}
}
