// cvt: from one type to another.
#include "lanes.h"

namespace ptx_machine {
namespace {

enum Round : u32 { kNearest, kToZero, kUp, kDown };

float wide(bf16 x) { return std::bit_cast<float>(static_cast<u32>(x.bits) << 16); }
bf16 narrow(float x) {  // to the nearest, ties to even
  u32 b = std::bit_cast<u32>(x);
  if ((b & 0x7fffffff) > 0x7f800000) return {u16{0x7fff}};
  return {static_cast<u16>((b + 0x7fff + (b >> 16 & 1)) >> 16)};
}
template <class T>
double to_double(T x) {
  if constexpr (std::is_same_v<T, bf16>) return wide(x);
  else return static_cast<double>(x);
}
double to_integer(double v, u32 round) {
  return round == kNearest  ? std::nearbyint(v)
         : round == kToZero ? std::trunc(v)
         : round == kUp     ? std::ceil(v)
                            : std::floor(v);
}

template <class D, class S>
D from_integer(S x, bool saturate) {
  using Limits = std::numeric_limits<D>;
  if constexpr (std::is_same_v<D, bf16>) return narrow(static_cast<float>(x));
  else if constexpr (!kInteger<D>) return static_cast<D>(x);
  else return saturate ? static_cast<D>(std::clamp<__int128>(x, Limits::min(), Limits::max())) : static_cast<D>(x);
}

template <class D, class S>
D from_float(S x, u32 round, bool integral, bool saturate) {
  if constexpr (kInteger<D>) {  // always saturates; a NaN is 0
    using Limits = std::numeric_limits<D>;
    double v = to_double(x);
    if (std::isnan(v)) return 0;
    v = to_integer(v, round);
    if (v <= static_cast<double>(Limits::min())) return Limits::min();
    return v >= static_cast<double>(Limits::max()) ? Limits::max() : static_cast<D>(v);
  } else {
    const double exact = integral ? to_integer(to_double(x), round) : to_double(x);
    if constexpr (std::is_same_v<D, bf16>) return narrow(static_cast<float>(exact));
    else {
      D v = static_cast<D>(exact);
      if (std::is_same_v<D, float> && !integral && round == kToZero &&
          std::abs(static_cast<double>(v)) > std::abs(exact))
        v = static_cast<D>(std::nextafter(static_cast<float>(v), 0.0f));
      return saturate ? (v > D(0) ? std::min(v, D(1)) : D(0)) : v;
    }
  }
}

// A register may be wider than the type: then its low bits are read, and integers written are extended.
template <class D>
void write(Warp& w, Slot d, u32 l, D v) {
  if (d.cls == k64) {
    if constexpr (kInteger<D>) w.r64[d.index * 32 + l] = static_cast<u64>(static_cast<s64>(v));
    else w.r64[d.index * 32 + l] = static_cast<u64>(put<D>(v));
  } else if constexpr (sizeof(D) == 8) {
    throw Failure("cvt: target too narrow");
  } else if constexpr (kInteger<D> && sizeof(D) != 2) {
    w.r32[d.index * 32 + l] = static_cast<u32>(static_cast<s64>(v));
  } else {
    w.r32[d.index * 32 + l] = put<D>(v);
  }
}

template <class D, class S>
void cvt(Warp& w, const Ins& i, u32 m) {  // k: rounding; m: to an integer, of floats; flag: saturates
  const u32 ok = valid(w, i.a[0]);
  const bool wider = sizeof(S) < 8 && (i.a[0].cls == k64 || i.a[0].cls == kPool64);
  const Store<S>* a = wider ? nullptr : source<S>(w, i.a[0]);
  EACH(m, l) {
    S x = get<S>(wider ? static_cast<Store<S>>(source64(w, i.a[0])[l]) : a[l]);
    if constexpr (kInteger<S>) write(w, i.d, l, from_integer<D, S>(x, i.flag));
    else write(w, i.d, l, from_float<D, S>(x, i.k, i.m != 0, i.flag));
  }
  set_valid(w, i.d, m, ok);
}

template <class H>
void cvt_pair(Warp& w, const Ins& i, u32 m) {  // cvt.rn.f16x2.f32 d, a, b: a is the upper half
  auto a = source<float>(w, i.a[0]), b = source<float>(w, i.a[1]);
  const u32 ok = valid(w, i.a[0]) & valid(w, i.a[1]);
  auto d = target<u32>(w, i.d);
  EACH(m, l) {
    u32 high = put<H>(from_float<H, float>(get<float>(a[l]), kNearest, false, false));
    u32 low = put<H>(from_float<H, float>(get<float>(b[l]), kNearest, false, false));
    d[l] = high << 16 | low;
  }
  set_valid(w, i.d, m, ok);
}

}  // namespace

bool decode_convert(Ins& i, const Parsed& p, Names& names) {
  if (p.op[0] != "cvt") return false;
  const std::string &to = p.op[p.op.size() - 2], &from = p.type();
  i.flag = p.has("sat");
  i.k = p.has("rz") || p.has("rzi")   ? kToZero
        : p.has("rp") || p.has("rpi") ? kUp
        : p.has("rm") || p.has("rmi") ? kDown
                                      : kNearest;
  i.m = p.has("rni") || p.has("rzi") || p.has("rpi") || p.has("rmi");
  if (to == "f16x2" || to == "bf16x2") {
    i.d = names.value(p.operand[0], 4, false);
    for (int k = 0; k < 2; ++k) set_source(i, k, p, names, 4, true);
    i.execute = to == "f16x2" ? cvt_pair<f16> : cvt_pair<bf16>;
    return true;
  }
  with_type(to, [&]<class D>() {
    with_type(from, [&]<class S>() {
      i.d = names.value(p.operand[0], sizeof(D), false);
      set_source(i, 0, p, names, sizeof(S), !kInteger<S>);
      i.execute = cvt<D, S>;
    });
  });
  if (i.execute == nullptr) not_implemented(p);
  return true;
}

}  // namespace ptx_machine
