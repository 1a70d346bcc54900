// What the correlation losses do inside one panel of columns, or one tile: a table of plain functions, one per
// instruction set. A panel is (rows, width) floats, width a multiple of 32.
#pragma once

#include <cstdint>

#include "common/table.h"
#include "product_tiles.h"

namespace fastssl {

// How one column of a gradient comes of what is known of it; see `finish`.
struct ColumnTerms {
  const float* own;       // times a
  const float* other;     // times b
  const float* constant;  // added to dz
  const float* rstd;      // dz = rstd (dA - ...)
};

// Of two columns: sum_n a b, the same with both rounded to bfloat16, or sum_n (a - b)^2.
enum class Comparison { Products, RoundedProducts, SquaredDistances };

struct CorrelationTiles {
  // panel = z - mean, times 1 / sqrt(variance + eps) if `divide`, of `count` columns of all rows, from `first` on; zero
  // in padding. Variances are sums of squares over `divisor`. mean, variance and rstd: of each of the padded columns.
  // `scratch`: width floats.
  void (*standardise)(const Rows& z, int64_t rows, int64_t padded_rows, int64_t first, int64_t count, int64_t width,
                      bool divide, double eps, double divisor, float* panel, float* mean, float* variance, float* rstd,
                      float* scratch);

  // Each column of a with that of b.
  void (*compare)(const float* a, const float* b, int64_t rows, int64_t width, Comparison comparison, float* sums);

  // With dA = alpha (P + row_weight_n a) + own a + other b in each column, row_weight null being 0,
  //     dz = factor (rstd (dA - mean(dA) - a sum(dA a) / divisor) + constant)
  // of `count` columns into `out`, whose rows lie `stride` elements apart; the projection only if `divisor` is not 0.
  // P is overwritten. `scratch`: 2 width floats.
  void (*finish)(float* P, const float* a, const float* b, const float* row_weight, int64_t rows, int64_t width,
                 int64_t count, float alpha, const ColumnTerms& terms, double divisor, float factor, float* scratch,
                 Element element, int64_t stride, void* out);

  // sum_i x_i y_i.
  double (*inner)(const float* x, const float* y, int64_t count);

  // A tile as the products that follow want it, rounded to bfloat16 into half (rows, columns) and pairs (rows / 2,
  // columns, 2).
  void (*round_tile)(const float* C, int64_t rows, int64_t columns, void* half, void* pairs);
};

FASTSSL_TABLE(CorrelationTiles, correlation_tiles)

}  // namespace fastssl
