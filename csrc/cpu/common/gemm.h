// C (M x N) = [C +] A (M x K) B (K x N), row-major float32, N a multiple of 16: the product where oneDNN's
// micro-kernels are not used. A strip of kStrip columns of B stays in the first-level cache while every row of
// A meets it; kRows x kStrip sums live in registers, so that each step of k costs kStrip / kLanes loads of B,
// kRows broadcasts of A and kRows kStrip / kLanes multiply-adds.
#pragma once

#include "common/simd.h"

namespace fastssl::FASTSSL_ISA {

constexpr int kVectors = kLanes == 16 ? 4 : 2;       // vectors of B per step
constexpr int kStrip = kVectors * kLanes;            // columns: 64, 16 or 8
constexpr int kRows = kLanes == 16 ? 6 : kLanes == 8 ? 6 : 4;

template <int rows, int vectors>
inline void gemm_registers(
    int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* A, const float* B, float* C) {
  Vec sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = add ? load(C + r * ldc + v * kLanes) : Vec{};
  for (int64_t k = 0; k < K; ++k) {
    Vec b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) b[v] = load(B + k * ldb + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec a = broadcast(A[r * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += a * b[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(C + r * ldc + v * kLanes, sum[r][v]);
}

template <int vectors>
inline void gemm_strip(int64_t M, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* A,
                       const float* B, float* C) {
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows) gemm_registers<kRows, vectors>(K, lda, ldb, ldc, add, A + m * lda, B, C + m * ldc);
  for (; m < M; ++m) gemm_registers<1, vectors>(K, lda, ldb, ldc, add, A + m * lda, B, C + m * ldc);
}

inline void gemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* A,
                 const float* B, float* C) {
  int64_t n = 0;
  for (; n + kStrip <= N; n += kStrip) gemm_strip<kVectors>(M, K, lda, ldb, ldc, add, A, B + n, C + n);
  for (; n < N; n += kLanes) gemm_strip<1>(M, K, lda, ldb, ldc, add, A, B + n, C + n);
}

}  // namespace fastssl::FASTSSL_ISA
