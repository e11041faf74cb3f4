// Operator schemas, argument checks and dispatch. Built against libtorch's stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/convolve.h"
#include "cpu/isa.h"
#include "cpu/layout.h"

namespace smart {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A macro, so that the parts of the message are built only when it is needed.
#define SMART_CHECK(holds, ...)        \
  do {                                 \
    if (!(holds)) refuse(__VA_ARGS__); \
  } while (false)

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ')';
  return text.str();
}

const float* per_channel(const std::optional<Tensor>& tensor, const char* name, int64_t channels) {
  if (!tensor) return nullptr;
  SMART_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->dim() == 1 && tensor->size(0) == channels &&
                  tensor->is_contiguous(),
              name, " has shape ", shape_of(*tensor), ": contiguous float32 (", channels, ",) is needed");
  return static_cast<const float*>(tensor->const_data_ptr());
}

// `geometry`: K, C/groups, R, S, stride (h, w), padding (top, bottom, left, right), dilation (h, w), groups. One list,
// because crossing the stable ABI costs a fraction of a microsecond a list or number.
cpu::Problem read_problem(const Tensor& x, const std::vector<int64_t>& geometry, int64_t lanes) {
  SMART_CHECK(geometry.size() == 13, "geometry has ", geometry.size(), " numbers: 13 are needed");
  const bool interleaved = x.dim() == 5 && x.size(4) == lanes;
  SMART_CHECK((x.dim() == 4 || interleaved) && x.scalar_type() == ScalarType::Float, "input has shape ", shape_of(x),
              ": float32 (N, C, H, W) is needed, or for interleaved images (N/", lanes, ", C, H, W, ", lanes, ")");
  const int64_t* g = geometry.data();
  cpu::Problem p = {};
  p.interleaved = interleaved;
  p.batch = interleaved ? x.size(0) * lanes : x.size(0);
  p.in_channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.out_channels = g[0], p.kernel_h = g[2], p.kernel_w = g[3];
  p.stride_h = g[4], p.stride_w = g[5];
  p.pad_top = g[6], p.pad_left = g[8];
  p.dilation_h = g[10], p.dilation_w = g[11];
  p.groups = g[12];
  for (const int i : {0, 1, 2, 3, 4, 5, 10, 11, 12})
    SMART_CHECK(g[i] > 0, "geometry[", i, "] is ", g[i], ": at least 1 is needed");
  for (const int i : {4, 5, 6, 7, 8, 9, 10, 11})
    SMART_CHECK(g[i] <= 1024, "geometry[", i, "] is ", g[i], ": strides, paddings and dilations are at most 1024");
  for (const int i : {6, 7, 8, 9})
    SMART_CHECK(g[i] >= 0, "geometry[", i, "] is ", g[i], ": padding must not be negative");
  SMART_CHECK(p.out_channels % p.groups == 0, p.out_channels, " output channels cannot be split into ", p.groups,
              " groups");
  SMART_CHECK(p.in_channels == g[1] * p.groups, "input has ", p.in_channels, " channels: the weight takes ",
              g[1] * p.groups);
  const int64_t reach_h = (p.kernel_h - 1) * p.dilation_h + 1, reach_w = (p.kernel_w - 1) * p.dilation_w + 1;
  const int64_t padded_h = p.height + g[6] + g[7], padded_w = p.width + g[8] + g[9];
  SMART_CHECK(padded_h >= reach_h && padded_w >= reach_w, "input of ", p.height, "x", p.width, " pixels padded to ",
              padded_h, "x", padded_w, " is smaller than the kernel's reach of ", reach_h, "x", reach_w);
  p.out_height = (padded_h - reach_h) / p.stride_h + 1;
  p.out_width = (padded_w - reach_w) / p.stride_w + 1;
  return p;
}

cpu::Weight read_weight(const cpu::Problem& p, const Tensor& values, const Tensor& codes, const Tensor& segments,
                        int64_t slab_channels, int64_t first_segment, int64_t last_segment) {
  SMART_CHECK(slab_channels > 0 && 0 <= first_segment && first_segment <= last_segment && last_segment <= 3,
              "slab_channels must be at least 1, and 0 <= first_segment <= last_segment <= 3");
  const bool wide = codes.scalar_type() == ScalarType::Short;
  SMART_CHECK(
      values.scalar_type() == ScalarType::Float && (wide || codes.scalar_type() == ScalarType::Byte) &&
          segments.scalar_type() == ScalarType::Int && values.is_contiguous() && codes.is_contiguous() &&
          segments.is_contiguous() && codes.numel() == values.numel(),
      "packed weight needs contiguous float32 values, uint8 or int16 codes of the same length, and int32 segments");
  SMART_CHECK(wide || slab_channels * p.kernel_h * p.kernel_w <= 256, "slabs of ", slab_channels,
              " channels need int16 codes");
  cpu::Weight w = {};
  w.values = static_cast<const float*>(values.const_data_ptr());
  w.codes = codes.const_data_ptr();
  w.segments = static_cast<const int32_t*>(segments.const_data_ptr());
  w.wide_codes = wide;
  w.slab_channels = slab_channels;
  w.first_segment = first_segment, w.last_segment = last_segment;
  const int64_t rows = cpu::slabs(p, w) * p.out_channels;
  SMART_CHECK(segments.numel() == rows * 3 + 1 && w.segments[rows * 3] == values.numel(), "packed weight has ",
              segments.numel(), " segment offsets: ", rows * 3 + 1,
              " are needed, the last equal to the number of values");
  return w;
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
  const cpu::Kernels* kernels = cpu::find_kernels(isa.c_str());
  SMART_CHECK(kernels != nullptr, "this library or machine has no '", isa, "' kernels: see cpu_isas()");
  const cpu::Problem p = read_problem(x, geometry, kernels->width);
  const cpu::Weight w = read_weight(p, values, codes, segments, slab_channels, first_segment, last_segment);
  // Of a path's non-zeros only the share of segments is known here: good enough to choose tiles and threads by.
  const int64_t nonzeros = values.numel() * (last_segment - first_segment) / 3 + 1;
  SMART_CHECK(
      cpu::fits(p.interleaved ? cpu::image_plan(p, w, nonzeros, *kernels) : cpu::pixel_plan(p, w, nonzeros, *kernels),
                slab_channels),
      "input of ", p.height, "x", p.width, " pixels is too large: what ", slab_channels,
      " channels of it give to one tile must be fewer than 2^31 numbers");

  std::vector<int64_t> shape = {x.size(0), p.out_channels, p.out_height, p.out_width};
  if (p.interleaved) shape.push_back(kernels->width);
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
  if (affine) {
    results.second = torch::stable::new_empty(x, shape);
    e.affine = *affine;
    e.affine.y = static_cast<float*>(results.second->mutable_data_ptr());
  }
  if (dense_residual) e.residual = static_cast<const float*>(dense_residual->const_data_ptr());
  if (p.batch > 0) {
    cpu::convolve(*kernels, p, w, nonzeros, e, static_cast<const float*>(dense_x.const_data_ptr()),
                  static_cast<float*>(y.mutable_data_ptr()));
  }
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

// Images that interleaved inputs hold side by side: the vector width of an instruction set.
int64_t cpu_lanes(std::string isa) {
  const cpu::Kernels* kernels = cpu::find_kernels(isa.c_str());
  SMART_CHECK(kernels != nullptr, "this library or machine has no '", isa, "' kernels: see cpu_isas()");
  return kernels->width;
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
  m.def("cpu_isas() -> str");
  m.def("cpu_lanes(str isa=\"\") -> int");
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CPU, m) {
  m.impl("sparse_conv2d_cpu", TORCH_BOX(&smart::sparse_conv2d_cpu));
  m.impl("sparse_conv2d_affine_cpu", TORCH_BOX(&smart::sparse_conv2d_affine_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&smart::cpu_isas));
  m.impl("cpu_lanes", TORCH_BOX(&smart::cpu_lanes));
}
