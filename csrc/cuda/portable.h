// What lets kernel bodies compile with g++ too: tests run them there on an emulated GPU, see tests/cpp/emulated_gpu.h.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define SMART_DEVICE __device__ __forceinline__
#define SMART_HOST_DEVICE __host__ __device__ __forceinline__
#define SMART_UNROLL _Pragma("unroll")
#define SMART_UNROLL_TWICE _Pragma("unroll 2")
#else
#define SMART_DEVICE inline
#define SMART_HOST_DEVICE inline
#define SMART_UNROLL
#define SMART_UNROLL_TWICE
#endif

namespace smart::cuda {

// What a thread loads or stores at once.
struct alignas(16) Words {
  uint32_t word[4];
};

// Floats that lie together.
template <int kNumbers>
struct alignas(4 * kNumbers) Floats {
  float number[kNumbers];
};

SMART_DEVICE uint32_t count_bits(uint32_t word) {
#ifdef __CUDACC__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

SMART_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SMART_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// 16-bit floats are kept as their bits; these say what they mean. Rounding is to nearest, ties to even.
struct Brain {
  static SMART_DEVICE float widen(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

  static SMART_DEVICE uint16_t narrow(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN: rounding could carry into infinity
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
};

struct Half {
#ifdef __CUDACC__
  static SMART_DEVICE float widen(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static SMART_DEVICE uint16_t narrow(float value) { return __half_as_ushort(__float2half_rn(value)); }
#else
  static float widen(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // Shifted into place, the exponent is too small by 127 - 15; the product also makes subnormal numbers right.
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
  }

  static uint16_t narrow(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
    if (rest < 0x38800000u) {
      // Subnormal: adding 1/2 leaves units of 2^-24 in the lowest bits, rounded by the addition itself.
      return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((rest + 0xfffu + (rest >> 13 & 1) - 0x38000000u) >> 13));
  }
#endif
};

}  // namespace smart::cuda
