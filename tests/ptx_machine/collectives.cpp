// Operations that the lanes of a warp, or the warps of a block, do together; and the flow of control.
#include "state.h"

namespace ptx_machine {
namespace {

enum Shuffle { kUp, kDown, kXor, kIndex };
template <int S>
void shfl(Warp& w, const Ins& i, u32 m) {
  auto a = source32(w, i.a[0]), b = source32(w, i.a[1]), c = source32(w, i.a[2]);
  need(w, i, i.a[1], m, "a shuffle's lane");
  std::array<u32, 32> from;
  std::copy_n(a, 32, from.begin());
  const u32 ok_from = valid(w, i.a[0]);
  u32 ok = 0, inside = 0;
  auto d = target<u32>(w, i.d);
  EACH(m, l) {
    const u32 segments = c[l] >> 8 & 31, clamp = c[l] & 31, by = b[l] & 31, least = l & segments;
    const int most = static_cast<int>(least | (clamp & ~segments)), lane = static_cast<int>(l);
    int j = S == kUp     ? lane - static_cast<int>(by)
            : S == kDown ? lane + static_cast<int>(by)
            : S == kXor  ? static_cast<int>(l ^ by)
                         : static_cast<int>(least | (by & ~segments));
    const bool in = S == kUp ? j >= most : j <= most;
    if (!in) j = lane;
    inside |= static_cast<u32>(in) << l;
    if (!(m >> j & 1)) complain(w, &i, "shuffle from a lane that does not take part");
    d[l] = from[j];
    ok |= (ok_from >> j & 1) << l;
  }
  set_valid(w, i.d, m, ok);
  if (i.d2.cls == kPred) set_predicate(w, i.d2, m, inside, ~0u);
}

enum Vote { kBallot, kAny, kAll, kUniform };
template <int K>
void vote(Warp& w, const Ins& i, u32 m) {
  const u32 p = predicate(w, i.a[0]) & m, ok = (valid(w, i.a[0]) & m) == m ? ~0u : 0;
  if (K == kBallot) {
    auto d = target<u32>(w, i.d);
    EACH(m, l) d[l] = p;
    return set_valid(w, i.d, m, ok);
  }
  const bool v = K == kAny ? p != 0 : K == kAll ? p == m : p == m || p == 0;
  set_predicate(w, i.d, m, v ? ~0u : 0, ok);
}

void sync_warp(Warp& w, const Ins&, u32 m) {
  if (m == w.alive) ++w.epoch;
}

u32 reduced(const Ins& i, u32 v, u32 x) {
  const auto s = [](u32 u) { return static_cast<int32_t>(u); };
  if (i.word == "add") return v + x;
  if (i.word == "or") return v | x;
  if (i.word == "and") return v & x;
  if (i.word == "xor") return v ^ x;
  if (i.word == "max") return i.flag ? static_cast<u32>(std::max(s(v), s(x))) : std::max(v, x);
  return i.flag ? static_cast<u32>(std::min(s(v), s(x))) : std::min(v, x);
}
void redux(Warp& w, const Ins& i, u32 m) {
  auto a = source32(w, i.a[0]);
  need(w, i, i.a[0], m, "a reduction's operand");
  const u32 first = std::countr_zero(m);
  u32 v = a[first];
  EACH(m & ~(1u << first), l) v = reduced(i, v, a[l]);
  auto d = target<u32>(w, i.d);
  EACH(m, l) d[l] = v;
  set_valid(w, i.d, m, ~0u);
}

void elect(Warp& w, const Ins& i, u32 m) {
  const u32 leader = std::countr_zero(m);
  if (i.d.cls != kNone) {
    auto d = target<u32>(w, i.d);
    EACH(m, l) d[l] = leader;
    set_valid(w, i.d, m, ~0u);
  }
  set_predicate(w, i.d2, m, 1u << leader, ~0u);
}

// The warp comes to a barrier of its block; the scheduler lets it go on when all are there. n: the vote.
enum BarrierVote : u32 { kNoVote, kOrVote, kAndVote, kCount };
void barrier(Warp& w, const Ins& i, u32 m) {
  Block& b = *w.block;
  const u32 first = std::countr_zero(m), name = source32(w, i.a[0])[first];
  if (name >= 16) fail(w, &i, "no such barrier");
  u32 expected = 0;
  if (i.a[1].cls != kNone) {
    expected = source32(w, i.a[1])[first];
    if (expected % 32 != 0) fail(w, &i, "a barrier's number of threads is no multiple of 32");
  } else {
    for (int v = 0; v < b.warps; ++v) expected += std::popcount(b.kernel->warps[v]->all);
  }
  HardBarrier& h = b.hard[name];
  if (h.expected != 0 && h.expected != expected)
    complain(w, &i, "warps come to one barrier with different numbers of threads");
  h.expected = expected;
  h.arrived += std::popcount(m);
  if (h.arrived > expected) complain(w, &i, "more threads at a barrier than it is for");
  if (i.n != kNoVote) {
    const u32 p = predicate(w, i.a[2]) & m;
    need(w, i, i.a[2], m, "a barrier's predicate");
    h.any |= p != 0, h.all &= p == m, h.count += std::popcount(p);
  }
  join(h.clock, w.clock);
  h.waiting.push_back({&w, &i});
}

void nothing(Warp&, const Ins&, u32) {}
void trap(Warp& w, const Ins& i, u32) { fail(w, &i, "trap"); }
void zero64(Warp& w, const Ins& i, u32 m) {
  EACH(m, l) w.r64[i.d.index * 32 + l] = 0;
  set_valid(w, i.d, m, ~0u);
}

// An operand "register|predicate".
std::pair<std::string, std::string> at_bar(const std::string& text) {
  const size_t bar = text.find('|');
  return {text.substr(0, bar), bar == std::string::npos ? "" : text.substr(bar + 1)};
}

void decode_shfl(Ins& i, const Parsed& p, Names& names) {
  if (!p.has("sync") || p.type() != "b32") not_implemented(p);
  auto [target, inside] = at_bar(p.operand[0]);
  i.d = names.value(target, 4, false);
  if (!inside.empty()) i.d2 = names.predicate(inside);
  for (int k = 0; k < 3; ++k) i.a[k] = names.value(p.operand[1 + k], 4, false);
  i.member = names.value(p.operand[4], 4, false);
  i.execute = p.has("up") ? shfl<kUp> : p.has("down") ? shfl<kDown> : p.has("bfly") ? shfl<kXor> : shfl<kIndex>;
}

void decode_vote(Ins& i, const Parsed& p, Names& names) {
  if (!p.has("sync")) not_implemented(p);
  i.d = p.has("ballot") ? names.value(p.operand[0], 4, false) : names.predicate(p.operand[0]);
  i.a[0] = names.predicate(p.operand[1]);
  i.member = names.value(p.operand[2], 4, false);
  i.execute = p.has("ballot") ? vote<kBallot> : p.has("any") ? vote<kAny> : p.has("all") ? vote<kAll> : vote<kUniform>;
}

void decode_barrier(Ins& i, const Parsed& p, Names& names) {
  i.flow = kBlockBarrier;
  i.execute = barrier;
  if (p.has("sync")) {
    i.a[0] = names.value(p.operand[0], 4, false);
    if (p.operand.size() > 1) i.a[1] = names.value(p.operand[1], 4, false);
    return;
  }
  if (!p.has("red")) not_implemented(p);
  i.n = p.has("popc") ? kCount : p.has("or") ? kOrVote : kAndVote;
  i.d = i.n == kCount ? names.value(p.operand[0], 4, false) : names.predicate(p.operand[0]);
  i.a[0] = names.value(p.operand[1], 4, false);
  if (p.operand.size() > 3) i.a[1] = names.value(p.operand[2], 4, false);
  i.a[2] = names.predicate(p.operand.back());
}

}  // namespace

bool decode_collectives(Ins& i, const Parsed& p, Names& names) {
  const std::string& o = p.op[0];
  i.flow = kCollective;
  if (o == "shfl") {
    decode_shfl(i, p, names);
  } else if (o == "vote") {
    decode_vote(i, p, names);
  } else if (o == "redux") {
    i.word = p.op[2], i.flag = p.type() == "s32";
    i.d = names.value(p.operand[0], 4, false), i.a[0] = names.value(p.operand[1], 4, false);
    i.member = names.value(p.operand[2], 4, false);
    i.execute = redux;
  } else if (o == "elect") {
    auto [target, leader] = at_bar(p.operand[0]);
    if (target != "_") i.d = names.value(target, 4, false);
    i.d2 = names.predicate(leader);
    i.member = names.value(p.operand[1], 4, false);
    i.execute = elect;
  } else if ((o == "bar" || o == "barrier") && p.has("warp")) {
    i.member = names.value(p.operand[0], 4, false), i.execute = sync_warp;
  } else if (o == "bar" || o == "barrier") {
    decode_barrier(i, p, names);
  } else {
    i.flow = kPlain;
    return false;
  }
  return true;
}

bool decode_control(Ins& i, const Parsed& p, Names& names) {
  static const std::set<std::string> no_effect = {"membar",   "griddepcontrol", "nanosleep",
                                                  "prefetch", "discard",        "fence"};
  const std::string& o = p.op[0];
  if (o == "bra") i.flow = kBranch, i.target = names.label(p.operand[0]), i.execute = nothing;
  else if (o == "ret" || o == "exit") i.flow = kReturn, i.execute = nothing;
  else if (o == "trap") i.execute = trap;
  else if (o == "createpolicy") i.d = names.value(p.operand[0], 8, false), i.execute = zero64;
  else if (no_effect.count(o)) i.execute = nothing;
  else return false;
  return true;
}

namespace {

void let_go(Warp& w, const Ins& i, const HardBarrier& h) {
  join(w.clock, h.clock);
  ++w.clock[w.id];
  ++w.epoch;
  for (Group& g : w.groups) {
    if (g.state != Group::kBarrier) continue;
    g.state = Group::kRun, ++g.pc;
    if (i.n == kOrVote) set_predicate(w, i.d, g.lanes, h.any ? ~0u : 0, ~0u);
    if (i.n == kAndVote) set_predicate(w, i.d, g.lanes, h.all ? ~0u : 0, ~0u);
    if (i.n == kCount) {
      EACH(g.lanes, l) w.r32[i.d.index * 32 + l] = h.count;
      set_valid(w, i.d, g.lanes, ~0u);
    }
  }
}

}  // namespace

bool open_barriers(Block& b) {  // those at which all have arrived; whether there was one
  bool any = false;
  for (HardBarrier& h : b.hard) {
    if (h.waiting.empty() || h.arrived < h.expected) continue;
    for (auto [w, i] : h.waiting) let_go(*w, *i, h);
    h = {};
    any = true;
  }
  return any;
}

}  // namespace ptx_machine
