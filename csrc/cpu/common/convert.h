// Conversion between float32 and the 16-bit formats in integer arithmetic: it needs no half type of the compiler and no
// instruction that a CPU may lack.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace fastssl::FASTSSL_ISA {

inline uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float bfloat16_to_float(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

// Rounds to nearest, ties to even; a NaN stays NaN.
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t u = bits(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

// A half's exponent and mantissa, read as a float's, give its value times 2^-112, subnormals included.
inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  const uint32_t scaled = bits(from_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;  // Inf and NaN keep the largest exponent
  return from_bits(scaled | special | static_cast<uint32_t>(h & 0x8000) << 16);
}

inline uint16_t float_to_half(float x) {
  const uint32_t u = bits(x), magnitude = u & 0x7fffffff;
  const uint32_t scaled = bits(from_bits(magnitude) * 0x1p-112f);
  uint32_t rounded = (scaled + 0xfff + ((scaled >> 13) & 1)) >> 13;
  if (magnitude >= 0x477ff000) rounded = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;  // 65520 and above, NaN
  return static_cast<uint16_t>(rounded | (u >> 16 & 0x8000));
}

}  // namespace fastssl::FASTSSL_ISA
