// What the correlation losses do within one panel of columns, or one tile: a table of plain functions, one per
// instruction set. A panel is (rows, width) floats, width a multiple of 32.
#pragma once

#include <cstdint>

#include "common/table.h"
#include "common/product_tiles.h"

namespace fastssl {

constexpr int64_t kScratchRows = 64;  // `scratch` below has kScratchRows width floats

// Columns [first, first + count) of a tensor's rows, for a panel of width >= count.
struct Columns {
  const Rows& z;
  int64_t first, count, width;
};

// The factors, one for each column, with which `finish` forms a gradient.
struct ColumnTerms {
  const float* own;    // times a
  const float* other;  // times b
  const float* rstd;   // dz = rstd (dA - ...)
};

struct CorrelationTiles {
  // panel = z - mean for all rows, times rstd = 1 / sqrt(variance + eps) if `divide` (otherwise rstd = 1); zero in
  // padding. A variance is a sum of squares over `divisor`. variance and rstd have an element for each padded column.
  void (*standardise)(const Columns& z, int64_t rows, int64_t padded_rows, bool divide, double eps, double divisor,
                      float* panel, float* variance, float* rstd, float* scratch);

  // sums[c] = sum_n a_nc b_nc of two panels, or of both rounded to bfloat16.
  void (*multiply_columns)(const float* a, const float* b, int64_t rows, int64_t width, bool rounded, float* sums);

  // sums[c] = sum_n (x_nc - y_nc)^2.
  void (*distances)(const Columns& x, const Columns& y, int64_t rows, float* sums, float* scratch);

  // With dA = alpha (P + row_weight_n a) + own a + other b in each column, where a null row_weight stands for 0, writes
  //     dz = factor (rstd (dA - mean(dA) - a sum(dA a) / divisor) + pull (x - y))
  // into `out`, whose rows lie `stride` elements apart. The term with sum(dA a) is left out if `divisor` is 0. P is
  // overwritten.
  void (*finish)(float* P, const float* a, const float* b, const float* row_weight, int64_t rows, float alpha,
                 const ColumnTerms& terms, double divisor, float pull, const Columns& x, const Columns& y, float factor,
                 float* scratch, Element element, int64_t stride, void* out);

  // sum_i x_i y_i.
  double (*inner)(const float* x, const float* y, int64_t count);
};

FASTSSL_TABLE(CorrelationTiles, correlation_tiles)

}  // namespace fastssl
