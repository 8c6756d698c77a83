// All machine operations of the kernels, each written twice: in PTX for nvcc, and as a model for a C++ compiler, with
// which the same kernels run on a CPU, thread by thread (the model's threads, barriers and copies: tests/emulator).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulator.h"  // threadIdx, __syncthreads, shuffles, vector types, launches
#endif

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

#if defined(__CUDACC__)

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

// x itself, but the compiler does not know: what follows from it is computed where it is used, not once and for all in
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
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A barrier of 256 threads, the workers, which need not be all of their block; the second also tells whether any is
// true.
__device__ __forceinline__ void workers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
__device__ __forceinline__ bool workers_any(bool vote) {
  int any;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %1, 0;\nbar.red.or.pred p, 1, 256, p;\nselp.s32 %0, 1, 0, p;\n}\n"
      : "=r"(any)
      : "r"(static_cast<int>(vote))
      : "memory");
  return any != 0;
}

// Starts `kernel` on `stream`; what went wrong, or cudaSuccess.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Parameters... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 << 10) {  // more than that only by leave: as much as there is, whoever launches it next
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream);
}

// Device memory that nothing may touch: only the model can see to that.
inline void guard(void*, int64_t) {}

#else  // the model

inline float to_float(Half x) {
  static const std::vector<float> table = [] {  // faster than the conversion, of which a product takes hundreds
    std::vector<float> values(1 << 16);
    for (unsigned bits = 0; bits < values.size(); ++bits) {
      _Float16 value;
      uint16_t half = static_cast<uint16_t>(bits);
      memcpy(&value, &half, 2);
      values[bits] = static_cast<float>(value);
    }
    return values;
  }();
  return table[x.bits];
}
inline Half to_half(double x) {
  _Float16 value = static_cast<_Float16>(x);
  Half half;
  memcpy(&half.bits, &value, 2);
  return half;
}

inline unsigned char* shared_memory() { return emulator::shared_memory(); }
inline int afresh(int x) { return x; }

inline int floor_of(float x) {
  emulator::require(std::fabs(x) < 1 << 22, "floor_of: out of range");
  return static_cast<int>(std::floor(x));
}
inline uint32_t load_relaxed(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }

inline void copy_16(void* to, const void* from, int bytes) {
  emulator::require(bytes == 0 || bytes == 16, "copy_16: 0 or 16 bytes");
  emulator::require(emulator::aligned(to, 16) && (bytes == 0 || emulator::aligned(from, 16)), "copy_16: not aligned");
  emulator::start_copy(to, from, bytes);
}
inline void copies_commit() { emulator::commit_copies(); }
template <int kPending>
inline void copies_wait() {
  emulator::wait_copies(kPending);
}

template <bool kTranspose>
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  struct Lane {
    uint64_t row[2];
    uint32_t r[4];
  } lane;
  emulator::require(emulator::aligned(row, 16), "load_matrices: row not aligned");
  lane.row[0] = static_cast<const uint64_t*>(row)[0], lane.row[1] = static_cast<const uint64_t*>(row)[1];
  emulator::warp_together("load_matrices", lane, [](Lane* const* lanes) {
    for (int l = 0; l < 32; ++l)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t pair = 0;
        for (int e = 0; e < 2; ++e) {
          int i = l / 4, j = l % 4 * 2 + e, from = 8 * matrix + (kTranspose ? j : i), k = kTranspose ? i : j;
          pair |= (lanes[from]->row[k / 4] >> (k % 4 * 16) & 0xffff) << (16 * e);
        }
        lanes[l]->r[matrix] = pair;
      }
  });
  for (int k = 0; k < 4; ++k) r[k] = lane.r[k];
}

// As tensor cores add: 16 products and the sum so far exactly, then rounded toward zero.
inline float toward_zero(double x) {
  float f = static_cast<float>(x);
  return std::fabs(static_cast<double>(f)) > std::fabs(x) ? std::nextafterf(f, 0.0f) : f;
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float d[4];
    uint32_t a[4], b[2];
  } lane{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::warp_together("multiply_add", lane, [](Lane* const* lanes) {
    float fa[16][16], fb[16][8];
    double fd[16][8] = {};  // a [row][k], b [k][column], their product
    for (int l = 0; l < 32; ++l) {
      int g = l / 4, k = l % 4 * 2;
      for (int part = 0; part < 4; ++part) {
        int row = g + part % 2 * 8, column = k + part / 2 * 8;
        fa[row][column] = to_float(low(lanes[l]->a[part])), fa[row][column + 1] = to_float(high(lanes[l]->a[part]));
      }
      for (int part = 0; part < 2; ++part) {
        fb[k + part * 8][g] = to_float(low(lanes[l]->b[part]));
        fb[k + part * 8 + 1][g] = to_float(high(lanes[l]->b[part]));
      }
    }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) fd[row][column] += static_cast<double>(fa[row][k]) * fb[k][column];
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 4; ++e) lanes[l]->d[e] = toward_zero(lanes[l]->d[e] + fd[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2]);
  });
  for (int k = 0; k < 4; ++k) d[k] = lane.d[k];
}

inline void workers_sync(int line = __builtin_LINE()) { emulator::sync_some(256, 0, line); }
inline bool workers_any(bool vote, int line = __builtin_LINE()) { return emulator::sync_some(256, vote, line) != 0; }

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Parameters... arguments) {
  return emulator::launch(grid, block, shared_bytes, [=] { kernel(arguments...); });
}

inline void guard(void* start, int64_t bytes) { emulator::guard(start, bytes); }

#endif

}  // namespace tcm::cuda
