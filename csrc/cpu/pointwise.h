// What surrounds convolutions, for values in either layout: channels of `pixels` pixels of `lanes` images each, lanes
// being 1 or the vector width. Part of cpu/kernels.h, which says how it is compiled.
#pragma once

#include "cpu/vectors.h"

namespace smart::cpu::SMART_ISA {

// Calls square(pixel, count) for the pixels of a channel, kWidth at a time: the last square overlaps the one before, or
// is cut short.
template <class Square>
static inline void for_squares(int64_t pixels, const Square& square) {
  for (int64_t done = 0; done < pixels; done += kWidth) square(min(done, max(pixels - kWidth, 0)), min(kWidth, pixels));
}

// Channels [first, last) of at most kWidth images: (images, C, pixels) -> (C, pixels, kWidth).
static void interleave(const float* x, int64_t channels, int64_t pixels, int64_t images, float* to, int64_t first,
                       int64_t last) {
  for (int64_t c = first; c < last; ++c) {
    for_squares(pixels, [&](int64_t pixel, int64_t count) {
      const float* from = x + c * pixels + pixel;
      Vector square[kWidth] = {};
      for (int64_t i = 0; i < images; ++i, from += channels * pixels) {
        if (count == kWidth) {
          square[i] = load(from);
        } else {
          for (int64_t j = 0; j < count; ++j) square[i][j] = from[j];
        }
      }
      transpose(square);
      for (int64_t j = 0; j < count; ++j) store(to + (c * pixels + pixel + j) * kWidth, square[j]);
    });
  }
}

// The inverse.
static void separate(const float* x, int64_t channels, int64_t pixels, int64_t images, float* to, int64_t first,
                     int64_t last) {
  for (int64_t c = first; c < last; ++c) {
    for_squares(pixels, [&](int64_t pixel, int64_t count) {
      Vector square[kWidth] = {};
      for (int64_t j = 0; j < count; ++j) square[j] = load(x + (c * pixels + pixel + j) * kWidth);
      transpose(square);
      float* row = to + c * pixels + pixel;
      for (int64_t i = 0; i < images; ++i, row += channels * pixels) {
        if (count == kWidth) {
          store(row, square[i]);
        } else {
          for (int64_t j = 0; j < count; ++j) row[j] = square[i][j];
        }
      }
    });
  }
}

// Both keep NaN, as torch does.
template <class Number>
static inline Number rectified(Number x) {
  return x < 0.0f ? Number{} : x;
}
template <class Number>
static inline Number at_most_six(Number x) {
  return x > 6.0f ? Number{} + 6.0f : x;
}

// y = relu(x * scale + bias), or without relu.
static void affine(const Affine& a, const float* x, int64_t channels, int64_t floats, float* y) {
  for (int64_t c = 0; c < channels; ++c, x += floats, y += floats) {
    const float scale = a.scale[c], bias = a.bias[c];
    for (int64_t i = 0; i < floats; ++i) {
      const float value = x[i] * scale + bias;
      y[i] = a.relu ? rectified(value) : value;
    }
  }
}

// y = relu(x + other), or without relu; without `other` relu(x).
static void add(const float* x, const float* other, bool rectify, int64_t floats, float* y) {
  for (int64_t i = 0; i < floats; ++i) {
    const float value = other ? x[i] + other[i] : x[i];
    y[i] = rectify ? rectified(value) : value;
  }
}

// e^x, within two units of the last place. NaN stays NaN.
static inline Vector exponential(Vector x) {
  typedef int32_t Integers __attribute__((vector_size(kWidth * sizeof(int32_t))));
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a number added to it is rounded to a whole one
  const Vector least = Vector{} - 87.0f, most = Vector{} + 89.0f;
  Vector bounded = x < least ? least : x;
  bounded = bounded > most ? most : bounded;
  const Vector rounded = bounded * 1.44269504f + kRound;
  const Vector n = rounded - kRound;  // e^x = 2^n e^rest
  const Vector rest = bounded - n * 0.693145751953125f - n * 1.42860677e-6f;
  // The polynomial of degree 6 of least relative error for |rest| <= ln(2) / 2: 1.9e-9 before rounding.
  Vector sum = rest * 0.00138368353f + 0.00837482419f;
  for (const float coefficient : {0.0416682251f, 0.166664198f, 0.499999911f, 1.0f, 1.0f})
    sum = sum * rest + coefficient;
  Integers power;
  __builtin_memcpy(&power, &rounded, sizeof(power));
  power = (power - 0x4b400000 + 127) << 23;  // the bits of kRound; of a float's exponent, that of infinity for n = 128
  Vector scale;
  __builtin_memcpy(&scale, &power, sizeof(scale));
  return sum * scale;
}

static inline Vector value_of(Function function, Vector x) {
  const auto relu6 = [](Vector v) { return at_most_six(rectified(v)); };
  switch (function) {
    case Function::kRelu6: return relu6(x);
    case Function::kSilu: return x / (exponential(-x) + 1.0f);
    case Function::kSigmoid: return 1.0f / (exponential(-x) + 1.0f);
    case Function::kHardswish: return x * relu6(x + 3.0f) / 6.0f;
    case Function::kHardsigmoid: return relu6(x + 3.0f) / 6.0f;
  }
  return x;
}

static void activate(Function function, const float* x, int64_t floats, float* y) {
  int64_t i = 0;
  for (; i + kWidth <= floats; i += kWidth) store(y + i, value_of(function, load(x + i)));
  if (i == floats) return;
  Vector rest = {};
  for (int64_t j = i; j < floats; ++j) rest[j - i] = x[j];
  rest = value_of(function, rest);
  for (int64_t j = i; j < floats; ++j) y[j] = rest[j - i];
}

static void multiply(const float* x, const float* other, bool is_gate, int64_t channels, int64_t pixels, int64_t lanes,
                     float* y) {
  if (!is_gate) {
    for (int64_t i = 0; i < channels * pixels * lanes; ++i) y[i] = x[i] * other[i];
    return;
  }
  for (int64_t c = 0; c < channels; ++c, other += lanes) {
    if (lanes == 1) {
      for (int64_t i = 0; i < pixels; ++i) y[i] = x[i] * other[0];
    } else {
      for (int64_t i = 0; i < pixels; ++i) store(y + i * kWidth, load(x + i * kWidth) * load(other));
    }
    x += pixels * lanes, y += pixels * lanes;
  }
}

// Without padding: (C, H, W, lanes) -> (C, P, Q, lanes). A NaN in a window is its maximum, as in torch.
static void max_pool(const Problem& p, int64_t lanes, const float* x, float* y) {
  for (int64_t c = 0; c < p.in_channels; ++c, x += p.height * p.width * lanes)
    for (int64_t i = 0; i < p.out_height; ++i)
      for (int64_t j = 0; j < p.out_width; ++j, y += lanes)
        for (int64_t r = 0; r < p.kernel_h; ++r)
          for (int64_t s = 0; s < p.kernel_w; ++s) {
            const float* from = x + ((i * p.stride_h + r) * p.width + j * p.stride_w + s) * lanes;
            for (int64_t lane = 0; lane < lanes; ++lane)
              if (r + s == 0 || from[lane] > y[lane] || from[lane] != from[lane]) y[lane] = from[lane];
          }
}

typedef float HalfVector __attribute__((vector_size(kWidth / 2 * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef double Doubles __attribute__((vector_size(kWidth / 2 * sizeof(double))));

// The sum of all lanes of two halves of vectors, a lane each, if they are pixels of one image.
static inline double sum_of(Doubles low, Doubles high) {
  const Doubles both = low + high;
  double sum = 0;
  for (int lane = 0; lane < kWidth / 2; ++lane) sum += both[lane];
  return sum;
}

// (C, pixels, lanes) -> (C, lanes), summed in float64.
static void average(const float* x, int64_t channels, int64_t pixels, int64_t lanes, float* y) {
  const int64_t floats = pixels * lanes;
  for (int64_t c = 0; c < channels; ++c, x += floats, y += lanes) {
    Doubles low = {}, high = {};
    int64_t i = 0;
    for (; i + kWidth <= floats; i += kWidth) {
      low += __builtin_convertvector(*reinterpret_cast<const HalfVector*>(x + i), Doubles);
      high += __builtin_convertvector(*reinterpret_cast<const HalfVector*>(x + i + kWidth / 2), Doubles);
    }
    if (lanes == 1) {
      double sum = sum_of(low, high);
      for (; i < floats; ++i) sum += x[i];
      y[0] = static_cast<float>(sum / pixels);
    } else {
      for (int lane = 0; lane < kWidth / 2; ++lane) {
        y[lane] = static_cast<float>(low[lane] / pixels);
        y[kWidth / 2 + lane] = static_cast<float>(high[lane] / pixels);
      }
    }
  }
}

}  // namespace smart::cpu::SMART_ISA
