#include "cpu/program.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

namespace smart::cpu {

namespace {

constexpr int64_t kAlign = 16;       // floats of a cache line
constexpr double kConvert = 0.25;    // cycles a number, to interleave or separate it
constexpr double kConvertFar = 0.5;  // more than that for values beyond the L2 cache
constexpr double kL2Floats = 256 * 1024;
constexpr double kPointwiseCycles = 0.2;  // a number

thread_local Scratch kept_values;   // between phases
thread_local Scratch local_values;  // of one unit

int64_t aligned(int64_t floats) { return ceil_div(floats, kAlign) * kAlign; }

// First-fit placement of arrays that live for a while.
class Arena {
 public:
  // A place for `floats` numbers, free from step `born` to step `dies`.
  int64_t place(int64_t floats, int born, int dies) {
    std::vector<std::pair<int64_t, int64_t>> taken;
    for (const Taken& t : taken_)
      if (t.born <= dies && born <= t.dies) taken.emplace_back(t.from, t.to);
    std::sort(taken.begin(), taken.end());
    int64_t from = 0;
    for (const auto& [begin, end] : taken) {
      if (from + floats <= begin) break;
      from = std::max(from, end);
    }
    taken_.push_back({from, from + aligned(floats), born, dies});
    size_ = std::max(size_, from + aligned(floats));
    return from;
  }
  int64_t size() const { return size_; }

 private:
  struct Taken {
    int64_t from, to;
    int born, dies;
  };
  std::vector<Taken> taken_;
  int64_t size_ = 0;
};

std::vector<int> read_by(const Step& step) {
  return step.other == kNone ? std::vector<int>{step.x} : std::vector<int>{step.x, step.other};
}

std::vector<int> made_by(const Step& step) {
  return step.second == kNone ? std::vector<int>{step.y} : std::vector<int>{step.y, step.second};
}

Plan plan_for(const Kernels& kernels, const Problem& problem, const Weight& weight) {
  const int64_t nonzeros = path_nonzeros(problem, weight);
  return (problem.interleaved ? image_plan : pixel_plan)(problem, weight.slab_channels, nonzeros, kernels);
}

void add_once(std::vector<int>& values, int value) {
  if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
}

}  // namespace

Program::Program(const Kernels& kernels, std::vector<Value> values, std::vector<Step> steps, int inputs,
                 std::vector<int> outputs, int64_t batch)
    : kernels_(kernels),
      values_(std::move(values)),
      steps_(std::move(steps)),
      inputs_(inputs),
      outputs_(std::move(outputs)),
      batch_(batch) {
  fuse_activations();
  split(choose_layouts());
  place_values();
}

// A function of nothing but a convolution's result becomes a part of the convolution.
void Program::fuse_activations() {
  std::vector<int> readers(values_.size(), 0);
  for (const int value : outputs_) ++readers[value];
  for (const Step& step : steps_)
    for (const int value : read_by(step)) ++readers[value];
  std::vector<Step> fused;
  std::vector<std::size_t> maker(values_.size(), steps_.size());  // in `fused`
  for (const Step& step : steps_) {
    // (Of channels shorter than a vector, as gates have, all together are faster than one after another.)
    const bool whole = values_[step.y].pixels() >= kernels_.width;
    if (step.kind == Kind::kActivate && whole && readers[step.x] == 1 && maker[step.x] < fused.size()) {
      Step& conv = fused[maker[step.x]];
      const Epilogue& e = conv.epilogue;
      if (conv.kind == Kind::kConvolution && conv.second == kNone && !e.activates && !e.relu6) {
        const bool relu6 = step.function == Function::kRelu6;
        conv.epilogue.relu = conv.epilogue.relu || relu6, conv.epilogue.relu6 = relu6;
        conv.epilogue.activates = !relu6, conv.epilogue.function = step.function;
        conv.y = step.y;
        maker[step.y] = maker[step.x];
        continue;
      }
    }
    for (const int value : made_by(step)) maker[value] = fused.size();
    fused.push_back(step);
  }
  steps_ = std::move(fused);
}

// The layout of each step that makes all of them together cheapest, conversions included: dynamic programming over the
// steps in their order.
std::vector<bool> Program::choose_layouts() const {
  const double units[2] = {static_cast<double>(batch_), static_cast<double>(ceil_div(batch_, kernels_.width))};
  double total[2] = {0, 0};
  std::vector<std::array<bool, 2>> came_from;
  for (const Step& step : steps_) {
    double cost[2];
    for (const bool interleaved : {false, true}) {
      double cycles = kPointwiseCycles * values_[step.y].floats() * (interleaved ? kernels_.width : 1);
      if (step.kind == Kind::kConvolution) {
        Problem problem = step.problem;
        problem.batch = interleaved ? kernels_.width : 1, problem.interleaved = interleaved;
        const Plan plan = plan_for(kernels_, problem, step.weight);
        cycles = plan.fits ? plan.cycles : 1e30;
      }
      cost[interleaved] = cycles * units[interleaved];
    }
    double convert = 0;
    for (const int value : read_by(step)) {
      const double floats = static_cast<double>(batch_) * values_[value].floats();
      convert += floats * (kConvert + std::clamp(floats / kL2Floats - 0.5, 0.0, 1.0) * kConvertFar);
    }
    if (came_from.empty()) total[1] = convert;
    std::array<bool, 2> best;
    double next[2];
    for (const bool interleaved : {false, true}) {
      const double stay = total[interleaved], change = total[!interleaved] + convert;
      best[interleaved] = stay <= change ? interleaved : !interleaved;
      next[interleaved] = std::min(stay, change) + cost[interleaved];
    }
    total[0] = next[0], total[1] = next[1];
    came_from.push_back(best);
  }
  std::vector<bool> layouts(steps_.size());
  bool interleaved = total[1] < total[0];
  for (std::size_t n = steps_.size(); n-- > 0;) {
    layouts[n] = interleaved;
    interleaved = came_from[n][interleaved];
  }
  return layouts;
}

// Makes the phases, and the convolutions in their layouts.
void Program::split(const std::vector<bool>& interleaved) {
  maker_.assign(values_.size(), kNone);
  shared_.assign(values_.size(), false);
  for (int value = 0; value < inputs_; ++value) shared_[value] = true;
  for (const int value : outputs_) shared_[value] = true;
  for (std::size_t n = 0; n < steps_.size(); ++n) {
    const Step& step = steps_[n];
    if (n == 0 || interleaved[n] != interleaved[n - 1])
      phases_.push_back({interleaved[n], static_cast<int>(n), static_cast<int>(n), 0, 0, {}, {}, {}});
    Phase& phase = phases_.back();
    const int number = static_cast<int>(phases_.size()) - 1;
    phase.last = static_cast<int>(n) + 1;
    for (const int value : made_by(step)) maker_[value] = number;
    for (const int value : read_by(step)) {
      if (maker_[value] != number) {
        shared_[value] = true;
        add_once(phase.reads, value);
      }
    }
    convolutions_.emplace_back();
    if (step.kind == Kind::kConvolution) {
      Problem problem = step.problem;
      problem.batch = interleaved[n] ? kernels_.width : 1, problem.interleaved = interleaved[n];
      const auto plan = std::make_shared<Plan>(plan_for(kernels_, problem, step.weight));
      if (!plan->fits) throw std::length_error(kTooLarge);
      convolutions_.back() = std::make_unique<Convolution>(kernels_, problem, step.weight, step.epilogue, plan);
      phase.cycles += plan->cycles;
    }
    phase.cycles += kPointwiseCycles * values_[step.y].floats();
  }
  for (std::size_t value = inputs_; value < values_.size(); ++value)
    if (shared_[value]) phases_[maker_[value]].writes.push_back(static_cast<int>(value));
}

void Program::place_values() {
  kept_.assign(values_.size(), kNone);
  for (Phase& phase : phases_) phase.floats = place_locally(phase);
  for (std::size_t value = inputs_; value < values_.size(); ++value) {
    if (!shared_[value] || std::find(outputs_.begin(), outputs_.end(), static_cast<int>(value)) != outputs_.end())
      continue;
    kept_[value] = kept_floats_;
    kept_floats_ += aligned(values_[value].floats() * batch_);
  }
}

// Places what a phase makes for itself alone; interleaved, also its copies of what others know.
int64_t Program::place_locally(Phase& phase) {
  std::vector<int> born(values_.size(), kNone), dies(values_.size(), kNone), order;
  const auto note = [&](int value, int step) {
    if (shared_[value] && !phase.interleaved) return;
    if (born[value] == kNone) born[value] = step, order.push_back(value);
    dies[value] = std::max(dies[value], step);
  };
  for (const int value : phase.reads) note(value, phase.first);
  for (int n = phase.first; n < phase.last; ++n) {
    for (const int value : made_by(steps_[n])) note(value, n);
    for (const int value : read_by(steps_[n])) note(value, n);
  }
  for (const int value : phase.writes) note(value, phase.last);
  Arena arena;
  const int64_t lanes = phase.interleaved ? kernels_.width : 1;
  phase.places.assign(values_.size(), kNone);
  for (const int value : order)
    phase.places[value] = arena.place(values_[value].floats() * lanes, born[value], dies[value]);
  return arena.size();
}

void Program::run(const std::vector<const float*>& inputs, const std::vector<float*>& outputs) const {
  Places outside(values_.size(), nullptr);
  float* kept = kept_values.at_least(kept_floats_);
  for (std::size_t value = 0; value < values_.size(); ++value)
    if (kept_[value] != kNone) outside[value] = kept + kept_[value];
  for (int value = 0; value < inputs_; ++value) outside[value] = const_cast<float*>(inputs[value]);
  for (std::size_t n = 0; n < outputs_.size(); ++n) outside[outputs_[n]] = outputs[n];

  const int64_t threads = torch::stable::get_num_threads();
  for (const Phase& phase : phases_) {
    const int64_t units = phase.interleaved ? ceil_div(batch_, kernels_.width) : batch_;
    // Threads that each run their own units meet once; threads that share a unit, once a layer.
    if (threads > 1 && (units >= 4 * threads || units % threads == 0)) {
      parallel(units, phase.cycles, threads,
               [&](int64_t first, int64_t last) { run_units(phase, outside, first, last, 1); });
    } else {
      run_units(phase, outside, 0, units, threads);
    }
  }
}

void Program::run_units(const Phase& phase, const Places& outside, int64_t first, int64_t last, int64_t threads) const {
  const int64_t lanes = phase.interleaved ? kernels_.width : 1;
  float* local = local_values.at_least(phase.floats);
  Places at(values_.size(), nullptr);
  for (std::size_t value = 0; value < values_.size(); ++value)
    if (phase.places[value] != kNone) at[value] = local + phase.places[value];
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t images = min(lanes, batch_ - unit * lanes);
    const auto there = [&](int value) { return outside[value] + unit * lanes * values_[value].floats(); };
    if (!phase.interleaved) {
      for (std::size_t value = 0; value < values_.size(); ++value)
        if (outside[value]) at[value] = there(static_cast<int>(value));
    } else {
      for (const int value : phase.reads) {
        const Value& v = values_[value];
        parallel(v.channels, kConvert * v.pixels() * lanes, threads, [&](int64_t a, int64_t b) {
          kernels_.interleave(there(value), v.channels, v.pixels(), images, at[value], a, b);
        });
      }
    }
    for (int step = phase.first; step < phase.last; ++step) run_step(step, phase.interleaved, at, threads);
    if (!phase.interleaved) continue;
    for (const int value : phase.writes) {
      const Value& v = values_[value];
      parallel(v.channels, kConvert * v.pixels() * lanes, threads, [&](int64_t a, int64_t b) {
        kernels_.separate(at[value], v.channels, v.pixels(), images, there(value), a, b);
      });
    }
  }
}

void Program::run_step(int number, bool interleaved, const Places& at, int64_t threads) const {
  const Step& step = steps_[number];
  const int64_t lanes = interleaved ? kernels_.width : 1;
  const Value& x = values_[step.x];
  const float* other = step.other == kNone ? nullptr : at[step.other];
  float* second = step.second == kNone ? nullptr : at[step.second];
  switch (step.kind) {
    case Kind::kConvolution: return convolutions_[number]->run({at[step.x], at[step.y], other, second}, threads);
    case Kind::kAffine:
      return kernels_.affine(step.epilogue.affine, at[step.x], x.channels, x.pixels() * lanes, at[step.y]);
    case Kind::kAdd: return kernels_.add(at[step.x], other, step.epilogue.relu, x.floats() * lanes, at[step.y]);
    case Kind::kActivate: return kernels_.activate(step.function, at[step.x], x.floats() * lanes, at[step.y]);
    case Kind::kMultiply:
      return kernels_.multiply(at[step.x], other, values_[step.other].pixels() < x.pixels(), x.channels, x.pixels(),
                               lanes, at[step.y]);
    case Kind::kMaxPool: return kernels_.max_pool(step.problem, lanes, at[step.x], at[step.y]);
    case Kind::kAverage: return kernels_.average(at[step.x], x.channels, x.pixels(), lanes, at[step.y]);
  }
}

}  // namespace smart::cpu
