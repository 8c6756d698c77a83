// The Python module tcm_fused._C: importing it registers the operators; it has the facts of the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/pair_loops.h"
#include "tcm_sources.h"  // written by setup.py

namespace tcm::cpu {
bool multiplies_codes();  // cpu/operators.cpp
}
namespace tcm::cuda {
std::string runtime_error();  // cuda/operators.cpp
}

PYBIND11_MODULE(_C, module) {
  module.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"compiler", TCM_COMPILER},
        {"torch", TCM_TORCH_VERSION},
        {"cuda_compiler", TCM_CUDA_COMPILER},            // nvcc and its version, or why there was none
        {"cuda_architectures", TCM_CUDA_ARCHITECTURES},  // "sm_80 compute_100": machine code, PTX; or empty
        {"sources", TCM_SOURCES},                        // digest: see tcm_fused/backends/extension.py
        {"cpu_instruction_set", tcm::cpu::name(tcm::cpu::best_isa())},
        {"cpu_codes", tcm::cpu::multiplies_codes() ? "decided in 8 bits" : "none: no fast products of bytes here"},
    };
  });
#if TCM_CUDA
  module.def("cuda_runtime_error", &tcm::cuda::runtime_error);
#endif
}
