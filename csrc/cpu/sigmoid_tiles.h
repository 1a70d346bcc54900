// What the sigmoid loss does within one tile: a table of plain functions, one per instruction set.
#pragma once

#include <cstdint>

#include "common/product_tiles.h"
#include "common/table.h"

namespace fastssl {

struct SigmoidTiles {
  // Returns sum_ij softplus(scale S_ij + bias).
  double (*softplus)(const float* S, int64_t ld, int64_t rows, int64_t columns, float scale, float bias);

  // The same; W_ij = sigmoid(scale S_ij + bias) overwrites S or, where `half` is given, goes as bfloat16 into
  // half (rows, columns) and pairs (rows / 2, columns, 2), and its sum is added to *weight. `rows` is even.
  double (*softplus_and_weights)(float* S, int64_t ld, int64_t rows, int64_t columns, float scale, float bias,
                                 double* weight, void* half, void* pairs);

  // out = x factor, of `count` numbers.
  void (*scaled)(const float* x, int64_t count, float factor, Element element, void* out);
};

FASTSSL_TABLE(SigmoidTiles, sigmoid_tiles)

}  // namespace fastssl
