// The machine as one device: kernels by architecture, for the CUDA runtime (cudart.cpp) and for Python (interface.cpp).
#pragma once

#include "machine.h"

namespace ptx_machine {

// Of the code that is selected; by its name in C++, which is the same in every compilation. Null: there is none.
Kernel* find_kernel(const std::string& mangled);
const std::string& selected();
size_t shared_per_block();  // bytes that a block may have with leave

// False, with a report, if the launch fails.
bool launch_or_report(Kernel& kernel, const std::string& name, Dim grid, Dim block, size_t shared,
                      const void* const* arguments);

// A tensor map as the driver makes one; false if the driver would refuse. swizzle: 0 none, 1 of 32 bytes, 2 of 64, 3 of 128.
bool make_tensor_map(void* out, void* address, int element, u32 rank, const u64* size, const u64* pitch, const u32* box,
                     int swizzle);

}  // namespace ptx_machine
