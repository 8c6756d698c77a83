// The TCM loss on a CPU: one walk over the similarity tiles. Knows nothing of torch.
#pragma once

#include "../tcm_fused.h"
#include "embeddings.h"
#include "pair_loops.h"

namespace tcm::cpu {

// Throws what the host throws, and std::bad_alloc. The bits of the result depend on the problem, on
// host.threads and on the instruction set, on nothing else.
template <class real>
void tcm_loss(const Problem<real>& problem, const Result<real>& result, const Host<real>& host, Isa isa);

}  // namespace tcm::cpu
