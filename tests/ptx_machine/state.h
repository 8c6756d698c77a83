// The machine's state, shared by its parts.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <set>
#include <stdexcept>

#include "machine.h"

namespace ptx_machine {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// --- instructions ------------------------------------------------------------------------------------------------

enum Class : u8 { kNone, k32, k64, kPred, kPool32, kPool64 };  // registers, or constants, one value a lane
struct Slot {
  Class cls = kNone;
  u32 index = 0;
  bool negated = false;  // of a predicate
};

struct Block;
struct Ins;
struct Warp;
using Execute = void (*)(Warp&, const Ins&, u32 lanes);
enum Flow : u8 { kPlain, kBranch, kReturn, kCollective, kBlockBarrier };

struct Ins {
  Execute execute = nullptr;
  Flow flow = kPlain;
  Slot d, d2, a[5], guard;
  std::vector<Slot> list, list2, list3, list4;
  int64_t offset = 0;
  int target = -1;          // of a branch
  u32 n = 0, m = 0, k = 0;  // each instruction's own
  bool flag = false;
  bool tracked = false;  // uses a register that products of warpgroups use
  Slot member;           // of a collective: its mask; none: all lanes that have not ended
  u32 (*special)(const Block&, u32 thread) = nullptr;
  std::string word, text;
  int line = 0;
  mutable u64 times = 0;  // that a warp executed it
};

// --- clocks ------------------------------------------------------------------------------------------------------

// Who writes to shared memory: warps, and one agent for each mbarrier. Each has a clock; a Clock says up to when
// somebody knows of all of them.
constexpr int kAgents = 64;
using Clock = std::array<u32, kAgents>;
inline void join(Clock& a, const Clock& b) {
  for (int k = 0; k < kAgents; ++k) a[k] = std::max(a[k], b[k]);
}

// --- shared memory -----------------------------------------------------------------------------------------------

enum ByteState : u8 { kUnwritten, kWritten, kInFlight, kMBarrier };
struct SharedByte {
  u8 state = kUnwritten, writer = 255, writer_lane = 0, reader = 255;
  u32 clock = 0, epoch = 0, fences = 0;  // of the writer, when it wrote
  u32 read_lanes = 0, read_epoch = 0;    // of the last warp that read
};

struct MBarrier {
  int agent = 0;
  u32 expected = 0, phase = 0;
  int64_t pending = 0, bytes = 0;  // in this phase
  Clock now{}, done{};             // of those that arrived in this phase, in all before
  u8 warp = 0, lane = 0;           // that initialised it
  u32 clock = 0, fence_clock = 0;  // when; and when a fence followed, 0: not yet
};

struct AsyncCopy {  // cp.async
  u32 to;
  u64 from;
  u32 size, read;
  int group;
};

struct TensorCopy {  // by the copy engine
  u32 to, barrier;
  TensorMap map;
  int64_t at[5];
  Clock issued;
  int line;
};

struct Product {  // of a warpgroup
  const Ins* ins;
  u64 a, b;  // matrix descriptors
  bool accumulate;
  int group;
  std::vector<std::pair<u32, u32>> ranges;  // of shared memory that it reads
};

// --- kernels, warps, blocks --------------------------------------------------------------------------------------

struct Parameter {
  std::string name;
  size_t offset, size;
};

struct Kernel {
  std::string name, module;
  std::vector<Parameter> parameters;
  std::vector<u8> parameter_memory;
  u64 parameter_base = 0;
  int most_threads = 1024;
  u32 static_shared = 0;
  u32 count32 = 0, count64 = 0, count_pred = 0;  // registers
  std::vector<std::array<u32, 32>> pool32;       // constants
  std::vector<std::array<u64, 32>> pool64;
  std::vector<Ins> code;
  std::vector<u8> product_register;  // [count32] whether products of warpgroups use it
  u64 launches = 0;
  std::vector<std::unique_ptr<Warp>> warps;  // kept from block to block
  ~Kernel();
};

struct Group {  // lanes at one place
  int pc;
  u32 lanes;
  enum State { kRun, kSync, kBarrier, kYield } state = kRun;
};

struct Warp {
  Block* block = nullptr;
  const Kernel* kernel = nullptr;
  int id = 0;
  u32 all = 0, alive = 0;  // lanes
  std::vector<u32> r32, valid32, pred, valid_pred, valid64;
  std::vector<u64> r64;
  std::vector<Group> groups;
  bool yielded = false;  // an instruction tells the scheduler that it has to wait
  u32 epoch = 1;         // counts the points at which its lanes know of each other's writes
  Clock clock{}, fenced{};
  std::array<u32, 32> fences{};  // between generic and async proxy, by lane
  std::array<std::vector<u32>, 32> fence_clock;
  std::array<std::vector<AsyncCopy>, 32> copies;
  std::array<int, 32> copy_group{};
  std::vector<Product> products;  // under way
  int product_group = 0;
  size_t products_issued = 0;
  bool product_fence = false;
  u64 touch = 1, fence_touch = 0;
  std::vector<u64> touched;   // [count32] when
  std::vector<u8> in_flight;  // [count32] 1: a product reads it, 2: writes it

  u32 now() const { return clock[id]; }
};

struct HardBarrier {  // of the sixteen that a block has
  u32 expected = 0, arrived = 0, count = 0;
  bool any = false, all = true;
  Clock clock{};
  std::vector<std::pair<Warp*, const Ins*>> waiting;
};

struct Block {
  Kernel* kernel;
  Dim grid, size, at;
  u32 shared_base, shared_size, dynamic_shared;
  u32 tag, launch_tag;  // numbers of this block, of its launch
  int warps;
  std::vector<u8> shared;
  std::vector<SharedByte> bytes;
  std::vector<u32> read_clock;  // [byte, warp]
  std::map<u32, MBarrier> barriers;
  std::vector<TensorCopy> tensor_copies;
  std::array<HardBarrier, 16> hard;
  int agents;
  int products_under_way = 0;
  struct Issued {
    const Ins* ins;
    u64 a, b;
    bool accumulate;
    bool operator==(const Issued&) const = default;
  };
  std::array<std::vector<Issued>, 8> issued;  // products of each warpgroup: its warps must issue the same
};

extern std::mt19937_64 random_bits;
extern bool lenient;
extern Sums sums;

// Errors of the program that runs: told, or told and the end of it.
void complain(const Warp& w, const Ins* ins, const std::string& what);
[[noreturn]] void fail(const Warp& w, const Ins* ins, const std::string& what);

// --- operands ----------------------------------------------------------------------------------------------------

template <class T>
using Store = std::conditional_t<sizeof(T) == 8, u64, u32>;
template <class T>
T get(Store<T> s) {
  T t;
  memcpy(&t, &s, sizeof t);
  return t;
}
template <class T>
Store<T> put(T t) {
  Store<T> s = 0;
  memcpy(&s, &t, sizeof t);
  return s;
}
inline const u32* source32(const Warp& w, Slot s) {
  if (s.cls == k32) return w.r32.data() + s.index * 32;
  if (s.cls == kPool32) return w.kernel->pool32[s.index].data();
  throw Failure("operand is not of 32 bits");
}
inline const u64* source64(const Warp& w, Slot s) {
  if (s.cls == k64) return w.r64.data() + s.index * 32;
  if (s.cls == kPool64) return w.kernel->pool64[s.index].data();
  throw Failure("operand is not of 64 bits");
}
template <class T>
const Store<T>* source(const Warp& w, Slot s) {
  if constexpr (sizeof(T) == 8) return source64(w, s);
  else return source32(w, s);
}
inline u64 value_of(const Warp& w, Slot s, int l) {  // of any width
  return s.cls == k64 || s.cls == kPool64 ? source64(w, s)[l] : source32(w, s)[l];
}
inline u64 address_of(const Warp& w, const Ins& i, Slot s, int l) { return value_of(w, s, l) + i.offset; }
template <class T>
Store<T>* target(Warp& w, Slot s) {
  if (s.cls != (sizeof(T) == 8 ? k64 : k32)) throw Failure("target has another width");
  if constexpr (sizeof(T) == 8) return w.r64.data() + s.index * 32;
  else return w.r32.data() + s.index * 32;
}

// Lanes in which a register has been written. A constant always has.
inline u32 valid(const Warp& w, Slot s) {
  switch (s.cls) {
    case k32: return w.valid32[s.index];
    case k64: return w.valid64[s.index];
    case kPred: return w.valid_pred[s.index];
    default: return ~0u;
  }
}
inline void set_valid(Warp& w, Slot s, u32 lanes, u32 ok) {
  u32& v = s.cls == k32 ? w.valid32[s.index] : s.cls == k64 ? w.valid64[s.index] : w.valid_pred[s.index];
  v = (v & ~lanes) | (ok & lanes);
}
inline void need(const Warp& w, const Ins& i, Slot s, u32 lanes, const char* what) {
  if (lanes & ~valid(w, s)) complain(w, &i, std::string("uses a register that was never written: ") + what);
}
inline u32 predicate(const Warp& w, Slot s) { return s.negated ? ~w.pred[s.index] : w.pred[s.index]; }
inline void set_predicate(Warp& w, Slot s, u32 lanes, u32 values, u32 ok) {
  u32& p = w.pred[s.index];
  p = (p & ~lanes) | ((s.negated ? ~values : values) & lanes);
  set_valid(w, s, lanes, ok);
}

// For each lane l of `lanes`.
#define EACH(lanes, l) \
  for (u32 rest_ = (lanes), l; rest_ != 0 && ((l = std::countr_zero(rest_)), true); rest_ &= rest_ - 1)

// --- memory (global.cpp, shared.cpp) -----------------------------------------------------------------------------

Allocation* find_allocation(u64 address, u64 size);
u8* global_memory(Warp& w, const Ins& i, u64 address, u32 size, bool write, int lane, bool atomic);

// Swizzled in patterns of 16 << bits bytes: the 16-byte chunk's number is exclusive-or'ed with that of its line of 128.
inline u32 swizzled(u32 address, u32 bits) { return address ^ (address >> 7 & ((1u << bits) - 1)) << 4; }
u32 shared_at(Warp& w, const Ins& i, u32 address, u32 size, u32 align);  // its place in the block's memory
void shared_read(Warp& w, const Ins& i, u32 address, u32 size, int lane, void* to);
void shared_write(Warp& w, const Ins& i, u32 address, u32 size, int lane, const void* from);
u8* shared_atomic(Warp& w, const Ins& i, u32 address, u32 size);
void product_reads(Warp& w, const Ins& i, u32 address, u32 size);  // the checks; then, when it is done, the numbers
void product_has_read(Warp& w, const Ins& i, u32 address, u32 size, void* to);
// Will be written asynchronously from now on, by one who knows of `clock`.
void claim(Warp& w, const Ins& i, u32 at, u32 size, const Clock& clock, const char* by);

// --- work beside the threads (copies.cpp, products.cpp, collectives.cpp) ---------------------------------

void finish_tensor_copy(Block& b, size_t which);
void note_touch(Warp& w, const Ins& i);
void forbid_in_flight(Warp& w, const Ins& i, u32 at, u32 size);
bool open_barriers(Block& b);

// --- decoding ----------------------------------------------------------------------------------------------------

struct Parsed {  // one instruction
  std::string text;
  std::vector<std::string> op;       // opcode and its modifiers
  std::vector<std::string> operand;  // as written

  bool has(const char* modifier) const { return std::find(op.begin() + 1, op.end(), modifier) != op.end(); }
  bool starts(const char* with) const { return text.compare(0, strlen(with), with) == 0; }
  const std::string& type() const { return op.back(); }
};
[[noreturn]] inline void not_implemented(const Parsed& p) { throw Failure("not implemented: " + p.text); }

inline int bytes_of(const std::string& type) {
  if (type == "pred") return 1;
  if (type == "f16x2" || type == "bf16x2") return 4;
  return std::stoi(type.substr(type.find_first_of("0123456789"))) / 8;
}

struct Names {                                                                // names and values, for decoders
  virtual Slot value(const std::string& text, int bytes, bool floating) = 0;  // a register or a constant
  virtual Slot predicate(const std::string& text) = 0;
  virtual std::vector<Slot> values(const std::string& text, int bytes) = 0;  // {a, b} or one
  virtual int label(const std::string& text) = 0;
  virtual int64_t number(const std::string& text) = 0;
  virtual void product_register(u32 index) = 0;
  virtual ~Names() = default;
};
// An address operand, [register + offset]: sets i.offset.
Slot decode_address(Ins& i, const std::string& text, Names& names, int bytes);

// Each knows its own opcodes, and gives false for all others.
using Decoder = bool (*)(Ins& i, const Parsed& p, Names& names);
bool decode_moves(Ins& i, const Parsed& p, Names& names);
bool decode_arithmetic(Ins& i, const Parsed& p, Names& names);
bool decode_bits(Ins& i, const Parsed& p, Names& names);
bool decode_convert(Ins& i, const Parsed& p, Names& names);
bool decode_memory(Ins& i, const Parsed& p, Names& names);
bool decode_copies(Ins& i, const Parsed& p, Names& names);
bool decode_products(Ins& i, const Parsed& p, Names& names);
bool decode_matrices(Ins& i, const Parsed& p, Names& names);
bool decode_collectives(Ins& i, const Parsed& p, Names& names);
bool decode_control(Ins& i, const Parsed& p, Names& names);

}  // namespace ptx_machine
