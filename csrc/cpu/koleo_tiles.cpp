// The work of KoLeo on a few rows, and on a tile of their products, compiled once per instruction set.
#include "koleo_tiles.h"

#include "common/rows.h"
#include "common/simd.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// f(d, i) for all d < dim, i being the same for those that are kLanes apart.
template <typename F>
inline void each(int64_t dim, const F& f) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes)
    for (int i = 0; i < kLanes; ++i) f(d + i, i);
  for (int i = 0; d + i < dim; ++i) f(d + i, i);
}

template <typename T>
inline T total(const T (&partial)[kLanes]) {
  T sum = 0;
  for (const T x : partial) sum += x;
  return sum;
}

void normalize(const Rows& x, int64_t first, int64_t count, double eps, double* inverse, float* scratch, float* z) {
  for (int64_t i = first; i < first + count; ++i) {
    const float* const row = row_of(x[i], x.element, x.dim, 1, scratch);
    double partial[kLanes] = {};
    each(x.dim, [&](int64_t d, int l) { partial[l] += static_cast<double>(row[d]) * row[d]; });
    const double norm = __builtin_sqrt(total(partial)), factor = 1 / (norm < eps ? eps : norm);
    inverse[i] = norm < eps ? -factor : factor;
    if (z)
      for (int64_t d = 0; d < x.dim; ++d) z[i * x.dim + d] = static_cast<float>(row[d] * factor);
  }
}

void center(const float* z, int64_t first, int64_t count, int64_t dim, const float* middle, float half, float* y,
            float* offset) {
  for (int64_t i = first; i < first + count; ++i) {
    double partial[kLanes] = {};
    each(dim, [&](int64_t d, int l) {
      y[i * dim + d] = z[i * dim + d] - middle[d];
      partial[l] += static_cast<double>(z[i * dim + d]) * middle[d];
    });
    offset[i] = static_cast<float>(total(partial) - half);
  }
}

float product(const float* a, const float* b, int64_t dim) {
  Vec partial[4] = {};  // four sums need not wait for each other
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) partial[v] += load(a + d + v * kLanes) * load(b + d + v * kLanes);
  for (; d + kLanes <= dim; d += kLanes) partial[0] += load(a + d) * load(b + d);
  float rest = 0;
  for (; d < dim; ++d) rest += a[d] * b[d];
  return sum((partial[0] + partial[1]) + (partial[2] + partial[3])) + rest;
}

// Whether x may be for a list with this threshold: NaN is for all.
inline IntVec may_enter(Vec x, Vec threshold) { return ~(x < threshold); }

inline bool any(IntVec mask) {
  int32_t bits[kLanes], found = 0;
  store(bits, mask);
  for (int i = 0; i < kLanes; ++i) found |= bits[i];
  return found;
}

// Row j, of this product, into the list of row i.
void enter(const Nearest& nearest, int64_t i, float x, int64_t j) {
  float* const value = nearest.value + (i - nearest.first) * nearest.k;
  int64_t* const index = nearest.index + (i - nearest.first) * nearest.k;
  int64_t at = nearest.k;
  for (; at > 0 && (x > value[at - 1] || (x == value[at - 1] && j < index[at - 1])); --at) {
    if (at == nearest.k) continue;
    value[at] = value[at - 1];
    index[at] = index[at - 1];
  }
  if (at == nearest.k) return;
  value[at] = x;
  index[at] = j;
  nearest.threshold[i] = value[nearest.k - 1] - nearest.margin - nearest.offset[i];
}

void find(const Nearest& nearest, const float* s, int64_t row, int64_t rows, int64_t column, int64_t columns,
          bool both) {
  const int64_t ld = (columns + 31) / 32 * 32;
  const float *const of_columns = nearest.threshold + column, *const offset = nearest.offset + column;
  for (int64_t i = row; i < row + rows; ++i, s += ld) {
    const float *const of_row = nearest.threshold + i, own_offset = nearest.offset[i];
    const auto candidates = [&](int64_t c) {
      const IntVec for_row = may_enter(load(s + c) + load(offset + c), broadcast(*of_row));
      return both ? for_row | may_enter(load(s + c) + own_offset, load(of_columns + c)) : for_row;
    };
    IntVec found = {};
    for (int64_t c = 0; c < ld; c += kLanes) found |= candidates(c);
    if (!any(found)) continue;
    const int64_t group = i / nearest.size * nearest.size;
    for (int64_t c = 0; c < ld; c += kLanes) {
      if (!any(candidates(c))) continue;
      for (int64_t l = c; l < c + kLanes && l < columns; ++l) {
        const int64_t j = column + l;
        const bool for_row = !(s[l] + offset[l] < *of_row), for_column = both && !(s[l] + own_offset < of_columns[l]);
        if (!(for_row || for_column) || i == j || j < group || j >= group + nearest.size) continue;
        const float exact = product(nearest.z + i * nearest.dim, nearest.z + j * nearest.dim, nearest.dim);
        const float x = exact == exact ? exact : kInfinity;
        if (for_row && i >= nearest.first && i < nearest.first + nearest.own) enter(nearest, i, x, j);
        if (for_column && j >= nearest.first && j < nearest.first + nearest.own) enter(nearest, j, x, i);
      }
    }
  }
}

double distance(const float* a, const float* b, int64_t dim, float eps) {
  double partial[kLanes] = {};
  each(dim, [&](int64_t d, int l) {
    const float apart = a[d] - b[d] + eps;
    partial[l] += static_cast<double>(apart) * apart;
  });
  return __builtin_sqrt(total(partial));
}

void add_difference(float factor, float inverse_distance, const float* a, const float* b, int64_t dim, float eps,
                    double* sums) {
  for (int64_t d = 0; d < dim; ++d)
    sums[d] += static_cast<double>(factor) * ((a[d] - b[d] + eps) * inverse_distance);
}

}  // namespace

extern const KoleoTiles koleo_tiles;
const KoleoTiles koleo_tiles = {normalize, center, find, distance, add_difference};

}  // namespace fastssl::FASTSSL_ISA
