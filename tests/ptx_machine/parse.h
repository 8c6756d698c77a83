// PTX text: types and functions that the parts of the parser share.
#pragma once

#include "state.h"

namespace ptx_machine {

constexpr u32 kSharedBase = 1024;  // where a block's shared memory begins: 0 would hide what is not set

using Symbols = std::map<std::string, int64_t>;  // addresses of parameters and of shared memory

std::string trim(const std::string& s);
std::vector<std::string> split(const std::string& s);  // at commas outside of brackets
// The declared number behind a word like ".align", or `otherwise`.
u32 number_after(const std::string& s, const char* word, u32 otherwise);
// The word before a '[' or at the end: the name that is declared.
std::string declared_name(const std::string& s);

// The text between a kernel's braces, of which the first is in line `line`, becomes instructions.
void parse_body(Kernel& kernel, Symbols symbols, const std::string& text, int line);

}  // namespace ptx_machine
