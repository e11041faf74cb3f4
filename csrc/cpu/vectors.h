// Vectors of one instruction set, as compiler types. Part of cpu/kernels.h, which says how it is compiled.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/problem.h"

#define SMART_INLINE inline __attribute__((always_inline))

namespace smart::cpu::SMART_ISA {

constexpr int kWidth = SMART_WIDTH;
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef float LooseVector __attribute__((vector_size(kWidth * sizeof(float)), aligned(sizeof(float)), may_alias));

static inline Vector load(const float* from) { return *reinterpret_cast<const LooseVector*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<LooseVector*>(to) = value; }

// The upper half of a float, and computed with as that float.
struct Bfloat16 {
  uint16_t bits;
  SMART_INLINE operator float() const {
    const uint32_t whole = static_cast<uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &whole, sizeof(value));
    return value;
  }
};

template <int... I>
static inline Vector interleave_low(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * kWidth)...);
}

template <int... I>
static inline Vector interleave_high(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + kWidth / 2 + (I % 2) * kWidth)...);
}

// Every second number of a and then b, from the first on.
template <int... I>
static inline Vector every_second(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}

constexpr auto kLaneNumbers = std::make_integer_sequence<int, kWidth>{};

// Transposes a square of kWidth rows in registers: log2(kWidth) perfect shuffles of its halves.
static inline void transpose(Vector (&rows)[kWidth]) {
  for (int step = 1; step < kWidth; step *= 2) {
    Vector shuffled[kWidth];
    for (int i = 0; i < kWidth / 2; ++i) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + kWidth / 2], kLaneNumbers);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + kWidth / 2], kLaneNumbers);
    }
    for (int i = 0; i < kWidth; ++i) rows[i] = shuffled[i];
  }
}

static inline void fill_zero(float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, Vector{});
  for (; i < count; ++i) to[i] = 0.0f;
}

// Copies exactly `count` floats: whole vectors of kLanes, then the rest with vectors half as long.
template <int kLanes = kWidth>
static inline void copy(float* to, const float* from, int64_t count) {
  typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    *reinterpret_cast<Lanes*>(to + i) = *reinterpret_cast<const Lanes*>(from + i);
  if constexpr (kLanes > 2) {
    if (i < count) copy<kLanes / 2>(to + i, from + i, count - i);
  } else if (i < count) {
    to[i] = from[i];
  }
}

}  // namespace smart::cpu::SMART_ISA
