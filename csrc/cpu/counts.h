// Counts of pairs by similarity, in all and by class, on a CPU.
#pragma once

#include "../problem.h"
#include "host.h"
#include "pair_loops.h"

namespace tcm::cpu {

// Throws std::invalid_argument if a row is not finite, std::bad_alloc, and whatever the host throws.
template <class real>
void counts(const CountProblem<real>& problem, const CountResult<real>& result, const Host<real>& host, Isa isa);

}  // namespace tcm::cpu
