// What follows the sums of a convolution: scale, bias, residual, ReLU, and a second result, eight channels at a time.
#pragma once

#include "portable.h"

namespace smart::cuda {

constexpr int kStoreChannels = 8;  // 16 bytes of 16-bit floats

template <class Element>
struct Epilogue {
  using Channels = float[kStoreChannels];

  // Stores eight channels of an output pixel, which begin at `index`; those of them that there are. `channel` is the
  // first, plus K on the second path where samples have their own. Problem: whatever struct has these names, as
  // TwoFour.
  template <class Problem>
  static SMART_DEVICE void store(const Problem& p, Channels& y, int64_t index, int channel) {
    const Part part = locate_part(p.out_channels, channel);
    scale_and_shift(y, p.scale, p.bias, part);
    if (p.residual) add(y, p.residual + index, part);
    if (p.relu) rectify(y);
    write(y, p.y + index, part);
    if (p.second) {
      scale_and_shift(y, p.second_scale, p.second_bias, part);
      if (p.second_relu) rectify(y);
      write(y, p.second + index, part);
    }
  }

 private:
  struct Part {
    int channel, count;
    bool aligned;  // to 16 bytes, in every pixel
  };

  static SMART_DEVICE Part locate_part(int out_channels, int channel) {
    if (out_channels % kStoreChannels == 0) return {channel, kStoreChannels, true};
    const int left = (channel < out_channels ? out_channels : 2 * out_channels) - channel;
    return {channel, left < kStoreChannels ? left : kStoreChannels, false};
  }

  static SMART_DEVICE void scale_and_shift(Channels& y, const float* scale, const float* bias, const Part& part) {
    SMART_UNROLL
    for (int j = 0; j < kStoreChannels; ++j) {
      if (j >= part.count) continue;
      if (scale) y[j] *= scale[part.channel + j];
      if (bias) y[j] += bias[part.channel + j];
    }
  }

  static SMART_DEVICE void add(Channels& y, const uint16_t* residual, const Part& part) {
    if (!part.aligned) {
      SMART_UNROLL
      for (int j = 0; j < kStoreChannels; ++j) {
        if (j < part.count) y[j] += Element::widen(residual[j]);
      }
      return;
    }
    const Words words = *reinterpret_cast<const Words*>(residual);
    SMART_UNROLL
    for (int j = 0; j < kStoreChannels; ++j) {
      y[j] += Element::widen(static_cast<uint16_t>(words.word[j / 2] >> j % 2 * 16));
    }
  }

  // NaN stays NaN, as in torch.
  static SMART_DEVICE void rectify(Channels& y) {
    SMART_UNROLL
    for (int j = 0; j < kStoreChannels; ++j) y[j] = y[j] < 0 ? 0 : y[j];
  }

  static SMART_DEVICE void write(const Channels& y, uint16_t* at, const Part& part) {
    if (!part.aligned) {
      SMART_UNROLL
      for (int j = 0; j < kStoreChannels; ++j) {
        if (j < part.count) at[j] = Element::narrow(y[j]);
      }
      return;
    }
    Words words;
    SMART_UNROLL
    for (int j = 0; j < 4; ++j) {
      words.word[j] = Element::narrow(y[2 * j]) | static_cast<uint32_t>(Element::narrow(y[2 * j + 1])) << 16;
    }
    *reinterpret_cast<Words*>(at) = words;
  }
};

}  // namespace smart::cuda
