// Work beside the threads: cp.async, mbarriers, the copy engine; and the fences that it needs.
#include "state.h"

namespace ptx_machine {
namespace {

// --- cp.async ----------------------------------------------------------------------------------------------------

void cp_async(Warp& w, const Ins& i, u32 m) {  // n bytes; k: offset of the source; a[2]: how many are read
  need(w, i, i.a[0], m, "an address");
  need(w, i, i.a[1], m, "an address");
  if (i.a[2].cls != kNone) need(w, i, i.a[2], m, "a size");
  EACH(m, l) {
    const u32 to = shared_at(w, i, static_cast<u32>(address_of(w, i, i.a[0], l)), i.n, i.n);
    const u64 from = source64(w, i.a[1])[l] + i.k;
    const u32 read = i.a[2].cls == kNone ? i.n : std::min(i.n, source32(w, i.a[2])[l]);
    if (from % i.n != 0) fail(w, &i, "cp.async: source is not aligned");
    for (u32 k = 0; k < read; k += 4) global_memory(w, i, from + k, 4, false, l, false);
    claim(w, i, to, i.n, w.clock, "cp.async writes");
    w.copies[l].push_back({to, from, i.n, read, w.copy_group[l]});
  }
}
void cp_commit(Warp& w, const Ins&, u32 m) { EACH(m, l)++ w.copy_group[l]; }
void land(Warp& w, const Ins& i, u32 l, const AsyncCopy& c) {
  Block& b = *w.block;
  memset(&b.shared[c.to], 0, c.size);
  memcpy(&b.shared[c.to], reinterpret_cast<void*>(c.from), c.read);
  for (u32 k = c.to; k < c.to + c.size; ++k) {
    SharedByte& s = b.bytes[k];
    if (s.state != kInFlight) complain(w, &i, "shared memory was overwritten while a copy wrote it");
    s.state = kWritten, s.writer = static_cast<u8>(w.id), s.writer_lane = static_cast<u8>(l), s.clock = w.now();
    s.epoch = w.epoch, s.fences = w.fences[l], s.read_lanes = 0;
  }
}
void cp_wait(Warp& w, const Ins& i, u32 m) {  // until n groups are left; flag: for all
  EACH(m, l) {
    auto& list = w.copies[l];
    size_t done = 0;
    const int up_to = w.copy_group[l] - static_cast<int>(i.n);
    for (; done < list.size() && (i.flag || list[done].group < up_to); ++done) land(w, i, l, list[done]);
    list.erase(list.begin(), list.begin() + done);
  }
}

// --- mbarriers ---------------------------------------------------------------------------------------------------

MBarrier& barrier_at(Warp& w, const Ins& i, u64 address) {
  auto found = w.block->barriers.find(shared_at(w, i, static_cast<u32>(address), 8, 8));
  if (found == w.block->barriers.end()) fail(w, &i, "no mbarrier was initialised here");
  MBarrier& b = found->second;
  if (b.warp != w.id && w.clock[b.warp] < b.clock) complain(w, &i, "race: an mbarrier that another warp initialises");
  return b;
}
void advance(MBarrier& b) {  // to the next phase, when all have arrived and all bytes have
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  join(b.done, b.now);
  b.now = {};
  b.pending = b.expected;
}
void mbarrier_init(Warp& w, const Ins& i, u32 m) {
  EACH(m, l) {
    Block& block = *w.block;
    const u32 at = shared_at(w, i, static_cast<u32>(address_of(w, i, i.a[0], l)), 8, 8);
    if (block.barriers.count(at)) complain(w, &i, "an mbarrier is initialised twice");
    MBarrier b;
    b.agent = block.warps + block.agents++;
    if (b.agent >= kAgents) fail(w, &i, "too many mbarriers for this machine");
    b.expected = source32(w, i.a[1])[l], b.pending = b.expected;
    if (b.expected == 0 || b.expected >= 1u << 20) fail(w, &i, "mbarrier: count out of range");
    b.warp = static_cast<u8>(w.id), b.lane = static_cast<u8>(l), b.clock = w.now();
    for (u32 k = at; k < at + 8; ++k) block.bytes[k].state = kMBarrier;
    block.barriers[at] = b;
  }
}
void mbarrier_inval(Warp& w, const Ins& i, u32 m) {
  EACH(m, l) {
    const u64 address = address_of(w, i, i.a[0], l);
    barrier_at(w, i, address);
    const u32 at = shared_at(w, i, static_cast<u32>(address), 8, 8);
    w.block->barriers.erase(at);
    for (u32 k = at; k < at + 8; ++k) w.block->bytes[k] = {};
  }
}
void mbarrier_arrive(Warp& w, const Ins& i, u32 m) {  // flag: expects bytes too; n: arrives
  EACH(m, l) {
    MBarrier& b = barrier_at(w, i, address_of(w, i, i.a[0], l));
    if (i.flag) {
      need(w, i, i.a[1], 1u << l, "a number of bytes");
      b.bytes += source32(w, i.a[1])[l];
      if (b.bytes >= 1 << 20) complain(w, &i, "mbarrier: too many bytes are expected");
    }
    join(b.now, w.clock);
    if (!i.n) continue;
    if (b.pending == 0) complain(w, &i, "mbarrier: more arrivals than it is for");
    --b.pending;
    advance(b);
  }
  ++w.clock[w.id];
}
void mbarrier_wait(Warp& w, const Ins& i, u32 m) {
  need(w, i, i.a[1], m, "a parity");
  u32 done = 0;
  EACH(m, l) {
    MBarrier& b = barrier_at(w, i, address_of(w, i, i.a[0], l));
    const u32 parity = source32(w, i.a[1])[l];
    if (parity > 1) complain(w, &i, "mbarrier: a parity that is neither 0 nor 1");
    if ((b.phase & 1) != parity) done |= 1u << l, join(w.clock, b.done);
    else w.yielded = true;
  }
  set_predicate(w, i.d, m, done, ~0u);
}

// --- the copy engine ---------------------------------------------------------------------------------------------

u32 bytes_of_box(const TensorMap& t) {
  u32 bytes = t.element;
  for (int k = 0; k < t.rank; ++k) bytes *= t.box[k];
  return bytes;
}

TensorMap map_at(Warp& w, const Ins& i, u64 address) {
  TensorMap map;
  if (address % 64 != 0) fail(w, &i, "a tensor map that is not aligned to 64 bytes");
  memcpy(&map, reinterpret_cast<void*>(address), sizeof map);
  if (map.magic != TensorMap::kMagic) fail(w, &i, "this is no tensor map");
  if (map.rank != i.n) fail(w, &i, "tensor map of another rank");
  return map;
}
void copy_tensor(Warp& w, const Ins& i, u32 m) {  // n dimensions; a: to, map, barrier; list: coordinates
  for (auto slot : {i.a[0], i.a[1], i.a[2]}) need(w, i, slot, m, "an operand of a tensor copy");
  EACH(m, l) {
    Block& b = *w.block;
    const u32 barrier = static_cast<u32>(value_of(w, i.a[2], l)) + i.k;
    MBarrier& bar = barrier_at(w, i, barrier);
    const bool shown = bar.fence_clock != 0 && (bar.warp == w.id || w.clock[bar.warp] >= bar.fence_clock);
    if (!lenient && !shown) complain(w, &i, "the copy engine is given an mbarrier that no fence has shown it");
    TensorCopy c;
    c.map = map_at(w, i, source64(w, i.a[1])[l]);
    const u32 to = static_cast<u32>(address_of(w, i, i.a[0], l)), bytes = bytes_of_box(c.map);
    if (to % 128 != 0) fail(w, &i, "a tensor copy to an address that is not aligned to 128 bytes");
    if (c.map.swizzle == 3 && to % 1024 != 0)
      complain(w, &i, "a swizzled tensor copy to an address that is not aligned to 1,024 bytes");
    c.to = shared_at(w, i, to, bytes, 128);
    for (u32 k = 0; k < i.n; ++k) {
      need(w, i, i.list[k], 1u << l, "a coordinate");
      c.at[k] = static_cast<int32_t>(source32(w, i.list[k])[l]);
    }
    c.barrier = shared_at(w, i, barrier, 8, 8);
    c.issued = w.clock;
    c.line = i.line;
    claim(w, i, c.to, bytes, w.clock, "a tensor copy writes");
    b.tensor_copies.push_back(c);
  }
}

void tell(const Block& b, const TensorCopy& c, const char* what) {
  report(b.kernel->name + ": tensor copy of line " + std::to_string(c.line) + " " + what);
}

// One row of the box, from the tensor to its swizzled place; zeros where the tensor has nothing.
void copy_row(Block& b, const TensorCopy& c, u32 r) {
  const TensorMap& t = c.map;
  u64 row = t.address;
  bool inside = true;
  for (u32 k = 1, rest = r; k < t.rank; rest /= t.box[k], ++k) {
    const int64_t p = c.at[k] + rest % t.box[k];
    inside &= p >= 0 && p < static_cast<int64_t>(t.size[k]);
    row += p * static_cast<int64_t>(t.pitch[k - 1]);
  }
  for (u32 e = 0; e < t.box[0]; ++e) {
    const int64_t p = c.at[0] + e;
    u8 data[8] = {};
    if (inside && p >= 0 && p < static_cast<int64_t>(t.size[0])) {
      const u64 from = row + p * t.element;
      const Allocation* a = find_allocation(from, t.element);
      if (a == nullptr) {
        tell(b, c, "reads out of bounds of device memory");
        continue;
      }
      if (a->state[from - a->begin] != kHolds) tell(b, c, "reads device memory that was never written");
      memcpy(data, reinterpret_cast<void*>(from), t.element);
    }
    const u32 address = swizzled(b.shared_base + c.to + (r * t.box[0] + e) * t.element, t.swizzle);
    memcpy(&b.shared[address - b.shared_base], data, t.element);
  }
}

// --- fences ------------------------------------------------------------------------------------------------------

void show_barriers(Warp& w, u32 m) {
  for (auto& [at, b] : w.block->barriers)
    if (b.warp == w.id && m >> b.lane & 1 && b.fence_clock == 0) b.fence_clock = w.now();
}
void fence_proxy(Warp& w, const Ins&, u32 m) {
  EACH(m, l)++ w.fences[l], w.fence_clock[l].push_back(w.now());
  join(w.fenced, w.clock);
  show_barriers(w, m);
}
void fence_init(Warp& w, const Ins&, u32 m) { show_barriers(w, m); }

}  // namespace

void finish_tensor_copy(Block& b, size_t which) {
  const TensorCopy c = b.tensor_copies[which];
  b.tensor_copies.erase(b.tensor_copies.begin() + which);
  MBarrier& bar = b.barriers.at(c.barrier);
  const u32 bytes = bytes_of_box(c.map), rows = bytes / (c.map.box[0] * c.map.element);
  for (u32 r = 0; r < rows; ++r) copy_row(b, c, r);
  for (u32 k = c.to; k < c.to + bytes; ++k) {
    SharedByte& s = b.bytes[k];
    if (s.state != kInFlight) report(b.kernel->name + ": shared memory was overwritten while the copy engine wrote it");
    s.state = kWritten, s.writer = static_cast<u8>(bar.agent), s.clock = bar.phase + 1, s.read_lanes = 0;
  }
  bar.now[bar.agent] = bar.phase + 1;
  join(bar.now, c.issued);
  bar.bytes -= bytes;
  advance(bar);
}

namespace {

void decode_tensor_copy(Ins& i, const Parsed& p, Names& names) {
  const bool to_shared = p.has("shared::cluster") || p.has("shared::cta");
  if (!p.has("global") || !to_shared || !p.has("mbarrier::complete_tx::bytes") || p.has("im2col") ||
      p.has("multicast::cluster"))
    not_implemented(p);
  i.n = p.op[4][0] - '0';
  const std::string& map = p.operand[1];  // [map, {coordinates}]
  const size_t comma = map.find(',');
  i.a[2] = decode_address(i, p.operand[2], names, 4);
  i.k = static_cast<u32>(i.offset);
  i.a[1] = decode_address(i, "[" + map.substr(1, comma - 1) + "]", names, 8);
  if (i.offset != 0) not_implemented(p);
  i.list = names.values(map.substr(comma + 1, map.size() - comma - 2), 4);
  i.a[0] = decode_address(i, p.operand[0], names, 4);
  i.execute = copy_tensor;
}

void decode_cp_async(Ins& i, const Parsed& p, Names& names) {
  if (!p.has("shared") && !p.has("shared::cta")) not_implemented(p);
  i.a[1] = decode_address(i, p.operand[1], names, 8);
  i.k = static_cast<u32>(i.offset);
  i.a[0] = decode_address(i, p.operand[0], names, 4);
  i.n = static_cast<u32>(names.number(p.operand[2]));
  if (p.operand.size() > 3) i.a[2] = names.value(p.operand[3], 4, false);
  i.execute = cp_async;
}

void decode_mbarrier(Ins& i, const Parsed& p, Names& names) {
  const std::string& what = p.op[1];
  if (what == "init" || what == "inval") {
    i.a[0] = decode_address(i, p.operand[0], names, 4);
    if (what == "init") i.a[1] = names.value(p.operand[1], 4, false);
    i.execute = what == "init" ? mbarrier_init : mbarrier_inval;
  } else if (what == "arrive" || what == "expect_tx") {
    const size_t at = what == "arrive" ? 1 : 0;
    if ((at && p.operand[0] != "_") || p.has("remote") || p.has("noComplete")) not_implemented(p);
    i.a[0] = decode_address(i, p.operand[at], names, 4);
    i.flag = p.has("expect_tx");
    if (i.flag) i.a[1] = names.value(p.operand[at + 1], 4, false);
    else if (p.operand.size() > at + 1) not_implemented(p);
    i.n = what == "arrive";
    i.execute = mbarrier_arrive;
  } else if ((what == "try_wait" || what == "test_wait") && p.has("parity")) {
    i.d = names.predicate(p.operand[0]);
    i.a[0] = decode_address(i, p.operand[1], names, 4);
    i.a[1] = names.value(p.operand[2], 4, false);
    i.execute = mbarrier_wait;
  } else {
    not_implemented(p);
  }
}

}  // namespace

bool decode_copies(Ins& i, const Parsed& p, Names& names) {
  const std::string& o = p.op[0];
  if (p.starts("cp.async.bulk.tensor.")) {
    decode_tensor_copy(i, p, names);
  } else if (p.starts("cp.async.commit_group")) {
    i.execute = cp_commit;
  } else if (p.starts("cp.async.wait_group")) {
    i.n = static_cast<u32>(names.number(p.operand[0])), i.execute = cp_wait;
  } else if (p.starts("cp.async.wait_all")) {
    i.flag = true, i.execute = cp_wait;
  } else if (p.starts("cp.async.c")) {
    decode_cp_async(i, p, names);
  } else if (o == "mbarrier") {
    decode_mbarrier(i, p, names);
  } else if (o == "fence" && p.has("mbarrier_init")) {
    i.execute = fence_init;
  } else if (o == "fence" && p.has("proxy")) {
    if (!p.has("async") && !p.has("async::generic")) not_implemented(p);
    i.execute = fence_proxy;
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx_machine
