// Loads, stores, atomics.
#include "state.h"

namespace ptx_machine {
namespace {

enum Space { kGlobal, kShared, kParam };

u64 extended(u64 raw, u32 bytes, bool is_signed) {
  if (!is_signed || bytes == 8) return raw;
  const u32 unused = 64 - bytes * 8;
  return static_cast<u64>(static_cast<int64_t>(raw << unused) >> unused);
}

void read_parameter(Warp& w, const Ins& i, u64 address, u32 size, void* to) {
  const Kernel& k = *w.kernel;
  if (address < k.parameter_base || address + size > k.parameter_base + k.parameter_memory.size())
    fail(w, &i, "read of parameters out of bounds");
  if (address % size) fail(w, &i, "misaligned read of parameters");
  memcpy(to, reinterpret_cast<void*>(address), size);
}

template <int S>
void load(Warp& w, const Ins& i, u32 m) {  // n: bytes each; k: how many; flag: signed; m: may be written by atomics
  need(w, i, i.a[0], m, "an address");
  u8 data[64];
  const u32 total = i.n * i.k;
  EACH(m, l) {
    const u64 address = address_of(w, i, i.a[0], l);
    if constexpr (S == kShared) shared_read(w, i, static_cast<u32>(address), total, l, data);
    else if constexpr (S == kParam) read_parameter(w, i, address, total, data);
    else memcpy(data, global_memory(w, i, address, total, false, l, i.m == 1), total);
    for (u32 k = 0; k < i.k; ++k) {
      u64 raw = 0;
      memcpy(&raw, data + k * i.n, i.n);
      const Slot d = i.list[k];
      if (d.cls == k64) w.r64[d.index * 32 + l] = extended(raw, i.n, i.flag);
      else if (d.cls == k32) w.r32[d.index * 32 + l] = static_cast<u32>(extended(raw, i.n, i.flag));
    }
  }
  for (auto& s : i.list)
    if (s.cls != kNone) set_valid(w, s, m, ~0u);
}

template <int S>
void store(Warp& w, const Ins& i, u32 m) {
  need(w, i, i.a[0], m, "an address");
  for (auto& s : i.list) need(w, i, s, m, "the value of a store");
  u8 data[64];
  const u32 total = i.n * i.k;
  EACH(m, l) {
    for (u32 k = 0; k < i.k; ++k) {
      const u64 raw = value_of(w, i.list[k], l);
      memcpy(data + k * i.n, &raw, i.n);
    }
    const u64 address = address_of(w, i, i.a[0], l);
    if constexpr (S == kShared) shared_write(w, i, static_cast<u32>(address), total, l, data);
    else memcpy(global_memory(w, i, address, total, true, l, false), data, total);
  }
}

template <class T>
T combine(const std::string& how, T a, T b, T c) {
  if (how == "exch") return b;
  if (how == "cas") return a == b ? c : a;
  if (how == "add") return a + b;
  if (how == "max") return std::max(a, b);
  if (how == "min") return std::min(a, b);
  if constexpr (std::is_integral_v<T>) {
    if (how == "or") return a | b;
    if (how == "and") return a & b;
    if (how == "xor") return a ^ b;
  }
  throw Failure("atomic: " + how);
}
template <class T, int S>
void atomic(Warp& w, const Ins& i, u32 m) {
  need(w, i, i.a[0], m, "an address");
  need(w, i, i.a[1], m, "an atomic's operand");
  EACH(m, l) {
    const u64 address = address_of(w, i, i.a[0], l);
    const T b = get<T>(static_cast<Store<T>>(value_of(w, i.a[1], l)));
    const T c = i.a[2].cls == kNone ? T{} : get<T>(static_cast<Store<T>>(value_of(w, i.a[2], l)));
    u8* p = S == kShared ? shared_atomic(w, i, static_cast<u32>(address), sizeof(T))
                         : global_memory(w, i, address, sizeof(T), true, l, true);
    T a;
    memcpy(&a, p, sizeof a);
    const T r = combine<T>(i.word, a, b, c);
    memcpy(p, &r, sizeof r);
    if (i.d.cls == k64) w.r64[i.d.index * 32 + l] = put<T>(a);
    else if (i.d.cls == k32) w.r32[i.d.index * 32 + l] = static_cast<u32>(put<T>(a));
  }
  if (i.d.cls != kNone) set_valid(w, i.d, m, ~0u);
}
template <int S>
Execute atomic_of(const std::string& type) {
  if (type == "u32" || type == "b32") return atomic<u32, S>;
  if (type == "s32") return atomic<int32_t, S>;
  if (type == "u64" || type == "b64") return atomic<u64, S>;
  if (type == "f32") return atomic<float, S>;
  return nullptr;
}

Space space_of(const Parsed& p) {
  return p.has("shared") || p.has("shared::cta") ? kShared : p.has("param") ? kParam : kGlobal;
}
void allow_only(const Parsed& p, const std::set<std::string>& words) {
  for (size_t k = 1; k + 1 < p.op.size(); ++k)
    if (!words.count(p.op[k])) not_implemented(p);
}

void decode_load_store(Ins& i, const Parsed& p, Names& names) {
  static const std::set<std::string> known = {"global",
                                              "shared",
                                              "shared::cta",
                                              "param",
                                              "v2",
                                              "v4",
                                              "v8",
                                              "relaxed",
                                              "acquire",
                                              "volatile",
                                              "weak",
                                              "cta",
                                              "gpu",
                                              "sys",
                                              "nc",
                                              "L1::evict_first",
                                              "L1::evict_last",
                                              "L1::evict_normal",
                                              "L1::no_allocate",
                                              "L2::cache_hint"};
  allow_only(p, known);
  const bool is_load = p.op[0] == "ld";
  const Space space = space_of(p);
  i.n = bytes_of(p.type()), i.k = p.has("v2") ? 2 : p.has("v4") ? 4 : p.has("v8") ? 8 : 1;
  i.flag = p.type()[0] == 's', i.m = p.has("relaxed") || p.has("volatile") || p.has("acquire");
  i.a[0] = decode_address(i, p.operand[is_load ? 1 : 0], names, space == kShared ? 4 : 8);
  i.list = names.values(p.operand[is_load ? 0 : 1], i.n);
  if (i.list.size() != i.k) throw Failure("number of operands: " + p.text);
  if (is_load) i.execute = space == kShared ? load<kShared> : space == kParam ? load<kParam> : load<kGlobal>;
  else i.execute = space == kShared ? store<kShared> : store<kGlobal>;
}

void decode_atomic(Ins& i, const Parsed& p, Names& names) {
  static const std::set<std::string> how = {"add", "max", "min", "or", "and", "exch", "cas", "xor"};
  std::set<std::string> known = {"global", "shared", "gpu", "cta", "relaxed", "acq_rel"};
  known.insert(how.begin(), how.end());
  allow_only(p, known);
  for (auto& word : p.op)
    if (how.count(word)) i.word = word;
  const bool is_shared = space_of(p) == kShared, returns = p.op[0] == "atom";
  const size_t first = returns ? 1 : 0;
  const int bytes = bytes_of(p.type());
  i.a[0] = decode_address(i, p.operand[first], names, is_shared ? 4 : 8);
  if (returns && p.operand[0] != "_") i.d = names.value(p.operand[0], bytes, false);
  for (size_t k = first + 1; k < p.operand.size(); ++k)
    i.a[k - first] = names.value(p.operand[k], bytes, p.type()[0] == 'f');
  i.execute = is_shared ? atomic_of<kShared>(p.type()) : atomic_of<kGlobal>(p.type());
  if (i.execute == nullptr) not_implemented(p);
}

}  // namespace

bool decode_memory(Ins& i, const Parsed& p, Names& names) {
  if (p.op[0] == "ld" || p.op[0] == "st") return decode_load_store(i, p, names), true;
  if (p.op[0] == "atom" || p.op[0] == "red") return decode_atomic(i, p, names), true;
  return false;
}

}  // namespace ptx_machine
