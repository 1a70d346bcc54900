// Packing the operands of tiled products and finishing their results: a table of plain functions, one per instruction
// set.
#pragma once

#include <cstdint>

#include "common/table.h"

namespace fastssl {

enum class Element : int { Float32, BFloat16, Float16 };

constexpr int64_t bytes_of(Element element) { return element == Element::Float32 ? 4 : 2; }

// The format of the operands of products: float32; float32 holding values rounded to bfloat16, where the instruction
// set multiplies nothing narrower than float32; or bfloat16.
enum class Operand : int { Float32, RoundedToBFloat16, BFloat16 };

// The rows of one tensor, or of two on top of each other: unit stride within a row, any stride between rows.
struct Rows {
  const void* data[2];
  int64_t stride[2];
  int64_t batch;  // rows of the first tensor
  int64_t dim;
  Element element;

  const void* operator[](int64_t i) const {
    const int side = i >= batch;
    const int64_t offset = (i - side * batch) * stride[side];
    return static_cast<const char*>(data[side]) + offset * bytes_of(element);
  }
};

// Columns of a right operand that lies in strips: in float32 those that stay in the first-level cache, in bfloat16, whose
// products read the left operand again for each strip, more.
constexpr int64_t strip_columns(bool half) { return half ? 256 : 64; }

// The (normalised) rows Z of one block as the operands of products, padded with zeros to rows x dim, both
// multiples of 32. "In pairs": two consecutive rows of the matrix interleaved, [k/2][n][2], the layout in which
// instructions that multiply pairs of bfloat16 read their right operand. Operands that nobody needs are null.
struct Packed {
  void* left;         // (rows, dim): left operand of Z Y^T; in float32 also right operand of W Z
  void* right;        // (dim, rows), in pairs if bfloat16: right operand of X Z^T; in float32 also left of Z^T W
  void* right_pairs;  // bfloat16 only: (rows, dim) in pairs: right operand of W Z
  void* left_columns; // bfloat16 only: (dim, rows): left operand of Z^T W
  const void* as_they_lie = nullptr;  // unless null, the rows themselves, which are `left` without being packed
  // Unless 0, right operands lie in strips of that many columns, one strip after the other, each as above; in float32
  // `right_pairs` is then Z itself in strips.
  int64_t strip = 0;
};

struct ProductTiles {
  // Writes Z (rows, dim), both multiples of 32, as operands. `out.left` may be z. `spare`: rows x dim floats.
  void (*arrange)(const float* z, int64_t rows, int64_t dim, Operand operand, float* spare, const Packed& out);

  // Packs rows [first, first + count), each divided by max(norm, 1e-12) if `normalize`. inverse_norm gets the factor
  // by which each row was multiplied, negated where 1e-12 was the larger. Returns the largest |z|^2. With a null
  // inverse_norm nothing is normalised and nothing measured.
  // `scratch`: 2 padded_rows x padded_dim floats.
  float (*pack)(const Rows& rows, int64_t first, int64_t count, int64_t padded_rows, int64_t padded_dim, bool normalize,
                Operand operand, float* inverse_norm, float* scratch, const Packed& out);

  // The largest |x|^2 of rows [first, first + count). `scratch`: padded dim floats.
  float (*largest_square)(const Rows& rows, int64_t first, int64_t count, float* scratch);

  // out (rows, columns) = x (columns, rows)^T, both multiples of 16; elements are float32 or pairs of bfloat16.
  void (*transposed)(const float* x, int64_t rows, int64_t columns, float* out);

  // One row of a gradient: with z = x |inverse_norm|, z' likewise of `positive` (which may be null), and
  // G = sums + positive_weight z',   out = scale (G - <G, z> z) |inverse_norm|,   without the projection if not
  // `normalize` or inverse_norm is negative. Returns <G, z> if `along_wanted`. `sums` is overwritten;
  // `scratch`: padded dim floats.
  double (*finish)(const void* x, float inverse_norm, const void* positive, float positive_inverse_norm,
                   float positive_weight, float scale, bool normalize, Element element, int64_t dim, float* sums,
                   float* scratch, Element out_element, void* out, bool along_wanted);

  // sum += weight x |inverse_norm|. `scratch`: padded dim floats.
  void (*add_row)(const void* x, float inverse_norm, float weight, Element element, int64_t dim, float* sum,
                  float* scratch);

  // out = factor x; `out` may be x.
  void (*store)(const float* x, float factor, Element element, int64_t dim, void* out);

  // <x, y>. `scratch`: 2 padded dim floats.
  double (*dot)(const void* x, Element element, const void* y, Element element_of_y, int64_t dim, float* scratch);

  // C = [C +] A B, as in common/gemm.h.
  void (*gemm)(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* A,
               const float* B, float* C);
};

FASTSSL_TABLE(ProductTiles, product_tiles)

}  // namespace fastssl
