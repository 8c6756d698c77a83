// Shared memory: who wrote and read each byte, and whether those who come later can know of it.
#include "state.h"

namespace ptx_machine {

bool lenient = false;
void set_lenient(bool on) { lenient = on; }

u32 shared_at(Warp& w, const Ins& i, u32 address, u32 size, u32 align) {
  const Block& b = *w.block;
  if (address % align != 0)
    fail(w, &i, "misaligned access to shared memory: " + std::to_string(address) + " by " + std::to_string(align));
  const int64_t at = static_cast<int64_t>(address) - b.shared_base;
  if (at < 0 || at + size > b.shared_size)
    fail(w, &i,
         "access to shared memory out of bounds: " + std::to_string(at) + " of " + std::to_string(b.shared_size));
  return static_cast<u32>(at);
}

namespace {

bool before(const Clock& clock, int agent, u32 when) { return clock[agent] >= when; }

void check_writer(Warp& w, const Ins& i, const SharedByte& s, int lane, const char* what) {
  if (s.writer == 255) return;
  if (s.writer == w.id) {
    if (lane >= 0 && s.writer_lane != lane && s.epoch == w.epoch)
      complain(w, &i, std::string("race within a warp: ") + what + " what another lane wrote, no barrier between");
  } else if (!before(w.clock, s.writer, s.clock)) {
    const bool by_copy = s.writer >= w.block->warps;
    complain(w, &i,
             std::string("race: ") + what +
                 (by_copy ? " what the copy engine wrote, its mbarrier not waited for"
                          : " what another warp wrote, no barrier between"));
  }
}
void check_readers(Warp& w, const Ins& i, u32 at, const Clock& clock, const char* by) {
  const Block& b = *w.block;
  const u32* read = &b.read_clock[static_cast<size_t>(at) * b.warps];
  for (int v = 0; v < b.warps; ++v)
    if (v != w.id && read[v] != 0 && !before(clock, v, read[v]))
      complain(w, &i, std::string("race: ") + by + " what another warp may still be reading");
}
u32& read_clock(Warp& w, u32 at) { return w.block->read_clock[static_cast<size_t>(at) * w.block->warps + w.id]; }

// Threads wrote through the generic proxy: a fence of the writing lane, or of this warp since, must lie between.
void check_fence(Warp& w, const Ins& i, const SharedByte& s) {
  if (s.writer >= w.block->warps) return;
  const auto& fences = w.block->kernel->warps[s.writer]->fence_clock[s.writer_lane];
  const bool fenced = s.fences < fences.size() && before(w.clock, s.writer, fences[s.fences]);
  if (!fenced && w.fenced[s.writer] < s.clock)
    complain(w, &i, "product reads what threads wrote, no fence.proxy.async between");
}

}  // namespace

void shared_read(Warp& w, const Ins& i, u32 address, u32 size, int lane, void* to) {
  Block& b = *w.block;
  const u32 at = shared_at(w, i, address, size, size);
  for (u32 k = at; k < at + size; ++k) {
    SharedByte& s = b.bytes[k];
    if (s.state == kUnwritten) complain(w, &i, "reads shared memory that was never written");
    if (s.state == kInFlight) complain(w, &i, "reads shared memory that an asynchronous copy is writing");
    if (s.state == kMBarrier) complain(w, &i, "reads an mbarrier");
    check_writer(w, i, s, lane, "reads");
    read_clock(w, k) = w.now();
    if (s.reader == w.id && s.read_epoch == w.epoch) s.read_lanes |= 1u << lane;
    else s.reader = static_cast<u8>(w.id), s.read_epoch = w.epoch, s.read_lanes = 1u << lane;
  }
  memcpy(to, b.shared.data() + at, size);
}

void shared_write(Warp& w, const Ins& i, u32 address, u32 size, int lane, const void* from) {
  Block& b = *w.block;
  const u32 at = shared_at(w, i, address, size, size);
  if (b.products_under_way) forbid_in_flight(w, i, at, size);
  const bool same = lenient && memcmp(b.shared.data() + at, from, size) == 0;
  for (u32 k = at; k < at + size; ++k) {
    SharedByte& s = b.bytes[k];
    if (s.state == kInFlight) complain(w, &i, "writes shared memory that an asynchronous copy is writing");
    if (s.state == kMBarrier) complain(w, &i, "writes an mbarrier");
    if (!same) check_writer(w, i, s, lane, "writes");
    check_readers(w, i, k, w.clock, "writes");
    if (s.reader == w.id && s.read_epoch == w.epoch && (s.read_lanes & ~(1u << lane)) != 0)
      complain(w, &i, "race within a warp: writes what another lane has read, no barrier between");
    s.state = kWritten, s.writer = static_cast<u8>(w.id), s.writer_lane = static_cast<u8>(lane);
    s.clock = w.now(), s.epoch = w.epoch, s.fences = w.fences[lane], s.read_lanes = 0;
  }
  memcpy(b.shared.data() + at, from, size);
}

// Atomics do not race with one another: a byte keeps its last plain writer.
u8* shared_atomic(Warp& w, const Ins& i, u32 address, u32 size) {
  Block& b = *w.block;
  const u32 at = shared_at(w, i, address, size, size);
  for (u32 k = at; k < at + size; ++k) {
    SharedByte& s = b.bytes[k];
    if (s.state != kWritten) complain(w, &i, "atomic on shared memory that was never written");
    if (s.writer != 255 && s.writer != w.id && !before(w.clock, s.writer, s.clock))
      complain(w, &i, "race: atomic on what another warp wrote");
    read_clock(w, k) = w.now();
  }
  return b.shared.data() + at;
}

void product_reads(Warp& w, const Ins& i, u32 address, u32 size) {
  Block& b = *w.block;
  const u32 at = shared_at(w, i, address, size, 2);
  for (u32 k = at; k < at + size; ++k) {
    const SharedByte& s = b.bytes[k];
    if (s.state == kUnwritten) complain(w, &i, "product reads shared memory that was never written");
    else if (s.state != kWritten) complain(w, &i, "product reads shared memory that a copy is writing");
    check_writer(w, i, s, -1, "product reads");
    check_fence(w, i, s);
    read_clock(w, k) = w.now();
  }
}
void product_has_read(Warp& w, const Ins& i, u32 address, u32 size, void* to) {
  const u32 at = shared_at(w, i, address, size, 2);
  for (u32 k = at; k < at + size; ++k) read_clock(w, k) = w.now();
  memcpy(to, w.block->shared.data() + at, size);
}

void claim(Warp& w, const Ins& i, u32 at, u32 size, const Clock& clock, const char* by) {
  Block& b = *w.block;
  if (b.products_under_way) forbid_in_flight(w, i, at, size);
  for (u32 k = at; k < at + size; ++k) {
    SharedByte& s = b.bytes[k];
    if (s.state == kInFlight) complain(w, &i, "two asynchronous copies write the same shared memory");
    if (s.state == kMBarrier) complain(w, &i, "a copy over an mbarrier");
    if (s.writer != 255 && s.writer != w.id && !before(clock, s.writer, s.clock))
      complain(w, &i, std::string("race: ") + by + " what another warp wrote");
    check_readers(w, i, k, clock, by);
    s.state = kInFlight;
    b.shared[k] = 0xa5;
  }
}

}  // namespace ptx_machine
