// Depthwise convolution: each output channel reads one input channel alone, so a panel would be gathered for one
// reader. Taps read the image where it lies instead, and lanes that lie beside it are left out. Part of cpu/kernels.h,
// which says how it is compiled.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/vectors.h"

namespace smart::cpu::SMART_ISA {

typedef int32_t Bits __attribute__((vector_size(kWidth * sizeof(int32_t))));

template <int... I>
constexpr Bits one_bit_each(std::integer_sequence<int, I...>) {
  return Bits{(1 << I)...};
}

// Every kStride-th number from `from` on; a kStride of 0 is any other, which is `stride`.
template <int kStride>
static SMART_INLINE Vector read(const float* from, int64_t stride) {
  if constexpr (kStride == 1) {
    return load(from);
  } else if constexpr (kStride == 2) {
    return every_second(load(from), load(from + kWidth), kLaneNumbers);
  } else {
    Vector numbers;
    for (int lane = 0; lane < kWidth; ++lane) numbers[lane] = from[lane * stride];
    return numbers;
  }
}

// sums[j] += value * what the tap reads for vector j, where that lies inside the image. (Outside lie other numbers,
// perhaps NaN: they may not even be multiplied by zero.)
template <int kStride, int... J>
static SMART_INLINE void add_tap(Vector* sums, float value, const float* x, const int32_t* from, const int32_t* inside,
                                 int64_t stride, std::integer_sequence<int, J...>) {
  constexpr Bits kBits = one_bit_each(kLaneNumbers);
  ((sums[J] = ((Bits{} + inside[J]) & kBits) != 0 ? sums[J] + value * read<kStride>(x + from[J], stride) : sums[J]),
   ...);
}

template <int... J>
static SMART_INLINE void finish_vectors(const Job& job, int64_t k, int64_t channel, const Vector* sums,
                                        const int32_t* to, const int32_t* count, std::integer_sequence<int, J...>) {
  const float scale = job.epilogue.scale ? job.epilogue.scale[k] : 1.0f;
  const float bias = job.epilogue.bias ? job.epilogue.bias[k] : 0.0f;
  const auto finish_one = [&](Vector sum, int64_t at, int32_t numbers) {
    if (numbers == kWidth) {
      store_vector(job, k, at, sum);
    } else if (numbers > 0) {
      alignas(64) float run[kWidth];
      store(run, sum);
      store_results(job, k, at, run, numbers);
    }
  };
  (finish_one(sums[J] * scale + bias, channel + to[J], count[J]), ...);
}

// One output channel: `x` is the channel it reads, its results begin at `channel`.
template <int kTile, int kStride, class Value, class Code>
static void filter(const Job& job, const float* x, int64_t k, int64_t channel) {
  constexpr auto kAll = std::make_integer_sequence<int, kTile>{};
  const Reads& r = job.reads;
  const Weight& w = job.weight;
  // In local variables: what a pointer leads to would be read again after every store.
  const Value* const values = static_cast<const Value*>(w.values);
  const Code* const codes = static_cast<const Code*>(w.codes);
  const int32_t* const row = w.segments + k * 3;
  const int64_t first = row[w.first_segment], last = row[w.last_segment];
  const int64_t stride = job.problem.stride_w, vectors = r.vectors;
  const int32_t *const from = r.from, *const to = r.to, *const count = r.count, *const shifts = r.shifts,
                       *const inside = r.inside;
  for (int64_t v = 0; v < vectors; v += kTile) {
    Vector sums[kTile] = {};
    for (int64_t n = first; n < last; ++n) {
      const int64_t tap = codes[n];
      add_tap<kStride>(sums, values[n], x + shifts[tap], from + v, inside + tap * vectors + v, stride, kAll);
    }
    finish_vectors(job, k, channel, sums, to + v, count + v, kAll);
  }
}

using Filter = void (*)(const Job&, const float*, int64_t, int64_t);

template <class Value, class Code, int kTile = kMostReads>
static Filter filter_for(const Job& job) {
  if (job.reads.tile == kTile) {
    const int64_t stride = job.layout.lanes == 1 ? job.problem.stride_w : 1;
    if (stride == 1) return filter<kTile, 1, Value, Code>;
    return stride == 2 ? filter<kTile, 2, Value, Code> : filter<kTile, 0, Value, Code>;
  }
  if constexpr (kTile > 1) return filter_for<Value, Code, kTile - 1>(job);
  return nullptr;
}

template <class Value>
static Filter filter_for_codes(const Job& job) {
  return job.weight.wide_codes ? filter_for<Value, int16_t>(job) : filter_for<Value, uint8_t>(job);
}

// Output channels [first, last), those of all blocks of images counted.
static void run_depthwise(const Job& job, int64_t first, int64_t last, float* scratch) {
  const Problem& p = job.problem;
  const Reads& r = job.reads;
  const Filter run = job.weight.half_values ? filter_for_codes<Bfloat16>(job) : filter_for_codes<float>(job);
  const int64_t in_floats = p.height * p.width * job.layout.lanes;
  const int64_t out_floats = p.out_height * p.out_width * job.layout.lanes, multiplier = p.out_channels / p.groups;
  for (int64_t n = first; n < last; ++n) {
    const int64_t k = n % p.out_channels;
    const float* x = job.x + (n / p.out_channels * p.in_channels + k / multiplier) * in_floats;
    // Beside a channel lie others. What is read beside the tensor's first and last ones is provided.
    if (x - job.x < r.before || job.x_end - x < r.after) {
      copy(scratch + r.before, x, in_floats);
      x = scratch + r.before;
    }
    run(job, x, k, n * out_floats);
    activate_results(job, n * out_floats, out_floats);
  }
}

}  // namespace smart::cpu::SMART_ISA
