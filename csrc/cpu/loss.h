// The loss on a CPU: one walk over the tiles of similarities.
#pragma once

#include "../problem.h"
#include "host.h"
#include "pair_loops.h"

namespace tcm::cpu {

// Throws std::bad_alloc, and whatever the host throws. The bits of the result depend on the problem, on
// host.threads and on the instruction set, on nothing else.
template <class real>
void loss(const Problem<real>& problem, const Result<real>& result, const Host<real>& host, Isa isa);

}  // namespace tcm::cpu
