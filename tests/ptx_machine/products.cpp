// Products by warpgroups (wgmma): the memory they read, which nobody may touch while they are under way.
#include "tensor_core.h"

namespace ptx_machine {
namespace {

// --- matrix descriptors ------------------------------------------------------------------------------------------

struct Descriptor {
  u32 start, leading, stride;  // bytes
  u32 swizzle;                 // patterns of 16 << swizzle bytes
  u32 width() const { return 16u << swizzle; }
};
Descriptor describe(Warp& w, const Ins& i, u64 d) {
  if ((d >> 14 & 3) || (d >> 30 & 3) || (d >> 46 & 7) || (d >> 52 & 0x3ff))
    fail(w, &i, "matrix descriptor: bits are set that are reserved");
  if (d >> 49 & 7) fail(w, &i, "matrix descriptor: base offsets are not implemented");
  auto field = [&](int at) { return static_cast<u32>(d >> at & 0x3fff) << 4; };
  const u32 mode = static_cast<u32>(d >> 62);  // 1: 128 bytes, 2: 64, 3: 32
  Descriptor r{field(0), field(16), field(32), mode == 0 ? 0 : 4 - mode};
  if (r.start >> 7 & ((1u << r.swizzle) - 1))
    complain(w, &i, "matrix descriptor: starts within a pattern of the swizzle, with base offset 0");
  return r;
}
// Address of eight neighbours: (mn, k..k+7) if K is the contiguous dimension, else, "across", (mn..mn+7, k). These are the
// canonical layouts, in elements of 16 bits and bytes:
//   K-major   none: ((8,m),(8,2)) : ((16,SBO),(2,LBO));  swizzle of W bytes: ((8,m),(8,2k)) : ((W,SBO),(2,16))
//   MN-major  swizzle of W bytes: ((8,W/16,m),(8,k)) : ((2,16,LBO),(W,SBO)); none: ((8,1,m),(8,k)) : ((2,16,SBO),(16,LBO))
u32 address_of_eight(const Descriptor& d, bool across, u32 mn, u32 k) {
  u32 at;
  if (across) {
    const u32 each = d.width() / 2;  // elements of a row of the pattern
    const u32 outer = d.swizzle == 0 ? d.stride : d.leading, inner = d.swizzle == 0 ? d.leading : d.stride;
    at = mn % each * 2 + mn / each * outer + k % 8 * d.width() + k / 8 * inner;
  } else {
    at = mn % 8 * d.width() + mn / 8 * d.stride + k / 8 * (d.swizzle == 0 ? d.leading : 16);
  }
  return swizzled(d.start + at, d.swizzle);
}

// --- operands ----------------------------------------------------------------------------------------------------

struct Matrix {  // [rows, 16] in shared memory, from row `first` on
  u64 descriptor;
  bool across;
  u32 first, rows;
};
template <class F>
void for_each_eight(Warp& w, const Ins& i, const Matrix& m, F&& f) {  // f(row, k, address)
  const Descriptor d = describe(w, i, m.descriptor);
  for (u32 r = 0; r < m.rows; r += m.across ? 8 : 1)
    for (u32 k = 0; k < 16; k += m.across ? 1 : 8) f(r, k, address_of_eight(d, m.across, m.first + r, k));
}
Matrix left_of(const Warp& w, const Ins& i, u64 a) { return {a, (i.m & 1) != 0, w.id % 4 * 16u, 16}; }
Matrix right_of(const Ins& i, u64 b) { return {b, (i.m & 2) != 0, 0, i.n}; }

// When the product starts: operands not there yet, or not visible, are told now.
std::pair<u32, u32> check_matrix(Warp& w, const Ins& i, const Matrix& m) {  // the range of shared memory that it covers
  u32 low = ~0u, high = 0;
  for_each_eight(w, i, m, [&](u32, u32, u32 address) {
    product_reads(w, i, address, 16);
    const u32 at = address - w.block->shared_base;
    low = std::min(low, at), high = std::max(high, at + 16);
  });
  return {low, high};
}
// When it is waited for. put(row, k, value).
template <class F>
void read_matrix(Warp& w, const Ins& i, const Matrix& m, F&& put) {
  u16 eight[8];
  for_each_eight(w, i, m, [&](u32 r, u32 k, u32 address) {
    product_has_read(w, i, address, 16, eight);
    for (u32 e = 0; e < 8; ++e) put(r + (m.across ? e : 0), k + (m.across ? 0 : e), half_value(eight[e]));
  });
}

double left[16][16], right[32][16][8];  // a of a warp [row, k]; b [column / 8, k, column % 8]

void multiply(Warp& w, const Product& p) {
  const Ins& i = *p.ins;
  if (i.list2.empty()) {
    read_matrix(w, i, left_of(w, i, p.a), [](u32 r, u32 k, float v) { left[r][k] = v; });
  } else {
    for (u32 l = 0; l < 32; ++l)
      for (u32 k = 0; k < 4; ++k) {
        const u32 v = source32(w, i.list2[k])[l], r = l / 4 + k % 2 * 8, c = l % 4 * 2 + k / 2 * 8;
        left[r][c] = half_value(v), left[r][c + 1] = half_value(v >> 16);
      }
  }
  read_matrix(w, i, right_of(i, p.b), [](u32 r, u32 k, float v) { right[r / 8][k][r % 8] = v; });
  for (u32 n = 0; n < i.n / 8; ++n) {
    float d[16][8] = {};
    u32* out[4];
    for (u32 e = 0; e < 4; ++e) out[e] = target<u32>(w, i.list[n * 4 + e]);
    auto each = [&](auto&& f) {
      for (u32 l = 0; l < 32; ++l)
        for (u32 e = 0; e < 4; ++e) f(d[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2], out[e][l]);
    };
    if (p.accumulate) each([](float& sum, u32 bits) { sum = std::bit_cast<float>(bits); });
    for (int r = 0; r < 16; ++r) add_products(left[r], right[n], d[r], kHopper);
    each([](float sum, u32& bits) { bits = std::bit_cast<u32>(sum); });
  }
  for (auto& s : i.list) set_valid(w, s, ~0u, ~0u);
}

// --- the instructions --------------------------------------------------------------------------------------------

u64 descriptor_of(Warp& w, const Ins& i, Slot s) {  // the same in all lanes
  need(w, i, s, ~0u, "a matrix descriptor");
  const u64* v = source64(w, s);
  if (std::any_of(v, v + 32, [&](u64 d) { return d != v[0]; }))
    complain(w, &i, "matrix descriptors differ between lanes");
  return v[0];
}

void check_same_in_warpgroup(Warp& w, const Ins& i, const Product& p) {
  auto& issued = w.block->issued[w.id / 4];
  const Block::Issued mine{&i, p.a, p.b, p.accumulate};
  if (w.products_issued == issued.size()) issued.push_back(mine);
  else if (!(issued[w.products_issued] == mine))
    complain(w, &i, "wgmma: the warps of a warpgroup issue different products");
  ++w.products_issued;
}

void take_registers(Warp& w, const Ins& i, bool accumulate) {
  for (auto& s : i.list) {
    if (w.touched[s.index] > w.fence_touch)
      complain(w, &i, "wgmma: an accumulator was touched after the last wgmma.fence");
    if (accumulate && w.in_flight[s.index] == 0) need(w, i, s, ~0u, "wgmma's accumulator");
    w.in_flight[s.index] |= 2;
  }
  for (auto& s : i.list2) {
    if (w.touched[s.index] > w.fence_touch)
      complain(w, &i, "wgmma: a register of A was touched after the last wgmma.fence");
    need(w, i, s, ~0u, "wgmma's A");
    if (w.in_flight[s.index] & 2) complain(w, &i, "wgmma: A is an accumulator under way");
    w.in_flight[s.index] |= 1;
  }
}

void wgmma(Warp& w, const Ins& i, u32 m) {  // n columns; m: 1 a across, 2 b across
  Block& b = *w.block;
  if (m != ~0u) fail(w, &i, "wgmma by part of a warp");
  if (w.id / 4 * 4 + 4 > b.warps) fail(w, &i, "wgmma without a whole warpgroup");
  if (!w.product_fence) complain(w, &i, "wgmma without any wgmma.fence before it");
  u32 scale = ~0u;
  if (i.a[2].cls != kNone) {
    scale = predicate(w, i.a[2]);
    need(w, i, i.a[2], m, "wgmma's scale-d");
    if (scale != 0 && scale != ~0u) complain(w, &i, "wgmma's scale-d differs between lanes");
  }
  Product p;
  p.ins = &i, p.group = w.product_group, p.accumulate = scale != 0;
  p.a = i.list2.empty() ? descriptor_of(w, i, i.a[0]) : 0;
  p.b = descriptor_of(w, i, i.a[1]);
  check_same_in_warpgroup(w, i, p);
  take_registers(w, i, p.accumulate);
  for (auto& other : w.products)
    if (other.ins->n != i.n) complain(w, &i, "products of different shapes under way: not in order without a fence");
  if (i.list2.empty()) p.ranges.push_back(check_matrix(w, i, left_of(w, i, p.a)));
  p.ranges.push_back(check_matrix(w, i, right_of(i, p.b)));
  w.products.push_back(std::move(p));
  ++b.products_under_way;
}
void wgmma_fence(Warp& w, const Ins&, u32) { w.product_fence = true, w.fence_touch = w.touch; }
void wgmma_commit(Warp& w, const Ins&, u32) { ++w.product_group; }
void wgmma_wait(Warp& w, const Ins& i, u32) {  // until n groups are left
  size_t done = 0;
  for (; done < w.products.size() && w.products[done].group < w.product_group - static_cast<int>(i.n); ++done) {
    multiply(w, w.products[done]);
    --w.block->products_under_way;
  }
  w.products.erase(w.products.begin(), w.products.begin() + done);
  std::fill(w.in_flight.begin(), w.in_flight.end(), 0);
  for (auto& p : w.products) {
    for (auto& s : p.ins->list) w.in_flight[s.index] |= 2;
    for (auto& s : p.ins->list2) w.in_flight[s.index] |= 1;
  }
}
void setmaxnreg(Warp& w, const Ins& i, u32 m) {
  if (m != ~0u) fail(w, &i, "setmaxnreg by part of a warp");
  if (i.n < 24 || i.n > 256 || i.n % 8 != 0) fail(w, &i, "setmaxnreg: no such number of registers");
}

}  // namespace

// An instruction that is no product uses registers of products.
void note_touch(Warp& w, const Ins& i) {
  ++w.touch;
  auto one = [&](Slot s, bool write) {
    if (s.cls != k32 || !w.kernel->product_register[s.index]) return;
    if ((w.in_flight[s.index] & 2) || (write && w.in_flight[s.index]))
      complain(w, &i,
               write ? "writes a register of a product under way" : "reads an accumulator of a product under way");
    w.touched[s.index] = w.touch;
  };
  auto is = [&](const char* op) { return i.text.compare(0, strlen(op), op) == 0; };
  const bool list_is_target = is("ld") || is("mma") || (is("mov") && i.a[0].cls != kNone);
  one(i.d, true);
  for (auto& s : i.a) one(s, false);
  for (auto& s : i.list) one(s, list_is_target);
  for (auto* list : {&i.list2, &i.list3, &i.list4})
    for (auto& s : *list) one(s, false);
}

void forbid_in_flight(Warp& w, const Ins& i, u32 at, u32 size) {
  for (auto& other : w.block->kernel->warps)
    if (other->block == w.block)
      for (auto& p : other->products)
        for (auto [low, high] : p.ranges)
          if (at < high && at + size > low) complain(w, &i, "writes shared memory that a product under way reads");
}

namespace {

void decode_product(Ins& i, const Parsed& p, Names& names) {
  const auto& op = p.op;
  if (op[1] != "mma_async" || op.size() != 8 || op[5] != "f32" || op[6] != "f16" || op[7] != "f16") not_implemented(p);
  i.n = std::stoi(op[4].substr(op[4].find('n') + 1));
  i.list = names.values(p.operand[0], 4);
  if (i.list.size() != i.n / 2) throw Failure("wgmma: number of accumulators");
  const bool registers = p.operand[1][0] == '{';  // a
  if (p.operand.size() != (registers ? 7u : 8u)) not_implemented(p);
  if (registers) i.list2 = names.values(p.operand[1], 4);
  else i.a[0] = names.value(p.operand[1], 8, false);
  i.a[1] = names.value(p.operand[2], 8, false);
  auto is_one = [&](size_t k) { return names.number(p.operand[k]) == 1; };
  if (!isdigit(p.operand[3][0])) i.a[2] = names.predicate(p.operand[3]);
  else if (!is_one(3)) not_implemented(p);
  if (!is_one(4) || !is_one(5)) not_implemented(p);  // signs
  i.m = registers ? (is_one(6) ? 2 : 0) : (is_one(6) ? 1 : 0) | (is_one(7) ? 2 : 0);
  for (auto* list : {&i.list, &i.list2})
    for (auto& s : *list) {
      if (s.cls != k32) not_implemented(p);
      names.product_register(s.index);
    }
  i.execute = wgmma;
}

}  // namespace

bool decode_products(Ins& i, const Parsed& p, Names& names) {
  if (p.op[0] == "setmaxnreg") {
    i.n = static_cast<u32>(names.number(p.operand[0])), i.execute = setmaxnreg;
  } else if (p.op[0] != "wgmma") {
    return false;
  } else if (p.op[1] == "fence") {
    i.execute = wgmma_fence;
  } else if (p.op[1] == "commit_group") {
    i.execute = wgmma_commit;
  } else if (p.op[1] == "wait_group") {
    i.n = static_cast<u32>(names.number(p.operand[0])), i.execute = wgmma_wait;
  } else {
    decode_product(i, p, names);
  }
  i.flow = kCollective;
  return true;
}

}  // namespace ptx_machine
