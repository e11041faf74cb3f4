// Operators on single layers: schemas and dispatch. Built against libtorch's stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/convolve.h"
#include "cpu/isa.h"

namespace smart {
namespace {

const cpu::Kernels& kernels_named(const std::string& isa) {
  const cpu::Kernels* kernels = cpu::find_kernels(isa.c_str());
  SMART_CHECK(kernels != nullptr, "this library or machine has no '", isa, "' kernels: see cpu_isas()");
  return *kernels;
}

// See smart_kernels/ops.py for what it computes and smart_kernels/packing/unstructured.py for the packed weight, whose
// codes are validated there, once, when packed or loaded.
//
// `affine` has its scale, bias and relu set; where its result goes is decided here. Null: there is no second result.
struct Results {
  Tensor y;
  std::optional<Tensor> second;
};

Results convolve(const Tensor& x, const Tensor& values, const Tensor& codes, const Tensor& segments,
                 const std::vector<int64_t>& geometry, int64_t slab_channels, int64_t first_segment,
                 int64_t last_segment, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, bool relu, const std::string& isa, cpu::Affine* affine) {
  const cpu::Kernels& kernels = kernels_named(isa);
  SMART_CHECK(geometry.size() == 13, "geometry has ", geometry.size(), " numbers: 13 are needed");
  SMART_CHECK(x.dim() == 4, "input has shape ", shape_of(x), ": (N, C, H, W) is needed");
  SMART_CHECK(x.scalar_type() == ScalarType::Float, "input is not float32, as the weights are: convert it");
  const cpu::Problem p = read_problem(x.size(0), x.size(1), x.size(2), x.size(3), geometry.data());
  const cpu::Weight w = read_weight(p, values, codes, segments, slab_channels, first_segment, last_segment);

  const std::vector<int64_t> shape = {p.batch, p.out_channels, p.out_height, p.out_width};
  Results results = {torch::stable::new_empty(x, shape), std::nullopt};
  Tensor& y = results.y;
  const Tensor dense_x = x.is_contiguous() ? x : torch::stable::contiguous(x);
  std::optional<Tensor> dense_residual;
  if (residual) {
    bool as_output = residual->scalar_type() == ScalarType::Float && residual->dim() == y.dim();
    for (int64_t i = 0; as_output && i < y.dim(); ++i) as_output = residual->size(i) == y.size(i);
    SMART_CHECK(as_output, "residual has shape ", shape_of(*residual), ": float32 ", shape_of(y),
                " is needed, the shape of the output");
    dense_residual = residual->is_contiguous() ? *residual : torch::stable::contiguous(*residual);
  }
  cpu::Epilogue e = {
      per_channel(scale, "scale", p.out_channels), per_channel(bias, "bias", p.out_channels), nullptr, relu, {}};
  cpu::Arrays arrays = {static_cast<const float*>(dense_x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()),
                        nullptr, nullptr};
  if (dense_residual) arrays.residual = static_cast<const float*>(dense_residual->const_data_ptr());
  if (affine) {
    results.second = torch::stable::new_empty(x, shape);
    e.affine = *affine;
    arrays.second = static_cast<float*>(results.second->mutable_data_ptr());
  }
  if (p.batch > 0) cpu::convolve(kernels, p, w, e, arrays);
  return results;
}

Tensor sparse_conv2d_cpu(Tensor x, Tensor values, Tensor codes, Tensor segments, std::vector<int64_t> geometry,
                         int64_t slab_channels, int64_t first_segment, int64_t last_segment,
                         std::optional<Tensor> scale, std::optional<Tensor> bias, std::optional<Tensor> residual,
                         bool relu, std::string isa) {
  return convolve(x, values, codes, segments, geometry, slab_channels, first_segment, last_segment, scale, bias,
                  residual, relu, isa, nullptr)
      .y;
}

// Also returns relu(y * affine_scale + affine_bias).
std::tuple<Tensor, Tensor> sparse_conv2d_affine_cpu(Tensor x, Tensor values, Tensor codes, Tensor segments,
                                                    std::vector<int64_t> geometry, int64_t slab_channels,
                                                    int64_t first_segment, int64_t last_segment,
                                                    std::optional<Tensor> scale, std::optional<Tensor> bias,
                                                    std::optional<Tensor> residual, bool relu, Tensor affine_scale,
                                                    Tensor affine_bias, bool affine_relu, std::string isa) {
  SMART_CHECK(!geometry.empty(), "geometry has 0 numbers: 13 are needed");
  cpu::Affine affine = {per_channel(affine_scale, "affine_scale", geometry[0]),
                        per_channel(affine_bias, "affine_bias", geometry[0]), affine_relu, nullptr};
  Results results = convolve(x, values, codes, segments, geometry, slab_channels, first_segment, last_segment, scale,
                             bias, residual, relu, isa, &affine);
  return {results.y, *results.second};
}

// About how many cycles of one thread sparse_conv2d_cpu takes for a path of so many non-zeros.
double cpu_cycles(std::vector<int64_t> input_shape, std::vector<int64_t> geometry, int64_t slab_channels,
                  int64_t nonzeros, std::string isa) {
  const cpu::Kernels& kernels = kernels_named(isa);
  SMART_CHECK(input_shape.size() == 4, "input has ", input_shape.size(), " dimensions: (N, C, H, W) is needed");
  SMART_CHECK(geometry.size() == 13, "geometry has ", geometry.size(), " numbers: 13 are needed");
  SMART_CHECK(slab_channels > 0 && nonzeros >= 0, "slab_channels is ", slab_channels, ", nonzeros ", nonzeros);
  const std::vector<int64_t>& x = input_shape;
  return cpu::estimated_cycles(kernels, read_problem(x[0], x[1], x[2], x[3], geometry.data()), slab_channels, nonzeros);
}

// Names of the instruction sets that can run here, fastest first, separated by spaces.
std::string cpu_isas() {
  std::string names;
  for (const char* name : {"avx512", "avx2", "plain"}) {
    if (cpu::find_kernels(name)) names += names.empty() ? name : std::string(" ") + name;
  }
  return names;
}

}  // namespace
}  // namespace smart

STABLE_TORCH_LIBRARY_FRAGMENT(smart_kernels, m) {
  m.def(
      "sparse_conv2d_cpu(Tensor x, Tensor values, Tensor codes, Tensor segments, int[] geometry, int slab_channels, "
      "int first_segment, int last_segment, Tensor? scale, Tensor? bias, Tensor? residual, bool relu, str isa=\"\") "
      "-> Tensor");
  m.def(
      "sparse_conv2d_affine_cpu(Tensor x, Tensor values, Tensor codes, Tensor segments, int[] geometry, "
      "int slab_channels, int first_segment, int last_segment, Tensor? scale, Tensor? bias, Tensor? residual, "
      "bool relu, Tensor affine_scale, Tensor affine_bias, bool affine_relu, str isa=\"\") -> (Tensor, Tensor)");
  m.def("cpu_cycles(int[] input_shape, int[] geometry, int slab_channels, int nonzeros, str isa=\"\") -> float");
  m.def("cpu_isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CPU, m) {
  m.impl("sparse_conv2d_cpu", TORCH_BOX(&smart::sparse_conv2d_cpu));
  m.impl("sparse_conv2d_affine_cpu", TORCH_BOX(&smart::sparse_conv2d_affine_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_cycles", TORCH_BOX(&smart::cpu_cycles));
  m.impl("cpu_isas", TORCH_BOX(&smart::cpu_isas));
}
