// The loss, its sizes for tests included, for ctypes.
#include "tcm_loss.cu"

extern "C" {
struct FakeLoss {
  int64_t symmetric, n, m, d, type, fp16, row_offset, per_side, sm, sm_count, block, chunk, one_chunk;
  const void *x, *y, *ref_x, *ref_y;
  void *loss, *grad_x, *grad_ref, *penalty, *count;
  double margin[2], lambda[2];
};
static tcm::cuda::Problem problem_of(const FakeLoss& f) {
  tcm::cuda::Problem p{};
  p.symmetric = f.symmetric, p.n = f.n, p.m = f.m, p.d = f.d, p.type = static_cast<tcm::cuda::Type>(f.type),
  p.fp16 = f.fp16;
  p.x = f.x, p.y = static_cast<const int64_t*>(f.y), p.ref_x = f.ref_x, p.ref_y = static_cast<const int64_t*>(f.ref_y);
  p.row_offset = f.row_offset, p.per_side = f.per_side, p.sm = f.sm, p.sm_count = f.sm_count;
  for (int k = 0; k < 2; ++k) p.margin[k] = f.margin[k], p.lambda[k] = f.lambda[k];
  return p;
}
static tcm::cuda::Tuning tuning_of(const FakeLoss& f) {
  tcm::cuda::Tuning t;
  if (f.block) t.block = static_cast<int>(f.block);
  if (f.chunk) t.chunk = f.chunk, t.one_chunk = f.one_chunk;
  return t;
}
int64_t fake_loss_bytes(const FakeLoss* f) { return tcm::cuda::bytes_of(problem_of(*f), tuning_of(*f)); }
const char* fake_loss(const FakeLoss* f, void* workspace) {
  tcm::cuda::Result r{};
  r.loss = static_cast<float*>(f->loss), r.grad_x = static_cast<float*>(f->grad_x),
  r.grad_ref = static_cast<float*>(f->grad_ref);
  r.penalty = static_cast<double*>(f->penalty), r.count = static_cast<int64_t*>(f->count);
  return tcm::cuda::run(problem_of(*f), r, workspace, nullptr, tuning_of(*f));
}
}
