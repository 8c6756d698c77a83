// Memory that is asked for before it is needed, where a library below would end the process for want of it: OpenMP when
// it cannot start a thread, oneDNN when there is no room for the code that it generates. So want of memory is an
// exception. Only an address space that is limited (RLIMIT_AS, a full swap) is ever short of it.
#pragma once

#include <cstdlib>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace tcm::cpu {

class OutOfMemory : public std::bad_alloc {  // MemoryError in Python
 public:
  explicit OutOfMemory(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// Throws unless `bytes` more could be had now. They are given back: nobody else may take them before they are used.
inline void require_memory([[maybe_unused]] size_t bytes, [[maybe_unused]] const char* purpose) {
#ifdef __linux__
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    throw OutOfMemory("tcm_fused: not enough memory: " + std::to_string(bytes >> 20) + " MiB are needed for " + purpose);
  munmap(memory, bytes);
#endif
}

// Throws unless `threads` threads could be started besides this one, and then have some memory each.
inline void require_threads(int threads) {
  constexpr size_t kEach = 1 << 20;  // OpenMP's and torch's own, thread-local variables among it
  size_t stack = 8 << 20;
#ifdef __linux__
  pthread_attr_t attributes;
  if (pthread_getattr_default_np(&attributes) == 0) {
    pthread_attr_getstacksize(&attributes, &stack);
    pthread_attr_destroy(&attributes);
  }
#endif
  require_memory(threads * (stack + kEach), "threads; fewer are set by torch.set_num_threads");
  // There may be a limit on their number too. Only at the first time: to start threads costs more than a small problem.
  static thread_local int rehearsed = 0;
  if (threads <= rehearsed) return;
  std::vector<std::jthread> all;
  try {
    for (int k = 0; k < threads; ++k) all.emplace_back([] {});
  } catch (const std::system_error&) {
    throw OutOfMemory("tcm_fused: " + std::to_string(threads) +
                      " threads could not be started; fewer are set by torch.set_num_threads");
  }
  rehearsed = threads;
}

}  // namespace tcm::cpu
