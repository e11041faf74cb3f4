// Winograd's F(4, 3) along one axis: inputs and weights to the values of polynomials at six points, and products back
// to outputs. Part of cpu/winograd.h.
#pragma once

#include "cpu/vectors.h"

namespace smart::cpu::SMART_ISA {

constexpr int kPatch = 6, kPoints = kPatch * kPatch;

// The points of interpolation are 0, a, -a, b, -b and infinity. With these the errors are a third of those with 1 and
// 2, and all that inputs and products are multiplied by is exact.
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB, kAB2 = kA2 * kB2;

template <class Number>
SMART_INLINE void transform_input(const Number (&d)[kPatch], Number (&to)[kPatch]) {
  const Number even_a = d[4] - kB2 * d[2], odd_a = d[3] - kB2 * d[1];
  const Number even_b = d[4] - kA2 * d[2], odd_b = d[3] - kA2 * d[1];
  to[0] = kAB2 * d[0] - (kA2 + kB2) * d[2] + d[4];
  to[1] = even_a + kA * odd_a;
  to[2] = even_a - kA * odd_a;
  to[3] = even_b + kB * odd_b;
  to[4] = even_b - kB * odd_b;
  to[5] = kAB2 * d[1] - (kA2 + kB2) * d[3] + d[5];
}

template <class Number>
SMART_INLINE void transform_weight(const Number (&g)[3], Number (&to)[kPatch]) {
  constexpr float kOfA = 1.0f / (2 * kA2 * (kA2 - kB2)), kOfB = 1.0f / (2 * kB2 * (kB2 - kA2));
  const Number even_a = (g[0] + kA2 * g[2]) * kOfA, even_b = (g[0] + kB2 * g[2]) * kOfB;
  to[0] = g[0] * (1.0f / kAB2);
  to[1] = even_a + g[1] * (kA * kOfA);
  to[2] = even_a - g[1] * (kA * kOfA);
  to[3] = even_b + g[1] * (kB * kOfB);
  to[4] = even_b - g[1] * (kB * kOfB);
  to[5] = g[2];
}

template <class Number>
SMART_INLINE void transform_output(const Number (&m)[kPatch], Number (&to)[4]) {
  const Number even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  to[0] = m[0] + even_a + even_b;
  to[1] = kA * odd_a + kB * odd_b;
  to[2] = kA2 * even_a + kB2 * even_b;
  to[3] = kA * kA2 * odd_a + kB * kB2 * odd_b + m[5];
}

}  // namespace smart::cpu::SMART_ISA
