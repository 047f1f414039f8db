// The threads of one CUDA block as fibers of one thread of the CPU, with the barriers they meet at.
//
// Schedules: seed 0 runs the threads in order; an odd seed shuffles them anew each round; an even
// one gives the warps a strict random order, so that one warp runs as far ahead of the others as
// the barriers allow. Blocks are shuffled too. An error is thrown for lanes of a warp that meet
// different collectives or leave, for barriers with different thread counts, for a deadlock, and
// for threads that end with a copy in flight.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Smallest x86-64 (System V) context switch; swapcontext would make two system calls.
extern "C" void fiber_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.weak fiber_switch
.type fiber_switch,@function
fiber_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size fiber_switch,.-fiber_switch
)");

namespace fibers {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index {
  unsigned x, y, z;
};

enum State { READY, IN_COLLECTIVE, AT_BARRIER, DONE };

// 16 bytes on their way from global to shared memory.
struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Thread {
  Index index;
  State state;
  const char* collective;  // what its warp is doing together, with which operands
  void* operands;
  std::vector<Copy> issued;
  std::deque<std::vector<Copy>> committed;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
  std::vector<char> stack;
  std::exception_ptr error;
};

struct Barrier {
  unsigned arrived = 0, wanted = 0;
  std::vector<Thread*> waiting;
};

// A place in the source where threads wait. `skipped` plants the bug that it is missing.
using Site = std::pair<std::string, int>;
inline std::set<Site> sites;
inline Site skipped;
inline bool meets(const char* kind, const char* file, int line) {
  const char* name = strrchr(file, '/');
  const Site site(std::string(kind) + " " + (name ? name + 1 : file), line);
  sites.insert(site);
  return site != skipped;
}

inline Thread* current = nullptr;
inline Index block_index;
inline std::vector<Thread> threads;
inline unsigned thread_count = 0;  // of the block
inline std::map<int, Barrier> barriers;
inline std::mt19937 random_bits;
inline uint32_t schedule = 0;  // the seed
inline std::vector<char> shared;
inline char* shared_base = nullptr;
inline size_t shared_size = 0;
inline std::function<void()>* body = nullptr;

inline void* scheduler_stack_pointer = nullptr;
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_bottom = nullptr;
inline size_t scheduler_size = 0;

inline void leave([[maybe_unused]] bool forever) {
  Thread* me = current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &me->fake_stack, scheduler_bottom,
                                 scheduler_size);
#endif
  fiber_switch(&me->stack_pointer, scheduler_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->fake_stack, &scheduler_bottom, &scheduler_size);
#endif
  current = me;
}

inline void resume(Thread& thread) {
  current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack.data(), thread.stack.size());
#endif
  fiber_switch(&scheduler_stack_pointer, thread.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline bool any_copy_in_flight(const Thread& thread) {
  bool any = !thread.issued.empty();
  for (const auto& group : thread.committed) any |= !group.empty();
  return any;
}

__attribute__((noinline)) inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  Thread* me = current;
  try {
    (*body)();
    if (any_copy_in_flight(*me) && skipped.first.empty())
      throw Error("a thread ended with a copy to shared memory in flight");
  } catch (...) {
    me->error = std::current_exception();
  }
  me->state = DONE;
  leave(true);
  std::abort();
}

inline void prepare(Thread& thread, unsigned i) {
  thread.index = {i, 0, 0};
  thread.state = READY;
  thread.error = nullptr;
  thread.issued.clear();
  thread.committed.clear();
  if (thread.stack.empty()) thread.stack.resize(256 << 10);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(thread.stack.data(), thread.stack.size());
#endif
  const uintptr_t end = reinterpret_cast<uintptr_t>(thread.stack.data() + thread.stack.size());
  void** top = reinterpret_cast<void**>(end & ~uintptr_t(63));
  *--top = nullptr;  // the alignment after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  thread.stack_pointer = top;
}

// The lanes of a warp meet; the last one runs `act` on the operands of all 32.
template <typename Operands, typename Act>
void together(const char* name, Operands& mine, Act act) {
  Thread* me = current;
  Thread* warp = &threads[me->index.x / 32 * 32];
  me->collective = name;
  me->operands = &mine;
  bool last = true;
  for (int lane = 0; lane < 32; ++lane) {
    const Thread& other = warp[lane];
    if (&other == me) continue;
    if (other.state == DONE) throw Error(std::string(name) + ": a lane has left");
    if (other.state == IN_COLLECTIVE && strcmp(other.collective, name))
      throw Error(std::string(name) + " meets " + other.collective);
    last &= other.state == IN_COLLECTIVE;
  }
  if (!last) {
    me->state = IN_COLLECTIVE;
    leave(false);
    return;
  }
  Operands* all[32];
  for (int lane = 0; lane < 32; ++lane) all[lane] = static_cast<Operands*>(warp[lane].operands);
  act(all);
  for (int lane = 0; lane < 32; ++lane) warp[lane].state = READY;
}

inline void barrier(int number, unsigned wanted) {
  if (number < 0 || number > 15) throw Error("there are 16 barriers");
  if (wanted % 32 || wanted > thread_count) throw Error("a barrier needs whole warps");
  Barrier& b = barriers[number];
  if (b.arrived && b.wanted != wanted) throw Error("one barrier, two thread counts");
  b.wanted = wanted;
  b.waiting.push_back(current);
  if (++b.arrived < wanted) {
    current->state = AT_BARRIER;
    leave(false);
    return;
  }
  for (Thread* thread : b.waiting) thread->state = READY;
  b = Barrier();
}

inline void copy(void* to, const void* from) {
  const bool aligned = (uintptr_t(to) | uintptr_t(from)) % 16 == 0;
  char* begin = static_cast<char*>(to);
  if (!aligned) throw Error("a 16-byte copy is not aligned");
  if (begin < shared_base || begin + 16 > shared_base + shared_size)
    throw Error("a copy ends outside shared memory");
  memset(to, 0xff, 16);  // NaN until it has arrived
  current->issued.push_back({to, from});
}

inline void commit() {
  current->committed.push_back(std::move(current->issued));
  current->issued.clear();
}

inline void wait(size_t pending) {
  while (current->committed.size() > pending) {
    for (const Copy& c : current->committed.front()) {
      if (c.from) memcpy(c.to, c.from, 16);
      else memset(c.to, 0, 16);
    }
    current->committed.pop_front();
  }
}

inline void run_block(unsigned count) {
  memset(shared_base, 0xff, shared_size);
  barriers.clear();
  for (unsigned i = 0; i < count; ++i) prepare(threads[i], i);
  std::vector<unsigned> order(count), warps(count / 32);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
  std::shuffle(warps.begin(), warps.end(), random_bits);
  const bool strict = schedule && schedule % 2 == 0;
  for (;;) {
    if (schedule % 2) std::shuffle(order.begin(), order.end(), random_bits);
    bool progress = false;
    const auto run = [&](unsigned i) {
      if (threads[i].state != READY) return;
      progress = true;
      resume(threads[i]);
      if (threads[i].error) std::rethrow_exception(threads[i].error);
    };
    if (strict) {
      for (unsigned w = 0; w < warps.size() && !progress; ++w)
        for (unsigned lane = 0; lane < 32; ++lane) run(warps[w] * 32 + lane);
      if (random_bits() % 64 == 0) std::shuffle(warps.begin(), warps.end(), random_bits);
    } else {
      for (unsigned i : order) run(i);
    }
    if (progress) continue;
    for (unsigned i = 0; i < count; ++i)
      if (threads[i].state != DONE) throw Error("deadlock: threads wait at different places");
    return;
  }
}

inline void launch(int64_t blocks, unsigned count, size_t shared_bytes, std::function<void()> f) {
  if (blocks < 1 || blocks > INT32_MAX || count < 32 || count > 1024 || count % 32)
    throw Error("invalid launch");
  if (shared_bytes > (227 << 10)) throw Error("too much shared memory");
  std::vector<char>(shared_bytes + 16).swap(shared);
  shared_base = shared.data() + (16 - uintptr_t(shared.data()) % 16) % 16;
  shared_size = shared_bytes;
  if (threads.empty()) threads.resize(1024);  // once: stacks must not move
  thread_count = count;
  body = &f;
  random_bits.seed(schedule);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  if (schedule) std::shuffle(order.begin(), order.end(), random_bits);
  for (unsigned block : order) {
    block_index = {block, 0, 0};
    run_block(count);
  }
}

}  // namespace fibers
