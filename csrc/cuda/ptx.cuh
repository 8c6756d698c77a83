// All machine operations of the kernels, in PTX. Without a GPU tests/ptx_machine executes the PTX that nvcc makes of the
// kernels: nothing here is written a second time for tests.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace tcm::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The bits of a Half pair in a 32-bit word, the first in the low half.
__device__ __forceinline__ Half low(uint32_t pair) { return {static_cast<uint16_t>(pair)}; }
__device__ __forceinline__ Half high(uint32_t pair) { return {static_cast<uint16_t>(pair >> 16)}; }

__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ Half to_half(double x) { return {__half_as_ushort(__double2half(x))}; }

// The block's dynamic shared memory; the kernels have no other.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// x itself, hidden from the compiler: values that depend on it are computed anew where they are used, and do not keep
// registers that a loop needs.
__device__ __forceinline__ int afresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The largest integer that is not above x, |x| < 2^22: one addition that rounds down, and an integer one.
__device__ __forceinline__ int floor_of(float x) {
  return __float_as_int(__fadd_rd(x, 12582912.0f)) - 0x4b400000;  // 1.5 * 2^23, where floats are a unit apart
}

// A word that other blocks of threads may be changing by atomics.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// Starts a copy of 16 bytes to shared memory; of these `bytes` are read (0 or 16), the rest is zero.
__device__ __forceinline__ void copy_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of halves; lane l gives the address of row l % 8 of matrix l / 8. The lane gets the elements
// (l / 4, l % 4 * 2 + 0..1) of each matrix, or of its transpose.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// d [16, 8] += a [16, 16] b [16, 8], by a warp. With g = lane / 4 and t = lane % 4 a lane holds
// a (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..); b (2t.., g), (2t + 8.., g); d (g, 2t..), (g + 8, 2t..).
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Barrier `number` of kThreads threads; the second also tells whether any is true.
template <int kThreads>
__device__ __forceinline__ void barrier_sync(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ bool barrier_any(int number, bool vote) {
  int any;
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %1, 0;\nbar.red.or.pred p, %2, %3, p;\nselp.s32 %0, 1, 0, p;\n}\n"
               : "=r"(any)
               : "r"(static_cast<int>(vote)), "r"(number), "n"(kThreads)
               : "memory");
  return any != 0;
}

}  // namespace tcm::cuda
