// A machine that executes PTX text on the CPU: see README.md.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ptx_machine {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

struct Dim {
  u32 x = 1, y = 1, z = 1;
  u32 size() const { return x * y * z; }
};

// Kept in the 128 bytes of a tensor map, in place of the driver's own form.
struct TensorMap {
  u64 magic, address;
  u64 size[5];
  u64 pitch[4];  // bytes, of dimension 1 and up
  u16 box[5];
  u8 stride[5];
  u8 rank, element, swizzle;  // swizzle: 0 none, 1 of 32 bytes, 2 of 64, 3 of 128
  static constexpr u64 kMagic = 0x66616b6554656e73;
};
static_assert(sizeof(TensorMap) <= 128);

// Device memory: host memory whose bounds and state, byte by byte, the machine knows.
enum GlobalState : u8 { kNeverWritten, kHolds, kForbidden };
struct Allocation {
  u64 begin, end;
  bool foreign = false;             // the host's own memory, lent
  std::vector<u8> state;            // GlobalState
  std::vector<u32> writer, reader;  // tag of the block of threads, or of its launch
  struct Last {
    u32 write = 0, read = 0;    // when, by the clock of
    u8 writer = 0, reader = 0;  // this warp of that block
  };
  std::vector<Last> last;
};
void* allocate(size_t bytes);
void adopt(void* memory, size_t bytes);  // memory of the host's that is to be device memory, all of it written
void release(void* memory);
void mark(const void* memory, size_t bytes, GlobalState state);

struct Kernel;
struct Module {
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  ~Module();
};
std::unique_ptr<Module> load(const std::string& text, const std::string& name);

int most_threads(const Kernel& kernel);
size_t parameters(const Kernel& kernel);
size_t parameter_bytes(const Kernel& kernel, size_t i);

// Runs a kernel to its end; each of `arguments` points to one.
void launch(Kernel& kernel, Dim grid, Dim block, size_t dynamic_shared, const void* const* arguments);

void set_seed(u64 seed);    // of the order of warps and copies
void set_lenient(bool on);  // as Triton needs it: mbarriers are shown to the copy engine without a fence, and several
                            // lanes write one value to one place

// How tensor cores add up: exactly, rounded once for each k16 step; or cutting off as GPUs do (see products.cpp).
enum class Sums { kExact, kTruncated };
void set_sums(Sums sums);

void report(const std::string& what);  // an error; the same one is kept once
std::string take_reports();
std::string coverage();  // a line a kernel launched so far: name, launches, instructions executed and in all

}  // namespace ptx_machine
