// mov, comparisons, selection, and operations on predicates.
#include "lanes.h"

namespace ptx_machine {
namespace {

enum Compare { kEq, kNe, kLt, kLe, kGt, kGe, kNum, kNan };
// `with_nan`: true where an operand is NaN (equ, neu, ltu..).
template <class T, int C, bool with_nan = false>
bool compare(T a, T b) {
  bool nan = false;
  if constexpr (std::is_floating_point_v<T>) nan = std::isnan(a) || std::isnan(b);
  if constexpr (C == kNum) return !nan;
  if constexpr (C == kNan) return nan;
  if (nan) return with_nan;
  if constexpr (C == kEq) return a == b;
  if constexpr (C == kNe) return a != b;
  if constexpr (C == kLt) return a < b;
  if constexpr (C == kLe) return a <= b;
  if constexpr (C == kGt) return a > b;
  return a >= b;
}

template <class T, int C, bool with_nan = false>
void setp(Warp& w, const Ins& i, u32 m) {  // n: combined with a predicate by 1 and, 2 or, 3 xor
  auto a = source<T>(w, i.a[0]);
  auto b = source<T>(w, i.a[1]);
  u32 ok = valid(w, i.a[0]) & valid(w, i.a[1]), value = 0;
  for (int l = 0; l < 32; ++l) value |= static_cast<u32>(compare<T, C, with_nan>(get<T>(a[l]), get<T>(b[l]))) << l;
  u32 second = ~value;
  if (i.n != 0) {
    const u32 c = predicate(w, i.a[2]);
    ok &= valid(w, i.a[2]);
    for (u32* v : {&value, &second}) *v = i.n == 1 ? *v & c : i.n == 2 ? *v | c : *v ^ c;
  }
  set_predicate(w, i.d, m, value, ok);
  if (i.d2.cls == kPred) set_predicate(w, i.d2, m, second, ok);
}
template <class T>
Execute setp_of(const std::string& c) {
  static const std::map<std::string, Execute> all = {
      {"eq", setp<T, kEq>},        {"ne", setp<T, kNe>},        {"lt", setp<T, kLt>},
      {"le", setp<T, kLe>},        {"gt", setp<T, kGt>},        {"ge", setp<T, kGe>},
      {"lo", setp<T, kLt>},        {"ls", setp<T, kLe>},        {"hi", setp<T, kGt>},
      {"hs", setp<T, kGe>},        {"equ", setp<T, kEq, true>}, {"neu", setp<T, kNe, true>},
      {"ltu", setp<T, kLt, true>}, {"leu", setp<T, kLe, true>}, {"gtu", setp<T, kGt, true>},
      {"geu", setp<T, kGe, true>}, {"num", setp<T, kNum>},      {"nan", setp<T, kNan>}};
  auto found = all.find(c);
  return found == all.end() ? nullptr : found->second;
}

template <class T>
void selp(Warp& w, const Ins& i, u32 m) {
  auto a = source<T>(w, i.a[0]);
  auto b = source<T>(w, i.a[1]);
  const u32 p = predicate(w, i.a[2]);
  const u32 ok = valid(w, i.a[2]) & ((p & valid(w, i.a[0])) | (~p & valid(w, i.a[1])));
  auto d = target<T>(w, i.d);
  EACH(m, l) d[l] = p >> l & 1 ? a[l] : b[l];
  set_valid(w, i.d, m, ok);
}

enum Logic { kAnd, kOr, kXor, kNot, kSame };
// Of predicates. `and` is known where one operand is known to be false, `or` where one is known to be true.
template <int K>
void logic(Warp& w, const Ins& i, u32 m) {
  auto value = [&](Slot s) { return s.cls == kPred ? predicate(w, s) : *source32(w, s) != 0 ? ~0u : 0u; };
  const u32 a = value(i.a[0]), ok_a = valid(w, i.a[0]);
  if (K == kNot || K == kSame) return set_predicate(w, i.d, m, K == kNot ? ~a : a, ok_a);
  const u32 b = value(i.a[1]), ok_b = valid(w, i.a[1]);
  u32 ok = ok_a & ok_b;
  if (K == kAnd) ok |= (ok_a & ~a) | (ok_b & ~b);
  if (K == kOr) ok |= (ok_a & a) | (ok_b & b);
  set_predicate(w, i.d, m, K == kAnd ? a & b : K == kOr ? a | b : a ^ b, ok);
}

using Special = u32 (*)(const Block& b, u32 thread);
const std::map<std::string, Special> kSpecial = {
    {"%tid.x", [](const Block& b, u32 t) { return t % b.size.x; }},
    {"%tid.y", [](const Block& b, u32 t) { return t / b.size.x % b.size.y; }},
    {"%tid.z", [](const Block& b, u32 t) { return t / b.size.x / b.size.y; }},
    {"%ntid.x", [](const Block& b, u32) { return b.size.x; }},
    {"%ntid.y", [](const Block& b, u32) { return b.size.y; }},
    {"%ntid.z", [](const Block& b, u32) { return b.size.z; }},
    {"%ctaid.x", [](const Block& b, u32) { return b.at.x; }},
    {"%ctaid.y", [](const Block& b, u32) { return b.at.y; }},
    {"%ctaid.z", [](const Block& b, u32) { return b.at.z; }},
    {"%nctaid.x", [](const Block& b, u32) { return b.grid.x; }},
    {"%nctaid.y", [](const Block& b, u32) { return b.grid.y; }},
    {"%nctaid.z", [](const Block& b, u32) { return b.grid.z; }},
    {"%laneid", [](const Block&, u32 t) { return t % 32; }},
    {"%warpid", [](const Block&, u32 t) { return t / 32; }},
    {"%lanemask_eq", [](const Block&, u32 t) { return 1u << t % 32; }},
    {"%lanemask_lt", [](const Block&, u32 t) { return (1u << t % 32) - 1; }},
    {"%lanemask_le", [](const Block&, u32 t) { return (2u << t % 32) - 1; }},
    {"%lanemask_gt", [](const Block&, u32 t) { return ~((2u << t % 32) - 1); }},
    {"%lanemask_ge", [](const Block&, u32 t) { return ~((1u << t % 32) - 1); }},
    {"%dynamic_smem_size", [](const Block& b, u32) { return b.dynamic_shared; }},
    // A block is a cluster of its own.
    {"%cluster_ctaid.x", [](const Block&, u32) { return 0u; }},
    {"%cluster_ctarank", [](const Block&, u32) { return 0u; }},
    {"%cluster_nctaid.x", [](const Block&, u32) { return 1u; }},
    {"%cluster_nctarank", [](const Block&, u32) { return 1u; }},
    {"%clusterid.x", [](const Block& b, u32) { return b.at.x; }},
};
void mov_special(Warp& w, const Ins& i, u32 m) {
  EACH(m, l) {
    const u32 value = i.special(*w.block, w.id * 32 + l);
    if (i.d.cls == k64) w.r64[i.d.index * 32 + l] = value;
    else w.r32[i.d.index * 32 + l] = value;
  }
  set_valid(w, i.d, m, ~0u);
}

u64 low_bytes(u64 v, u32 bytes) { return bytes < 8 ? v & ((u64{1} << bytes * 8) - 1) : v; }
void mov_pack(Warp& w, const Ins& i, u32 m) {  // {a, b, ..} to one register of i.n bytes
  const u32 each = i.n / i.list.size();
  u32 ok = ~0u;
  for (auto& s : i.list) ok &= valid(w, s);
  EACH(m, l) {
    u64 v = 0;
    for (size_t k = 0; k < i.list.size(); ++k) v |= low_bytes(value_of(w, i.list[k], l), each) << k * each * 8;
    if (i.n == 8) target<u64>(w, i.d)[l] = v;
    else target<u32>(w, i.d)[l] = static_cast<u32>(v);
  }
  set_valid(w, i.d, m, ok);
}
void mov_unpack(Warp& w, const Ins& i, u32 m) {
  const u32 each = i.n / i.list.size(), ok = valid(w, i.a[0]);
  EACH(m, l) {
    const u64 v = value_of(w, i.a[0], l);
    for (size_t k = 0; k < i.list.size(); ++k)
      if (i.list[k].cls != kNone)
        w.r32[i.list[k].index * 32 + l] = static_cast<u32>(low_bytes(v >> k * each * 8, each));
  }
  for (auto& s : i.list)
    if (s.cls != kNone) set_valid(w, s, m, ok);
}

void set_copy(Ins& i, const Parsed& p, Names& names) {
  set_by_type(i, p, names, [&]<class T>() -> Execute { return op1<T, T, [](T x) { return x; }>; });
}

void decode_mov(Ins& i, const Parsed& p, Names& names) {
  const std::string &d = p.operand[0], &s = p.operand[1];
  if (p.type() == "pred") {
    i.d = names.predicate(d);
    i.a[0] = s[0] == '%' || s[0] == '!' || isalpha(s[0]) ? names.predicate(s) : names.value(s, 4, false);
    i.execute = logic<kSame>;
    return;
  }
  i.n = bytes_of(p.type());
  if (d[0] == '{') {
    i.list = names.values(d, i.n / 2), i.a[0] = names.value(s, i.n, false);
    i.execute = mov_unpack;
  } else if (s[0] == '{') {
    const int parts = static_cast<int>(std::count(s.begin(), s.end(), ',')) + 1;
    i.list = names.values(s, i.n / parts), i.d = names.value(d, i.n, false);
    i.execute = mov_pack;
  } else if (auto special = kSpecial.find(s); special != kSpecial.end()) {
    i.d = names.value(d, i.n, false), i.special = special->second;
    i.execute = mov_special;
  } else {
    set_copy(i, p, names);
  }
}

void decode_setp(Ins& i, const Parsed& p, Names& names) {
  const size_t bar = p.operand[0].find('|');
  i.d = names.predicate(p.operand[0].substr(0, bar));
  if (bar != std::string::npos) i.d2 = names.predicate(p.operand[0].substr(bar + 1));
  i.n = p.has("and") ? 1 : p.has("or") ? 2 : p.has("xor") ? 3 : 0;
  if (i.n) i.a[2] = names.predicate(p.operand[3]);
  with_type(p.type(), [&]<class T>() {
    if constexpr (!std::is_same_v<T, bf16>) {
      for (int k = 0; k < 2; ++k) set_source(i, k, p, names, sizeof(T), !kInteger<T>);
      i.execute = setp_of<T>(p.op[1]);
    }
  });
  if (i.execute == nullptr) not_implemented(p);
}

}  // namespace

bool decode_moves(Ins& i, const Parsed& p, Names& names) {
  const std::string &o = p.op[0], &type = p.type();
  if (o == "mov") {
    decode_mov(i, p, names);
  } else if (o == "cvta") {
    if (p.has("shared") || p.has("local")) not_implemented(p);
    set_copy(i, p, names);
  } else if (o == "setp") {
    decode_setp(i, p, names);
  } else if (o == "selp") {
    const int bytes = bytes_of(type);
    const bool floating = type[0] == 'f' || type == "bf16";
    i.d = names.value(p.operand[0], bytes, floating);
    for (int k = 0; k < 2; ++k) set_source(i, k, p, names, bytes, floating);
    i.a[2] = names.predicate(p.operand[3]);
    i.execute = bytes == 8 ? selp<u64> : selp<u32>;
  } else if (type == "pred" && (o == "and" || o == "or" || o == "xor" || o == "not")) {
    i.d = names.predicate(p.operand[0]);
    for (size_t k = 1; k < p.operand.size(); ++k) i.a[k - 1] = names.predicate(p.operand[k]);
    i.execute = o == "and" ? logic<kAnd> : o == "or" ? logic<kOr> : o == "xor" ? logic<kXor> : logic<kNot>;
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx_machine
