// Instructions that only compute: one function for all lanes of a warp, by the type of its operands.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "state.h"

namespace ptx_machine {

using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f16 = _Float16;
struct bf16 {
  u16 bits;
};

template <class T>
constexpr bool kInteger = std::is_integral_v<T>;

// Calls f<T>() for the type of PTX named `t`; false if there is none.
template <class F>
bool with_type(const std::string& t, F&& f) {
  if (t == "u8" || t == "b8") return f.template operator()<u8>(), true;
  if (t == "s8") return f.template operator()<s8>(), true;
  if (t == "u16" || t == "b16") return f.template operator()<u16>(), true;
  if (t == "s16") return f.template operator()<s16>(), true;
  if (t == "u32" || t == "b32") return f.template operator()<u32>(), true;
  if (t == "s32") return f.template operator()<s32>(), true;
  if (t == "u64" || t == "b64") return f.template operator()<u64>(), true;
  if (t == "s64") return f.template operator()<s64>(), true;
  if (t == "f16") return f.template operator()<f16>(), true;
  if (t == "bf16") return f.template operator()<bf16>(), true;
  if (t == "f32") return f.template operator()<float>(), true;
  if (t == "f64") return f.template operator()<double>(), true;
  return false;
}

// d = F(a), F(a, b), F(a, b, c) in the lanes of `m`. The result is valid where all operands are.
template <class R, class T, auto F>
void op1(Warp& w, const Ins& i, u32 m) {
  auto a = source<T>(w, i.a[0]);
  u32 ok = valid(w, i.a[0]);
  auto d = target<R>(w, i.d);
  EACH(m, l) d[l] = put<R>(F(get<T>(a[l])));
  set_valid(w, i.d, m, ok);
}
template <class R, class T, class U, auto F>
void op2(Warp& w, const Ins& i, u32 m) {
  auto a = source<T>(w, i.a[0]);
  auto b = source<U>(w, i.a[1]);
  u32 ok = valid(w, i.a[0]) & valid(w, i.a[1]);
  auto d = target<R>(w, i.d);
  if (m == ~0u) {  // the usual case, which a compiler makes vectors of
    for (int l = 0; l < 32; ++l) d[l] = put<R>(F(get<T>(a[l]), get<U>(b[l])));
  } else {
    EACH(m, l) d[l] = put<R>(F(get<T>(a[l]), get<U>(b[l])));
  }
  set_valid(w, i.d, m, ok);
}
template <class R, class T, class U, class V, auto F>
void op3(Warp& w, const Ins& i, u32 m) {
  auto a = source<T>(w, i.a[0]);
  auto b = source<U>(w, i.a[1]);
  auto c = source<V>(w, i.a[2]);
  u32 ok = valid(w, i.a[0]) & valid(w, i.a[1]) & valid(w, i.a[2]);
  auto d = target<R>(w, i.d);
  if (m == ~0u) {
    for (int l = 0; l < 32; ++l) d[l] = put<R>(F(get<T>(a[l]), get<U>(b[l]), get<V>(c[l])));
  } else {
    EACH(m, l) d[l] = put<R>(F(get<T>(a[l]), get<U>(b[l]), get<V>(c[l])));
  }
  set_valid(w, i.d, m, ok);
}

// The instruction's target and sources, all of T.
template <class T>
void set_operands(Ins& i, const Parsed& p, Names& names) {
  i.d = names.value(p.operand[0], sizeof(T), !kInteger<T>);
  for (size_t k = 1; k < p.operand.size(); ++k) i.a[k - 1] = names.value(p.operand[k], sizeof(T), !kInteger<T>);
}

// All operands have the instruction's type T; choose<T>() tells how it is executed, null: not implemented.
template <class F>
void set_by_type(Ins& i, const Parsed& p, Names& names, F&& choose) {
  with_type(p.type(), [&]<class T>() {
    set_operands<T>(i, p, names);
    i.execute = choose.template operator()<T>();
  });
  if (i.execute == nullptr) not_implemented(p);
}

// Sources of types of their own: `bytes` and whether constants are of floating point.
inline void set_source(Ins& i, int k, const Parsed& p, Names& names, int bytes, bool floating = false) {
  i.a[k] = names.value(p.operand[k + 1], bytes, floating);
}

}  // namespace ptx_machine
