// Runs CUDA kernels on a CPU, block by block, one fiber per CUDA thread, in several orders.
//
// What it is strict about: a collective that not all threads reach together; shared memory, which starts as NaNs and
// ends where the launch said; asynchronous copies, whose target is NaN until a wait lets them land, as late as that
// wait allows. AddressSanitizer guards shared memory; ThreadSanitizer sees two threads of a block, or two blocks of a
// launch, that touch the same memory without a barrier between them. What it cannot show: PTX, registers, fences,
// speed.
#pragma once

#if !defined(__x86_64__)
#error "the emulator switches fibers in x86-64 assembly"
#endif

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using std::memcpy;

#if defined(__SANITIZE_THREAD__)
#define TCM_NO_TSAN __attribute__((no_sanitize_thread))
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
#define TCM_NO_TSAN
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct int2 {
  int x, y;
};
struct int3 {
  int x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

namespace emulator {

enum class Schedule {
  kInOrder,   // all threads in turn, each as far as it gets
  kGreedy,    // one warp as far as it gets, then the next
  kBackward,  // the last thread first
  kShuffled,  // any order, drawn anew each round
};
struct Options {
  Schedule schedule = Schedule::kInOrder;
  unsigned seed = 0;
};
inline Options options;

// By the name that the tests have for it.
inline Schedule schedule_of(const std::string& name) {
  if (name == "in order") return Schedule::kInOrder;
  if (name == "greedy") return Schedule::kGreedy;
  return name == "backward" ? Schedule::kBackward : Schedule::kShuffled;
}

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The emulator's own memory is no matter for ThreadSanitizer.
struct Unseen {
#if defined(__SANITIZE_THREAD__)
  Unseen() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unseen() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
#else
  Unseen() {}
  ~Unseen() {}
#endif
};
// What comes before release(p) is seen after acquire(p).
inline void release([[maybe_unused]] const void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(const_cast<void*>(p));
#endif
}
inline void acquire([[maybe_unused]] const void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(const_cast<void*>(p));
#endif
}

// Where a group of threads meets: all but the last to arrive wait, the last acts for all.
struct Meeting {
  int arrived = 0;
  unsigned generation = 0;
  const char* what = nullptr;
  int line = 0;
  void* lanes[128] = {};
};

struct Voting : Meeting {
  int votes = 0, result = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// A box of a matrix of halves, 64 columns wide, on its way to shared memory.
struct TensorMap {
  const unsigned char* base;
  int64_t rows;
  int columns, box_rows;
};
struct Box {
  unsigned char* to;
  TensorMap map;
  int row, column;
};

// A barrier in shared memory; its state is kept beside it, by address.
struct Barrier {
  uint64_t unused;
};
struct BarrierState {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
  std::vector<Box> boxes;  // copies that it counts
};

// A warpgroup's product, as one of its threads has started it.
struct Product {
  float* d;
  int columns;
  bool across;    // a is in registers, and b is read across its rows
  uint64_t a, b;  // operands: offsets in shared memory
  bool accumulate;
  uint32_t registers[4];
};

struct Block;
struct Thread {
  dim3 index;
  int number = 0;
  Block* block = nullptr;
  Meeting* meeting = nullptr;  // where it waits, or null
  unsigned generation = 0;
  std::function<bool()> ready;  // or what it waits for
  bool done = false;
  std::deque<std::vector<Product>> products{1};  // by group, the open one last
  std::deque<std::vector<Copy>> copies{1};  // by group, the open one last
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* sanitizer = nullptr;
};

struct Block {
  dim3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  std::vector<int> warp_live;
  Voting all, some;
  std::vector<Meeting> warpgroups;
  std::map<const void*, BarrierState> barriers;
  int live = 0;
  unsigned char* shared = nullptr;
  const std::function<void()>* body = nullptr;
  std::string error;  // of a thread; ends the launch
  void* stack_pointer = nullptr;  // of the scheduler
  void* sanitizer = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
};

constexpr size_t kStack = 128 << 10;
inline Thread* current = nullptr;

inline unsigned char* shared_memory() { return current->block->shared; }
inline void guard([[maybe_unused]] void* start, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(start, bytes);
#endif
}
inline bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Switching: saves the callee's registers on the stack that is left, and goes on where the other stack was left.
extern "C" void emulator_switch(void** save, void* load);
__asm__(
    ".text\n.weak emulator_switch\n.type emulator_switch,@function\nemulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

TCM_NO_TSAN inline void leave([[maybe_unused]] bool for_good) {  // the current fiber, for the scheduler
  Thread* thread = current;
  Block* block = thread->block;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &thread->sanitizer, block->stack, block->stack_size);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(block->sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  emulator_switch(&thread->stack_pointer, block->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread->sanitizer, &block->stack, &block->stack_size);
#endif
}

inline void resume(Thread& thread) {
  Block* block = thread.block;
  current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block->sanitizer, thread.stack, kStack);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(thread.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  emulator_switch(&block->stack_pointer, thread.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block->sanitizer, nullptr, nullptr);
#endif
  current = nullptr;
}

[[noreturn]] inline void fail(const std::string& what) {
  if (current == nullptr) throw Error(what);
  Block* block = current->block;
  if (block->error.empty())
    block->error = "block (" + std::to_string(block->index.x) + ", " + std::to_string(block->index.y) + ", " +
                   std::to_string(block->index.z) + ") thread " + std::to_string(current->number) + ": " + what;
  leave(true);
  std::abort();
}
inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

template <class Act>
void meet(Meeting& meeting, int expected, const char* what, int line, Act act) {
  if (meeting.arrived == 0) {
    meeting.what = what, meeting.line = line;
  } else if (std::strcmp(meeting.what, what) != 0 || meeting.line != line) {
    fail(std::string("threads meet in different places: ") + meeting.what + " and " + what);
  }
  if (++meeting.arrived == expected) {
    act();
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    current->meeting = &meeting, current->generation = meeting.generation;
    leave(false);
  }
}

// All lanes of a warp bring what they have, one acts for all. Orders no memory.
template <class Lane, class Act>
void warp_together(const char* what, Lane& lane, Act act) {
  Unseen unseen;
  Block* block = current->block;
  int warp = current->number / 32;
  require(block->warp_live[warp] == 32, "a warp's collective lacks lanes");
  Meeting& meeting = block->warps[warp];
  meeting.lanes[current->number % 32] = &lane;
  meet(meeting, 32, what, 0, [&] {
    Lane* lanes[32];
    for (int l = 0; l < 32; ++l) lanes[l] = static_cast<Lane*>(meeting.lanes[l]);
    act(static_cast<Lane* const*>(lanes));
  });
}

inline int sync(Voting& voting, int expected, int vote, int line) {
  release(&voting);
  int result;
  {
    Unseen unseen;
    voting.votes |= vote;
    meet(voting, expected, "barrier", line, [&] { voting.result = voting.votes, voting.votes = 0; });
    result = voting.result;  // stays until all have come to the next barrier
  }
  acquire(&voting);
  return result;
}
inline int sync_block(int vote, int line) { return sync(current->block->all, current->block->live, vote, line); }
inline int sync_some(int expected, int vote, int line) { return sync(current->block->some, expected, vote, line); }

// Asynchronous copies of the current thread.
inline void start_copy(void* to, const void* from, int bytes) {
  static_cast<uint64_t*>(to)[0] = static_cast<uint64_t*>(to)[1] = ~uint64_t{0};
  Unseen unseen;
  current->copies.back().push_back({to, from, bytes});
}
inline void commit_copies() {
  Unseen unseen;
  current->copies.emplace_back();
}
inline void wait_copies(int pending) {
  auto& copies = current->copies;
  while (static_cast<int>(copies.size()) - 1 > pending) {
    for (const Copy& copy : copies.front()) {
      auto* to = static_cast<uint64_t*>(copy.to);
      auto* from = static_cast<const uint64_t*>(copy.from);
      to[0] = copy.bytes ? from[0] : 0, to[1] = copy.bytes ? from[1] : 0;
    }
    Unseen unseen;
    copies.pop_front();
  }
}

// Barriers in shared memory.
inline BarrierState& state_of(Barrier& barrier) {
  auto found = current->block->barriers.find(&barrier);
  require(found != current->block->barriers.end(), "a barrier is used before its initialisation");
  return found->second;
}
inline void init_barrier(Barrier& barrier, int arrivals) {
  barrier.unused = 0;  // for AddressSanitizer and for a missing __syncthreads
  Unseen unseen;
  BarrierState& state = current->block->barriers[&barrier];
  state.arrivals = state.pending = arrivals;
}
inline void end_phase(BarrierState& state) {  // if all have arrived, and all bytes
  require(state.pending >= 0, "more arrivals at a barrier than it counts");
  if (state.pending == 0 && state.bytes == 0) ++state.phase, state.pending = state.arrivals;
}
inline void arrive_at(Barrier& barrier, int bytes) {
  release(&barrier);
  Unseen unseen;
  BarrierState& state = state_of(barrier);
  state.bytes += bytes, --state.pending;
  end_phase(state);
}
inline void start_box(void* to, const TensorMap& map, Barrier& barrier, int row, int column) {
  auto* words = static_cast<uint64_t*>(to);
  for (int k = 0; k < map.box_rows * 16; ++k) words[k] = ~uint64_t{0};
  release(&barrier);
  Unseen unseen;
  state_of(barrier).boxes.push_back({static_cast<unsigned char*>(to), map, row, column});
}
// Copies land when somebody waits for them.
inline void land(Barrier& barrier) {
  std::vector<Box> boxes;
  {
    Unseen unseen;
    boxes.swap(state_of(barrier).boxes);
  }
  for (const Box& box : boxes)
    for (int r = 0; r < box.map.box_rows; ++r)
      for (int c = 0; c < 8; ++c) {
        int64_t row = box.row + int64_t{r}, column = box.column + c * 8;
        bool inside = row < box.map.rows && column < box.map.columns;
        auto* from = reinterpret_cast<const uint64_t*>(box.map.base + (row * box.map.columns + column) * 2);
        auto* to = reinterpret_cast<uint64_t*>(box.to + r * 128 + (c ^ r % 8) * 16);
        to[0] = inside ? from[0] : 0, to[1] = inside ? from[1] : 0;
      }
  release(&barrier);
  Unseen unseen;
  BarrierState& state = state_of(barrier);
  for (const Box& box : boxes) state.bytes -= box.map.box_rows * 128;
  if (!boxes.empty()) end_phase(state);
}
inline void wait_for(Barrier& barrier, int parity) {
  for (;;) {
    acquire(&barrier);
    BarrierState* state;
    {
      Unseen unseen;
      state = &state_of(barrier);
      if (static_cast<int>(state->phase % 2) != parity) return;
    }
    land(barrier);
    Unseen unseen;
    if (static_cast<int>(state->phase % 2) != parity) continue;
    current->ready = [state, parity] { return static_cast<int>(state->phase % 2) != parity || !state->boxes.empty(); };
    leave(false);
  }
}

// Products of warpgroups: operands are read, and registers written, when the thread waits for them.
inline void start_product(const Product& product) {
  Unseen unseen;
  current->products.back().push_back(product);
}
inline void commit_products() {
  Unseen unseen;
  current->products.emplace_back();
}
template <class Multiply>
void wait_products(int pending, Multiply multiply) {
  std::vector<Product> mine;
  {
    Unseen unseen;
    while (static_cast<int>(current->products.size()) - 1 > pending) {
      for (const Product& product : current->products.front()) mine.push_back(product);
      current->products.pop_front();
    }
    Meeting& meeting = current->block->warpgroups[current->number / 128];
    meeting.lanes[current->number % 128] = &mine;
    meet(meeting, 128, "a wait for products", 0, [&] {
      for (size_t k = 0; k < mine.size(); ++k) {
        Product* all[128];
        for (int thread = 0; thread < 128; ++thread) {
          auto& theirs = *static_cast<std::vector<Product>*>(meeting.lanes[thread]);
          require(theirs.size() == mine.size() && theirs[k].a == mine[k].a && theirs[k].b == mine[k].b,
                  "threads of a warpgroup start different products");
          all[thread] = &theirs[k];
        }
        multiply(mine[k], static_cast<Product* const*>(all));
      }
    });
  }
#if defined(__SANITIZE_THREAD__)
  if (current->number % 32 != 0) return;
  auto read_row = [](uint64_t at, int bytes) {
    for (int k = 0; k < bytes; k += 8)
      static_cast<void>(*reinterpret_cast<volatile uint64_t*>(shared_memory() + ((at + k) ^ ((at >> 7 & 7) << 4))));
  };
  for (const Product& product : mine) {  // each warp has read its rows of a and all of b
    for (int row = 0; row < 16; ++row) {
      if (!product.across) read_row(product.a + (current->number % 128 / 2 + row) * 128, 32);
      else read_row(product.b + row * 128, 128), read_row(product.b + 128 * 128 + row * 128, 128);
    }
    for (int row = 0; row < 256 && !product.across; ++row) read_row(product.b + row * 128, 32);
  }
#endif
}

// What the threads of a launch release when they end: not what they acquire when they begin.
inline const void* end_of(const std::function<void()>* body) { return reinterpret_cast<const char*>(body) + 1; }

inline void run_thread(Thread* thread) {
  Block* block = thread->block;
  acquire(block->body);  // all that came before the launch
  (*block->body)();
  {
    Unseen unseen;
    for (auto& group : thread->copies) require(group.empty(), "the thread ends with copies under way");
    for (auto& group : thread->products) require(group.empty(), "the thread ends with products under way");
    thread->done = true;
    --block->warp_live[thread->number / 32];
    if (--block->live && block->all.arrived == block->live) fail("threads end while others wait for them");
  }
  release(end_of(block->body));
}

// Where a thread's fiber begins. It never returns, and so keeps out of ThreadSanitizer's count of calls.
TCM_NO_TSAN inline void begin_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &current->block->stack, &current->block->stack_size);
#endif
  run_thread(current);
  leave(true);
  std::abort();
}

// A stack, and what ThreadSanitizer takes for a thread. These are dear, so the blocks take turns with three sets of
// them: accesses of two blocks of a launch are unordered unless their numbers differ by a multiple of three.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* sanitizer = nullptr;
};
inline Fiber& fiber_of(unsigned block, size_t thread) {
  static std::vector<Fiber> sets[3];
  auto& set = sets[block % 3];
  while (set.size() <= thread) {
    set.emplace_back();
#if defined(__SANITIZE_THREAD__)
    set.back().sanitizer = __tsan_create_fiber(0);
#endif
  }
  return set[thread];
}

// The scheduler: lets threads run, one at a time, until all are done.
inline void run_block(Block& block, size_t shared_bytes) {
  int size = block.size.x * block.size.y * block.size.z;
  block.threads = std::vector<Thread>(size);
  block.warps = std::vector<Meeting>((size + 31) / 32);
  block.warpgroups = std::vector<Meeting>((size + 127) / 128);
  block.warp_live.assign(block.warps.size(), 0);
  block.live = size;
  size_t capacity = (shared_bytes + 1023) / 1024 * 1024 + 1024;
  block.shared = static_cast<unsigned char*>(std::aligned_alloc(1024, capacity));
  std::memset(block.shared, 0xff, shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.shared + shared_bytes, capacity - shared_bytes);
#elif defined(__SANITIZE_THREAD__)
  block.sanitizer = __tsan_get_current_fiber();
#endif
  std::vector<int> order(size);
  for (int k = 0; k < size; ++k) {
    Thread& thread = block.threads[k];
    thread.number = k, thread.block = &block;
    thread.index = dim3(k % block.size.x, k / block.size.x % block.size.y, k / (block.size.x * block.size.y));
    ++block.warp_live[k / 32];
    order[k] = options.schedule == Schedule::kBackward ? size - 1 - k : k;
    Fiber& own = fiber_of(block.index.x + block.index.y + block.index.z, k);
    thread.stack = own.stack.get(), thread.sanitizer = own.sanitizer;
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(thread.stack) + kStack) / 64 * 64) - 2;
    *top = reinterpret_cast<void*>(&begin_fiber);
    for (int r = 1; r <= 6; ++r) top[-r] = nullptr;
    thread.stack_pointer = top - 6;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack, kStack);  // of what the last fiber left there
#endif
  }
  std::mt19937 random(options.seed + block.index.x);
  int left = size;
  while (left > 0 && block.error.empty()) {
    bool progress = false;
    int warp = -1;  // greedy: the one that runs
    if (options.schedule == Schedule::kShuffled) std::shuffle(order.begin(), order.end(), random);
    for (int k : order) {
      Thread& thread = block.threads[k];
      if (options.schedule == Schedule::kGreedy && warp >= 0 && k / 32 != warp) continue;
      if (thread.done || (thread.meeting && thread.meeting->generation == thread.generation)) continue;
      if (thread.ready && !thread.ready()) continue;
      thread.meeting = nullptr, thread.ready = nullptr;
      progress = true, warp = k / 32;
      resume(thread);
      left -= thread.done;
      if (!block.error.empty()) break;
    }
    if (!progress) {
      for (Thread& thread : block.threads)
        if (!thread.done && block.error.empty())
          block.error = "deadlock: thread " + std::to_string(thread.number) + " waits for ever at " +
                        (thread.meeting ? thread.meeting->what : "a barrier in shared memory");
    }
  }
  for (auto& [barrier, state] : block.barriers)
    if (!state.boxes.empty() && block.error.empty()) block.error = "a block ends with copies under way";
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block.shared, capacity);
#endif
  std::free(block.shared);
}

inline cudaError_t launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || shared_bytes > 227 << 10 ||
      size.x * size.y * size.z > 1024)
    return cudaErrorInvalidConfiguration;
  release(&body);
  {
    Unseen unseen;
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          Block block;
          block.index = dim3(x, y, z), block.size = size, block.grid = grid, block.body = &body;
          run_block(block, shared_bytes);
          if (!block.error.empty()) throw Error(block.error);
        }
  }
  acquire(end_of(&body));  // only now: blocks of one launch know nothing of each other
  return cudaSuccess;
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->block->index)
#define blockDim (emulator::current->block->size)
#define gridDim (emulator::current->block->grid)

inline void __syncthreads(int line = __builtin_LINE()) { emulator::sync_block(0, line); }
inline int __syncthreads_or(int vote, int line = __builtin_LINE()) { return emulator::sync_block(vote != 0, line); }

inline void __syncwarp() {
  emulator::Block* block = emulator::current->block;
  void* warp = &block->warps[emulator::current->number / 32];
  emulator::release(warp);
  int lane = 0;
  emulator::warp_together("__syncwarp", lane, [](int* const*) {});
  emulator::acquire(warp);
}

// Shuffles and votes of whole warps. `from` of a lane is the lane it takes from.
template <class T>
T shuffle(unsigned mask, T value, int from) {
  struct Lane {
    T in, out;
    int from;
  } lane{value, value, from};
  emulator::require(mask == ~0u, "shuffle: only whole warps");
  emulator::warp_together("shuffle", lane, [](Lane* const* lanes) {
    for (int l = 0; l < 32; ++l) lanes[l]->out = lanes[lanes[l]->from]->in;
  });
  return lane.out;
}
inline int lane_number() { return emulator::current->number % 32; }
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return shuffle(mask, value, from & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return shuffle(mask, value, lane_number() ^ with);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return shuffle(mask, value, lane_number() >= by ? lane_number() - by : lane_number());
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  struct Lane {
    int vote;
    unsigned all;
  } lane{vote, 0};
  emulator::require(mask == ~0u, "ballot: only whole warps");
  emulator::warp_together("ballot", lane, [](Lane* const* lanes) {
    unsigned all = 0;
    for (int l = 0; l < 32; ++l) all |= unsigned{lanes[l]->vote != 0} << l;
    for (int l = 0; l < 32; ++l) lanes[l]->all = all;
  });
  return lane.all;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }

template <class T>
T atomicOr(T* p, T bits) {
  return __atomic_fetch_or(p, bits, __ATOMIC_RELAXED);
}
template <class T>
T atomicAdd(T* p, T term) {
  return __atomic_fetch_add(p, term, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* p, T value) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(p, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
