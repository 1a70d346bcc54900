// What Sinkhorn-Knopp does to a few rows of logits: a table of plain functions, one per instruction set.
#pragma once

#include <cstdint>

#include "common/product_tiles.h"
#include "common/table.h"

namespace fastssl {

constexpr int64_t kChunk = 1024;           // columns at a time: few enough for the first-level cache
constexpr float kLowest = -0x1.fffffep127f;  // the maximum of nothing: minus infinity would make differences NaN

// For logits t with K columns. What has one element per column is padded to a multiple of 32.
struct SinkhornTiles {
  // total[k] = sum_i 2^(c (t_ik - top[k])) over all rows so far, where top[k] becomes the largest t_ik so far, and
  // starts as kLowest.
  void (*sum_exponentials)(const Rows& t, int64_t first, int64_t count, float c, float* total, float* top);

  // Adds such sums, (more, more_top), to (total, top).
  void (*add_exponentials)(const float* more, const float* more_top, int64_t columns, float c, float* total, float* top);

  // The assignments P_i = softmax((t_i - center) c log 2) of at most four rows: sums[k] += sum_i P_ik or, if `sums` is
  // null, out[i] = P_i, rows of K floats. `scratch`: count x (padded columns + 2 chunks) floats.
  void (*assign)(const Rows& t, int64_t first, int64_t count, const float* center, float c, float* scratch, float* sums,
                 float* out);

  // sums[k] += sum_i t_ik.
  void (*sum)(const Rows& t, int64_t first, int64_t count, float* sums);
};

FASTSSL_TABLE(SinkhornTiles, sinkhorn_tiles)

}  // namespace fastssl
