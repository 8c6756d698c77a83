// The counts for ctypes, their sizes for tests included: see kernels.py.
#include "counts.cu"

extern "C" {

struct CountsCall {
  int64_t symmetric, n, m, d, classes, thresholds, bits, sm, sm_count, shared_per_block, shared_per_sm, window, chunk,
      one_chunk;
  const void *x, *y, *ref_x, *ref_y, *threshold;
  void *count, *class_count, *best, *ref_best;
};

static tcm::CountProblem<float> problem_of(const CountsCall& c) {
  tcm::CountProblem<float> p{};
  p.symmetric = c.symmetric, p.n = c.n, p.m = c.m, p.d = c.d, p.classes = c.classes, p.thresholds = c.thresholds,
  p.bits = static_cast<int>(c.bits);
  p.x = static_cast<const float*>(c.x), p.y = static_cast<const int64_t*>(c.y);
  p.ref_x = static_cast<const float*>(c.ref_x), p.ref_y = static_cast<const int64_t*>(c.ref_y);
  p.threshold = static_cast<const float*>(c.threshold);
  return p;
}
static tcm::cuda::Device device_of(const CountsCall& c) {
  return {static_cast<int>(c.sm), static_cast<int>(c.sm_count), static_cast<int>(c.shared_per_block),
          static_cast<int>(c.shared_per_sm)};
}

int64_t counts_bytes(const CountsCall* c) { return tcm::cuda::workspace_bytes(problem_of(*c), device_of(*c)); }
const char* counts_run(const CountsCall* c, void* workspace) {
  tcm::CountResult<float> r{};
  const int64_t cells = problem_of(*c).cells(), class_cells = (c->classes + 1) * c->thresholds;
  for (int side = 0; side < 2; ++side) {
    r.count[side] = static_cast<int64_t*>(c->count) + side * cells;
    r.class_count[side] = static_cast<int64_t*>(c->class_count) + side * class_cells;
    r.best[side] = static_cast<float*>(c->best) + side * c->n;
    r.ref_best[side] = static_cast<float*>(c->ref_best) + side * c->m;
  }
  tcm::cuda::Tuning t;
  t.window = static_cast<int>(c->window), t.chunk = c->chunk, t.one_chunk = c->one_chunk;
  return tcm::cuda::run_counts(problem_of(*c), device_of(*c), r, workspace, nullptr, t);
}

}  // extern "C"
