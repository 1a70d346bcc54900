// The work within one tile of a softmax, compiled once per instruction set.
//
// A tile is S = Z_I Z_J^T for two blocks of rows, in float32 and small enough for the second-level cache. The
// forward pass turns it into row and column sums of 2^(c (S - origin)), c = scale log2(e); the backward pass into
// weights
//
//     W_ij = a_i 2^(c (S_ij - row_origin_i)) + b_j 2^(c (S_ij - column_origin_j))
//
// which then multiply Z_J (and, transposed, Z_I). Per entry that is two exponentials, or one where all rows and
// columns share an origin: about a dozen vector instructions against the 2 D operations of the product itself.
// The origin is subtracted before the multiplication by c: near the origin, where the exponentials are large, the
// difference is exact. Nothing here knows of diagonals or positives: the caller writes -inf (times the sign of c) where
// an entry must not count.
#include "common/softmax_tiles.h"

#include "common/simd.h"
#include "common/weights.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr int64_t kMaxColumns = 256;  // of a tile

// Where the exponentials themselves are stored, besides their sums.
enum class Keep { Nowhere, Float32, BFloat16 };

// Four rows at a time, so that a column's running sum is loaded and stored once for four exponentials.
template <int group, bool extremes, Keep keep>
void sum_exponentials_of(const float* S, int64_t ld, int64_t columns, float c, float origin, float sign,
                         double* row_total, float* row_extreme, float* column_sum, float* column_extreme, void* kept) {
  Vec row_sum[group] = {}, row_top[group];
  for (int r = 0; r < group; ++r) row_top[r] = broadcast(-__builtin_inff());
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec column = load(column_sum + j), column_top = extremes ? load(column_extreme + j) : Vec{};
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      const Vec s = load(S + r * ld + j);
      const Vec e = exp2((s - origin) * c);
      row_sum[r] += e;
      column += e;
      if (keep == Keep::Float32) store(static_cast<float*>(kept) + r * columns + j, e);
      if (keep == Keep::BFloat16) store_bfloat16(e, static_cast<uint16_t*>(kept) + r * columns + j);
      if (extremes) {
        row_top[r] = max(row_top[r], s * sign);
        column_top = max(column_top, s * sign);
      }
    }
    store(column_sum + j, column);
    if (extremes) store(column_extreme + j, column_top);
  }
  for (int r = 0; r < group; ++r) {
    row_total[r] += sum(row_sum[r]);
    if (extremes) row_extreme[r] = sign * max_of(sign * row_extreme[r], max(row_top[r]));
  }
}

template <bool extremes, Keep keep>
void sum_exponentials_of_tile(const float* S, int64_t ld, int64_t rows, int64_t columns, float c, float origin,
                              double* row_total, float* row_extreme, double* column_total, float* column_extreme,
                              void* kept) {
  const float sign = c < 0 ? -1 : 1;
  alignas(64) float column_sum[kMaxColumns] = {}, column_top[kMaxColumns];
  for (int64_t j = 0; j < columns; ++j) column_top[j] = -__builtin_inff();
  const auto take = [&]<int group>(int64_t r) {
    constexpr int64_t bytes = keep == Keep::Float32 ? 4 : keep == Keep::BFloat16 ? 2 : 0;
    sum_exponentials_of<group, extremes, keep>(S + r * ld, ld, columns, c, origin, sign, row_total + r,
                                               extremes ? row_extreme + r : nullptr, column_sum, column_top,
                                               static_cast<char*>(kept) + r * columns * bytes);
  };
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) take.template operator()<4>(r);
  for (; r < rows; ++r) take.template operator()<1>(r);
  if (!column_total) return;
  for (int64_t j = 0; j < columns; ++j) {
    column_total[j] += column_sum[j];
    if (extremes) column_extreme[j] = sign * max_of(sign * column_extreme[j], column_top[j]);
  }
}

void sum_exponentials(const float* S, int64_t ld, int64_t rows, int64_t columns, float c, float origin,
                      double* row_total, float* row_extreme, double* column_total, float* column_extreme, void* kept,
                      bool narrow) {
  const auto choose = [&]<Keep keep>() {
    return row_extreme ? sum_exponentials_of_tile<true, keep> : sum_exponentials_of_tile<false, keep>;
  };
  const auto f = !kept ? choose.template operator()<Keep::Nowhere>()
      : narrow         ? choose.template operator()<Keep::BFloat16>()
                       : choose.template operator()<Keep::Float32>();
  f(S, ld, rows, columns, c, origin, row_total, row_extreme, column_total, column_extreme, kept);
}

// Moves a row's origin, and the sum about it, to `extreme` if that lies further in the direction of `sign`. Returns
// false if there is nothing to sum: every entry seen so far, including these, is excluded.
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
    // A row, or below a column, with nothing in it keeps origin 0: its exponentials are then 0, or NaN if it has a NaN,
    // which the extreme need not be.
    const float origin = move_origin(max(extreme), sign, c, row_origin[r], row_total[r]) ? row_origin[r] : 0;
    for (int64_t j = 0; j < columns; j += kLanes) e += exp2((load(row + j) - origin) * c);
    row_total[r] += sum(e);
  }
  if (!column_total) return;
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec extreme = lowest, e = {}, origin = {};
    for (int64_t r = 0; r < rows; ++r) extreme = max(extreme, load(S + r * ld + j) * sign);
    for (int i = 0; i < kLanes; ++i)
      if (move_origin(extreme[i], sign, c, column_origin[j + i], column_total[j + i])) origin[i] = column_origin[j + i];
    for (int64_t r = 0; r < rows; ++r) e += exp2((load(S + r * ld + j) - origin) * c);
    for (int i = 0; i < kLanes; ++i) column_total[j + i] += e[i];
  }
}

// The exponentials E, each row about its own origin or all about a shared one.
void exponentials(float* S, int64_t ld, int64_t rows, int64_t columns, float c, const float* shared_origin,
                  double* row_total, float* row_extreme, float* sums, int64_t dim, void* half) {
  const float sign = c < 0 ? -1 : 1;
  for (int64_t r = 0; r < rows; ++r) {
    float* const row = S + r * ld;
    uint16_t* const narrow = half ? static_cast<uint16_t*>(half) + r * columns : nullptr;
    Vec top = broadcast(-__builtin_inff());
    float origin = 0;
    if (shared_origin) {
      origin = *shared_origin;
    } else {
      for (int64_t j = 0; j < columns; j += kLanes) top = max(top, load(row + j) * sign);
      const float before = row_extreme[r];
      if (move_origin(max(top), sign, c, row_extreme[r], row_total[r])) origin = row_extreme[r];
      if (row_extreme[r] != before && before != -sign * __builtin_inff()) {
        const Vec factor = exp2(broadcast((before - row_extreme[r]) * c));
        for (int64_t d = 0; d < dim; d += kLanes) store(sums + r * dim + d, load(sums + r * dim + d) * factor);
      }
    }
    Vec total = {};
    for (int64_t j = 0; j < columns; j += 2 * kLanes) {
      const Vec s0 = load(row + j), s1 = load(row + j + kLanes);
      if (shared_origin) top = max(top, max(s0 * sign, s1 * sign));
      const Vec e0 = exp2((s0 - origin) * c), e1 = exp2((s1 - origin) * c);
      total += e0 + e1;
      if (narrow) {
        store_bfloat16(e0, e1, narrow + j);
      } else {
        store(row + j, e0);
        store(row + j + kLanes, e1);
      }
    }
    row_total[r] += sum(total);
    if (shared_origin) row_extreme[r] = sign * max_of(sign * row_extreme[r], max(top));
  }
}

void weights(float* S, int64_t ld, int64_t rows, int64_t columns, float c, float origin, const float* a,
             const float* b, void* half, void* pairs) {
  each_weight(S, ld, rows, columns, static_cast<uint16_t*>(half), static_cast<uint16_t*>(pairs),
              [=](int64_t r, int64_t j) {
                return exp2((load(S + r * ld + j) - origin) * c) * (b ? a[r] + load(b + j) : broadcast(a[r]));
              });
}

void weights_online(float* S, int64_t ld, int64_t rows, int64_t columns, float c, const float* a,
                    const float* row_origin, const float* b, const float* column_origin, void* half, void* pairs) {
  if (!b) {
    each_weight(S, ld, rows, columns, static_cast<uint16_t*>(half), static_cast<uint16_t*>(pairs),
                [=](int64_t r, int64_t j) { return exp2((load(S + r * ld + j) - row_origin[r]) * c) * a[r]; });
    return;
  }
  each_weight(S, ld, rows, columns, static_cast<uint16_t*>(half), static_cast<uint16_t*>(pairs),
              [=](int64_t r, int64_t j) {
                const Vec s = load(S + r * ld + j);
                return exp2((s - row_origin[r]) * c) * a[r] + exp2((s - load(column_origin + j)) * c) * load(b + j);
              });
}

void weights_of_kept(const void* E, int64_t rows, int64_t columns, const float* a, const float* b, float* W, void* half,
                     void* pairs) {
  const auto coefficient = [=](int64_t r, int64_t j) { return b ? a[r] + load(b + j) : broadcast(a[r]); };
  if (half) {
    each_weight(W, columns, rows, columns, static_cast<uint16_t*>(half), static_cast<uint16_t*>(pairs),
                [=](int64_t r, int64_t j) {
                  return load_bfloat16(static_cast<const uint16_t*>(E) + r * columns + j) * coefficient(r, j);
                });
  } else {
    each_weight(W, columns, rows, columns, nullptr, nullptr, [=](int64_t r, int64_t j) {
      return load(static_cast<const float*>(E) + r * columns + j) * coefficient(r, j);
    });
  }
}

}  // namespace

extern const SoftmaxTiles softmax_tiles;
const SoftmaxTiles softmax_tiles = {
    sum_exponentials, sum_exponentials_online, exponentials, weights, weights_online, weights_of_kept,
};

}  // namespace fastssl::FASTSSL_ISA
