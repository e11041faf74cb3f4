// Work over torch's threads, and memory that each of them keeps.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <memory>
#include <new>

namespace smart::cpu {

// Work under this many cycles (some 10 us) is not worth handing to another thread, which takes as long to wake.
constexpr double kGrainCycles = 32 * 1024;

// Calls body(first, last) over [0, count) on at most `threads` of torch's threads; `cycles` is what one of them costs.
template <class Body>
void parallel(int64_t count, double cycles, int64_t threads, const Body& body) {
  const int64_t grain = cycles >= kGrainCycles ? 1 : static_cast<int64_t>(kGrainCycles / (cycles < 1 ? 1 : cycles)) + 1;
  if (threads == 1 || grain >= count) return body(0, count);
  torch::stable::parallel_for(0, count, grain, body);
}

// Memory that only grows, kept from call to call: new to the process each time, large blocks would cost more in page
// faults than what is done in them. It holds what the last call left.
class Scratch {
 public:
  float* at_least(int64_t count) {
    if (held_ < count) {
      held_ = 0;
      memory_.reset();
      memory_.reset(new (std::align_val_t{kCacheLine}) float[count]);
      held_ = count;
    }
    return memory_.get();
  }

 private:
  static constexpr std::size_t kCacheLine = 64;
  struct Free {
    void operator()(float* memory) const { operator delete[](memory, std::align_val_t{kCacheLine}); }
  };
  std::unique_ptr<float[], Free> memory_;
  int64_t held_ = 0;
};

}  // namespace smart::cpu
