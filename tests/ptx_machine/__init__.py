"""Executes on the CPU the PTX that nvcc and Triton make of the GPU kernels: see README.md."""
