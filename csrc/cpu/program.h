// A stretch of a network, run in one call: no operator boundaries between its layers, and no memory allocated once a
// program has run.
//
// Steps compute values from values. Each step runs in one of the two layouts of cpu/problem.h; consecutive steps of one
// layout are a *phase*, which runs unit by unit - one image, or a block of interleaved ones - through all its steps, so
// that what passes between layers stays in the caches and threads meet once a phase.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/convolve.h"
#include "cpu/problem.h"
#include "cpu/threads.h"

namespace smart::cpu {

constexpr int kNone = -1;

// kAdd without `other` is ReLU alone; what kMultiply multiplies by may be one number for each channel.
enum class Kind { kConvolution, kAffine, kAdd, kMaxPool, kAverage, kActivate, kMultiply };
constexpr int kKinds = 7;

struct Step {
  Kind kind;
  int x, other, y,
      second;       // values; `other` is added or multiplied by, `second` a convolution's second result; or kNone
  Problem problem;  // of one image; pooling uses a part of it
  Weight weight;
  Epilogue epilogue;  // its pointers to images are of no meaning; kAffine uses `affine`, kAdd `relu`
  Function function;  // of kActivate
};

struct Value {
  int64_t channels, height, width;
  int64_t pixels() const { return height * width; }
  int64_t floats() const { return channels * pixels(); }
};

class Program {
 public:
  // Inputs and outputs are values; values are numbered in the order in which steps make them, inputs first. Every
  // reference must be to an earlier value of a fitting size: the caller has checked that.
  Program(const Kernels& kernels, std::vector<Value> values, std::vector<Step> steps, int inputs,
          std::vector<int> outputs, int64_t batch);

  // inputs[i], outputs[i]: (batch, C, H, W), contiguous.
  void run(const std::vector<const float*>& inputs, const std::vector<float*>& outputs) const;

 private:
  struct Phase {
    bool interleaved;
    int first, last;              // steps
    int64_t floats;               // of a unit's values
    double cycles;                // about, for a unit
    std::vector<int> reads;       // values from outside
    std::vector<int> writes;      // values for outside
    std::vector<int64_t> places;  // by value: where it lies among a unit's values, or kNone
  };
  // Where values are while a unit runs, by value.
  using Places = std::vector<float*>;

  void fuse_activations();
  std::vector<bool> choose_layouts() const;
  void split(const std::vector<bool>& interleaved);
  void place_values();
  int64_t place_locally(Phase& phase);
  void run_units(const Phase& phase, const Places& outside, int64_t first, int64_t last, int64_t threads) const;
  void run_step(int step, bool interleaved, const Places& at, int64_t threads) const;

  const Kernels& kernels_;
  std::vector<Value> values_;
  std::vector<Step> steps_;
  int inputs_;
  std::vector<int> outputs_;
  int64_t batch_;
  std::vector<Phase> phases_;
  std::vector<std::unique_ptr<Convolution>> convolutions_;  // by step
  std::vector<int> maker_;                                  // by value: the phase that makes it, or kNone
  std::vector<bool> shared_;                                // by value: whether other phases or the caller know it
  std::vector<int64_t> kept_;                               // by value: its place among those kept between phases
  int64_t kept_floats_ = 0;
};

}  // namespace smart::cpu
