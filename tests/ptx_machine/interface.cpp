// For ctypes: see machine.py.
#include "interface.h"

#include <fstream>
#include <iostream>
#include <sstream>

namespace ptx_machine {

std::string demangled(const std::string& name);

namespace {

struct Loaded {  // one file
  std::unique_ptr<Module> module;
  std::map<std::string, Kernel*> kernels;  // by demangled name
};
std::map<std::string, std::map<std::string, Loaded>>& loaded() {  // by code, by file; never destroyed
  static auto& all = *new std::map<std::string, std::map<std::string, Loaded>>;
  return all;
}
std::string code = "80", text;

}  // namespace

Kernel* find_kernel(const std::string& mangled) {
  const std::string name = demangled(mangled);
  for (auto& [file, l] : loaded()[code])
    if (auto k = l.kernels.find(name); k != l.kernels.end()) return k->second;
  return nullptr;
}
const std::string& selected() { return code; }
size_t shared_per_block() { return (code.compare(0, 2, "80") == 0 ? 163 : 227) * size_t{1024}; }

bool launch_or_report(Kernel& kernel, const std::string& name, Dim grid, Dim block, size_t shared,
                      const void* const* arguments) {
  try {
    launch(kernel, grid, block, shared, arguments);
    return true;
  } catch (const std::exception& e) {
    return report("launch of " + demangled(name).substr(0, 90) + " failed: " + e.what()), false;
  }
}

bool make_tensor_map(void* out, void* address, int element, u32 rank, const u64* size, const u64* pitch, const u32* box,
                     int swizzle) {
  TensorMap t{};
  t.magic = TensorMap::kMagic, t.address = reinterpret_cast<u64>(address);
  if (t.address % 16 || rank < 1 || rank > 5 || swizzle < 0 || swizzle > 3) return false;
  t.rank = static_cast<u8>(rank), t.element = static_cast<u8>(element), t.swizzle = static_cast<u8>(swizzle);
  for (u32 k = 0; k < rank; ++k) {
    if (size[k] == 0 || size[k] > u64{1} << 32 || box[k] == 0 || box[k] > 256) return false;
    t.size[k] = size[k], t.box[k] = static_cast<u16>(box[k]), t.stride[k] = 1;
    if (k == 0) continue;
    const u64 p = pitch[k - 1];
    if (p % 16 || p >= u64{1} << 40 || p < size[0] * element) return false;
    t.pitch[k - 1] = p;
  }
  const u64 inner = u64{box[0]} * element;
  if (inner % 16 || (swizzle && inner > u64{16} << swizzle)) return false;
  memset(out, 0, 128);
  memcpy(out, &t, sizeof t);
  return true;
}

extern "C" {

// Null, or why the file cannot be executed.
const char* machine_load(const char* architecture, const char* path) {
  std::stringstream all;
  all << std::ifstream(path).rdbuf();
  const std::string whole = path, name = whole.substr(whole.rfind('/') + 1);
  try {
    Loaded& l = loaded()[architecture][name];
    l.kernels.clear();
    l.module = load(all.str(), name);
    for (auto& [mangled, kernel] : l.module->kernels) l.kernels[demangled(mangled)] = kernel.get();
    return nullptr;
  } catch (const std::exception& e) {
    return text = name + ": " + e.what(), text.c_str();
  }
}
void machine_unload(const char* architecture) { loaded().erase(architecture); }
void machine_select(const char* architecture) { code = architecture; }
void machine_lenient(int on) { set_lenient(on != 0); }
void machine_truncate(int on) { set_sums(on != 0 ? Sums::kTruncated : Sums::kExact); }
void machine_seed(uint64_t seed) { set_seed(seed); }
void* machine_allocate(size_t bytes) { return allocate(bytes); }
void machine_adopt(void* memory, size_t bytes) { adopt(memory, bytes); }
void machine_release(void* memory) { release(memory); }
void machine_mark(void* memory, size_t bytes, int state) { mark(memory, bytes, static_cast<GlobalState>(state)); }
const char* machine_reports() { return text = take_reports(), text.c_str(); }
const char* machine_coverage() { return text = coverage(), text.c_str(); }

int machine_tensor_map(void* out, void* address, int element, int rank, const uint64_t* size, const uint64_t* pitch,
                       const uint32_t* box, int swizzle) {
  return make_tensor_map(out, address, element, static_cast<u32>(rank), size, pitch, box, swizzle);
}
int machine_launch(const char* name, const uint32_t* grid, uint32_t threads, size_t shared, void** arguments) {
  Kernel* k = find_kernel(name);
  if (k == nullptr) return report(std::string("no kernel ") + name), 0;
  return launch_or_report(*k, name, {grid[0], grid[1], grid[2]}, {threads, 1, 1}, shared, arguments);
}
int machine_parameters(const char* name) {
  const Kernel* k = find_kernel(name);
  return k == nullptr ? -1 : static_cast<int>(parameters(*k));
}
int machine_parameter_bytes(const char* name, int i) {
  return static_cast<int>(parameter_bytes(*find_kernel(name), i));
}

}  // extern "C"

}  // namespace ptx_machine
