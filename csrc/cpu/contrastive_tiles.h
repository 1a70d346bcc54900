// What the contrastive losses do inside one tile: a table of plain functions, one per instruction set.
// `contrastive.cpp` decides which tiles, in which order, on which thread; `contrastive_tiles.cpp` does the work.
#pragma once

#include <cstdint>

namespace fastssl {

enum class Element : int { Float32, BFloat16, Float16 };

// What the operands of products are: float32; float32 holding values rounded to bfloat16, where the
// instruction set multiplies nothing narrower; or bfloat16.
enum class Operand : int { Float32, RoundedToBFloat16, BFloat16 };

// The 2B rows of [z1; z2]: unit stride within a row, any stride between rows.
struct Rows {
  const void* data[2];
  int64_t stride[2];
  int64_t batch;
  int64_t dim;
  Element element;

  const void* operator[](int64_t i) const {
    const int side = i >= batch;
    const int64_t offset = (i - side * batch) * stride[side];
    return static_cast<const char*>(data[side]) + offset * (element == Element::Float32 ? 4 : 2);
  }
};

// The (normalised) rows of one block as the operands of products, padded with zeros to rows x dim, both
// multiples of 32. "In pairs": two consecutive rows of the matrix interleaved, [k/2][n][2], as instructions
// that multiply pairs of bfloat16 want their right operand.
struct Packed {
  void* left;         // (rows, dim): left operand of Z Z^T; in float32 also right operand of W Z
  void* right;        // (dim, rows), in pairs if bfloat16: right operand of Z Z^T; in float32 also left of Z^T W
  void* right_pairs;  // bfloat16 only: (rows, dim) in pairs: right operand of W Z
  void* left_columns; // bfloat16 only: (dim, rows): left operand of Z^T W
};

struct ContrastiveTiles {
  // Packs rows [first, first + count), each divided by max(norm, 1e-12) if `normalize`. inverse_norm gets what
  // each was multiplied by, negated where 1e-12 was the larger. Returns the largest |z|^2.
  // right_pairs and left_columns are written unless null. `scratch`: padded_rows x padded_dim floats.
  float (*pack)(const Rows& rows, int64_t first, int64_t count, int64_t padded_rows, int64_t padded_dim, bool normalize,
                Operand operand, float* inverse_norm, float* scratch, const Packed& out);

  // row_total[i] += sum_j 2^(c (S_ij - origin)) and, unless null, column_total[j] += sum_i 2^(c (S_ij - origin)).
  void (*sum_exponentials)(const float* S, int64_t ld, int64_t rows, int64_t columns, float c, float origin,
                           double* row_total, double* column_total);

  // The same about an origin of each row and column, the entry with the largest c S_ij so far: row_total[i] is
  // sum_j 2^(c (S_ij - row_origin[i])), likewise columns. Origins start infinite, with c's sign reversed.
  void (*sum_exponentials_online)(const float* S, int64_t ld, int64_t rows, int64_t columns, float c, double* row_total,
                                  float* row_origin, double* column_total, float* column_origin);

  // W_ij = (a_i + b_j) 2^(c (S_ij - origin)), over S in place or, where `half` is given, as bfloat16 into
  // half (rows, columns) and pairs (rows / 2, columns, 2). `rows` is even.
  void (*weights)(float* S, int64_t ld, int64_t rows, int64_t columns, float c, float origin, const float* a,
                  const float* b, void* half, void* pairs);

  // The same about an origin of each row and column: W_ij = a_i 2^(c (S_ij - row_origin_i)) +
  // b_j 2^(c (S_ij - column_origin_j)).
  void (*weights_online)(float* S, int64_t ld, int64_t rows, int64_t columns, float c, const float* a,
                         const float* row_origin, const float* b, const float* column_origin, void* half, void* pairs);

  // gradient (rows, dim) += transposed (dim, rows)^T, both padded.
  void (*add_transposed)(const float* transposed, int64_t rows, int64_t dim, float* gradient, float* scratch);

  // One row of the gradient: with G = sums + positive_weight z_positive,
  // out = scale (G - <G, z> z) inverse_norm, without the projection if not `normalize` or inverse_norm is negative.
  // Returns <G, z>. `scratch`: padded_dim floats.
  double (*finish_row)(const void* x, float inverse_norm, const void* positive, float positive_inverse_norm,
                       float positive_weight, float scale, bool normalize, Element element, int64_t dim, float* sums,
                       float* scratch, void* out);

  // C = [C +] A B, as common/gemm.h.
  void (*gemm)(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* A,
               const float* B, float* C);
};

namespace baseline { extern const ContrastiveTiles contrastive_tiles; }
namespace avx2 { extern const ContrastiveTiles contrastive_tiles; }
namespace avx512 { extern const ContrastiveTiles contrastive_tiles; }
namespace avx512_bf16 { extern const ContrastiveTiles contrastive_tiles; }

}  // namespace fastssl
