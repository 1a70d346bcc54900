// Packing rows into operands, and finishing rows of sums, compiled once per instruction set.
#include "common/product_tiles.h"

#include "common/convert.h"
#include "common/gemm.h"
#include "common/rows.h"
#include "common/simd.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr float kNormFloor = 1e-12f;  // torch.nn.functional.normalize's eps

// In double, so that rows of numbers such as 1e30 or 1e-30 have a norm; `dim` is padded.
double dot(const float* a, const float* b, int64_t dim) {
  double partial[kLanes] = {};
  for (int64_t d = 0; d < dim; d += kLanes)
    for (int i = 0; i < kLanes; ++i) partial[i] += static_cast<double>(a[d + i]) * b[d + i];
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += partial[i];
  return total;
}

void arrange(const float* z, int64_t rows, int64_t dim, Operand operand, float* spare, const Packed& out) {
  const int64_t elements = rows * dim;
  if (operand != Operand::BFloat16) {
    float* const left = out.left ? static_cast<float*>(out.left) : spare;
    if (operand == Operand::RoundedToBFloat16) {
      for (int64_t i = 0; i < elements; ++i) left[i] = bfloat16_to_float(float_to_bfloat16(z[i]));
      z = left;
    } else if (out.left && out.left != z) {
      for (int64_t i = 0; i < elements; ++i) left[i] = z[i];
    }
    if (out.right)
      transpose(reinterpret_cast<const int32_t*>(z), dim, rows, dim, static_cast<int32_t*>(out.right), rows);
    return;
  }
  // A pair of bfloat16 is a 32-bit element: (rows, dim / 2) pairs along d transpose into `right`,
  // (rows / 2, dim) pairs along the rows transpose into `left_columns`.
  uint16_t* const free = reinterpret_cast<uint16_t*>(spare);
  uint16_t* const left = out.left ? static_cast<uint16_t*>(out.left) : free;
  for (int64_t i = 0; i < elements; ++i) left[i] = float_to_bfloat16(z[i]);
  if (out.right)
    transpose(reinterpret_cast<const int32_t*>(left), dim / 2, rows, dim / 2, static_cast<int32_t*>(out.right), rows);
  if (out.right_pairs || out.left_columns) {
    uint16_t* const pairs = out.right_pairs ? static_cast<uint16_t*>(out.right_pairs) : free + elements;
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t d = 0; d < dim; ++d) {
        pairs[r * dim + 2 * d] = left[r * dim + d];
        pairs[r * dim + 2 * d + 1] = left[(r + 1) * dim + d];
      }
    if (out.left_columns)
      transpose(reinterpret_cast<const int32_t*>(pairs), dim, rows / 2, dim, static_cast<int32_t*>(out.left_columns),
                rows / 2);
  }
}

float pack(const Rows& rows, int64_t first, int64_t count, int64_t padded_rows, int64_t padded_dim, bool normalize,
           Operand operand, float* inverse_norm, float* scratch, const Packed& out) {
  float* z = operand == Operand::BFloat16 || !out.left ? scratch : static_cast<float*>(out.left);
  const bool wanted = out.left || out.right || out.right_pairs || out.left_columns;
  double largest = 0;
  for (int64_t r = 0; r < count; ++r) {
    float* const row = z + r * padded_dim;
    const float* x = row;
    if (wanted) {
      load_row(rows[first + r], rows.element, rows.dim, 1, row);
    } else {
      x = row_of(rows[first + r], rows.element, rows.dim, 1, scratch);
    }
    const double square = dot(x, x, padded_dim);
    inverse_norm[r] = 1;
    if (normalize) {
      const double norm = __builtin_sqrt(square);
      const double inverse = 1 / (norm > kNormFloor || norm != norm ? norm : kNormFloor);
      for (int64_t d = 0; wanted && d < padded_dim; ++d) row[d] = static_cast<float>(row[d] * inverse);
      inverse_norm[r] = static_cast<float>(norm > kNormFloor || norm != norm ? inverse : -inverse);
    } else {
      largest = square <= largest ? largest : square;
    }
  }
  if (wanted) {
    const int64_t elements = padded_rows * padded_dim;
    for (int64_t i = count * padded_dim; i < elements; ++i) z[i] = 0;
    arrange(z, padded_rows, padded_dim, operand, scratch + elements, out);
  }
  return normalize ? 1.f : static_cast<float>(largest);
}

float largest_square(const Rows& rows, int64_t first, int64_t count, float* scratch) {
  double largest = 0;
  for (int64_t r = 0; r < count; ++r) {
    const float* const x = row_of(rows[first + r], rows.element, rows.dim, 1, scratch);
    const double square = dot(x, x, (rows.dim + 31) / 32 * 32);
    largest = square <= largest ? largest : square;
  }
  return static_cast<float>(largest);
}

void transposed(const float* x, int64_t rows, int64_t columns, float* out) {
  transpose(reinterpret_cast<const int32_t*>(x), rows, columns, rows, reinterpret_cast<int32_t*>(out), columns);
}

double finish(const void* x, float inverse_norm, const void* positive, float positive_inverse_norm,
              float positive_weight, float scale, bool normalize, Element element, int64_t dim, float* sums,
              float* scratch, Element out_element, void* out) {
  const int64_t padded = (dim + 31) / 32 * 32;
  const float inverse = __builtin_fabsf(inverse_norm);
  if (positive) {
    const float* const p = row_of(positive, element, dim, __builtin_fabsf(positive_inverse_norm), scratch);
    for (int64_t d = 0; d < padded; ++d) sums[d] += positive_weight * p[d];
  }
  const float* const z = row_of(x, element, dim, inverse, scratch);
  const double along = dot(sums, z, padded);
  const float projection = normalize && inverse_norm > 0 ? static_cast<float>(along) : 0;
  if (projection != 0)
    for (int64_t d = 0; d < padded; ++d) sums[d] -= projection * z[d];
  if (inverse != 1) {
    const double factor = double(scale) * inverse;  // in double: a float holds neither 1e40 nor 1e-50
    for (int64_t d = 0; d < padded; ++d) sums[d] = static_cast<float>(sums[d] * factor);
    scale = 1;
  }
  store_row(sums, out_element, dim, scale, out);
  return along;
}

double dot_rows(const void* x, const void* y, Element element, int64_t dim, float* scratch) {
  const int64_t padded = (dim + 31) / 32 * 32;
  return dot(row_of(x, element, dim, 1, scratch), row_of(y, element, dim, 1, scratch + padded), padded);
}

}  // namespace

extern const ProductTiles product_tiles;
const ProductTiles product_tiles = {arrange, pack, largest_square, transposed, finish, dot_rows, gemm};

}  // namespace fastssl::FASTSSL_ISA
