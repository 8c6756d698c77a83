// Stands in for CUDA's header of this name where the kernels run in the emulator: what csrc/cuda uses of it.
#pragma once

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration";
}
