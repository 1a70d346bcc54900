// Vectors of float as wide as the instruction set this file is compiled for.
//
// GCC's and Clang's vector extensions, not intrinsics: the same lines become AVX-512, AVX2, SSE2 or NEON.
// A file that includes this one is compiled once per instruction set, with FASTSSL_ISA naming it, and everything in it
// lives in a namespace of that name. It must not include ATen or the standard library's templates: the linker may keep
// one file's copy of an inline function for all files, and so bring AVX-512 to a CPU without it.
#pragma once

#include <cstdint>

#ifndef FASTSSL_ISA
#error "compile this file once per instruction set, with -DFASTSSL_ISA=<name>"
#endif

namespace fastssl::FASTSSL_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
// Aligned as bfloat16 is, of which an element may be a pair.
typedef int32_t UnalignedIntVec __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline IntVec load(const int32_t* p) { return *reinterpret_cast<const UnalignedIntVec*>(p); }
inline void store(int32_t* p, IntVec v) { *reinterpret_cast<UnalignedIntVec*>(p) = v; }
inline Vec broadcast(float x) { return x - Vec{}; }

inline float sum(Vec v) {
  float s[kLanes];
  store(s, v);
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) s[i] += s[i + w];
  return s[0];
}

inline float max(Vec v) {
  float m[kLanes];
  store(m, v);
  for (int i = 1; i < kLanes; ++i) m[0] = m[i] > m[0] ? m[i] : m[0];
  return m[0];
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline float max_of(float a, float b) { return a > b ? a : b; }

// 2^t for t <= 127, with a relative error of 1e-7; 0 below -126 and at -inf; NaN for NaN.
// t = n + f with n the nearest integer: the float 1.5 2^23 + t holds n in its low bits, so one addition rounds,
// and adding those bits, shifted into the exponent's place, multiplies by 2^n. The polynomial is the minimax
// approximation of 2^f on [-1/2, 1/2].
inline Vec exp2(Vec t) {
  const Vec round = broadcast(12582912.f);
  const Vec n = t + round;
  const Vec f = t - (n - round);
  Vec p = broadcast(1.54614447e-4f);
  p = p * f + 1.34004282e-3f;
  p = p * f + 9.61805668e-3f;
  p = p * f + 5.55032723e-2f;
  p = p * f + 2.40226509e-1f;
  p = p * f + 6.93147207e-1f;
  p = p * f + 1.f;
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));  // unsigned: far below -126 the sum wraps
  const Vec scaled = reinterpret_cast<Vec>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(n) << 23));
  return t < -126.f ? Vec{} : scaled;
}

// out[c][r] = in[r][c] for 32-bit elements; rows and columns are multiples of kLanes.
// A square of kLanes x kLanes goes through registers: log2(kLanes) rounds, each of which swaps the halves that
// lie `w` apart between rows `w` apart.
template <int w>
inline void swap_halves(IntVec (&v)[kLanes]) {
  if constexpr (w > 0) {
    IntVec low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = (i & w) ? i - w + kLanes : i;
      high[i] = (i & w) ? i + kLanes : i + w;
    }
    for (int i = 0; i < kLanes; ++i) {
      if (i & w) continue;
      const IntVec a = v[i], b = v[i + w];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + w] = __builtin_shuffle(a, b, high);
    }
    swap_halves<w / 2>(v);
  }
}

inline void transpose(const int32_t* in, int64_t ld_in, int64_t rows, int64_t columns, int32_t* out, int64_t ld_out) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      IntVec v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = load(in + (r + i) * ld_in + c);
      swap_halves<kLanes / 2>(v);
      for (int i = 0; i < kLanes; ++i) store(out + (c + i) * ld_out + r, v[i]);
    }
}

}  // namespace fastssl::FASTSSL_ISA
