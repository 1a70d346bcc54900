// Drawing from a tile of a linear layer's logits: a table of plain functions, one per instruction set.
#pragma once

#include <cstdint>

#include "common/logits_tiles.h"

namespace fastssl {

// A tile's place among all logits, which the random numbers follow from.
struct DrawPlace {
  uint64_t seed;
  int64_t row, column, columns;  // of the tile's first logit; of all logits
};

struct CategoricalTiles {
  // Where v = scale (L_kr + bias_k) + Gumbel noise is more than best_r, or NaN, it becomes best_r, and its column id_r.
  // `bias` may be null.
  void (*draw)(const float* L, const LogitShape& shape, const float* bias, float scale, const DrawPlace& place,
               float* best, int32_t* id);
};

FASTSSL_TABLE(CategoricalTiles, categorical_tiles)

}  // namespace fastssl
