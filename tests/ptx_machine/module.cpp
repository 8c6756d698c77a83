// A file of PTX to kernels: directives and parameters.
#include "parse.h"

namespace ptx_machine {

Module::~Module() = default;

namespace {

std::string without_comments(const std::string& raw) {  // with as many lines
  std::string text;
  for (size_t p = 0; p < raw.size();) {
    if (raw.compare(p, 2, "//") == 0) {
      p = std::min(raw.find('\n', p), raw.size());
    } else if (raw.compare(p, 2, "/*") == 0) {
      const size_t e = raw.find("*/", p);
      text += std::string(std::count(raw.begin() + p, raw.begin() + e, '\n'), '\n');
      p = e + 2;
    } else {
      text += raw[p++];
    }
  }
  return text;
}

u32 bytes_of_parameter(const std::string& s) {  // .param .u64 name, .param .align 8 .b8 name[24]
  for (const char* type : {".b16", ".u16", ".s16"})
    if (s.find(type) != std::string::npos) return 2;
  for (const char* type : {".b32", ".u32", ".s32", ".f32"})
    if (s.find(type) != std::string::npos) return 4;
  for (const char* type : {".b64", ".u64", ".s64", ".f64"})
    if (s.find(type) != std::string::npos) return 8;
  return 1;
}

void add_parameters(Kernel& kernel, Symbols& symbols, const std::string& list) {
  size_t offset = 0;
  for (auto& s : split(list)) {
    const u32 each = bytes_of_parameter(s);
    const bool points = s.find(".ptr") != std::string::npos;  // then .align is of the memory that it points to
    const u32 align = points ? each : number_after(s, ".align", each);
    offset = (offset + align - 1) / align * align;
    kernel.parameters.push_back({declared_name(s), offset, number_after(s, "[", 1) * size_t{each}});
    offset += kernel.parameters.back().size;
  }
  kernel.parameter_memory.assign(offset, 0);
  kernel.parameter_base = reinterpret_cast<u64>(std::aligned_alloc(256, (offset + 511) / 256 * 256));
  for (auto& q : kernel.parameters) symbols[q.name] = static_cast<int64_t>(kernel.parameter_base + q.offset);
}

int threads_of(const std::string& directives) {
  for (const char* word : {".maxntid", ".reqntid"}) {
    const size_t a = directives.find(word);
    if (a == std::string::npos) continue;
    int threads = 1;
    for (auto& n : split(directives.substr(a + strlen(word), directives.find('\n', a) - a - strlen(word))))
      threads *= std::stoi(n);
    return threads;
  }
  return 1024;
}

size_t closing(const std::string& text, size_t open) {
  int depth = 0;
  for (size_t e = open; e < text.size(); ++e) {
    if (text[e] == '{') ++depth;
    if (text[e] == '}' && --depth == 0) return e;
  }
  throw Failure("a brace that is not closed");
}

bool is_header(const std::string& line) {
  for (const char* word : {".version", ".target", ".address_size", ".file"})
    if (line.compare(0, strlen(word), word) == 0) return true;
  return false;
}

}  // namespace

std::unique_ptr<Module> load(const std::string& raw, const std::string& name) {
  auto module = std::make_unique<Module>();
  const std::string text = without_comments(raw);
  Symbols dynamic;  // shared memory whose size the launch tells
  size_t p = 0;
  int line = 1;
  auto advance = [&](size_t to) {
    line += static_cast<int>(std::count(text.begin() + p, text.begin() + to, '\n')), p = to;
  };
  for (size_t next; (next = text.find_first_not_of(" \t\r\n;", p)) != std::string::npos;) {
    advance(next);
    const size_t line_end = text.find('\n', p), entry = text.find(".entry", p), semicolon = text.find(';', p);
    const std::string head = text.substr(p, line_end - p);
    if (is_header(head)) {
      advance(line_end);
    } else if (head.compare(0, 8, ".section") == 0) {
      advance(text.find('}', p) + 1);
    } else if (semicolon != std::string::npos && semicolon < entry) {
      const std::string s = trim(text.substr(p, semicolon - p));
      if (s.find(".extern") == std::string::npos || s.find(".shared") == std::string::npos)
        throw Failure("not implemented: " + s);
      dynamic[declared_name(s)] = kSharedBase;  // no kernel has static shared memory beside it
      advance(semicolon + 1);
    } else if (entry == std::string::npos) {
      break;
    } else {
      auto kernel = std::make_unique<Kernel>();
      const size_t open = text.find('(', entry), close = text.find(')', open), brace = text.find('{', close);
      const size_t end = closing(text, brace);
      kernel->name = trim(text.substr(entry + 6, open - entry - 6)), kernel->module = name;
      Symbols symbols = dynamic;
      add_parameters(*kernel, symbols, text.substr(open + 1, close - open - 1));
      kernel->most_threads = threads_of(text.substr(close, brace - close));
      advance(brace);
      parse_body(*kernel, symbols, text.substr(brace + 1, end - brace - 1), line);
      if (kernel->static_shared != 0 && !dynamic.empty()) throw Failure("static and dynamic shared memory together");
      advance(end + 1);
      module->kernels[kernel->name] = std::move(kernel);
    }
  }
  return module;
}

}  // namespace ptx_machine
