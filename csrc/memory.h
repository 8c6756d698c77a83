// Want of memory as an exception. Two libraries below would end the process: OpenMP when it cannot start a thread, oneDNN
// when there is no room for the code that it generates. So we ask for as much first, and give it back.
#pragma once

#include <cstdlib>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#endif

namespace tcm {

class OutOfMemory : public std::bad_alloc {  // MemoryError in Python
 public:
  explicit OutOfMemory(const std::string& text) : text_("tcm_fused: not enough memory: " + text) {}
  OutOfMemory(size_t bytes, const char* purpose)
      : OutOfMemory(std::to_string((bytes >> 20) + 1) + " MiB are needed for " + purpose) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// Throws unless `bytes` more could be had now. They are given back: nobody else may take them before they are used.
inline void require_memory([[maybe_unused]] size_t bytes, [[maybe_unused]] const char* purpose) {
#ifdef __linux__
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw OutOfMemory(bytes, purpose);
  munmap(memory, bytes);
#endif
}

// Throws unless `threads` threads could be started besides this one, and then have some memory each.
inline void require_threads(int threads) {
#ifdef __linux__
  constexpr size_t kEach = 1 << 20;  // OpenMP's and torch's own, thread-local variables among it
  static const size_t stack = [] {
    size_t size = 8 << 20;
    pthread_attr_t attributes;
    if (pthread_getattr_default_np(&attributes) != 0) return size;
    pthread_attr_getstacksize(&attributes, &size);
    pthread_attr_destroy(&attributes);
    return size;
  }();
  rlimit limit;  // nothing else could refuse a stack, of which no page is there yet
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY)
    require_memory(threads * (stack + kEach), "threads; torch.set_num_threads sets fewer");
#endif
  // There may be a limit on their number too. Only at the first time: to start threads costs more than a small problem.
  static thread_local int rehearsed = 0;
  if (threads <= rehearsed) return;
  std::vector<std::jthread> all;
  try {
    for (int k = 0; k < threads; ++k) all.emplace_back([] {});
  } catch (const std::system_error&) {
    throw OutOfMemory(std::to_string(threads) + " threads cannot be started; torch.set_num_threads sets fewer");
  }
  rehearsed = threads;
}

}  // namespace tcm
