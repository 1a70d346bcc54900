// A row with rows from anywhere: a table of plain functions, one per instruction set.
#pragma once

#include <cstdint>

#include "common/product_tiles.h"
#include "common/table.h"

namespace fastssl {

// Rows have `dim` elements, which need not be a multiple of anything. Those of floats that end in `padded` have room
// for a multiple of 32, where zeros stand behind them. `spare`: room for one padded row.
struct SelectedTiles {
  // padded = x as float32.
  void (*widen)(const void* x, Element element, int64_t dim, float* padded);

  // dots[j] = <x_padded, rows[j]>, j < count.
  void (*dots)(const float* x_padded, const void* const* rows, int64_t count, Element element, int64_t dim,
               float* spare, float* dots);

  // sum_padded += sum_j weights[j] rows[j], j < count.
  void (*add)(const float* weights, const void* const* rows, int64_t count, Element element, int64_t dim, float* spare,
              float* sum_padded);

  // values = exp(scale (values - origin)), and their sum, over `count`; room for a multiple of 32.
  double (*exponentials)(float* values, int64_t count, float scale, float origin);

  // The norm of x, of which squares may overflow.
  float (*norm)(const void* x, Element element, int64_t dim, float* spare);

  // out = factor (sum_padded - along x), without x where that is null.
  void (*project)(const float* sum_padded, const void* x, Element element, int64_t dim, float along, float factor,
                  float* spare, void* out);
};

FASTSSL_TABLE(SelectedTiles, selected_tiles)

}  // namespace fastssl
