// The body of the direct convolution, over a Device: a GPU in gpu.h, or tests/cpp/emulated_gpu.h.
#pragma once

#include "direct.h"

namespace smart::cuda {

template <class Traits, class Device>
class DirectBody {
 public:
  SMART_DEVICE DirectBody(const Device& device, const Direct& problem, char* shared)
      : device(device), p(problem), panel(shared + Traits::kStagedBytes) {
    const int tiles_of_group = (p.group_outputs + Traits::kChannels - 1) / Traits::kChannels;
    const int tiles = tiles_of_group * p.groups;
    // Neighbouring thread blocks read the same pixels.
    range = locate_tile(p, device.block() / tiles, Traits::kPixels);
    const int tile = device.block() % tiles, warp = device.thread() / 32;
    group = tile / tiles_of_group;
    first_output = tile % tiles_of_group * Traits::kChannels + warp * Traits::kWarpChannels;
    first_segment = p.order ? range.second : p.first_segment;
    last_segment = p.order ? range.second + 2 : p.last_segment;
    staged = reinterpret_cast<Term*>(shared) + warp * kStagedTerms;
  }

  SMART_DEVICE void run() {
    if (range.begin >= range.end) return;  // one tile more was started than there may be, where paths meet
    Sums sums = {};
    const Pixel pixel = locate_pixel(p, range.begin + device.thread() % Traits::kPixels, range.end);
    for (int slab = 0; slab < p.slabs; ++slab) {
      device.sync();  // all are done with the slab before
      fill(slab, pixel);
      device.sync();
      SMART_UNROLL
      for (int i = 0; i < Traits::kWarpChannels; ++i) {
        if (first_output + i < p.group_outputs) walk(sums[i], slab, group * p.group_outputs + first_output + i);
      }
    }
    store(sums);
  }

 private:
  using Pixels = float[Traits::kLanePixels];
  using Sums = Pixels[Traits::kWarpChannels];

  // A tap, and some neighbouring channels of the slab from `channel` on.
  struct Place {
    int tap, tap_row, tap_column, channel;
  };

  // Each thread gathers its pixel's numbers: of all taps and channels of the slab every so manieth.
  SMART_DEVICE void fill(int slab, const Pixel& pixel) {
    const int first = slab * p.slab_channels;
    const int channels = p.group_channels - first < p.slab_channels ? p.group_channels - first : p.slab_channels;
    const int64_t begin = static_cast<int64_t>(pixel.origin) * p.channels + group * p.group_channels + first;
    if (p.quads)
      gather<kQuad>(pixel, begin, channels);
    else
      gather<1>(pixel, begin, channels);
  }

  template <int kNumbers>
  SMART_DEVICE void gather(const Pixel& pixel, int64_t begin, int channels) {
    Place place = {0, 0, 0, device.thread() / Traits::kPixels * kNumbers};
    settle(place, channels);
    while (place.tap < p.taps) {
      int codes[Traits::kBatch];
      Floats<kNumbers> numbers[Traits::kBatch];
      SMART_UNROLL
      for (int i = 0; i < Traits::kBatch; ++i) {
        codes[i] = place.tap < p.taps ? place.channel * p.taps + place.tap : -1;
        numbers[i] = read<kNumbers>(pixel, begin, place);
        place.channel += Traits::kThreads / Traits::kPixels * kNumbers;
        settle(place, channels);
      }
      SMART_UNROLL
      for (int i = 0; i < Traits::kBatch; ++i) write(codes[i], numbers[i]);
    }
  }

  // Channels beyond the last are the first ones of the next tap.
  SMART_DEVICE void settle(Place& place, int channels) const {
    while (place.channel >= channels && place.tap < p.taps) {
      place.channel -= channels;
      ++place.tap;
      if (++place.tap_column == p.kernel_w) place.tap_column = 0, ++place.tap_row;
    }
  }

  template <int kNumbers>
  SMART_DEVICE Floats<kNumbers> read(const Pixel& pixel, int64_t begin, const Place& place) const {
    const int down = place.tap_row * p.dilation_h, right = place.tap_column * p.dilation_w;
    const auto row = static_cast<uint32_t>(pixel.row + down), column = static_cast<uint32_t>(pixel.column + right);
    const bool inside = row < static_cast<uint32_t>(p.height) && column < static_cast<uint32_t>(p.width);
    if (!inside || place.tap >= p.taps) return {};  // padding
    const int64_t index = begin + static_cast<int64_t>(down * p.width + right) * p.channels + place.channel;
    return *reinterpret_cast<const Floats<kNumbers>*>(p.x + index);
  }

  // Codes of neighbouring channels are as far apart as there are taps. Lanes are neighbouring pixels, and hit all
  // banks.
  template <int kNumbers>
  SMART_DEVICE void write(int code, const Floats<kNumbers>& numbers) {
    if (code < 0) return;
    auto* to = reinterpret_cast<float*>(panel) + device.thread() % Traits::kPixels;
    SMART_UNROLL
    for (int i = 0; i < kNumbers; ++i) to[(code + i * p.taps) * Traits::kPixels] = numbers.number[i];
  }

  // Adds the products of an output channel's non-zeros in the slab. Lanes bring one each; then all read each of them.
  SMART_DEVICE void walk(Pixels& sums, int slab, int output) {
    const int32_t* segments = p.segments + (static_cast<int64_t>(slab) * p.out_channels + output) * kSegments;
    const int end = segments[last_segment], lane = device.thread() % 32;
    for (int begin = segments[first_segment]; begin < end; begin += kStagedTerms) {
      const int count = end - begin < kStagedTerms ? end - begin : kStagedTerms;
      device.sync_warp();  // all lanes are done with the terms before
      if (lane < count) staged[lane] = {p.values[begin + lane], p.codes[begin + lane] * Traits::kRowBytes};
      device.sync_warp();
      SMART_UNROLL_TWICE
      for (int i = 0; i + 1 < count; i += 2) {
        const TwoTerms two = *reinterpret_cast<const TwoTerms*>(staged + i);
        multiply(sums, two.term[0]);
        multiply(sums, two.term[1]);
      }
      if (count % 2) multiply(sums, staged[count - 1]);
    }
  }

  SMART_DEVICE void multiply(Pixels& sums, const Term& term) const {
    const auto* row = reinterpret_cast<const Floats<Traits::kLanePixels>*>(panel + term.row);
    const Floats<Traits::kLanePixels> x = row[device.thread() % 32];
    SMART_UNROLL
    for (int i = 0; i < Traits::kLanePixels; ++i) sums[i] += term.value * x.number[i];
  }

  SMART_DEVICE void store(const Sums& sums) const {
    SMART_UNROLL
    for (int i = 0; i < Traits::kLanePixels; ++i) {
      const int place = range.begin + device.thread() % 32 * Traits::kLanePixels + i;
      const int output = locate_pixel(p, place, range.end).output;
      if (output < 0) continue;
      SMART_UNROLL
      for (int j = 0; j < Traits::kWarpChannels; j += Traits::kStoreChannels) {
        Channels y;
        SMART_UNROLL
        for (int k = 0; k < Traits::kStoreChannels; ++k) y.number[k] = sums[j + k][i];
        finish(y, output, first_output + j);
      }
    }
  }

  using Channels = Floats<Traits::kStoreChannels>;

  // Scale, bias, residual, ReLU, and the second result, of some channels of a pixel.
  SMART_DEVICE void finish(Channels y, int output, int channel) const {
    const int left = p.group_outputs - channel;
    const int count = left < Traits::kStoreChannels ? left : Traits::kStoreChannels;
    if (count <= 0) return;
    channel += group * p.group_outputs;
    const int64_t index = static_cast<int64_t>(output) * p.out_channels + channel;
    const int of_path = channel + (range.second ? p.out_channels : 0);
    scale_and_shift(y, p.scale, p.bias, of_path, count);
    if (p.residual) {
      const Channels added = load(p.residual + index, count);
      SMART_UNROLL
      for (int i = 0; i < Traits::kStoreChannels; ++i) y.number[i] += added.number[i];
    }
    if (p.relu) rectify(y);
    save(y, p.y + index, count);
    if (p.second) {
      scale_and_shift(y, p.second_scale, p.second_bias, of_path, count);
      if (p.second_relu) rectify(y);
      save(y, p.second + index, count);
    }
  }

  static SMART_DEVICE void scale_and_shift(Channels& y, const float* scale, const float* bias, int channel, int count) {
    SMART_UNROLL
    for (int i = 0; i < Traits::kStoreChannels; ++i) {
      if (scale && i < count) y.number[i] *= scale[channel + i];
      if (bias && i < count) y.number[i] += bias[channel + i];
    }
  }

  // NaN stays NaN, as in torch.
  static SMART_DEVICE void rectify(Channels& y) {
    SMART_UNROLL
    for (int i = 0; i < Traits::kStoreChannels; ++i) y.number[i] = y.number[i] < 0 ? 0 : y.number[i];
  }

  SMART_DEVICE Channels load(const float* from, int count) const {
    if (p.wide_output) return *reinterpret_cast<const Channels*>(from);
    Channels numbers = {};
    SMART_UNROLL
    for (int i = 0; i < Traits::kStoreChannels; ++i) {
      if (i < count) numbers.number[i] = from[i];
    }
    return numbers;
  }

  SMART_DEVICE void save(const Channels& numbers, float* to, int count) const {
    if (p.wide_output) {
      *reinterpret_cast<Channels*>(to) = numbers;
      return;
    }
    SMART_UNROLL
    for (int i = 0; i < Traits::kStoreChannels; ++i) {
      if (i < count) to[i] = numbers.number[i];
    }
  }

  const Device& device;
  const Direct& p;
  char* const panel;
  Term* staged;
  Range range;
  int group, first_output, first_segment, last_segment;
};

}  // namespace smart::cuda
