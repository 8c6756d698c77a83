// Logic, shifts, fields of bits.
#include "lanes.h"

namespace ptx_machine {
namespace {

u32 permute(u32 a, u32 b, u32 c) {  // four of the eight bytes of a and b, as the nibbles of c choose; 8: its sign
  u64 both = a | static_cast<u64>(b) << 32;
  u32 d = 0;
  for (int k = 0; k < 4; ++k) {
    u32 chosen = c >> 4 * k & 15, byte = both >> (chosen & 7) * 8 & 0xff;
    if (chosen & 8) byte = byte & 0x80 ? 0xff : 0;
    d |= byte << 8 * k;
  }
  return d;
}
u32 reverse(u32 a) {
  u32 r = 0;
  for (int k = 0; k < 32; ++k) r |= (a >> k & 1) << (31 - k);
  return r;
}
u64 joined(u32 low, u32 high) { return static_cast<u64>(high) << 32 | low; }

template <class T>
T bit_insert(T a, T b, u32 at, u32 length) {  // the low bits of a into b
  at &= 0xff, length &= 0xff;
  for (u32 k = 0; k < length && at + k < sizeof(T) * 8; ++k) b = (b & ~(T(1) << (at + k))) | ((a >> k & 1) << (at + k));
  return b;
}
template <class T>
void bfi(Warp& w, const Ins& i, u32 m) {
  auto a = source<T>(w, i.a[0]), b = source<T>(w, i.a[1]);
  auto at = source32(w, i.a[2]), length = source32(w, i.a[3]);
  u32 ok = valid(w, i.a[0]) & valid(w, i.a[1]) & valid(w, i.a[2]) & valid(w, i.a[3]);
  auto d = target<T>(w, i.d);
  EACH(m, l) d[l] = bit_insert<T>(a[l], b[l], at[l], length[l]);
  set_valid(w, i.d, m, ok);
}
template <class T>
T bit_extract(T a, u32 at, u32 length) {  // filled up with the field's sign if T has one
  constexpr u32 size = sizeof(T) * 8;
  using U = std::make_unsigned_t<T>;
  at &= 0xff, length &= 0xff;
  U v = 0, u = static_cast<U>(a);
  U sign = std::is_signed_v<T> && length > 0 ? u >> std::min(at + length - 1, size - 1) & 1 : 0;
  for (u32 k = 0; k < size; ++k) v |= (k < length && at + k < size ? u >> (at + k) & 1 : sign) << k;
  return static_cast<T>(v);
}
void lop3(Warp& w, const Ins& i, u32 m) {  // i.k: the table of all three bits' function
  auto a = source32(w, i.a[0]), b = source32(w, i.a[1]), c = source32(w, i.a[2]);
  u32 ok = valid(w, i.a[0]) & valid(w, i.a[1]) & valid(w, i.a[2]);
  auto d = target<u32>(w, i.d);
  EACH(m, l) {
    u32 v = 0;
    for (int k = 0; k < 8; ++k)
      if (i.k >> k & 1) v |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
    d[l] = v;
  }
  set_valid(w, i.d, m, ok);
}

template <class T>
Execute logic_of(const std::string& o) {
  if (o == "and") return op2<T, T, T, [](T a, T b) { return static_cast<T>(a & b); }>;
  if (o == "or") return op2<T, T, T, [](T a, T b) { return static_cast<T>(a | b); }>;
  if (o == "xor") return op2<T, T, T, [](T a, T b) { return static_cast<T>(a ^ b); }>;
  return op1<T, T, [](T a) { return static_cast<T>(~a); }>;
}
template <class T>
Execute shift_of(const std::string& o) {
  constexpr u32 bits = sizeof(T) * 8;
  if (o == "shr")
    return op2<T, T, u32, [](T a, u32 b) { return static_cast<T>(b >= bits ? (a < 0 ? -1 : 0) : a >> b); }>;
  return op2<T, T, u32, [](T a, u32 b) {
    return b >= bits ? static_cast<T>(0) : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << b);
  }>;
}
template <class T>
Execute count_of(const std::string& o) {
  if (o == "popc") return op1<u32, T, [](T a) { return static_cast<u32>(std::popcount(a)); }>;
  return op1<u32, T, [](T a) { return static_cast<u32>(std::countl_zero(a)); }>;
}

// Of one type the target and the first source, of 32 bits the others; choose<T>() may give null.
template <class F>
void decode_mixed(Ins& i, const Parsed& p, Names& names, bool target_of_type, F&& choose) {
  with_type(p.type(), [&]<class T>() {
    if constexpr (kInteger<T> && sizeof(T) >= 2) {
      i.d = names.value(p.operand[0], target_of_type ? sizeof(T) : 4, false);
      set_source(i, 0, p, names, sizeof(T));
      for (size_t k = 1; k + 1 < p.operand.size(); ++k) set_source(i, static_cast<int>(k), p, names, 4);
      i.execute = choose.template operator()<T>();
    }
  });
  if (i.execute == nullptr) not_implemented(p);
}

// Those of words of 32 bits only.
bool decode_words(Ins& i, const Parsed& p, Names& names) {
  const std::string &o = p.op[0], &type = p.type();
  if (o == "shf") {
    if (!p.has("wrap")) not_implemented(p);
    i.execute = p.has("l")
                    ? op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 c) { return u32(joined(a, b) << (c & 31) >> 32); }>
                    : op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 c) { return u32(joined(a, b) >> (c & 31)); }>;
  } else if (o == "bfind") {
    if (type != "u32") not_implemented(p);
    if (p.has("shiftamt"))
      i.execute = op1<u32, u32, [](u32 a) { return a == 0 ? ~0u : static_cast<u32>(std::countl_zero(a)); }>;
    else i.execute = op1<u32, u32, [](u32 a) { return a == 0 ? ~0u : static_cast<u32>(31 - std::countl_zero(a)); }>;
  } else if (o == "brev" && type == "b32") {
    i.execute = op1<u32, u32, [](u32 a) { return reverse(a); }>;
  } else if (o == "prmt" && type == "b32") {
    i.execute = op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 c) { return permute(a, b, c); }>;
  } else {
    return false;
  }
  set_operands<u32>(i, p, names);
  return true;
}

}  // namespace

bool decode_bits(Ins& i, const Parsed& p, Names& names) {
  const std::string& o = p.op[0];
  if (o == "and" || o == "or" || o == "xor" || o == "not") {
    if (p.type() == "pred") return false;
    set_by_type(i, p, names, [&]<class T>() -> Execute {
      if constexpr (kInteger<T>) return logic_of<T>(o);
      return nullptr;
    });
  } else if (o == "shl" || o == "shr") {
    decode_mixed(i, p, names, true, [&]<class T>() { return shift_of<T>(o); });
  } else if (o == "popc" || o == "clz") {
    decode_mixed(i, p, names, false, [&]<class T>() -> Execute {
      if constexpr (std::is_unsigned_v<T> && sizeof(T) >= 4) return count_of<T>(o);
      return nullptr;
    });
  } else if (o == "bfe") {
    decode_mixed(i, p, names, true, [&]<class T>() -> Execute {
      if constexpr (sizeof(T) >= 4)
        return op3<T, T, u32, u32, [](T a, u32 b, u32 c) { return bit_extract<T>(a, b, c); }>;
      return nullptr;
    });
  } else if (o == "bfi") {
    const int bytes = bytes_of(p.type());
    i.d = names.value(p.operand[0], bytes, false);
    for (int k = 0; k < 4; ++k) set_source(i, k, p, names, k < 2 ? bytes : 4);
    i.execute = bytes == 8 ? bfi<u64> : bfi<u32>;
  } else if (o == "lop3") {
    i.d = names.value(p.operand[0], 4, false);
    for (int k = 0; k < 3; ++k) set_source(i, k, p, names, 4);
    i.k = static_cast<u32>(names.number(p.operand[4]));
    i.execute = lop3;
  } else {
    return decode_words(i, p, names);
  }
  return true;
}

}  // namespace ptx_machine
