// Hopper's machine operations (sm_90a), in PTX: barriers in shared memory that count arrivals and bytes, copies of boxes
// of a matrix by the copy engine, products by warpgroups.
#pragma once

#include <cuda.h>  // types only

#include "ptx.cuh"

namespace tcm::cuda {

constexpr int kBoxRows = 128, kBoxColumns = 64;  // of halves: 128 bytes a row, the width of a swizzle

// Whether the code being compiled may use warpgroups; asked at run time, see `most_threads`.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TCM_SM90 1
#else
#define TCM_SM90 0
#endif

using TensorMap = CUtensorMap;

struct Barrier {
  uint64_t state;
};

__device__ __forceinline__ void barrier_init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// Makes barriers known to the copy engine; a __syncthreads() must follow.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and has the phase wait for `bytes` of copies.
__device__ __forceinline__ void barrier_expect(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity is over; the one before the first is odd.
__device__ __forceinline__ void barrier_wait(Barrier& barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@p bra DONE;\nbra "
      "WAIT;\nDONE:\n}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Starts the copy of a box of the matrix, from (row, column) on; chunk c of 16 bytes of row r comes to r * 128 +
// (c ^ r % 8) * 16. `to` is aligned to 1,024 bytes. Rows past the end are zeros.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, Barrier& barrier, int row, int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// A matrix of rows of 64 halves, swizzled as `copy_box` does, as an operand of `warpgroup_multiply`.
__device__ __forceinline__ uint64_t operand(const void* rows) {
  return static_cast<uint64_t>((shared_address(rows) & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
// The same from column `column` (a multiple of 16) on.
__device__ __forceinline__ uint64_t operand_at(uint64_t operand, int column) { return operand + (column * 2 >> 4); }

// A matrix of 128 columns as an operand that is read across: blocks of 64 columns, 16 KB each, rows of 128 bytes
// swizzled as by `copy_box`; from row `row` (a multiple of 16) on.
__device__ __forceinline__ uint64_t operand_across(const void* blocks, int row) {
  return static_cast<uint64_t>(((shared_address(blocks) & 0x3ffff) + row * 128) >> 4) |
         uint64_t{(128 * 128) >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// After this thread's ordinary writes to shared memory, and before the barrier that lets products read them.
__device__ __forceinline__ void writes_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product, and after registers of `d` or shared memory have been written otherwise.
__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `kPending` groups of products are under way.
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Waits for all products, which were into `d`. The compiler sees no tie between the wait and d: one is made, so that d is
// not read or moved before.
template <int kSize>
__device__ __forceinline__ void warpgroup_finish(float (&d)[kSize]) {
  warpgroup_wait<0>();
#pragma unroll
  for (int k = 0; k < kSize; ++k) asm volatile("" : "+f"(d[k])::"memory");
}

// The accumulators of a product by a warpgroup: PTX wants each register by its number in the text, and as an operand.
#define TCM_NUMBERS_64                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TCM_NUMBERS_128                                                                          \
  TCM_NUMBERS_64                                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TCM_FLOATS_4(d, k) "+f"(d[k]), "+f"(d[k + 1]), "+f"(d[k + 2]), "+f"(d[k + 3])
#define TCM_FLOATS_16(d, k) TCM_FLOATS_4(d, k), TCM_FLOATS_4(d, k + 4), TCM_FLOATS_4(d, k + 8), TCM_FLOATS_4(d, k + 12)
#define TCM_FLOATS_64(d, k) \
  TCM_FLOATS_16(d, k), TCM_FLOATS_16(d, k + 16), TCM_FLOATS_16(d, k + 32), TCM_FLOATS_16(d, k + 48)

// d [64, 256] (+)= a [64, 16] b [256, 16] transposed, by a warpgroup; both operands in shared memory. A lane of warp w
// of the warpgroup holds rows 16 w + lane / 4 + 8 h and columns 8 n + lane % 4 * 2 + e of d, as d [4 n + 2 h + e].
__device__ __forceinline__ void warpgroup_multiply(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" TCM_NUMBERS_128 "}, %128, %129, p, 1, 1, 0, 0;\n}\n"
      : TCM_FLOATS_64(d, 0), TCM_FLOATS_64(d, 64)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

// d [64, 128] += a [64, 16] b [16, 128], by a warpgroup; a in registers, as `multiply_add` has it in each warp's 16
// rows; d as above. a must stay as it is until the product has been waited for.
__device__ __forceinline__ void warpgroup_multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" TCM_NUMBERS_64
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
               : TCM_FLOATS_64(d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef TCM_NUMBERS_64
#undef TCM_NUMBERS_128
#undef TCM_FLOATS_4
#undef TCM_FLOATS_16
#undef TCM_FLOATS_64

// Registers a thread of the warpgroup has from here on.
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace tcm::cuda
