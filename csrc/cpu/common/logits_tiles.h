// What softmax losses of a linear layer do inside one tile of its logits: a table of plain functions, one per
// instruction set.
#pragma once

#include <cstdint>

#include "common/product_tiles.h"
#include "common/table.h"

namespace fastssl {

// A tile L (classes, rows) of logits, a column for each row of features: rows are lanes. Both are multiples of 32, of
// which the first `count` classes and `valid` rows are meant.
struct LogitShape {
  int64_t classes, rows;
  int64_t count, valid;
};

// Where element (k, r) of such a tile is in pairs, as (classes, rows) in strips of rows (`Packed`).
static inline int64_t pair_at(const LogitShape& shape, int64_t k, int64_t r) {
  constexpr int64_t strip = strip_columns(true);
  const int64_t first = r / strip * strip, wide = shape.rows - first < strip ? shape.rows - first : strip;
  return first * shape.classes + k / 2 * 2 * wide + 2 * (r - first) + k % 2;
}

struct LogitsTiles {
  // E_kr = 2^(c (L_kr - shift_k - largest_r)), largest_r the largest L_kr - shift_k of the tile, as floats into `out`,
  // which may be L, unless null, and as bfloat16 into `half`, unless null; 0 beside what is meant.
  // total_r = sum_k E_kr. distance[t][r] = sum_k targets[t]_kr (largest_r - L_kr), of `count` targets. `shift` may be
  // null.
  void (*exponentials)(const float* L, const LogitShape& shape, const float* shift, float c, float* out, void* half,
                       float* largest, float* total, const float* const* targets, int64_t count, float* distance);

  // (top, sum) = sums of exponentials about the largest logit of all tiles, from those of `tiles` tiles, `ld` apart.
  void (*combine)(const float* largest, const float* total, int64_t tiles, int64_t ld, int64_t rows, float c,
                  float* top, float* sum);

  // The same of the distances of L and one target, a tile of E with a factor: sum_k target_kr (top_r - L_kr), about
  // target_top.
  void (*combine_distance)(const float* distance, const float* largest, const float* top, const float* target_largest,
                           const float* target_total, const float* target_top, int64_t tiles, int64_t ld, int64_t rows,
                           float target_c, float* out);

  // out_r = a_r 2^(c (largest_r - top_r)): what a tile's E are to be multiplied by. 0 beside `valid` rows.
  void (*factors)(const float* a, const float* largest, const float* top, int64_t rows, int64_t valid, float c,
                  float* out);

  // out_r = sum_k a_k (largest_r - (L_kr - shift_k)).
  void (*distances)(const float* L, const LogitShape& shape, const float* shift, const float* largest, const float* a,
                    float* out);

  // W_kr = factor_r E_kr - sum_t target_factors[t][r] targets[t]_kr - uniform_k uniform_factor_r, without the last term
  // where `uniform` is null. E and targets are floats, and W is written over E; or bfloat16, and W is written into half
  // (classes, rows) and pairs, as `pair_at` says. `uniform` is 0 beside the meant classes, the factors beside rows.
  void (*weights)(void* E, const LogitShape& shape, const float* factor, const void* const* targets,
                  const float* const* target_factors, int64_t count, const float* uniform, const float* uniform_factor,
                  void* half, void* pairs);

  // out_k += sum_r W_kr, W being floats, or bfloat16 if `half`.
  void (*class_sums)(const void* W, const LogitShape& shape, bool half, float* out);
};

FASTSSL_TABLE(LogitsTiles, logits_tiles)

}  // namespace fastssl
