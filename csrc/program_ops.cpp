// Operators on programs: stretches of a network that run in one call. Built against libtorch's stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/program.h"

namespace smart {
namespace {

// One step as smart_kernels/programs.py writes it: numbers of values, then of tensors, then plain numbers; -1 is none.
enum Field {
  kKind,
  kX,
  kOther,
  kY,
  kSecond,
  kValues,
  kCodes,
  kSegments,
  kScale,
  kBias,
  kAffineScale,
  kAffineBias,
  kSlabChannels,
  kFirstSegment,
  kLastSegment,
  kRelu,
  kAffineRelu,
  kGeometry,
  kFields = kGeometry + 13,
};

// A program and what its pointers lead to.
struct Held {
  std::vector<Tensor> tensors;
  std::vector<cpu::Value> inputs, outputs;
  int64_t batch;
  std::unique_ptr<cpu::Program> program;
};

std::mutex programs_lock;
std::unordered_map<int64_t, std::shared_ptr<const Held>> programs;
int64_t last_program = 0;

class Reader {
 public:
  Reader(const std::vector<Tensor>& tensors, std::vector<cpu::Value>& values) : tensors_(tensors), values_(values) {}

  cpu::Step read(const int64_t* fields) {
    fields_ = fields;
    SMART_CHECK(0 <= fields[kKind] && fields[kKind] < cpu::kKinds, "unknown kind of step ", fields[kKind]);
    cpu::Step step = {};
    step.kind = static_cast<cpu::Kind>(fields[kKind]);
    step.x = value(kX), step.other = fields[kOther] == cpu::kNone ? cpu::kNone : value(kOther);
    const cpu::Value x = values_[step.x];
    cpu::Value y = x;
    switch (step.kind) {
      case cpu::Kind::kConvolution: y = read_convolution(step, x); break;
      case cpu::Kind::kAffine: step.epilogue.affine = read_affine(x.channels); break;
      case cpu::Kind::kAdd: step.epilogue.relu = fields[kRelu]; break;
      case cpu::Kind::kMaxPool: y = read_pooling(step, x); break;
      case cpu::Kind::kAverage: y = {x.channels, 1, 1}; break;
      case cpu::Kind::kActivate: step.function = read_function(); break;
      case cpu::Kind::kMultiply: break;
    }
    const bool convolves = step.kind == cpu::Kind::kConvolution;
    SMART_CHECK(convolves || fields[kSecond] == cpu::kNone, "only a convolution makes a second value");
    const bool multiplies = step.kind == cpu::Kind::kMultiply;
    SMART_CHECK(multiplies == (step.other != cpu::kNone) || convolves || step.kind == cpu::Kind::kAdd,
                "a product needs another value, and only a convolution or a sum may have one");
    if (step.other != cpu::kNone) {
      const cpu::Value& other = values_[step.other];
      const bool is_gate = multiplies && other.pixels() == 1;
      SMART_CHECK(other.channels == y.channels && (is_gate || (other.height == y.height && other.width == y.width)),
                  "what is added must have the size of what it is added to; a factor may be one pixel");
    }
    step.y = make(kY, y);
    step.second = fields[kSecond] == cpu::kNone ? cpu::kNone : make(kSecond, y);
    return step;
  }

 private:
  int value(Field field) const {
    const int64_t number = fields_[field];
    SMART_CHECK(0 <= number && number < static_cast<int64_t>(values_.size()), "a step reads value ", number, " of ",
                values_.size(), " that were made before it");
    return static_cast<int>(number);
  }

  int make(Field field, const cpu::Value& value) {
    SMART_CHECK(fields_[field] == static_cast<int64_t>(values_.size()), "a step makes value ", fields_[field], ": ",
                values_.size(), " is the next");
    values_.push_back(value);
    return static_cast<int>(fields_[field]);
  }

  const Tensor& tensor(Field field) const {
    const int64_t number = fields_[field];
    SMART_CHECK(0 <= number && number < static_cast<int64_t>(tensors_.size()), "a step reads tensor ", number, " of ",
                tensors_.size());
    return tensors_[number];
  }

  const float* channels(Field field, const char* name, int64_t count) const {
    return fields_[field] == cpu::kNone ? nullptr : per_channel(tensor(field), name, count);
  }

  cpu::Affine read_affine(int64_t count) const {
    const float* scale = channels(kAffineScale, "affine_scale", count);
    const float* bias = channels(kAffineBias, "affine_bias", count);
    SMART_CHECK(scale && bias, "an affine step needs a scale and a bias");
    return {scale, bias, fields_[kAffineRelu] != 0, nullptr};
  }

  cpu::Value read_convolution(cpu::Step& step, const cpu::Value& x) const {
    const cpu::Problem p = read_problem(1, x.channels, x.height, x.width, fields_ + kGeometry);
    step.problem = p;
    step.weight = read_weight(p, tensor(kValues), tensor(kCodes), tensor(kSegments), fields_[kSlabChannels],
                              fields_[kFirstSegment], fields_[kLastSegment]);
    step.epilogue.scale = channels(kScale, "scale", p.out_channels);
    step.epilogue.bias = channels(kBias, "bias", p.out_channels);
    step.epilogue.relu = fields_[kRelu];
    if (fields_[kSecond] != cpu::kNone) step.epilogue.affine = read_affine(p.out_channels);
    return {p.out_channels, p.out_height, p.out_width};
  }

  cpu::Function read_function() const {
    SMART_CHECK(0 <= fields_[kRelu] && fields_[kRelu] < cpu::kFunctions, "unknown function ", fields_[kRelu]);
    return static_cast<cpu::Function>(fields_[kRelu]);
  }

  // Of the geometry, pooling uses the kernel's size and the strides.
  cpu::Value read_pooling(cpu::Step& step, const cpu::Value& x) const {
    std::vector<int64_t> g(fields_ + kGeometry, fields_ + kFields);
    g[0] = g[1] = x.channels, g[12] = 1;
    step.problem = read_problem(1, x.channels, x.height, x.width, g.data());
    SMART_CHECK(g[6] + g[7] + g[8] + g[9] == 0 && g[10] == 1 && g[11] == 1,
                "pooling of programs has neither padding nor dilation");
    return {x.channels, step.problem.out_height, step.problem.out_width};
  }

  const std::vector<Tensor>& tensors_;
  std::vector<cpu::Value>& values_;
  const int64_t* fields_ = nullptr;
};

// `inputs`: C, H, W of each; `steps`: fields of each, one after another; `outputs`: numbers of values. The tensors are
// those of smart_kernels/packing/unstructured.py, validated when packed or loaded, and per-channel ones.
int64_t program_create(std::vector<Tensor> tensors, std::vector<int64_t> inputs, std::vector<int64_t> steps,
                       std::vector<int64_t> outputs, int64_t batch, std::string isa) {
  const cpu::Kernels* kernels = cpu::find_kernels(isa.c_str());
  SMART_CHECK(kernels != nullptr, "this library or machine has no '", isa, "' kernels: see cpu_isas()");
  SMART_CHECK(batch > 0 && inputs.size() % 3 == 0 && !steps.empty() && steps.size() % kFields == 0,
              "a program needs a batch of at least 1, three numbers for each input, and ", +kFields,
              " for each of its steps");
  auto held = std::make_shared<Held>();
  held->tensors = std::move(tensors), held->batch = batch;
  std::vector<cpu::Value> values;
  for (std::size_t i = 0; i < inputs.size(); i += 3) {
    SMART_CHECK(inputs[i] > 0 && inputs[i + 1] > 0 && inputs[i + 2] > 0, "an input has a size below 1");
    values.push_back({inputs[i], inputs[i + 1], inputs[i + 2]});
  }
  held->inputs = values;
  std::vector<cpu::Step> read;
  Reader reader(held->tensors, values);
  for (std::size_t i = 0; i < steps.size(); i += kFields) read.push_back(reader.read(steps.data() + i));
  std::vector<int> results;
  for (const int64_t value : outputs) {
    SMART_CHECK(static_cast<int64_t>(held->inputs.size()) <= value && value < static_cast<int64_t>(values.size()),
                "output ", value, " is made by no step");
    results.push_back(static_cast<int>(value)), held->outputs.push_back(values[value]);
  }
  const int input_count = static_cast<int>(held->inputs.size());
  held->program =
      std::make_unique<cpu::Program>(*kernels, std::move(values), std::move(read), input_count, results, batch);
  const std::lock_guard<std::mutex> guard(programs_lock);
  programs[++last_program] = std::move(held);
  return last_program;
}

std::vector<Tensor> program_run(int64_t program, std::vector<Tensor> inputs) {
  std::shared_ptr<const Held> held;
  {
    const std::lock_guard<std::mutex> guard(programs_lock);
    const auto found = programs.find(program);
    SMART_CHECK(found != programs.end(), "there is no program ", program);
    held = found->second;
  }
  SMART_CHECK(inputs.size() == held->inputs.size(), "the program takes ", held->inputs.size(), " inputs, not ",
              inputs.size());
  std::vector<Tensor> contiguous, results;
  std::vector<const float*> from;
  std::vector<float*> to;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& x = inputs[i];
    const cpu::Value& v = held->inputs[i];
    SMART_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 4 && x.size(0) == held->batch &&
                    x.size(1) == v.channels && x.size(2) == v.height && x.size(3) == v.width,
                "input has shape ", shape_of(x), ": the program was made for float32 (", held->batch, ", ", v.channels,
                ", ", v.height, ", ", v.width, ")");
    contiguous.push_back(x.is_contiguous() ? x : torch::stable::contiguous(x));
    from.push_back(static_cast<const float*>(contiguous.back().const_data_ptr()));
  }
  for (const cpu::Value& v : held->outputs) {
    results.push_back(torch::stable::new_empty(inputs[0], {held->batch, v.channels, v.height, v.width}));
    to.push_back(static_cast<float*>(results.back().mutable_data_ptr()));
  }
  held->program->run(from, to);
  return results;
}

void free_program(int64_t program) {
  std::shared_ptr<const Held> last;  // destroyed after the lock is released
  const std::lock_guard<std::mutex> guard(programs_lock);
  const auto found = programs.find(program);
  if (found == programs.end()) return;
  last = std::move(found->second);
  programs.erase(found);
}

}  // namespace
}  // namespace smart

// Not an operator: the garbage collector calls it at any moment, also while torch traces a network, and an operator
// would become a part of that network.
extern "C" __attribute__((visibility("default"))) void smart_kernels_free_program(int64_t program) {
  smart::free_program(program);
}

STABLE_TORCH_LIBRARY_FRAGMENT(smart_kernels, m) {
  m.def("program_create(Tensor[] tensors, int[] inputs, int[] steps, int[] outputs, int batch, str isa=\"\") -> int");
  m.def("program_run(int program, Tensor[] inputs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CPU, m) {
  m.impl("program_create", TORCH_BOX(&smart::program_create));
  m.impl("program_run", TORCH_BOX(&smart::program_run));
}
