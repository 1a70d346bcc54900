// Sums of tokens: a table of plain functions, one per instruction set.
#pragma once

#include <cstdint>

#include "common/table.h"
#include "common/product_tiles.h"

namespace fastssl {

struct MaskingTiles {
  // out = x + y, of `dim` elements each.
  void (*add)(const void* x, const void* y, Element element, int64_t dim, void* out);

  // sums += rows[0] + ... + rows[count - 1], each of `dim` elements.
  void (*accumulate)(const void* const* rows, int64_t count, Element element, int64_t dim, float* sums);

  // out = sums, rounded.
  void (*round)(const float* sums, Element element, int64_t dim, void* out);
};

FASTSSL_TABLE(MaskingTiles, masking_tiles)

}  // namespace fastssl
