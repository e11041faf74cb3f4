// A GPU for kernel bodies compiled with g++: every thread of a thread block is a fiber, and warps run in lockstep at
// collective instructions. Written from the PTX manual alone, so that it may disagree with the kernels.
//
// It is strict where hardware is lenient: a copy arrives as late as it may, when its thread waits for it; warps run as
// far ahead of others as barriers let them, in the order asked for, forwards or backwards, so that a missing barrier
// changes results; metadata that do not ascend, misaligned addresses and copies beyond shared memory stop the program.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/portable.h"

namespace smart::cuda {

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

class ThreadBlock {
 public:
  ThreadBlock(int threads, int block, size_t shared_bytes, bool backwards, int split = 0)
      : block(block),
        split(split),
        backwards(backwards),
        shared_bytes(shared_bytes),
        fibers(threads),
        warps(threads / 32) {
    require(threads % 32 == 0, "a thread block is made of whole warps");
    storage.reset(static_cast<char*>(std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024)));
    std::memset(storage.get(), 0xff, shared_bytes);  // NaN: what nobody wrote shows
  }

  char* shared() const { return storage.get(); }

  // Runs `body(thread)` for all threads until each has returned.
  void run(const std::function<void(int)>& body) {
    this->body = &body;
    running_block = this;
    for (size_t i = 0; i < fibers.size(); ++i) prepare(static_cast<int>(i));
    for (size_t left = fibers.size(); left > 0;) {
      const size_t before = events;
      for (size_t i = 0; i < warps.size(); ++i) {
        // As far as the warp gets: nothing but barriers keeps it from running ahead of others.
        size_t start;
        do {
          start = events;
          left -= resume(static_cast<int>(backwards ? warps.size() - 1 - i : i));
        } while (events != start);
      }
      require(events != before, "threads wait for each other forever: not all reach the same barrier");
    }
  }

  struct Copy {
    char* to;
    const char* from;  // null: zeros
  };

  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    std::vector<Copy> open;                // copies of no group yet
    std::deque<std::vector<Copy>> groups;  // closed, and on their way
    bool done = false;
  };

  // Where the lanes of a warp, or all threads, meet.
  struct Meeting {
    int arrived = 0;
    uint64_t turn = 0;
  };

  struct Warp {
    Meeting meeting;
    // Operands of the last two collective instructions: lanes may be one apart.
    uint32_t registers[2][32][16];
    const char* rows[2][32];
  };

  void meet(Meeting& meeting, int members) {
    const uint64_t turn = meeting.turn;
    ++events;
    if (++meeting.arrived == members) {
      meeting.arrived = 0;
      ++meeting.turn;
    }
    while (meeting.turn == turn) yield();
  }

  // Lets other threads run.
  void yield() { swapcontext(&fibers[current].context, &scheduler); }

  const int block, split;
  const bool backwards;
  const size_t shared_bytes;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting all;
  int current = 0;
  size_t events = 0;

 private:
  // Lets each thread of a warp run until it waits for others; returns how many have ended.
  int resume(int warp) {
    int ended = 0;
    for (int lane = 0; lane < 32; ++lane) {
      current = warp * 32 + (backwards ? 31 - lane : lane);
      if (fibers[current].done) continue;
      swapcontext(&scheduler, &fibers[current].context);
      if (fibers[current].done) ++ended, ++events;
    }
    return ended;
  }

  void prepare(int thread) {
    Fiber& fiber = fibers[thread];
    getcontext(&fiber.context);
    fiber.stack.resize(1 << 17);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&ThreadBlock::enter), 1, thread);
  }

  static void enter(int thread) {
    (*running_block->body)(thread);
    running_block->fibers[thread].done = true;
  }

  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };

  static inline ThreadBlock* running_block = nullptr;
  ucontext_t scheduler;
  const std::function<void(int)>* body = nullptr;
  std::unique_ptr<char, Free> storage;
};

// The Device of one thread.
class EmulatedGpu {
 public:
  EmulatedGpu(ThreadBlock& of, int thread) : of(of), index(thread) {}

  int thread() const { return index; }
  int block() const { return of.block; }
  int split() const { return of.split; }
  void sync() const { of.meet(of.all, static_cast<int>(of.fibers.size())); }
  void sync_warp() const { of.meet(of.warps[index / 32].meeting, 32); }

  void copy16(char* to, const void* from, bool inside) const {
    require(to >= of.shared() && to + 16 <= of.shared() + of.shared_bytes, "a copy goes beyond shared memory");
    require(reinterpret_cast<uintptr_t>(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0,
            "a copy of 16 bytes is not aligned");
    of.fibers[index].open.push_back({to, inside ? static_cast<const char*>(from) : nullptr});
  }

  void commit() const {
    auto& fiber = of.fibers[index];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
  }

  template <int kPending>
  void wait() const {
    auto& groups = of.fibers[index].groups;
    for (; groups.size() > static_cast<size_t>(kPending); groups.pop_front()) {
      for (const auto& copy : groups.front()) {
        if (copy.from)
          std::memcpy(copy.to, copy.from, 16);
        else
          std::memset(copy.to, 0, 16);
      }
    }
  }

  void load_matrices(uint32_t (&to)[4], const char* row) const {
    require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "a row of ldmatrix is not aligned");
    require(row >= of.shared() && row + 16 <= of.shared() + of.shared_bytes, "ldmatrix reads beyond shared memory");
    ThreadBlock::Warp& warp = of.warps[index / 32];
    const int turn = warp.meeting.turn % 2;
    warp.rows[turn][lane()] = row;
    of.meet(warp.meeting, 32);
    // Lanes 8 j to 8 j + 7 name the rows of matrix j; this lane gets elements 2 t and 2 t + 1 of row lane / 4.
    for (int j = 0; j < 4; ++j) std::memcpy(&to[j], warp.rows[turn][8 * j + lane() / 4] + lane() % 4 * 4, 4);
  }

  uint32_t shuffle_up(uint32_t value, int distance) const {
    ThreadBlock::Warp& warp = of.warps[index / 32];
    const int turn = warp.meeting.turn % 2;
    warp.registers[turn][lane()][0] = value;
    of.meet(warp.meeting, 32);
    return warp.registers[turn][lane() < distance ? lane() : lane() - distance][0];
  }

  // mma.m16n8k16, of dense weights.
  template <class Element>
  void multiply(float (&sums)[4], const Words& weights, const uint32_t (&columns)[2]) const {
    ThreadBlock::Warp& warp = of.warps[index / 32];
    const int turn = warp.meeting.turn % 2;
    uint32_t* mine = warp.registers[turn][lane()];
    for (int j = 0; j < 4; ++j) mine[j] = weights.word[j];
    for (int j = 0; j < 2; ++j) mine[4 + j] = columns[j];
    of.meet(warp.meeting, 32);
    const auto& all = warp.registers[turn];
    for (int c = 0; c < 4; ++c) {
      const int row = row_of_sum(c), column = column_of_sum(c);
      double sum = sums[c];
      for (int depth = 0; depth < 16; ++depth) {
        sum += static_cast<double>(Element::widen(weight(all, row, depth))) * Element::widen(input(all, depth, column));
      }
      sums[c] = static_cast<float>(sum);
    }
  }

  // mma.sp.m16n8k32, of weights of which two of each four are kept.
  template <class Element, int kSelector>
  void multiply(float (&sums)[4], const Words& weights, const uint32_t (&columns)[4], uint32_t metadata) const {
    ThreadBlock::Warp& warp = of.warps[index / 32];
    const int turn = warp.meeting.turn % 2;
    uint32_t* mine = warp.registers[turn][lane()];
    for (int j = 0; j < 4; ++j) mine[j] = weights.word[j], mine[4 + j] = columns[j];
    mine[8] = metadata;
    of.meet(warp.meeting, 32);
    const auto& all = warp.registers[turn];
    for (int c = 0; c < 4; ++c) {
      const int row = row_of_sum(c), column = column_of_sum(c);
      double sum = sums[c];
      for (int slot = 0; slot < 16; ++slot) {
        const int depth = slot / 2 * 4 + position<kSelector>(all, row, slot);
        sum += static_cast<double>(Element::widen(weight(all, row, slot))) * Element::widen(input(all, depth, column));
      }
      sums[c] = static_cast<float>(sum);
    }
  }

 private:
  using Registers = uint32_t[32][16];

  int lane() const { return index % 32; }

  // c0 and c1 are row `group`, c2 and c3 row `group` + 8, of columns 2 t and 2 t + 1.
  int row_of_sum(int c) const { return lane() / 4 + (c >= 2 ? 8 : 0); }
  int column_of_sum(int c) const { return lane() % 4 * 2 + c % 2; }

  static uint16_t half_of(uint32_t word, int half) { return static_cast<uint16_t>(word >> 16 * half); }

  // Element `slot` of the 16 that a row has, or keeps of 32: a[i] of a lane has slots 2 t + i % 2, plus 8 for i >= 4,
  // and rows `group` for i of 0, 1, 4, 5.
  static uint16_t weight(const Registers& all, int row, int slot) {
    const int from = row % 8 * 4 + slot % 8 / 2;
    const int i = (slot >= 8 ? 4 : 0) + (row >= 8 ? 2 : 0) + slot % 2;
    return half_of(all[from][i / 2], i % 2);
  }

  // b[i] of a lane has column `group` and row 2 t + i % 2 + 8 (i / 2).
  static uint16_t input(const Registers& all, int depth, int column) {
    const int from = column * 4 + depth % 8 / 2, i = depth / 8 * 2 + depth % 2;
    return half_of(all[from][4 + i / 2], i % 2);
  }

  template <int kSelector>
  static int position(const Registers& all, int row, int slot) {
    const int chunk = slot / 2, from = row % 8 * 4 + kSelector * 2 + chunk / 4;
    const uint32_t bits = half_of(all[from][8], row / 8) >> chunk % 4 * 4 & 0xf;
    require((bits & 3) < bits >> 2, "metadata do not ascend");
    return slot % 2 ? bits >> 2 : bits & 3;
  }

  ThreadBlock& of;
  const int index;
};

}  // namespace smart::cuda
