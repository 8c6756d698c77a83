// The Python module tcm_fused._C: importing it registers the operators; it tells what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/pair_loops.h"

PYBIND11_MODULE(_C, module) {
  module.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"compiler", TCM_COMPILER},
        {"torch", TCM_TORCH_VERSION},
        {"cuda_architectures", ""},
        {"cpu_instruction_set", tcm::cpu::name(tcm::cpu::best_isa())},
    };
  });
}
