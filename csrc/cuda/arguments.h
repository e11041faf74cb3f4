// What the CUDA operators check of their arguments, and read of them, whatever kernel they are for.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <vector>

#include "checks.h"

namespace smart::cuda {

using torch::headeronly::MemoryFormat;

inline void check_kind(const Tensor& tensor, const char* name, const Tensor& x, ScalarType type, int64_t numel) {
  SMART_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == numel && tensor.is_cuda() &&
                  tensor.get_device_index() == x.get_device_index(),
              name, " has shape ", shape_of(tensor), ": ", numel,
              " contiguous numbers, of the type that packing gives them and on the input's device, are needed");
}

inline int narrowed(int64_t number, const char* what) {
  SMART_CHECK(number >= 0 && number <= std::numeric_limits<int>::max() - (1 << 16), what, " are ", number,
              ": too many for 32-bit indices, split the batch");
  return static_cast<int>(number);
}

// What pixels.h needs of a problem, and the channels.
template <class Problem>
void read_pixels(const cpu::Problem& c, Problem* p) {
  p->batch = narrowed(c.batch, "samples"), p->channels = narrowed(c.in_channels, "channels");
  p->height = narrowed(c.height, "rows"), p->width = narrowed(c.width, "columns");
  p->out_channels = narrowed(c.out_channels, "channels");
  p->out_height = narrowed(c.out_height, "rows"), p->out_width = narrowed(c.out_width, "columns");
  p->pixels = narrowed(c.batch * c.out_height * c.out_width, "output pixels");
  // Padding and what a kernel reaches beyond the last pixel count too.
  narrowed((c.batch * c.height + 2048 + c.kernel_h * c.dilation_h) * (c.width + 2048), "input pixels");
  p->kernel_w = narrowed(c.kernel_w, "taps");
  p->stride_h = static_cast<int>(c.stride_h), p->stride_w = static_cast<int>(c.stride_w);
  p->pad_top = static_cast<int>(c.pad_top), p->pad_left = static_cast<int>(c.pad_left);
  p->dilation_h = static_cast<int>(c.dilation_h), p->dilation_w = static_cast<int>(c.dilation_w);
}

// (K,), or (2, K) where samples have their own paths.
inline const float* read_channels(const std::optional<Tensor>& tensor, const char* name, int64_t out_channels,
                                  bool of_both_paths, const Tensor& x) {
  if (!tensor) return nullptr;
  check_kind(*tensor, name, x, ScalarType::Float, out_channels * (of_both_paths ? 2 : 1));
  return static_cast<const float*>(tensor->const_data_ptr());
}

inline const int32_t* read_indices(const std::optional<Tensor>& tensor, const char* name, const Tensor& x,
                                   int64_t numel) {
  if (!tensor) return nullptr;
  check_kind(*tensor, name, x, ScalarType::Int, numel);
  return static_cast<const int32_t*>(tensor->const_data_ptr());
}

// A result of this shape beside x, in channels_last.
inline Tensor empty_result(const std::vector<int64_t>& shape, const Tensor& x) {
  return torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

inline Tensor channels_last(const Tensor& x) { return torch::stable::contiguous(x, MemoryFormat::ChannelsLast); }

// The residual in channels_last, if there is one and it is like the output.
inline std::optional<Tensor> read_residual(const std::optional<Tensor>& residual, const Tensor& y) {
  if (!residual) return std::nullopt;
  bool as_output = residual->scalar_type() == y.scalar_type() && residual->dim() == 4 && residual->is_cuda() &&
                   residual->get_device_index() == y.get_device_index();
  for (int64_t i = 0; as_output && i < 4; ++i) as_output = residual->size(i) == y.size(i);
  SMART_CHECK(as_output, "residual has shape ", shape_of(*residual), ": ", shape_of(y),
              " of the input's type and device is needed, the shape of the output");
  return channels_last(*residual);
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace smart::cuda
