// What softmax losses do within one tile: a table of plain functions, one per instruction set.
// Callers decide which tiles, in which order, on which thread; `softmax_tiles.cpp` does the work.
#pragma once

#include <cstdint>

#include "common/table.h"

namespace fastssl {

struct SoftmaxTiles {
  // row_total[i] += sum_j 2^(c (S_ij - origin)) and, unless null, column_total[j] += sum_i 2^(c (S_ij - origin)).
  // Unless null, row_extreme[i] and column_extreme[j] become the entry with the largest c S_ij so far; they start
  // infinite, with c's sign reversed. Unless null, `kept` (rows, columns) gets the exponentials, in float32 or, if
  // `narrow`, in bfloat16; it may be S.
  void (*sum_exponentials)(const float* S, int64_t ld, int64_t rows, int64_t columns, float c, float origin,
                           double* row_total, float* row_extreme, double* column_total, float* column_extreme,
                           void* kept, bool narrow);

  // The same, with an origin for each row and column, the extreme so far: row_total[i] is
  // sum_j 2^(c (S_ij - row_extreme[i])), and likewise for columns.
  void (*sum_exponentials_online)(const float* S, int64_t ld, int64_t rows, int64_t columns, float c, double* row_total,
                                  float* row_extreme, double* column_total, float* column_extreme);

  // S becomes E_ij = 2^(c (S_ij - origin_i)), in place or, where `half` is given, as bfloat16 into half (rows,
  // columns); row_total[i] += sum_j E_ij; row_extreme is as above. The origin is *shared_origin or, if that is null,
  // row_extreme[i]: then row_total[i] and sums[i] (dim floats, the products of E so far) are rescaled as it moves.
  void (*exponentials)(float* S, int64_t ld, int64_t rows, int64_t columns, float c, const float* shared_origin,
                       double* row_total, float* row_extreme, float* sums, int64_t dim, void* half);

  // W_ij = (a_i + b_j) 2^(c (S_ij - origin)), over S in place or, where `half` is given, as bfloat16 into
  // half (rows, columns) and pairs (rows / 2, columns, 2). `rows` is even. b may be null: 0.
  void (*weights)(float* S, int64_t ld, int64_t rows, int64_t columns, float c, float origin, const float* a,
                  const float* b, void* half, void* pairs);

  // The same with an origin for each row and column: W_ij = a_i 2^(c (S_ij - row_origin_i)) +
  // b_j 2^(c (S_ij - column_origin_j)).
  void (*weights_online)(float* S, int64_t ld, int64_t rows, int64_t columns, float c, const float* a,
                         const float* row_origin, const float* b, const float* column_origin, void* half, void* pairs);

  // W_ij = (a_i + b_j) E_ij from exponentials E (rows, columns) that were kept: in float32 and into W or, where `half`
  // is given, in bfloat16 and into half and pairs as above.
  void (*weights_of_kept)(const void* E, int64_t rows, int64_t columns, const float* a, const float* b, float* W,
                          void* half, void* pairs);
};

FASTSSL_TABLE(SoftmaxTiles, softmax_tiles)

}  // namespace fastssl
