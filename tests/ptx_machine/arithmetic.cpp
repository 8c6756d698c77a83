// Sums, products, quotients, extremes.
#include "lanes.h"

namespace ptx_machine {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
using Twice = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, s32, u32>,
                                 std::conditional_t<std::is_signed_v<T>, s64, u64>>;

template <class T>
T add_down(T a, T b) {  // rounded toward minus infinity: the sum less one place where its error is negative
  volatile T s = a + b, bb = s - a;
  volatile T error = (a - (s - bb)) + (b - bb);
  return error < 0 ? std::nextafter(static_cast<T>(s), -std::numeric_limits<T>::infinity()) : static_cast<T>(s);
}
// Of 0 and -0 the first is larger.
template <class T>
T max_of(T a, T b) {
  if (a == 0 && b == 0) return std::signbit(a) ? b : a;
  return std::fmax(a, b);
}
template <class T>
T min_of(T a, T b) {
  if (a == 0 && b == 0) return std::signbit(a) ? a : b;
  return std::fmin(a, b);
}
template <class T>
T nan_max(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : max_of(a, b);
}
template <class T>
T nan_min(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : min_of(a, b);
}

// Left open by PTX, and done as GPUs do it: x / 0 has all bits set, x % 0 is x.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return static_cast<T>(~T(0));
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(-static_cast<Unsigned<T>>(a));
  return static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(0) : static_cast<T>(a % b);
}

template <class T>
Execute of_integers(const std::string& o, bool high) {
  using U = Unsigned<T>;
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  if (o == "add") return op2<T, T, T, [](T a, T b) { return static_cast<T>(static_cast<U>(a) + static_cast<U>(b)); }>;
  if (o == "sub") return op2<T, T, T, [](T a, T b) { return static_cast<T>(static_cast<U>(a) - static_cast<U>(b)); }>;
  if (o == "mul" && high)
    return op2<T, T, T, [](T a, T b) { return static_cast<T>(static_cast<Wide>(a) * b >> sizeof(T) * 8); }>;
  if (o == "mul")
    return op2<T, T, T, [](T a, T b) { return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b)); }>;
  if (o == "mad" && !high)
    return op3<T, T, T, T, [](T a, T b, T c) {
      return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b) + static_cast<u64>(c));
    }>;
  if (o == "div") return op2<T, T, T, [](T a, T b) { return quotient(a, b); }>;
  if (o == "rem") return op2<T, T, T, [](T a, T b) { return remainder(a, b); }>;
  if (o == "min") return op2<T, T, T, [](T a, T b) { return std::min(a, b); }>;
  if (o == "max") return op2<T, T, T, [](T a, T b) { return std::max(a, b); }>;
  if (o == "neg") return op1<T, T, [](T a) { return static_cast<T>(-static_cast<U>(a)); }>;
  if (o == "abs") return op1<T, T, [](T a) { return a < 0 ? static_cast<T>(-static_cast<U>(a)) : a; }>;
  return nullptr;
}

template <class T>
Execute of_floats(const std::string& o, bool down, bool nan) {
  if (o == "add" && down) return op2<T, T, T, [](T a, T b) { return add_down(a, b); }>;
  if (o == "add") return op2<T, T, T, [](T a, T b) { return a + b; }>;
  if (o == "sub") return op2<T, T, T, [](T a, T b) { return a - b; }>;
  if (o == "mul") return op2<T, T, T, [](T a, T b) { return a * b; }>;
  if (o == "fma" || o == "mad") return op3<T, T, T, T, [](T a, T b, T c) { return std::fma(a, b, c); }>;
  if (o == "div") return op2<T, T, T, [](T a, T b) { return a / b; }>;
  if (o == "min" && nan) return op2<T, T, T, [](T a, T b) { return nan_min(a, b); }>;
  if (o == "min") return op2<T, T, T, [](T a, T b) { return min_of(a, b); }>;
  if (o == "max" && nan) return op2<T, T, T, [](T a, T b) { return nan_max(a, b); }>;
  if (o == "max") return op2<T, T, T, [](T a, T b) { return max_of(a, b); }>;
  if (o == "neg") return op1<T, T, [](T a) { return -a; }>;
  if (o == "abs") return op1<T, T, [](T a) { return std::abs(a); }>;
  if (o == "sqrt") return op1<T, T, [](T a) { return std::sqrt(a); }>;
  if (o == "rcp") return op1<T, T, [](T a) { return 1 / a; }>;
  return nullptr;
}

// mul.wide, mad.wide: products of twice the width.
void decode_wide(Ins& i, const Parsed& p, Names& names) {
  with_type(p.type(), [&]<class T>() {
    if constexpr (kInteger<T> && sizeof(T) >= 2 && sizeof(T) <= 4) {
      using D = Twice<T>;
      i.d = names.value(p.operand[0], sizeof(D), false);
      for (int k = 0; k < 2; ++k) set_source(i, k, p, names, sizeof(T));
      if (p.op[0] == "mul") {
        i.execute = op2<D, T, T, [](T a, T b) { return static_cast<D>(static_cast<D>(a) * static_cast<D>(b)); }>;
      } else {
        set_source(i, 2, p, names, sizeof(D));
        i.execute = op3<D, T, T, D, [](T a, T b, D c) {
          return static_cast<D>(static_cast<Unsigned<D>>(static_cast<D>(a) * static_cast<D>(b)) +
                                static_cast<Unsigned<D>>(c));
        }>;
      }
    }
  });
  if (i.execute == nullptr) not_implemented(p);
}

}  // namespace

bool decode_arithmetic(Ins& i, const Parsed& p, Names& names) {
  static const std::set<std::string> known = {"add", "sub", "mul", "mad", "fma",  "div", "rem",
                                              "min", "max", "abs", "neg", "sqrt", "rcp"};
  const std::string& o = p.op[0];
  if (!known.count(o)) return false;
  if (o == "abs" && (p.type() == "f16x2" || p.type() == "bf16x2")) {
    set_operands<u32>(i, p, names);
    i.execute = op1<u32, u32, [](u32 a) { return a & 0x7fff7fff; }>;
    return true;
  }
  const bool down = p.has("rm"), other_rounding = p.has("rz") || p.has("rp") || (down && o != "add");
  const bool inexact = p.has("ftz") || p.has("approx") || (p.has("full") && o != "div");
  if (inexact || other_rounding || p.has("cc")) not_implemented(p);
  if (p.has("wide")) return decode_wide(i, p, names), true;
  set_by_type(i, p, names, [&]<class T>() -> Execute {
    if constexpr (kInteger<T>) return of_integers<T>(o, p.has("hi"));
    if constexpr (std::is_floating_point_v<T>) return of_floats<T>(o, down, p.has("NaN"));
    return nullptr;
  });
  return true;
}

}  // namespace ptx_machine
