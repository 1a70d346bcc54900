// Writing a tile of weights in the layouts that the products after it read: in place, or rounded to bfloat16.
#pragma once

#include "common/convert.h"
#include "common/simd.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace fastssl::FASTSSL_ISA {

// Stores 2 kLanes numbers as bfloat16.
inline void store_bfloat16(Vec low, Vec high, uint16_t* out) {
#ifdef __AVX512BF16__
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  for (int i = 0; i < kLanes; ++i) {
    out[i] = float_to_bfloat16(low[i]);
    out[kLanes + i] = float_to_bfloat16(high[i]);
  }
#endif
}

// Stores kLanes numbers as bfloat16, and loads them again.
inline void store_bfloat16(Vec v, uint16_t* out) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < kLanes; ++i) out[i] = float_to_bfloat16(v[i]);
#endif
}

inline Vec load_bfloat16(const uint16_t* x) {
  typedef uint16_t Narrow __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  typedef uint32_t Wide __attribute__((vector_size(kLanes * 4)));
  return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const Narrow*>(x), Wide) << 16);
}

// The weights of rows r and r + 1 as bfloat16, in both layouts.
inline void store_pair(Vec w0, Vec w1, uint16_t* half, int64_t ld, uint16_t* pairs) {
#ifdef __AVX512BF16__
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)w1, (__m512)w0);  // 16 of w0, then 16 of w1
  _mm512_mask_storeu_epi64(half, 0x0f, both);
  _mm512_mask_storeu_epi64(half + ld - 16, 0xf0, both);
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(interleave, both));
#else
  for (int i = 0; i < kLanes; ++i) {
    pairs[2 * i] = half[i] = float_to_bfloat16(w0[i]);
    pairs[2 * i + 1] = half[ld + i] = float_to_bfloat16(w1[i]);
  }
#endif
}

// Stores the weights of a tile, two rows at a time: into S or, where `half` is given, as bfloat16 in both layouts.
// weight(r, j) gives kLanes weights of row r from column j on; it is called for both rows before either is stored.
template <typename Weight>
inline void each_weight(float* S, int64_t ld, int64_t rows, int64_t columns, uint16_t* half, uint16_t* pairs,
                        const Weight& weight) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Vec w0 = weight(r, j), w1 = weight(r + 1, j);
      if (half) {
        store_pair(w0, w1, half + r * columns + j, columns, pairs + r * columns + 2 * j);
      } else {
        store(S + r * ld + j, w0);
        store(S + (r + 1) * ld + j, w1);
      }
    }
  }
}

}  // namespace fastssl::FASTSSL_ISA
