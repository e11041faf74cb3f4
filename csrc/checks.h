// What the operators check of their arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/problem.h"

namespace smart {

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

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ')';
  return text.str();
}

inline const float* per_channel(const std::optional<Tensor>& tensor, const char* name, int64_t channels) {
  if (!tensor) return nullptr;
  SMART_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->dim() == 1 && tensor->size(0) == channels &&
                  tensor->is_contiguous(),
              name, " has shape ", shape_of(*tensor), ": contiguous float32 (", channels, ",) is needed");
  return static_cast<const float*>(tensor->const_data_ptr());
}

// `g`: K, C/groups, R, S, stride (h, w), padding (top, bottom, left, right), dilation (h, w), groups.
inline cpu::Problem read_problem(int64_t batch, int64_t channels, int64_t height, int64_t width, const int64_t* g) {
  cpu::Problem p = {};
  p.batch = batch, p.in_channels = channels, p.height = height, p.width = width;
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

inline cpu::Weight read_weight(const cpu::Problem& p, const Tensor& values, const Tensor& codes, const Tensor& segments,
                               int64_t slab_channels, int64_t first_segment, int64_t last_segment) {
  SMART_CHECK(slab_channels > 0 && 0 <= first_segment && first_segment <= last_segment && last_segment <= 3,
              "slab_channels must be at least 1, and 0 <= first_segment <= last_segment <= 3");
  const bool wide = codes.scalar_type() == ScalarType::Short, half = values.scalar_type() == ScalarType::BFloat16;
  SMART_CHECK((half || values.scalar_type() == ScalarType::Float) &&
                  (wide || codes.scalar_type() == ScalarType::Byte) && segments.scalar_type() == ScalarType::Int &&
                  values.is_contiguous() && codes.is_contiguous() && segments.is_contiguous() &&
                  codes.numel() == values.numel(),
              "packed weight needs contiguous float32 or bfloat16 values, uint8 or int16 codes of the same length, and "
              "int32 segments");
  SMART_CHECK(wide || slab_channels * p.kernel_h * p.kernel_w <= 256, "slabs of ", slab_channels,
              " channels need int16 codes");
  cpu::Weight w = {};
  w.values = values.const_data_ptr();
  w.codes = codes.const_data_ptr();
  w.segments = static_cast<const int32_t*>(segments.const_data_ptr());
  w.half_values = half, w.wide_codes = wide;
  w.slab_channels = slab_channels;
  w.first_segment = first_segment, w.last_segment = last_segment;
  const int64_t rows = cpu::slabs(p, w) * p.out_channels;
  SMART_CHECK(segments.numel() == rows * 3 + 1 && w.segments[rows * 3] == values.numel(), "packed weight has ",
              segments.numel(), " segment offsets: ", rows * 3 + 1,
              " are needed, the last equal to the number of values");
  return w;
}

}  // namespace smart
