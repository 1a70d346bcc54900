// Packing rows into operands, and finishing rows of sums, compiled once per instruction set.
#include "common/product_tiles.h"

#include "common/convert.h"
#include "common/gemm.h"
#include "common/rows.h"
#include "common/simd.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr float kNormFloor = 1e-12f;  // torch.nn.functional.normalize's eps

double sum(double (&partial)[kLanes]) {
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) partial[i] += partial[i + w];
  return partial[0];
}

// <a, b>; `dim` is padded. Four products at a time are summed in float32, and these sums in double. Where the products
// are too large or too small for that, they are double as well: rows of numbers such as 1e30 or 1e-30 have a norm.
double dot(const float* a, const float* b, int64_t dim) {
  double partial[kLanes] = {};
  const auto product = [=](int64_t d) { return load(a + d) * load(b + d); };
  const auto add = [&](Vec four) {
    for (int i = 0; i < kLanes; ++i) partial[i] += four[i];
  };
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes)
    add(product(d) + product(d + kLanes) + product(d + 2 * kLanes) + product(d + 3 * kLanes));
  for (; d < dim; d += kLanes) add(product(d));
  const double total = sum(partial), size = __builtin_fabs(total);
  if (size > 1e-25 && size < __builtin_inf()) return total;
  for (int i = 0; i < kLanes; ++i) partial[i] = 0;
  for (d = 0; d < dim; d += kLanes)
    for (int i = 0; i < kLanes; ++i) partial[i] += static_cast<double>(a[d + i]) * b[d + i];
  return sum(partial);
}

// Whether a float holds x, which it does neither 1e40 nor, with all its digits, 1e-40.
bool fits_float(double x) { return __builtin_fabs(x) >= __FLT_MIN__ && __builtin_fabs(x) <= __FLT_MAX__; }

// out = x factor, of `dim` numbers; `out` may be x.
void scale_row(const float* x, double factor, int64_t dim, float* out) {
  if (fits_float(factor)) {
    store_row(x, Element::Float32, dim, static_cast<float>(factor), out);
  } else {
    for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(x[d] * factor);
  }
}

// A row, still to be multiplied with a factor.
struct ScaledRow {
  const float* x;
  float factor;

  // x times `factor`; x itself if it is float32, padded, and its products with the factor are no extreme numbers.
  ScaledRow(const void* row, Element element, int64_t dim, float factor_, float* spare) {
    const bool moderate = factor_ > 1e-15f && factor_ < 1e15f;
    factor = moderate ? factor_ : 1;
    x = row_of(row, element, dim, moderate ? 1 : factor_, spare);
  }
};

// out = x (rows, columns) in strips of `width` columns, one after the other.
void in_strips(const int32_t* x, int64_t rows, int64_t columns, int64_t width, int32_t* out) {
  for (int64_t c = 0; c < columns; c += width) {
    const int64_t wide = c + width < columns ? width : columns - c;
    for (int64_t r = 0; r < rows; ++r, out += wide)
      for (int64_t i = 0; i < wide; ++i) out[i] = x[r * columns + c + i];
  }
}

// out = x (columns, rows)^T in such strips.
void transpose_in_strips(const int32_t* x, int64_t rows, int64_t columns, int64_t width, int32_t* out) {
  for (int64_t c = 0; c < columns; c += width) {
    const int64_t wide = c + width < columns ? width : columns - c;
    transpose(x + c * rows, rows, wide, rows, out + c * rows, wide);
  }
}

// The operands of `left`, which may be out.left. `spare`: rows x dim floats.
void arrange_halves(const uint16_t* left, int64_t rows, int64_t dim, float* spare, const Packed& out) {
  // A pair of bfloat16 is a 32-bit element: (rows, dim / 2) pairs along d transpose into `right`,
  // (rows / 2, dim) pairs along the rows transpose into `left_columns`.
  const auto bits = [](const void* x) { return static_cast<const int32_t*>(x); };
  if (out.right)
    transpose_in_strips(bits(left), dim / 2, rows, out.strip ? out.strip : rows, static_cast<int32_t*>(out.right));
  if (!out.right_pairs && !out.left_columns) return;
  const bool whole = out.right_pairs && !out.strip;
  auto* const pairs = static_cast<uint32_t*>(whole ? out.right_pairs : spare);
  for (int64_t r = 0; r < rows; r += 2) {
    const uint16_t *const first = left + r * dim, *const second = first + dim;
    uint32_t* const to = pairs + r / 2 * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = first[d] | static_cast<uint32_t>(second[d]) << 16;
  }
  if (out.right_pairs && !whole)
    in_strips(bits(pairs), rows / 2, dim, out.strip, static_cast<int32_t*>(out.right_pairs));
  if (out.left_columns)
    transpose(bits(pairs), dim, rows / 2, dim, static_cast<int32_t*>(out.left_columns), rows / 2);
}

void arrange(const float* z, int64_t rows, int64_t dim, Operand operand, float* spare, const Packed& out) {
  const int64_t elements = rows * dim;
  if (operand == Operand::BFloat16) {
    uint16_t* const left = static_cast<uint16_t*>(out.left ? out.left : spare);
    for (int64_t i = 0; i < elements; ++i) left[i] = float_to_bfloat16(z[i]);
    return arrange_halves(left, rows, dim, spare + elements / 2, out);
  }
  const auto bits = [](const void* x) { return static_cast<const int32_t*>(x); };
  float* const left = static_cast<float*>(out.left ? out.left : spare);
  if (operand == Operand::RoundedToBFloat16) {
    for (int64_t i = 0; i < elements; ++i) left[i] = bfloat16_to_float(float_to_bfloat16(z[i]));
    z = left;
  } else if (out.left && out.left != z) {
    for (int64_t i = 0; i < elements; ++i) left[i] = z[i];
  }
  if (out.right)
    transpose_in_strips(bits(z), dim, rows, out.strip ? out.strip : rows, static_cast<int32_t*>(out.right));
  if (out.right_pairs && out.strip) in_strips(bits(z), rows, dim, out.strip, static_cast<int32_t*>(out.right_pairs));
}

float pack(const Rows& rows, int64_t first, int64_t count, int64_t padded_rows, int64_t padded_dim, bool normalize,
           Operand operand, float* inverse_norm, float* scratch, const Packed& out) {
  float* z = operand == Operand::BFloat16 || !out.left ? scratch : static_cast<float*>(out.left);
  const bool wanted = out.left || out.right || out.right_pairs || out.left_columns, copied = wanted && !out.as_they_lie;
  double largest = 0;
  for (int64_t r = 0; r < count && (copied || inverse_norm); ++r) {
    float* const row = copied ? z + r * padded_dim : scratch;
    const float* const x = row_of(rows[first + r], rows.element, rows.dim, 1, row);
    const double square = inverse_norm ? dot(x, x, padded_dim) : 0;
    double inverse = 1;
    if (inverse_norm) inverse_norm[r] = 1;
    if (normalize) {
      const double norm = __builtin_sqrt(square);
      inverse = 1 / (norm > kNormFloor || norm != norm ? norm : kNormFloor);
      inverse_norm[r] = static_cast<float>(norm > kNormFloor || norm != norm ? inverse : -inverse);
    } else {
      largest = square <= largest ? largest : square;
    }
    if (copied && (x != row || normalize)) scale_row(x, inverse, padded_dim, row);
  }
  if (wanted && out.as_they_lie) {
    if (operand == Operand::BFloat16)
      arrange_halves(static_cast<const uint16_t*>(out.as_they_lie), padded_rows, padded_dim, scratch, out);
    else
      arrange(static_cast<const float*>(out.as_they_lie), padded_rows, padded_dim, operand, scratch, out);
  } else if (wanted) {
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

void add_row(const void* x, float inverse_norm, float weight, Element element, int64_t dim, float* sum,
             float* scratch) {
  const int64_t padded = (dim + 31) / 32 * 32;
  const ScaledRow z(x, element, dim, __builtin_fabsf(inverse_norm), scratch);
  const float factor = weight * z.factor;
  for (int64_t d = 0; d < padded; ++d) sum[d] += factor * z.x[d];
}

double finish(const void* x, float inverse_norm, const void* positive, float positive_inverse_norm,
              float positive_weight, float scale, bool normalize, Element element, int64_t dim, float* sums,
              float* scratch, Element out_element, void* out, bool along_wanted) {
  const int64_t padded = (dim + 31) / 32 * 32;
  const float inverse = __builtin_fabsf(inverse_norm);
  if (positive) add_row(positive, positive_inverse_norm, positive_weight, element, dim, sums, scratch);
  const ScaledRow z(x, element, dim, inverse, scratch);
  const double along = along_wanted || normalize ? dot(sums, z.x, padded) * z.factor : 0;
  const float projection = normalize && inverse_norm > 0 ? static_cast<float>(along * z.factor) : 0;
  if (projection != 0)
    for (int64_t d = 0; d < padded; ++d) sums[d] -= projection * z.x[d];
  const double factor = double(scale) * inverse;
  if (out == sums) {  // as they are gathered in the gradient itself
    scale_row(sums, factor, dim, sums);
    return along;
  }
  if (!fits_float(factor)) scale_row(sums, factor, padded, sums);
  store_row(sums, out_element, dim, fits_float(factor) ? static_cast<float>(factor) : 1, out);
  return along;
}

void store(const float* x, float factor, Element element, int64_t dim, void* out) {
  store_row(x, element, dim, factor, out);
}

double dot_rows(const void* x, Element element, const void* y, Element element_of_y, int64_t dim, float* scratch) {
  const int64_t padded = (dim + 31) / 32 * 32;
  return dot(row_of(x, element, dim, 1, scratch), row_of(y, element_of_y, dim, 1, scratch + padded), padded);
}

}  // namespace

extern const ProductTiles product_tiles;
const ProductTiles product_tiles = {arrange, pack, largest_square, transposed, finish, add_row, store, dot_rows, gemm};

}  // namespace fastssl::FASTSSL_ISA
