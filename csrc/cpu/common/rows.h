// Loads and stores of rows of any element type, to and from float32.
#pragma once

#include "common/convert.h"
#include "common/product_tiles.h"
#include "common/simd.h"

namespace fastssl::FASTSSL_ISA {

// Writes x as float32, times `factor`, into `out`, and zeros up to the padded length.
inline void load_row(const void* x, Element element, int64_t dim, float factor, float* out) {
  if (element == Element::Float32) {
    for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<const float*>(x)[d] * factor;
  } else if (element == Element::BFloat16) {
    for (int64_t d = 0; d < dim; ++d) out[d] = bfloat16_to_float(static_cast<const uint16_t*>(x)[d]) * factor;
  } else {
    for (int64_t d = 0; d < dim; ++d) out[d] = half_to_float(static_cast<const uint16_t*>(x)[d]) * factor;
  }
  for (int64_t d = dim; d % 32; ++d) out[d] = 0;
}

// The same, or x itself where that already is the result.
inline const float* row_of(const void* x, Element element, int64_t dim, float factor, float* spare) {
  if (element == Element::Float32 && dim % 32 == 0 && factor == 1) return static_cast<const float*>(x);
  load_row(x, element, dim, factor, spare);
  return spare;
}

inline void store_row(const float* x, Element element, int64_t dim, float factor, void* out) {
  if (element == Element::Float32) {
    float* const to = static_cast<float*>(out);  // may be x: a compiler that fears worse would go number by number
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(to + d, load(x + d) * factor);
    for (; d < dim; ++d) to[d] = x[d] * factor;
  } else if (element == Element::BFloat16) {
    for (int64_t d = 0; d < dim; ++d) static_cast<uint16_t*>(out)[d] = float_to_bfloat16(x[d] * factor);
  } else {
    for (int64_t d = 0; d < dim; ++d) static_cast<uint16_t*>(out)[d] = float_to_half(x[d] * factor);
  }
}

}  // namespace fastssl::FASTSSL_ISA
