// Nearest neighbours in tiles of similarities, and distances: a table of plain functions, one per instruction set.
#pragma once

#include <cstdint>

#include "common/product_tiles.h"
#include "common/table.h"

namespace fastssl {

// The search for the k rows j != i, of the group of `size` consecutive rows that row i is in, whose products with it
// are largest, for the `own` rows i from `first` on. Tiles are of products of other rows y, <y_i, y_j> being about
// <z_i, z_j> - offset_i - offset_j.
struct Nearest {
  const float* z;  // (count, dim)
  int64_t count, dim, size, first, own, k;
  float margin;         // what a tile tells of <z_i, z_j> is that close to it
  const float* offset;  // of each row, padded
  float* value;         // (own, k), in descending order; minus infinity where there is none yet, infinity for NaN
  int64_t* index;       // (own, k); equal products in ascending order
  float* threshold;     // of row i, padded: what <y_i, y_j> + offset_j must reach; infinity for rows that are not own
};

struct KoleoTiles {
  // Rows [first, first + count) of x, divided by max(norm, eps), into z unless that is null. `inverse`: the factor by
  // which each was multiplied, negative where eps was larger than the norm. `scratch`: padded dim floats.
  void (*normalize)(const Rows& x, int64_t first, int64_t count, double eps, double* inverse, float* scratch, float* z);

  // Of rows [first, first + count): y = z - middle, and offset = <z, middle> - half.
  void (*center)(const float* z, int64_t first, int64_t count, int64_t dim, const float* middle, float half, float* y,
                 float* offset);

  // Enters into the lists what is in the tile s (rows, columns) of Y Y^T, whose first entry is (row, column): of its
  // rows and, if `both`, of its columns.
  void (*find)(const Nearest& nearest, const float* s, int64_t row, int64_t rows, int64_t column, int64_t columns,
               bool both);

  // |a - b + eps|.
  double (*distance)(const float* a, const float* b, int64_t dim, float eps);

  // sums += factor (a - b + eps) inverse_distance. The factors are apart because their product may be too large a number;
  // in double, so that equal terms of opposite signs leave nothing.
  void (*add_difference)(float factor, float inverse_distance, const float* a, const float* b, int64_t dim, float eps,
                         double* sums);
};

FASTSSL_TABLE(KoleoTiles, koleo_tiles)

}  // namespace fastssl
