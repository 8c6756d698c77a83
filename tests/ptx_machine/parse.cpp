// The body of a kernel to instructions: scopes, registers, labels, operands.
#include "parse.h"

namespace ptx_machine {

std::string trim(const std::string& s) {
  const size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}
std::vector<std::string> split(const std::string& s) {
  std::vector<std::string> parts;
  int depth = 0;
  std::string part;
  for (char c : s) {
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c == ',' && depth == 0) parts.push_back(trim(part)), part.clear();
    else part += c;
  }
  if (!trim(part).empty() || !parts.empty()) parts.push_back(trim(part));
  return parts;
}
u32 number_after(const std::string& s, const char* word, u32 otherwise) {
  const size_t at = s.find(word);
  return at == std::string::npos ? otherwise : static_cast<u32>(std::stoul(s.substr(at + strlen(word))));
}
std::string declared_name(const std::string& s) {
  const size_t end = std::min(s.find('['), s.size()), begin = s.find_last_of(" \t", end - 1) + 1;
  return s.substr(begin, end - begin);
}

namespace {

std::string compact(const std::string& s) {
  std::string r;
  for (char c : s)
    if (!isspace(static_cast<unsigned char>(c))) r += c;
  return r;
}
bool is_word(char c) { return isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }
bool is_bits(const std::string& t) {  // 0f3F800000, 0d3FF0000000000000
  return (t.size() == 10 && t[0] == '0' && tolower(t[1]) == 'f') ||
         (t.size() == 18 && t[0] == '0' && tolower(t[1]) == 'd');
}

struct Register {
  Class cls;
  u32 first, count;
};
struct Scope {
  int parent;
  std::map<std::string, Register> registers,
      ranges;  // single ones; and those like %f<10>, by the name before the number
  std::map<std::string, int> labels;
};
struct Statement {
  std::string text;
  int scope, line;
};

class Parser : public Names {
 public:
  Parser(Kernel& kernel, Symbols& symbols) : kernel_(kernel), symbols_(symbols) {}

  void body(const std::string& text, int line) {
    std::vector<Statement> statements = read(text, line);
    for (auto& s : statements) kernel_.code.push_back(instruction(s));
    kernel_.product_register.resize(kernel_.count32);
    for (auto& i : kernel_.code)
      if (i.text.compare(0, 5, "wgmma") != 0) i.tracked = uses_products(i);
  }

  // --- Names -----------------------------------------------------------------------------------------------------

  Slot value(const std::string& text, int bytes, bool floating) override {
    if (Slot s = find(text); s.cls != kNone) {
      if (s.cls == kPred) throw Failure("a predicate as a value: " + text);
      return s;
    }
    u64 v;
    if (!constant(text, v)) throw Failure("unknown operand '" + text + "'");
    if (floating && bytes >= 4 && !is_bits(text)) throw Failure("an integer as a floating-point constant: " + text);
    return pool(v, bytes);
  }
  Slot predicate(const std::string& text) override {
    const bool negated = text[0] == '!';
    Slot s = find(negated ? text.substr(1) : text);
    if (s.cls != kPred) throw Failure("no predicate: " + text);
    s.negated = negated;
    return s;
  }
  std::vector<Slot> values(const std::string& text, int bytes) override {
    std::vector<Slot> r;
    std::string inner = trim(text);
    if (inner[0] == '{') inner = inner.substr(1, inner.rfind('}') - 1);
    for (auto& part : split(inner)) r.push_back(part == "_" ? Slot{} : value(part, bytes, false));
    return r;
  }
  int label(const std::string& text) override {
    for (int s = scope_; s >= 0; s = scopes_[s].parent)
      if (auto f = scopes_[s].labels.find(text); f != scopes_[s].labels.end()) return f->second;
    throw Failure("no label " + text);
  }
  int64_t number(const std::string& text) override {
    u64 v;
    if (!constant(text, v)) throw Failure("no number: " + text);
    return static_cast<int64_t>(v);
  }
  void product_register(u32 index) override {
    kernel_.product_register.resize(kernel_.count32);
    kernel_.product_register[index] = 1;
  }

 private:
  // --- operands --------------------------------------------------------------------------------------------------

  Slot find(const std::string& name) {
    size_t digits = name.size();
    while (digits > 0 && isdigit(name[digits - 1])) --digits;
    for (int s = scope_; s >= 0; s = scopes_[s].parent) {
      const Scope& scope = scopes_[s];
      if (auto f = scope.registers.find(name); f != scope.registers.end()) return {f->second.cls, f->second.first};
      if (digits == name.size()) continue;
      auto f = scope.ranges.find(name.substr(0, digits));
      if (f == scope.ranges.end()) continue;
      const u32 k = std::stoul(name.substr(digits));
      if (k < f->second.count) return {f->second.cls, f->second.first + k};
    }
    return {};
  }
  Slot pool(u64 v, int bytes) {
    if (bytes == 8) {
      kernel_.pool64.emplace_back().fill(v);
      return {kPool64, static_cast<u32>(kernel_.pool64.size() - 1)};
    }
    kernel_.pool32.emplace_back().fill(static_cast<u32>(bytes == 4 ? v : v & ((u64{1} << bytes * 8) - 1)));
    return {kPool32, static_cast<u32>(kernel_.pool32.size() - 1)};
  }
  bool constant(const std::string& t, u64& v) {
    if (is_bits(t)) return v = std::stoull(t.substr(2), nullptr, 16), true;
    if (t == "WARP_SZ") return v = 32, true;
    const size_t sign = t[0] == '-';
    if (t.size() > sign && isdigit(t[sign])) {
      std::string digits = t.substr(sign);
      if (digits.back() == 'U') digits.pop_back();
      int base = 10;
      if (digits.size() > 1 && digits[0] == '0') base = tolower(digits[1]) == 'x' ? 16 : digits[1] == 'b' ? 2 : 8;
      v = std::stoull(base == 2 ? digits.substr(2) : digits, nullptr, base);
      if (sign) v = 0 - v;
      return true;
    }
    auto f = symbols_.find(t);
    return f != symbols_.end() && (v = static_cast<u64>(f->second), true);
  }

  // --- statements ------------------------------------------------------------------------------------------------

  std::vector<Statement> read(const std::string& text, int line) {
    std::vector<Statement> statements;
    scopes_.push_back({-1, {}, {}, {}});
    size_t p = 0;
    auto advance = [&](size_t to) {
      line += static_cast<int>(std::count(text.begin() + p, text.begin() + to, '\n')), p = to;
    };
    for (size_t next; (next = text.find_first_not_of(" \t\r\n;", p)) != std::string::npos;) {
      advance(next);
      if (text[p] == '{') {
        scopes_.push_back({scope_, {}, {}, {}});
        scope_ = static_cast<int>(scopes_.size() - 1);
        advance(p + 1);
        continue;
      }
      if (text[p] == '}') {
        scope_ = scopes_[scope_].parent;
        advance(p + 1);
        continue;
      }
      size_t e = p;
      while (e < text.size() && is_word(text[e])) ++e;
      const size_t after = text.find_first_not_of(" \t", e);
      const std::string word = text.substr(p, e - p);
      if (e > p && after != std::string::npos && text[after] == ':' && text[after + 1] != ':') {
        scopes_[scope_].labels[word] = static_cast<int>(statements.size());
        advance(after + 1);
        continue;
      }
      if (word == ".loc" || word == ".file") {
        advance(std::min(text.find('\n', p), text.size()));
        continue;
      }
      const size_t end = text.find(';', p);
      const std::string s = trim(text.substr(p, end - p));
      if (word == ".reg") declare(s);
      else if (word == ".shared") declare_shared(s);
      else if (word[0] != '.') statements.push_back({s, scope_, line});
      else if (word != ".pragma" && word != ".branchtargets") throw Failure("directive: " + s);
      advance(end);
    }
    statements.push_back({"ret", 0, line});
    return statements;
  }

  void declare(const std::string& text) {  // .reg .b32 %r<10>, a
    const size_t at = text.find('.', 1), end = text.find_first_of(" \t", at);
    const std::string type = text.substr(at + 1, end - at - 1);
    const Class c = type == "pred" ? kPred : type.substr(1) == "64" ? k64 : k32;
    u32& count = c == k64 ? kernel_.count64 : c == kPred ? kernel_.count_pred : kernel_.count32;
    for (auto& name : split(text.substr(end))) {
      const size_t open = name.find('<');
      const u32 n = open == std::string::npos ? 1 : static_cast<u32>(std::stoul(name.substr(open + 1)));
      auto& names = open == std::string::npos ? scopes_[scope_].registers : scopes_[scope_].ranges;
      names[name.substr(0, open)] = {c, count, n};
      count += n;
    }
  }

  void declare_shared(const std::string& s) {  // .shared .align 16 .b8 name[size]
    const u32 align = number_after(s, ".align", 16);
    kernel_.static_shared = (kernel_.static_shared + align - 1) / align * align;
    symbols_[declared_name(s)] = kSharedBase + kernel_.static_shared;
    kernel_.static_shared += number_after(s, "[", 0);
  }

  Ins instruction(const Statement& s) {
    static constexpr Decoder decoders[] = {decode_moves,       decode_arithmetic, decode_bits,     decode_convert,
                                           decode_memory,      decode_copies,     decode_products, decode_matrices,
                                           decode_collectives, decode_control};
    scope_ = s.scope;
    Ins i;
    i.line = s.line;
    Parsed p;
    p.text = s.text;
    if (p.text[0] == '@') {
      const size_t e = p.text.find_first_of(" \t\n");
      i.guard = predicate(p.text.substr(1, e - 1));
      p.text = trim(p.text.substr(e));
    }
    const size_t e = p.text.find_first_of(" \t\n");
    i.text = p.text.substr(0, e);
    for (size_t at = 0, dot; at <= i.text.size(); at = dot + 1) {
      dot = std::min(i.text.find('.', at), i.text.size());
      p.op.push_back(i.text.substr(at, dot - at));
    }
    if (e != std::string::npos) p.operand = split(p.text.substr(e));
    for (auto& o : p.operand) o = compact(o);
    try {
      if (std::none_of(std::begin(decoders), std::end(decoders), [&](Decoder d) { return d(i, p, *this); }))
        not_implemented(p);
    } catch (const std::exception& x) {
      throw Failure("line " + std::to_string(s.line) + ": " + x.what() + " in: " + p.text.substr(0, 200));
    }
    return i;
  }

  bool uses_products(const Ins& i) const {
    auto one = [&](const Slot& s) { return s.cls == k32 && kernel_.product_register[s.index]; };
    bool any = one(i.d) || std::any_of(std::begin(i.a), std::end(i.a), one);
    for (auto* list : {&i.list, &i.list2, &i.list3, &i.list4}) any |= std::any_of(list->begin(), list->end(), one);
    return any;
  }

  Kernel& kernel_;
  Symbols& symbols_;
  std::vector<Scope> scopes_;
  int scope_ = 0;
};

}  // namespace

Slot decode_address(Ins& i, const std::string& text, Names& names, int bytes) {
  if (text.front() != '[' || text.back() != ']') throw Failure("no address: " + text);
  const std::string inner = text.substr(1, text.size() - 2);
  const size_t plus = inner.find('+', 1);
  i.offset = plus == std::string::npos ? 0 : names.number(inner.substr(plus + 1));
  return names.value(inner.substr(0, plus), bytes, false);
}

void parse_body(Kernel& kernel, Symbols symbols, const std::string& text, int line) {
  Parser(kernel, symbols).body(text, line);
}

}  // namespace ptx_machine
