// The loss for ctypes, its sizes for tests included: see kernels.py.
#include "loss.cu"

extern "C" {

struct LossCall {
  int64_t symmetric, n, m, d, type, fp16, row_offset, sm, sm_count, rectangle, screen_from, chunk, one_chunk;
  const void *x, *y, *ref_x, *ref_y;
  const double *device_margin, *device_weight;  // null: the numbers below
  void *loss, *grad_x, *grad_ref, *penalty, *count;
  double margin[2], weight[2];
};

static tcm::Problem<void> problem_of(const LossCall& c) {
  tcm::Problem<void> p{};
  p.symmetric = c.symmetric != 0, p.n = c.n, p.m = c.m, p.d = c.d, p.fp16 = c.fp16 != 0, p.row_offset = c.row_offset;
  p.x = c.x, p.y = static_cast<const int64_t*>(c.y);
  p.ref_x = c.ref_x, p.ref_y = static_cast<const int64_t*>(c.ref_y);
  p.margin = {{c.margin[0], c.margin[1]}, c.device_margin};
  p.weight = {{c.weight[0], c.weight[1]}, c.device_weight};
  return p;
}
static tcm::cuda::Device device_of(const LossCall& c) {
  return {static_cast<int>(c.sm), static_cast<int>(c.sm_count), 0, 0};
}
static tcm::cuda::Tuning tuning_of(const LossCall& c) {
  tcm::cuda::Tuning t;
  t.rectangle = static_cast<int>(c.rectangle), t.screen_from = static_cast<int>(c.screen_from), t.chunk = c.chunk,
  t.one_chunk = c.one_chunk;
  return t;
}

int64_t loss_bytes(const LossCall* c) { return tcm::cuda::bytes_of(problem_of(*c), device_of(*c), tuning_of(*c)); }
const char* loss_run(const LossCall* c, void* workspace) {
  tcm::Result<float> r{};
  r.loss = static_cast<float*>(c->loss), r.grad_x = static_cast<float*>(c->grad_x);
  r.grad_ref = static_cast<float*>(c->grad_ref);
  r.penalty = static_cast<double*>(c->penalty), r.count = static_cast<int64_t*>(c->count);
  return tcm::cuda::run(problem_of(*c), static_cast<tcm::cuda::Type>(c->type), device_of(*c), r, workspace, nullptr,
                        tuning_of(*c));
}

}  // extern "C"
