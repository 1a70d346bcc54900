// Matrix products on the CPU: their precision, and the code that computes them.
//
// Products run in oneDNN's micro-kernels (AMX, AVX-512) through ATen, or else in common/gemm.h. For bfloat16 products
// operands and weights are each rounded once; "tf32" and "float16" multiply in float32.
#pragma once

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <string_view>

#include "common/isa.h"
#include "common/product_tiles.h"

namespace fastssl {

constexpr int64_t kPadding = 32;  // rows and features are padded to multiples of this, as AMX and transposes need

// How a call multiplies: with which instruction set's functions, with or without oneDNN, in what precision.
struct Engine {
  const ProductTiles& tile;
  bool onednn;
  Operand operand;

  explicit Engine(std::string_view precision)
      : tile(FASTSSL_TABLE_IN_USE(product_tiles)),
        onednn(current() >= Isa::Avx512 && at::globalContext().userEnabledMkldnn()) {
    const bool bfloat16 = precision == "bfloat16";
    const bool pairs = onednn && current() >= Isa::Avx512Bf16;
    operand = !bfloat16 ? Operand::Float32 : pairs ? Operand::BFloat16 : Operand::RoundedToBFloat16;
  }

  bool half() const { return operand == Operand::BFloat16; }
  int64_t bytes() const { return half() ? 2 : 4; }

  // C (M x N) = [C +] A (M x K) B (K x N); leading dimensions are K, N, N.
  void multiply(int64_t M, int64_t N, int64_t K, bool add, const void* A, const void* B, float* C) const {
    if (half()) {
      at::native::cpublas::brgemm(M, N, K, K, N, N, add, static_cast<const at::BFloat16*>(A),
                                  static_cast<const at::BFloat16*>(B), C);
    } else if (onednn) {
      at::native::cpublas::brgemm(M, N, K, K, N, N, add, static_cast<const float*>(A), static_cast<const float*>(B), C);
    } else {
      tile.gemm(M, N, K, K, N, N, add, static_cast<const float*>(A), static_cast<const float*>(B), C);
    }
  }

  // The same where B lies in strips, as `Packed` has it: its rows are then not so far apart that they fall on
  // each other in the first-level cache.
  void multiply_strips(int64_t M, int64_t N, int64_t K, bool add, const void* A, const void* B, float* C) const {
    const int64_t strip_wide = strip_columns(half());
    for (int64_t n = 0; n < N; n += strip_wide) {
      const int64_t wide = std::min(strip_wide, N - n);
      const void* const strip = static_cast<const char*>(B) + n * K * bytes();
      if (half()) {
        at::native::cpublas::brgemm(M, wide, K, K, wide, N, add, static_cast<const at::BFloat16*>(A),
                                    static_cast<const at::BFloat16*>(strip), C + n);
      } else if (onednn) {
        at::native::cpublas::brgemm(M, wide, K, K, wide, N, add, static_cast<const float*>(A),
                                    static_cast<const float*>(strip), C + n);
      } else {
        tile.gemm(M, wide, K, K, wide, N, add, static_cast<const float*>(A), static_cast<const float*>(strip), C + n);
      }
    }
  }

  // Every thread that has multiplied must call this when it is done: AMX's tile registers are state of the thread.
  void release() const {
    if (onednn) at::native::cpublas::brgemm_release(half());
  }
};

}  // namespace fastssl
