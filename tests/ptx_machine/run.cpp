// Runs launches: blocks one after the other, warps in a random order, the lanes of a warp together where they can be.
#include <cxxabi.h>

#include <cstdio>

#include "parse.h"

namespace ptx_machine {

std::mt19937_64 random_bits(1);
void set_seed(u64 seed) { random_bits.seed(seed); }

int most_threads(const Kernel& k) { return k.most_threads; }
size_t parameter_bytes(const Kernel& k, size_t i) { return k.parameters.at(i).size; }
size_t parameters(const Kernel& k) { return k.parameters.size(); }

// --- reports -----------------------------------------------------------------------------------------------------

namespace {
constexpr int kEnough = 20000;  // complaints that end a launch
std::map<std::string, int> reports;
std::vector<Kernel*> launched;
u32 tags = 0;
int complaints = 0;            // in this launch
const Ins* current = nullptr;  // for the message, when something is wrong
}  // namespace

void report(const std::string& what) { ++reports[what]; }
std::string take_reports() {
  std::string s;
  for (auto& [what, times] : reports) s += what + " (" + std::to_string(times) + " times)\n";
  reports.clear();
  return s;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string s = status == 0 ? text : name;
  std::free(text);
  return s;
}
static std::string short_name(const Kernel& k) {  // without result, namespaces and parameters
  std::string s = demangled(k.name);
  for (const char* part : {"(anonymous namespace)::", "tcm::cuda::", "void "})
    for (size_t at; (at = s.find(part)) != std::string::npos;) s.erase(at, strlen(part));
  return s.substr(0, s.find('('));
}
void complain(const Warp& w, const Ins* i, const std::string& what) {
  const std::string where = i == nullptr ? "" : " line " + std::to_string(i->line) + " " + i->text.substr(0, 60);
  report(w.kernel->module + " " + short_name(*w.kernel) + where + ": " + what);
  if (++complaints > kEnough) throw Failure("too many errors");
}
void fail(const Warp& w, const Ins* i, const std::string& what) {
  complain(w, i, what);
  throw Failure(what);
}

std::string coverage() {
  std::string s;
  for (const Kernel* k : launched) {
    auto executed = std::count_if(k->code.begin(), k->code.end(), [](const Ins& i) { return i.times > 0; });
    s += k->module + " " + short_name(*k) + " " + std::to_string(k->launches) + " " + std::to_string(executed) + " " +
         std::to_string(k->code.size()) + "\n";
  }
  return s;
}

Kernel::~Kernel() {
  std::erase(launched, this);
  std::free(reinterpret_cast<void*>(parameter_base));
}

// --- a warp ------------------------------------------------------------------------------------------------------

namespace {

constexpr int kSpin = 16;  // instructions of a loop that asks an mbarrier again and again: they are no progress

// One warp for some instructions. Its lanes are in groups, each at one place of the program.
class Turn {
 public:
  explicit Turn(Warp& w) : w_(w) {}

  bool run(int budget) {  // whether it did more than wait
    for (auto& g : w_.groups)
      if (g.state == Group::kYield) g.state = Group::kRun;
    bool waits = false;
    while (!waits && budget > 0 && choose()) waits = !run_group(budget);
    return done_ > (waits ? kSpin : 0);
  }

 private:
  // The group that is furthest behind goes first; groups at one place become one.
  bool choose() {
    int best = -1;
    auto& groups = w_.groups;
    for (size_t k = 0; k < groups.size(); ++k)
      if (groups[k].state == Group::kRun && (best < 0 || groups[k].pc < groups[best].pc)) best = static_cast<int>(k);
    if (best < 0) return false;
    for (int k = 0; k < static_cast<int>(groups.size());) {
      const Group& other = groups[k];
      if (k == best || other.pc != groups[best].pc || other.state == Group::kBarrier) {
        ++k;
        continue;
      }
      groups[best].lanes |= other.lanes;
      groups.erase(groups.begin() + k);
      if (k < best) --best;
    }
    chosen_ = best;
    limit_ = INT32_MAX;
    for (int k = 0; k < static_cast<int>(groups.size()); ++k)
      if (k != best && groups[k].state != Group::kBarrier) limit_ = std::min(limit_, groups[k].pc);
    return true;
  }

  void leave(Group::State state) { w_.groups[chosen_] = {pc_, lanes_, state}; }

  // Until the group waits, ends, parts, or comes to where another is. False: the whole warp waits.
  bool run_group(int& budget) {
    pc_ = w_.groups[chosen_].pc, lanes_ = w_.groups[chosen_].lanes;
    while (budget-- > 0) {
      const Ins& i = w_.kernel->code[pc_];
      u32 m = lanes_;
      if (i.guard.cls == kPred) {
        need(w_, i, i.guard, lanes_, "a guard");
        m &= predicate(w_, i.guard);
      }
      if (m != 0) {
        if ((i.flow == kCollective || i.flow == kBlockBarrier) && !all_there(i, m)) return leave(Group::kSync), true;
        ++i.times, ++done_;
        current = &i;
        if (i.tracked) note_touch(w_, i);
        if (i.flow == kBlockBarrier) {
          leave(Group::kBarrier);
          i.execute(w_, i, m);
          return true;
        }
        if (i.flow == kBranch) {
          if (!branch(i, m)) return true;
          continue;
        }
        if (i.flow == kReturn) return end(m), true;
        i.execute(w_, i, m);
      }
      ++pc_;
      if (w_.yielded) {
        w_.yielded = false;
        leave(Group::kYield);
        return w_.groups.size() > 1;
      }
      if (pc_ >= limit_) break;
    }
    leave(Group::kRun);
    return true;
  }

  bool all_there(const Ins& i, u32 m) {  // the lanes that a collective is of
    u32 member = w_.alive;
    if (i.member.cls != kNone) {
      need(w_, i, i.member, m, "a mask of lanes");
      member = source32(w_, i.member)[std::countr_zero(m)];
      if (member & ~w_.alive) complain(w_, &i, "a mask names lanes that have ended or never were");
      member &= w_.alive;
      if (m & ~member) complain(w_, &i, "a lane is not in its own mask");
    }
    if ((m & member) == member) return true;
    if (m != lanes_) fail(w_, &i, "a guarded collective by part of its lanes");
    return false;
  }

  bool branch(const Ins& i, u32 m) {  // whether the group goes on at once
    const u32 stay = lanes_ & ~m;
    if (stay != 0) {
      w_.groups[chosen_] = {pc_ + 1, stay, Group::kRun};
      w_.groups.push_back({i.target, m, Group::kRun});
      return false;
    }
    const bool back = i.target <= pc_;
    pc_ = i.target;
    if (pc_ < limit_ && !back) return true;
    leave(Group::kRun);
    return false;
  }

  void end(u32 m) {
    w_.alive &= ~m;
    for (auto& g : w_.groups)
      if (g.state == Group::kSync) g.state = Group::kRun;  // they need not wait for these
    const u32 stay = lanes_ & ~m;
    if (stay == 0) w_.groups.erase(w_.groups.begin() + chosen_);
    else w_.groups[chosen_] = {pc_ + 1, stay, Group::kRun};
  }

  Warp& w_;
  int chosen_ = 0, pc_ = 0, limit_ = 0, done_ = 0;
  u32 lanes_ = 0;
};

// --- a block -----------------------------------------------------------------------------------------------------

void reset(Warp& w, Block& b, u32 threads) {
  const u32 mine = threads - w.id * 32;
  w.block = &b;
  w.all = w.alive = mine >= 32 ? ~0u : (1u << mine) - 1;
  w.groups = {{0, w.all, Group::kRun}};
  w.yielded = false, w.epoch = 1, w.product_fence = false, w.product_group = 0, w.products_issued = 0;
  w.products.clear();
  for (auto* registers : {&w.valid32, &w.valid64, &w.valid_pred}) std::fill(registers->begin(), registers->end(), 0);
  std::fill(w.touched.begin(), w.touched.end(), 0), std::fill(w.in_flight.begin(), w.in_flight.end(), 0);
  w.touch = 1, w.fence_touch = 0;
  w.clock = {}, w.fenced = {}, w.fences = {}, w.copy_group = {};
  w.clock[w.id] = 1;
  for (auto& f : w.fence_clock) f.clear();
  for (auto& c : w.copies) c.clear();
}

void tell_deadlock(Kernel& kernel, const Block& b) {
  for (int k = 0; k < b.warps; ++k)
    for (auto& g : kernel.warps[k]->groups) {
      char lanes[64];
      snprintf(lanes, sizeof lanes, "warp %d lanes %08x state %d", k, g.lanes, g.state);
      complain(*kernel.warps[k], &kernel.code[g.pc], std::string("waits forever: ") + lanes);
    }
  throw Failure("deadlock");
}

void check_end(Kernel& kernel, const Block& b) {
  for (int k = 0; k < b.warps; ++k) {
    const Warp& w = *kernel.warps[k];
    if (w.products_issued != b.issued[k / 4].size())
      complain(w, nullptr, "wgmma: the warps of a warpgroup issue different numbers of products");
    if (!w.products.empty()) complain(w, nullptr, "ends with products under way");
    if (std::any_of(w.copies.begin(), w.copies.end(), [](auto& c) { return !c.empty(); }))
      complain(w, nullptr, "ends with copies to shared memory under way");
  }
  const Warp& first = *kernel.warps[0];
  if (!b.tensor_copies.empty()) complain(first, nullptr, "ends with tensor copies under way");
  for (auto& h : b.hard)
    if (!h.waiting.empty()) complain(first, nullptr, "ends with threads at a barrier");
}

// Warps take turns of random length in a random order, some falling behind; copies end at random times.
void run_block(Kernel& kernel, Block& b) {
  for (int k = 0; k < b.warps; ++k) reset(*kernel.warps[k], b, b.size.size());
  std::vector<int> order(b.warps);
  for (int idle = 0, alive = 1; alive;) {
    bool moved = false;
    alive = 0;
    for (int k = 0; k < b.warps; ++k) order[k] = k;
    std::shuffle(order.begin(), order.end(), random_bits);
    for (int k : order) {
      Warp& w = *kernel.warps[k];
      if (w.groups.empty()) continue;
      alive = 1;
      if (b.warps > 1 && random_bits() % 8 == 0) continue;
      moved |= Turn(w).run(50 + static_cast<int>(random_bits() % 2000));
      moved |= open_barriers(b);
    }
    if (!b.tensor_copies.empty() && (random_bits() % 2 || !moved)) {
      finish_tensor_copy(b, random_bits() % b.tensor_copies.size());
      moved = true;
    }
    idle = moved ? 0 : idle + 1;
    if (alive && idle > 200) tell_deadlock(kernel, b);
  }
  check_end(kernel, b);
}

void start(Kernel& kernel, Block& b) {
  std::fill(b.shared.begin(), b.shared.end(), 0x5a);
  b.bytes.assign(b.shared_size, {});
  b.read_clock.assign(static_cast<size_t>(b.shared_size) * b.warps, 0);
  b.barriers.clear(), b.tensor_copies.clear(), b.agents = 0, b.products_under_way = 0;
  for (auto& g : b.issued) g.clear();
  for (auto& h : b.hard) h = {};
  try {
    run_block(kernel, b);
  } catch (const Failure& e) {
    throw Failure(std::string(e.what()) +
                  (current == nullptr ? "" : ", line " + std::to_string(current->line) + " " + current->text));
  }
}

void make_warps(Kernel& kernel, int count) {
  while (static_cast<int>(kernel.warps.size()) < count) {
    auto w = std::make_unique<Warp>();
    w->kernel = &kernel, w->id = static_cast<int>(kernel.warps.size());
    w->r32.resize(kernel.count32 * 32), w->valid32.resize(kernel.count32);
    w->r64.resize(kernel.count64 * 32), w->valid64.resize(kernel.count64);
    w->pred.resize(kernel.count_pred), w->valid_pred.resize(kernel.count_pred);
    w->touched.resize(kernel.count32), w->in_flight.resize(kernel.count32);
    kernel.warps.push_back(std::move(w));
  }
  kernel.warps.resize(count);
}

}  // namespace

void launch(Kernel& kernel, Dim grid, Dim block, size_t dynamic_shared, const void* const* arguments) {
  if (kernel.launches++ == 0) launched.push_back(&kernel);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    throw Failure("launch: no such grid");
  if (block.size() == 0 || block.size() > 1024 || static_cast<int>(block.size()) > kernel.most_threads)
    throw Failure("launch: too many threads");
  u8* memory = reinterpret_cast<u8*>(kernel.parameter_base);
  for (size_t k = 0; k < kernel.parameters.size(); ++k)
    memcpy(memory + kernel.parameters[k].offset, arguments[k], kernel.parameters[k].size);
  Block b{};
  b.kernel = &kernel, b.grid = grid, b.size = block;
  b.shared_base = kSharedBase, b.dynamic_shared = static_cast<u32>(dynamic_shared);
  b.shared_size = kernel.static_shared + b.dynamic_shared;
  if (b.shared_size > 227 * 1024) throw Failure("launch: too much shared memory");
  b.shared.resize(b.shared_size);
  b.warps = static_cast<int>((block.size() + 31) / 32);
  make_warps(kernel, b.warps);
  if (tags > 4000000000u) throw Failure("too many blocks of threads for one process");
  b.launch_tag = ++tags;
  complaints = 0, current = nullptr;
  for (u32 z = 0; z < grid.z; ++z)
    for (u32 y = 0; y < grid.y; ++y)
      for (u32 x = 0; x < grid.x; ++x) {
        b.at = {x, y, z}, b.tag = ++tags;
        start(kernel, b);
      }
}

}  // namespace ptx_machine
