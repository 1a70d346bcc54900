// The inside of a tile of the contrastive losses, compiled once per instruction set.
//
// A tile is S = Z_I Z_J^T for two blocks of rows, in float32 and small enough for the second-level cache. The
// forward pass turns it into row and column sums of 2^(c (S - origin)), c = scale log2(e); the backward pass into
// weights
//
//     W_ij = a_i 2^(c (S_ij - row_origin_i)) + b_j 2^(c (S_ij - column_origin_j))
//
// which then multiply Z_J (and, transposed, Z_I). Per entry that is two exponentials, or one where all rows and
// columns share an origin: about a dozen vector instructions against the 2 D operations of the product itself.
// The origin is subtracted first: near it, where the exponentials are large, the difference is exact.
// Nothing here knows of diagonals or positives: the caller puts -inf (times the sign of c) where an entry is
// not to count.
#include "contrastive_tiles.h"

#include "common/convert.h"
#include "common/gemm.h"
#include "common/simd.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr float kNormFloor = 1e-12f;  // torch.nn.functional.normalize's eps
constexpr int64_t kMaxColumns = 256;  // of a tile

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
  float* z = operand == Operand::BFloat16 ? scratch : static_cast<float*>(out.left);
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
  for (int64_t i = count * padded_dim; i < padded_rows * padded_dim; ++i) z[i] = 0;

  if (operand != Operand::BFloat16) {
    transpose(static_cast<int32_t*>(out.left), padded_dim, padded_rows, padded_dim, static_cast<int32_t*>(out.right),
              padded_rows);
  } else {
    // A pair of bfloat16 is a 32-bit element: (rows, dim / 2) pairs along d transpose into `right`,
    // (rows / 2, dim) pairs along the rows transpose into `left_columns`.
    uint16_t* left = static_cast<uint16_t*>(out.left);
    for (int64_t i = 0; i < padded_rows * padded_dim; ++i) left[i] = float_to_bfloat16(z[i]);
    transpose(static_cast<int32_t*>(out.left), padded_dim / 2, padded_rows, padded_dim / 2,
              static_cast<int32_t*>(out.right), padded_rows);
    if (out.right_pairs) {
      uint16_t* pairs = static_cast<uint16_t*>(out.right_pairs);
      for (int64_t r = 0; r < padded_rows; r += 2)
        for (int64_t d = 0; d < padded_dim; ++d) {
          pairs[r * padded_dim + 2 * d] = left[r * padded_dim + d];
          pairs[r * padded_dim + 2 * d + 1] = left[(r + 1) * padded_dim + d];
        }
      transpose(static_cast<int32_t*>(out.right_pairs), padded_dim, padded_rows / 2, padded_dim,
                static_cast<int32_t*>(out.left_columns), padded_rows / 2);
    }
  }
  return normalize ? 1.f : static_cast<float>(largest);
}

// Four rows at a time, so that a column's running sum is loaded and stored once for four exponentials.
template <int group>
void sum_exponentials_of(const float* S, int64_t ld, int64_t columns, float c, float origin, double* row_total,
                         float* column_sum) {
  Vec row_sum[group] = {};
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec column = load(column_sum + j);
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      const Vec e = exp2((load(S + r * ld + j) - origin) * c);
      row_sum[r] += e;
      column += e;
    }
    store(column_sum + j, column);
  }
  for (int r = 0; r < group; ++r) row_total[r] += sum(row_sum[r]);
}

void sum_exponentials(const float* S, int64_t ld, int64_t rows, int64_t columns, float c, float origin,
                      double* row_total, double* column_total) {
  alignas(64) float column_sum[kMaxColumns] = {};
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) sum_exponentials_of<4>(S + r * ld, ld, columns, c, origin, row_total + r, column_sum);
  for (; r < rows; ++r) sum_exponentials_of<1>(S + r * ld, ld, columns, c, origin, row_total + r, column_sum);
  if (column_total)
    for (int64_t j = 0; j < columns; ++j) column_total[j] += column_sum[j];
}

// Moves a row's origin, and the sum about it, to `extreme` if that lies further along `sign`. False if there is
// nothing to sum: every entry seen so far, these included, is excluded.
bool move_origin(float extreme, float sign, float c, float& origin, double& total) {
  if (!(extreme <= sign * origin)) {
    total *= exp2(broadcast((origin - sign * extreme) * c))[0];
    origin = sign * extreme;
  }
  return extreme != -__builtin_inff();
}

void sum_exponentials_online(const float* S, int64_t ld, int64_t rows, int64_t columns, float c, double* row_total,
                             float* row_origin, double* column_total, float* column_origin) {
  const Vec lowest = broadcast(-__builtin_inff());
  const float sign = c < 0 ? -1 : 1;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = S + r * ld;
    Vec extreme = lowest, e = {};
    for (int64_t j = 0; j < columns; j += kLanes) extreme = max(extreme, load(row + j) * sign);
    if (!move_origin(max(extreme), sign, c, row_origin[r], row_total[r])) continue;
    for (int64_t j = 0; j < columns; j += kLanes) e += exp2((load(row + j) - row_origin[r]) * c);
    row_total[r] += sum(e);
  }
  if (!column_total) return;
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec extreme = lowest, e = {}, origin = {};
    for (int64_t r = 0; r < rows; ++r) extreme = max(extreme, load(S + r * ld + j) * sign);
    for (int i = 0; i < kLanes; ++i)
      // A column with nothing in it keeps origin 0: its exponentials are then 0, not NaN.
      if (move_origin(extreme[i], sign, c, column_origin[j + i], column_total[j + i])) origin[i] = column_origin[j + i];
    for (int64_t r = 0; r < rows; ++r) e += exp2((load(S + r * ld + j) - origin) * c);
    for (int i = 0; i < kLanes; ++i) column_total[j + i] += e[i];
  }
}

// The weights of rows r and r + 1 as bfloat16, in both layouts.
void store_pair(Vec w0, Vec w1, uint16_t* half, int64_t ld, uint16_t* pairs) {
#ifdef __AVX512BF16__
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)w1, (__m512)w0);  // 16 of w0, then 16 of w1
  _mm512_mask_storeu_epi64(half, 0x0f, both);
  _mm512_mask_storeu_epi64(half + ld - 16, 0xf0, both);
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(interleave, both));
#else
  for (int i = 0; i < kLanes; ++i) {
    pairs[2 * i] = half[i] = float_to_bfloat16(w0[i]);
    pairs[2 * i + 1] = half[ld + i] = float_to_bfloat16(w1[i]);
  }
#endif
}

// weight(r, j, s) for every entry of the tile, two rows at a time.
template <typename Weight>
void each_weight(float* S, int64_t ld, int64_t rows, int64_t columns, uint16_t* half, uint16_t* pairs,
                 const Weight& weight) {
  for (int64_t r = 0; r < rows; r += 2) {
    float* s0 = S + r * ld;
    float* s1 = s0 + ld;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Vec w0 = weight(r, j, load(s0 + j)), w1 = weight(r + 1, j, load(s1 + j));
      if (half) {
        store_pair(w0, w1, half + r * columns + j, columns, pairs + r * columns + 2 * j);
      } else {
        store(s0 + j, w0);
        store(s1 + j, w1);
      }
    }
  }
}

void weights(float* S, int64_t ld, int64_t rows, int64_t columns, float c, float origin, const float* a,
             const float* b, void* half, void* pairs) {
  each_weight(S, ld, rows, columns, static_cast<uint16_t*>(half), static_cast<uint16_t*>(pairs),
              [=](int64_t r, int64_t j, Vec s) { return exp2((s - origin) * c) * (a[r] + load(b + j)); });
}

void weights_online(float* S, int64_t ld, int64_t rows, int64_t columns, float c, const float* a,
                    const float* row_origin, const float* b, const float* column_origin, void* half, void* pairs) {
  each_weight(S, ld, rows, columns, static_cast<uint16_t*>(half), static_cast<uint16_t*>(pairs),
              [=](int64_t r, int64_t j, Vec s) {
                return exp2((s - row_origin[r]) * c) * a[r] + exp2((s - load(column_origin + j)) * c) * load(b + j);
              });
}

void add_transposed(const float* transposed, int64_t rows, int64_t dim, float* gradient, float* scratch) {
  transpose(reinterpret_cast<const int32_t*>(transposed), rows, dim, rows, reinterpret_cast<int32_t*>(scratch), dim);
  for (int64_t i = 0; i < rows * dim; i += kLanes) store(gradient + i, load(gradient + i) + load(scratch + i));
}

double finish_row(const void* x, float inverse_norm, const void* positive, float positive_inverse_norm,
                  float positive_weight, float scale, bool normalize, Element element, int64_t dim, float* sums,
                  float* scratch, void* out) {
  const int64_t padded = (dim + 31) / 32 * 32;
  const float inverse = __builtin_fabsf(inverse_norm);
  load_row(positive, element, dim, __builtin_fabsf(positive_inverse_norm), scratch);
  for (int64_t d = 0; d < padded; ++d) sums[d] += positive_weight * scratch[d];
  load_row(x, element, dim, inverse, scratch);
  const double along = dot(sums, scratch, padded);
  const float projection = normalize && inverse_norm > 0 ? static_cast<float>(along) : 0;
  for (int64_t d = 0; d < padded; ++d) sums[d] = (sums[d] - projection * scratch[d]) * scale * inverse;
  if (element == Element::Float32) {
    for (int64_t d = 0; d < dim; ++d) static_cast<float*>(out)[d] = sums[d];
  } else if (element == Element::BFloat16) {
    for (int64_t d = 0; d < dim; ++d) static_cast<uint16_t*>(out)[d] = float_to_bfloat16(sums[d]);
  } else {
    for (int64_t d = 0; d < dim; ++d) static_cast<uint16_t*>(out)[d] = float_to_half(sums[d]);
  }
  return along;
}

}  // namespace

extern const ContrastiveTiles contrastive_tiles;
const ContrastiveTiles contrastive_tiles = {
    pack, sum_exponentials, sum_exponentials_online, weights, weights_online, add_transposed, finish_row, gemm,
};

}  // namespace fastssl::FASTSSL_ISA
