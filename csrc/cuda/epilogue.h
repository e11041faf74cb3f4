// What follows the sums of a convolution: scale, bias, residual, ReLU, and a second result, eight channels at a time.
#pragma once

#include "portable.h"

namespace smart::cuda {

constexpr int kStoreChannels = 8;  // 16 bytes of 16-bit floats

template <class Element>
struct Epilogue {
  using Channels = float[kStoreChannels];

  // Stores eight channels of an output pixel, which begin at `index`. `channel` is the first of them, plus K on the
  // second path where samples have their own. Problem: whatever struct has these names, as TwoFour.
  template <class Problem>
  static SMART_DEVICE void store(const Problem& p, Channels& y, int64_t index, int channel) {
    scale_and_shift(y, p.scale, p.bias, channel);
    if (p.residual) add(y, p.residual + index);
    if (p.relu) rectify(y);
    write(y, p.y + index);
    if (p.second) {
      scale_and_shift(y, p.second_scale, p.second_bias, channel);
      if (p.second_relu) rectify(y);
      write(y, p.second + index);
    }
  }

 private:
  static SMART_DEVICE void scale_and_shift(Channels& y, const float* scale, const float* bias, int channel) {
    SMART_UNROLL
    for (int j = 0; j < kStoreChannels; ++j) {
      if (scale) y[j] *= scale[channel + j];
      if (bias) y[j] += bias[channel + j];
    }
  }

  static SMART_DEVICE void add(Channels& y, const uint16_t* residual) {
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

  static SMART_DEVICE void write(const Channels& y, uint16_t* at) {
    Words words;
    SMART_UNROLL
    for (int j = 0; j < 4; ++j) {
      words.word[j] = Element::narrow(y[2 * j]) | static_cast<uint32_t>(Element::narrow(y[2 * j + 1])) << 16;
    }
    *reinterpret_cast<Words*>(at) = words;
  }
};

}  // namespace smart::cuda
