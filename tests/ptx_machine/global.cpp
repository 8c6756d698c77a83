// Device memory, and who touched each byte of it.
#include "state.h"

namespace ptx_machine {

namespace {
std::map<u64, std::unique_ptr<Allocation>> allocations;  // by begin
Allocation* last_found = nullptr;

void add(u64 begin, size_t bytes, bool foreign) {
  auto a = std::make_unique<Allocation>();
  a->begin = begin, a->end = begin + bytes, a->foreign = foreign;
  a->state.assign(bytes, foreign ? kHolds : kNeverWritten);
  a->writer.assign(bytes, 0), a->reader.assign(bytes, 0), a->last.resize(bytes);
  allocations[begin] = std::move(a);
  last_found = nullptr;
}
}  // namespace

Allocation* find_allocation(u64 address, u64 size) {
  auto inside = [&](const Allocation& a) { return address >= a.begin && address + size <= a.end; };
  if (last_found != nullptr && inside(*last_found)) return last_found;
  auto next = allocations.upper_bound(address);
  if (next == allocations.begin() || !inside(*std::prev(next)->second)) return nullptr;
  return last_found = std::prev(next)->second.get();
}

void* allocate(size_t bytes) {
  const size_t room = (bytes + 511) / 256 * 256;
  void* memory = std::aligned_alloc(256, room);
  memset(memory, 0xcd, room);
  add(reinterpret_cast<u64>(memory), bytes, false);
  return memory;
}
void adopt(void* memory, size_t bytes) { add(reinterpret_cast<u64>(memory), bytes, true); }
void release(void* memory) {
  last_found = nullptr;
  auto a = allocations.find(reinterpret_cast<u64>(memory));
  if (memory == nullptr || a == allocations.end()) return;
  const bool foreign = a->second->foreign;
  allocations.erase(a);
  if (!foreign) std::free(memory);
}
void mark(const void* memory, size_t bytes, GlobalState state) {
  if (bytes == 0) return;
  Allocation* a = find_allocation(reinterpret_cast<u64>(memory), bytes);
  if (a == nullptr) return report("mark: no such device memory");
  std::fill_n(a->state.begin() + (reinterpret_cast<u64>(memory) - a->begin), bytes, state);
}

namespace {

// Between the warps of a block: by their clocks.
void check_warps(Warp& w, const Ins& i, Allocation& a, u64 b, bool write) {
  Allocation::Last& last = a.last[b];
  const u32 tag = w.block->tag;
  if (a.writer[b] == tag && last.writer != w.id && w.clock[last.writer] < last.write)
    complain(w, &i,
             write ? "race in global memory: writes what another warp wrote, no barrier between"
                   : "race in global memory: reads what another warp wrote, no barrier between");
  if (write && a.reader[b] == tag && last.reader != w.id && w.clock[last.reader] < last.read)
    complain(w, &i, "race in global memory: writes what another warp may still be reading");
  if (write) last.writer = static_cast<u8>(w.id), last.write = w.now();
  else last.reader = static_cast<u8>(w.id), last.read = w.now();
}

// Between the blocks of a launch nothing is ordered.
void check_blocks(Warp& w, const Ins& i, Allocation& a, u64 b, bool write) {
  const u32 tag = w.block->tag, launch = w.block->launch_tag;
  if (a.writer[b] >= launch && a.writer[b] != tag)
    complain(w, &i, write ? "two blocks of threads write one byte" : "reads what another block of threads writes");
  if (!write) {
    a.reader[b] = a.reader[b] >= launch && a.reader[b] != tag ? launch : tag;  // launch: several
    return;
  }
  if (a.reader[b] >= launch && a.reader[b] != tag) complain(w, &i, "writes what another block of threads reads");
  a.writer[b] = tag;
}

}  // namespace

u8* global_memory(Warp& w, const Ins& i, u64 address, u32 size, bool write, int lane, bool atomic) {
  if (address % size != 0) fail(w, &i, "misaligned access of " + std::to_string(size) + " bytes to global memory");
  Allocation* a = find_allocation(address, size);
  if (a == nullptr) {
    const u64 from = w.kernel->parameter_base;
    const bool parameter = address >= from && address + size <= from + w.kernel->parameter_memory.size();
    if (!write && parameter) return reinterpret_cast<u8*>(address);
    fail(w, &i,
         std::string(write ? "write to" : "read of") + " global memory out of bounds, lane " + std::to_string(lane));
  }
  const u64 at = address - a->begin;
  for (u64 b = at; b < at + size; ++b) {
    if (a->state[b] == kForbidden) fail(w, &i, "touches a gap between two arrays of the workspace");
    if (a->state[b] == kNeverWritten && (!write || atomic)) {
      complain(w, &i, "reads global memory that was never written");
      break;
    }
  }
  for (u64 b = at; b < at + size; ++b) {
    if (write) a->state[b] = kHolds;
    if (atomic) continue;  // atomics do not race
    check_warps(w, i, *a, b, write);
    check_blocks(w, i, *a, b, write);
  }
  return reinterpret_cast<u8*>(address);
}

}  // namespace ptx_machine
