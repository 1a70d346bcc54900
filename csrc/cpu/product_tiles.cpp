// Packing rows into operands, and finishing rows of sums, compiled once per instruction set.
#include "product_tiles.h"

#include "common/convert.h"
#include "common/gemm.h"
#include "common/simd.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr float kNormFloor = 1e-12f;  // torch.nn.functional.normalize's eps

// x as float32, times `factor`, into `out`; zeros up to the padded length.
void load_row(const void* x, Element element, int64_t dim, float factor, float* out) {
  if (element == Element::Float32) {
    for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<const float*>(x)[d] * factor;
  } else if (element == Element::BFloat16) {
    for (int64_t d = 0; d < dim; ++d) out[d] = bfloat16_to_float(static_cast<const uint16_t*>(x)[d]) * factor;
  } else {
    for (int64_t d = 0; d < dim; ++d) out[d] = half_to_float(static_cast<const uint16_t*>(x)[d]) * factor;
  }
  for (int64_t d = dim; d % 32; ++d) out[d] = 0;
}

void store_row(const float* x, Element element, int64_t dim, float factor, void* out) {
  if (element == Element::Float32) {
    for (int64_t d = 0; d < dim; ++d) static_cast<float*>(out)[d] = x[d] * factor;
  } else if (element == Element::BFloat16) {
    for (int64_t d = 0; d < dim; ++d) static_cast<uint16_t*>(out)[d] = float_to_bfloat16(x[d] * factor);
  } else {
    for (int64_t d = 0; d < dim; ++d) static_cast<uint16_t*>(out)[d] = float_to_half(x[d] * factor);
  }
}

// In double, so that rows of 1e30 or 1e-30 have a norm; `dim` is padded.
double dot(const float* a, const float* b, int64_t dim) {
  double partial[kLanes] = {};
  for (int64_t d = 0; d < dim; d += kLanes)
    for (int i = 0; i < kLanes; ++i) partial[i] += static_cast<double>(a[d + i]) * b[d + i];
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += partial[i];
  return total;
}

float pack(const Rows& rows, int64_t first, int64_t count, int64_t padded_rows, int64_t padded_dim, bool normalize,
           Operand operand, float* inverse_norm, float* scratch, const Packed& out) {
  const bool half = operand == Operand::BFloat16;
  float* z = half || !out.left ? scratch : static_cast<float*>(out.left);
  double largest = 0;
  for (int64_t r = 0; r < count; ++r) {
    float* row = z + r * padded_dim;
    load_row(rows[first + r], rows.element, rows.dim, 1, row);
    const double square = dot(row, row, padded_dim);
    inverse_norm[r] = 1;
    if (normalize) {
      const double norm = __builtin_sqrt(square);
      const double inverse = 1 / (norm > kNormFloor || norm != norm ? norm : kNormFloor);
      for (int64_t d = 0; d < padded_dim; ++d) row[d] = static_cast<float>(row[d] * inverse);
      inverse_norm[r] = static_cast<float>(norm > kNormFloor || norm != norm ? inverse : -inverse);
    } else {
      largest = square <= largest ? largest : square;
    }
    if (operand == Operand::RoundedToBFloat16)
      for (int64_t d = 0; d < padded_dim; ++d) row[d] = bfloat16_to_float(float_to_bfloat16(row[d]));
  }
  const int64_t elements = padded_rows * padded_dim;
  for (int64_t i = count * padded_dim; i < elements; ++i) z[i] = 0;

  if (!half) {
    if (out.right)
      transpose(reinterpret_cast<const int32_t*>(z), padded_dim, padded_rows, padded_dim,
                static_cast<int32_t*>(out.right), padded_rows);
  } else {
    // A pair of bfloat16 is a 32-bit element: (rows, dim / 2) pairs along d transpose into `right`,
    // (rows / 2, dim) pairs along the rows transpose into `left_columns`.
    uint16_t* spare = reinterpret_cast<uint16_t*>(scratch + elements);
    uint16_t* left = out.left ? static_cast<uint16_t*>(out.left) : spare;
    for (int64_t i = 0; i < elements; ++i) left[i] = float_to_bfloat16(z[i]);
    if (out.right)
      transpose(reinterpret_cast<const int32_t*>(left), padded_dim / 2, padded_rows, padded_dim / 2,
                static_cast<int32_t*>(out.right), padded_rows);
    if (out.right_pairs || out.left_columns) {
      uint16_t* pairs = out.right_pairs ? static_cast<uint16_t*>(out.right_pairs) : spare + elements;
      for (int64_t r = 0; r < padded_rows; r += 2)
        for (int64_t d = 0; d < padded_dim; ++d) {
          pairs[r * padded_dim + 2 * d] = left[r * padded_dim + d];
          pairs[r * padded_dim + 2 * d + 1] = left[(r + 1) * padded_dim + d];
        }
      if (out.left_columns)
        transpose(reinterpret_cast<const int32_t*>(pairs), padded_dim, padded_rows / 2, padded_dim,
                  static_cast<int32_t*>(out.left_columns), padded_rows / 2);
    }
  }
  return normalize ? 1.f : static_cast<float>(largest);
}

float largest_square(const Rows& rows, int64_t first, int64_t count, float* scratch) {
  double largest = 0;
  for (int64_t r = 0; r < count; ++r) {
    load_row(rows[first + r], rows.element, rows.dim, 1, scratch);
    const double square = dot(scratch, scratch, (rows.dim + 31) / 32 * 32);
    largest = square <= largest ? largest : square;
  }
  return static_cast<float>(largest);
}

void add_transposed(const float* transposed, int64_t rows, int64_t dim, float* sums, float* scratch) {
  transpose(reinterpret_cast<const int32_t*>(transposed), rows, dim, rows, reinterpret_cast<int32_t*>(scratch), dim);
  for (int64_t i = 0; i < rows * dim; i += kLanes) store(sums + i, load(sums + i) + load(scratch + i));
}

double finish(const void* x, float inverse_norm, const void* positive, float positive_inverse_norm,
              float positive_weight, float scale, bool normalize, Element element, int64_t dim, float* sums,
              float* scratch, Element out_element, void* out) {
  const int64_t padded = (dim + 31) / 32 * 32;
  const float inverse = __builtin_fabsf(inverse_norm);
  if (positive) {
    load_row(positive, element, dim, __builtin_fabsf(positive_inverse_norm), scratch);
    for (int64_t d = 0; d < padded; ++d) sums[d] += positive_weight * scratch[d];
  }
  load_row(x, element, dim, inverse, scratch);
  const double along = dot(sums, scratch, padded);
  const float projection = normalize && inverse_norm > 0 ? static_cast<float>(along) : 0;
  for (int64_t d = 0; d < padded; ++d) sums[d] = (sums[d] - projection * scratch[d]) * scale;
  store_row(sums, out_element, dim, inverse, out);
  return along;
}

double dot_rows(const void* x, const void* y, Element element, int64_t dim, float* scratch) {
  const int64_t padded = (dim + 31) / 32 * 32;
  load_row(x, element, dim, 1, scratch);
  load_row(y, element, dim, 1, scratch + padded);
  return dot(scratch, scratch + padded, padded);
}

}  // namespace

extern const ProductTiles product_tiles;
const ProductTiles product_tiles = {pack, largest_square, add_transposed, finish, dot_rows, gemm};

}  // namespace fastssl::FASTSSL_ISA
