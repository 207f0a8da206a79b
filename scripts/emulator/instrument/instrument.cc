// SPDX-License-Identifier: GPL-2.0
//
// Profiler: which functions, at which level, did the instructions of a measured operation go to?
//
// Between start and stop (XGETBV, see the backdoor patch) every executed instruction is counted
// under the stack it ran on. Outside of that only calls are followed, so that the stacks are
// known when a region starts.
//
// Contexts. VMX root mode is L0. In non-root mode the guests of a nested stack are told apart
// by the TSC offset of the current VMCS: every level adds the (negative) offset of its own
// start, so it differs between levels, does not change while a guest lives, and sorts them by
// depth. Their kernels cannot be told apart by addresses, being the same image. A guest whose hypervisor
// does not set an offset shares its hypervisor's; so the VMCS and the EPT pointer count as well, and the
// symbolizer puts together again what belongs to one level.
//
// Stacks. A call is remembered with the stack pointer behind it. It is over when the stack pointer
// rises above that, whichever way (return, longjmp, a stack left behind), so nothing has to
// match up. Each context keeps one list of calls for each stack, that is for each 16 KiB
// of kernel address space (THREAD_SIZE) or 8 MiB of others.
//
// A frame is (function entered, place of the call). Tail calls are not seen here; the symbolizer sees
// from the place of the next call, or of the instruction, that another function was running.
//
// Regions of different length are kept apart, so that those that an interrupt hit can be left out afterwards.
// The result is written to the file $MATRYOSHKA_PROFILE when the emulator ends.
//
// Locks. $MATRYOSHKA_LOCKS names functions of L0 that take a lock (first argument) and those that release it, as
// take=release,... in hexadecimal. Every wait and every hold counts then, in regions or not, by the place that took the lock.
// A hold belongs to the stack that it was taken on, so to a task, wherever that runs and whoever runs meanwhile.

#include "bochs.h"
#include "cpu/cpu.h"
#include "pc_system.h"

#include <deque>
#include <map>
#include <stdio.h>
#include <stdlib.h>
#include <unordered_map>
#include <vector>

#if BX_INSTRUMENTATION

bool matryoshka_profile_on = false;

namespace {

struct Frame {
  Bit64u rsp;     // stack pointer after the call
  Bit64u target;  // function entered
  Bit64u site;    // address of the call, or the vector of an event (below 256)
  int node;       // tree node, -1 until a region needs it
};

typedef std::vector<Frame> Stack;

struct Context {
  Bit64s offset = 0;  // TSC offset; 0 for L0
  Bit64u vmcs = 0;    // address of the VMCS
  Bit64u eptp = 0;
  Bit64u entered = 0; // times switched to
  int root = -1;      // its node
  std::unordered_map<Bit64u, Stack> stacks;
};

struct Node {
  int parent;
  int context;
  Bit64u target, site;
};

struct NodeKey {
  int parent;
  Bit64u target, site;
  bool operator==(const NodeKey &o) const { return parent == o.parent && target == o.target && site == o.site; }
};

struct Place {
  int node;
  Bit64u rip;
  bool operator==(const Place &o) const { return node == o.node && rip == o.rip; }
};

inline size_t mix(Bit64u h) { h *= 0x9e3779b97f4a7c15ULL; return h ^ (h >> 29); }
struct Hash {
  size_t operator()(const NodeKey &k) const { return mix(k.target ^ mix(k.site ^ mix(k.parent))); }
  size_t operator()(const Place &p) const { return mix(p.rip ^ mix(p.node)); }
};

typedef std::unordered_map<Place, Bit64u, Hash> Counts;
typedef std::map<std::pair<int, unsigned>, Bit64u> Exits; // (context left, basic reason)

struct Region {
  Bit64u times = 0;
  Counts counts;
  Exits exits;
};

struct Cpu {
  int context = 0;
  bool guest = false;
  Bit64s offset = 0;
  Bit64u vmcs = 0, eptp = 0;
  Bit64u key = 0;
  Stack *stack = NULL;
  bool event = false;    // the next instruction is the first of a handler
  unsigned vector = 0;
  Bit64u *last = NULL;   // counter of the instruction under way
  Bit64u since = 0;      // the instruction count when it began
};

// A lock being taken, or held.
struct Hold {
  size_t pair;        // which functions
  Bit64u site;        // the place that took it
  Bit64u rsp;         // its stack pointer behind the call
  Bit64u since;       // the instruction count, when the call was made or when it came back
  bool held;
};

struct LockKey {
  Bit64u lock, stack;
  bool operator==(const LockKey &o) const { return lock == o.lock && stack == o.stack; }
};

struct LockHash {
  size_t operator()(const LockKey &k) const { return mix(k.lock ^ mix(k.stack)); }
};

typedef std::map<Bit64u, Bit64u> Lengths; // how often, by instructions
struct LockUse { Lengths waits, holds; };

std::vector<std::pair<Bit64u, Bit64u> > lock_pairs;     // functions that take and release
std::unordered_map<LockKey, Hold, LockHash> lock_holds;
std::unordered_map<Bit64u, std::vector<LockKey> > lock_waits; // by stack
std::map<std::pair<size_t, Bit64u>, LockUse> lock_uses; // by pair and site

std::deque<Context> contexts(1); // pointers into it stay good
std::vector<Node> nodes;
std::unordered_map<NodeKey, int, Hash> children;
std::map<Bit64u, Region> regions; // by length in instructions
Counts counts;
Exits exits;
Bit64u region_start = 0;
Cpu cpus[BX_MAX_SMP_THREADS_SUPPORTED];

int child(int parent, int context, Bit64u target, Bit64u site)
{
  NodeKey key = { parent < 0 ? -1 - context : parent, target, site };
  std::unordered_map<NodeKey, int, Hash>::iterator found = children.find(key);
  if (found != children.end()) return found->second;
  int id = nodes.size();
  Node node = { parent, context, target, site };
  nodes.push_back(node);
  children[key] = id;
  return id;
}

int node_of(Cpu &c)
{
  Context &context = contexts[c.context];
  if (context.root < 0) context.root = child(-1, c.context, 0, 0);
  Stack &stack = *c.stack;
  size_t known = stack.size();
  while (known && stack[known-1].node < 0) known--;
  int node = known ? stack[known-1].node : context.root;
  for (; known < stack.size(); known++) {
    node = child(node, c.context, stack[known].target, stack[known].site);
    stack[known].node = node;
  }
  return node;
}

// Bring CPU's context and stack up to date with its registers.
void locate(unsigned cpu, Cpu &c, Bit64u rsp)
{
  BX_CPU_C *p = BX_CPU(cpu);
  bool guest = p->in_vmx_guest;
  bool moved = false;
  if (guest != c.guest || (guest && (p->tsc_offset != c.offset || p->vmcsptr != c.vmcs || p->vmcs.eptptr != c.eptp))) {
    c.guest = guest;
    c.offset = p->tsc_offset;
    c.vmcs = p->vmcsptr;
    c.eptp = p->vmcs.eptptr;
    c.context = 0;
    if (guest) {
      size_t n = 1;
      while (n < contexts.size() && (contexts[n].offset != c.offset || contexts[n].vmcs != c.vmcs || contexts[n].eptp != c.eptp)) n++;
      if (n == contexts.size()) {
        contexts.push_back(Context());
        contexts[n].offset = c.offset;
        contexts[n].vmcs = c.vmcs;
        contexts[n].eptp = c.eptp;
      }
      c.context = n;
    }
    contexts[c.context].entered++;
    moved = true;
  }
  Bit64u key = (rsp >> 63) ? (rsp >> 14) : (rsp >> 23);
  if (moved || key != c.key || ! c.stack) {
    c.key = key;
    c.stack = &contexts[c.context].stacks[key];
  }
}

void push(Cpu &c, Bit64u rsp, Bit64u target, Bit64u site)
{
  Stack &stack = *c.stack;
  // what lies at or below this address has been left
  while (! stack.empty() && stack.back().rsp <= rsp) stack.pop_back();
  if (stack.size() > 512) return;
  Frame frame = { rsp, target, site, -1 };
  stack.push_back(frame);
}

// Count what was executed since the last instruction began: one, or the iterations of a repeated one.
void settle(unsigned cpu, Cpu &c)
{
  Bit64u now = BX_CPU(cpu)->get_icount();
  if (c.last) *c.last += now - c.since;
  c.since = now;
}

bool enters(Bit64u to, Bit64u function)
{
  return to == function || to == function + 4; // behind its ENDBR
}

// L0 jumps or calls: does it take or release a lock?
void lock_call(unsigned cpu, Cpu &c, Bit64u rsp, Bit64u from, Bit64u to)
{
  LockKey key = { BX_CPU(cpu)->gen_reg[BX_64BIT_REG_RDI].rrx, c.key };
  Bit64u now = BX_CPU(cpu)->get_icount();
  for (size_t n = 0; n < lock_pairs.size(); n++) {
    if (enters(to, lock_pairs[n].first)) {
      Hold hold = { n, from, rsp, now, false };
      lock_holds[key] = hold;
      lock_waits[key.stack].push_back(key);
    }
    else if (enters(to, lock_pairs[n].second)) {
      std::unordered_map<LockKey, Hold, LockHash>::iterator found = lock_holds.find(key);
      if (found == lock_holds.end()) continue;
      Hold &hold = found->second;
      if (hold.held && hold.pair == n) lock_uses[std::make_pair(n, hold.site)].holds[now - hold.since]++;
      lock_holds.erase(found);
    }
  }
}

// L0 returns: has it taken the lock?
void lock_return(unsigned cpu, Cpu &c, Bit64u rsp)
{
  std::unordered_map<Bit64u, std::vector<LockKey> >::iterator found = lock_waits.find(c.key);
  if (found == lock_waits.end()) return;
  Bit64u now = BX_CPU(cpu)->get_icount();
  std::vector<LockKey> &waits = found->second;
  while (! waits.empty()) {
    std::unordered_map<LockKey, Hold, LockHash>::iterator at = lock_holds.find(waits.back());
    if (at != lock_holds.end()) {
      Hold &hold = at->second;
      if (rsp <= hold.rsp) break; // something that it calls
      lock_uses[std::make_pair(hold.pair, hold.site)].waits[now - hold.since]++;
      hold.since = now;
      hold.held = true;
    }
    waits.pop_back();
  }
  if (waits.empty()) lock_waits.erase(found);
}

void write_lengths(FILE *f, const char *what, size_t pair, Bit64u site, const Lengths &lengths)
{
  for (Lengths::const_iterator i = lengths.begin(); i != lengths.end(); i++)
    fprintf(f, "%s %zu %llx %llu %llu\n", what, pair, (unsigned long long) site, (unsigned long long) i->first, (unsigned long long) i->second);
}

void write_profile()
{
  const char *path = getenv("MATRYOSHKA_PROFILE");
  if (! path || (regions.empty() && lock_uses.empty())) return;
  FILE *f = fopen(path, "w");
  if (! f) { perror(path); return; }
  fprintf(f, "matryoshka-profile 1\n");
  for (size_t n = 0; n < contexts.size(); n++)
    fprintf(f, "context %zu %lld %llx %llx %llu\n", n, (long long) contexts[n].offset, (unsigned long long) contexts[n].vmcs,
      (unsigned long long) contexts[n].eptp, (unsigned long long) contexts[n].entered);
  for (size_t n = 0; n < nodes.size(); n++)
    fprintf(f, "node %zu %d %d %llx %llx\n", n, nodes[n].parent, nodes[n].context,
      (unsigned long long) nodes[n].target, (unsigned long long) nodes[n].site);
  for (std::map<Bit64u, Region>::iterator r = regions.begin(); r != regions.end(); r++) {
    fprintf(f, "region %llu %llu\n", (unsigned long long) r->first, (unsigned long long) r->second.times);
    for (Counts::iterator i = r->second.counts.begin(); i != r->second.counts.end(); i++)
      fprintf(f, "count %d %llx %llu\n", i->first.node, (unsigned long long) i->first.rip, (unsigned long long) i->second);
    for (Exits::iterator i = r->second.exits.begin(); i != r->second.exits.end(); i++)
      fprintf(f, "exit %d %u %llu\n", i->first.first, i->first.second, (unsigned long long) i->second);
  }
  for (std::map<std::pair<size_t, Bit64u>, LockUse>::iterator i = lock_uses.begin(); i != lock_uses.end(); i++) {
    write_lengths(f, "wait", i->first.first, i->first.second, i->second.waits);
    write_lengths(f, "hold", i->first.first, i->first.second, i->second.holds);
  }
  fclose(f);
}

// Done once, before the first instruction.
bool read_locks()
{
  const char *text = getenv("MATRYOSHKA_LOCKS");
  unsigned long long take, release;
  int length;
  while (text && sscanf(text, "%llx=%llx%n", &take, &release, &length) == 2) {
    lock_pairs.push_back(std::make_pair((Bit64u) take, (Bit64u) release));
    text += length;
    if (*text == ',') text++;
  }
  if (! lock_pairs.empty()) atexit(write_profile);
  return true;
}

const bool locks_known = read_locks();

} // namespace

void bx_instr_profile(unsigned cpu, bool on)
{
  static bool registered = false;
  if (! registered) {
    registered = true;
    if (lock_pairs.empty()) atexit(write_profile);
  }
  if (on) {
    counts.clear();
    exits.clear();
    region_start = BX_CPU(cpu)->get_icount();
    for (size_t n = 0; n < BX_MAX_SMP_THREADS_SUPPORTED; n++) cpus[n].last = NULL;
    matryoshka_profile_on = true;
  }
  else if (matryoshka_profile_on) {
    matryoshka_profile_on = false;
    settle(cpu, cpus[cpu]);
    Bit64u length = BX_CPU(cpu)->get_icount() - region_start;
    Region &region = regions[length];
    region.times++;
    for (Counts::iterator i = counts.begin(); i != counts.end(); i++) region.counts[i->first] += i->second;
    for (Exits::iterator i = exits.begin(); i != exits.end(); i++) region.exits[i->first] += i->second;
  }
}

// Before an instruction executes, in a region only.
void matryoshka_instruction(unsigned cpu)
{
  Cpu &c = cpus[cpu];
  BX_CPU_C *p = BX_CPU(cpu);
  Bit64u rsp = p->gen_reg[BX_64BIT_REG_RSP].rrx, rip = p->get_rip();
  locate(cpu, c, rsp);
  if (c.event) {
    c.event = false;
    push(c, rsp, rip, c.vector);
  }
  Stack &stack = *c.stack;
  while (! stack.empty() && stack.back().rsp < rsp) stack.pop_back();
  Place place = { node_of(c), rip };
  settle(cpu, c);
  c.last = &counts[place];
}

void matryoshka_branch(unsigned cpu, unsigned what, bx_address from, bx_address to)
{
  bool call = BX_INSTR_IS_CALL_KIND(what);
  bool locks = ! lock_pairs.empty() && ! BX_CPU(cpu)->in_vmx_guest;
  if (! call && what != BX_INSTR_IS_RET && ! locks) return;
  Cpu &c = cpus[cpu];
  Bit64u rsp = BX_CPU(cpu)->gen_reg[BX_64BIT_REG_RSP].rrx;
  locate(cpu, c, rsp);
  if (locks) {
    if (what == BX_INSTR_IS_RET) lock_return(cpu, c, rsp);
    else lock_call(cpu, c, rsp, from, to);
    if (! call && what != BX_INSTR_IS_RET) return;
  }
  if (! call) {
    // the stack pointer may fall again before the next call (alloca): it is over now
    while (! c.stack->empty() && c.stack->back().rsp < rsp) c.stack->pop_back();
    return;
  }
  if (c.event) {
    // outside of a region nobody looked at the handler's first instruction
    c.event = false;
  }
  push(c, rsp, to, from);
}

// An interrupt or exception is being delivered.
void matryoshka_event(unsigned cpu, unsigned vector)
{
  cpus[cpu].event = true;
  cpus[cpu].vector = vector & 0xff;
}

void matryoshka_vmexit(unsigned cpu, Bit32u reason)
{
  Cpu &c = cpus[cpu];
  c.event = false;
  if (matryoshka_profile_on) exits[std::make_pair(c.context, reason & 0xffff)]++;
}

#endif
