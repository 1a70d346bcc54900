// The work within a panel and within a tile of the correlation losses, compiled once per instruction set.
//
// Sums over rows are taken in two levels, kChunk rows at a time: their rounding error grows like the square root of
// that of a plain loop.
#include "correlation/correlation_tiles.h"

#include "common/rows.h"
#include "common/simd.h"
#include "common/weights.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr int64_t kChunk = 32;   // rows at a time, which fit the first-level cache
constexpr int64_t kColumns = 32;  // columns at a time, whose sums fit registers
constexpr int64_t kVectors = kColumns / kLanes;

void fill(float* x, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) x[i] = value;
}

// sums[c] = sum_n term(n, c). A term is a vector of columns from c on, and is asked for once. `begin` is called with
// the rows of each chunk before they are summed.
template <typename Begin, typename Term>
inline void sum_rows(int64_t rows, int64_t width, float* sums, const Begin& begin, const Term& term) {
  fill(sums, width, 0);
  for (int64_t first = 0; first < rows; first += kChunk) {
    const int64_t last = first + kChunk < rows ? first + kChunk : rows;
    begin(first, last);
    for (int64_t c = 0; c < width; c += kColumns) {
      Vec partial[kVectors] = {};
      for (int64_t n = first; n < last; ++n)
        for (int64_t v = 0; v < kVectors; ++v) partial[v] += term(n, c + v * kLanes);
      for (int64_t v = 0; v < kVectors; ++v) store(sums + c + v * kLanes, load(sums + c + v * kLanes) + partial[v]);
    }
  }
}

template <typename Term>
inline void sum_rows(int64_t rows, int64_t width, float* sums, const Term& term) {
  sum_rows(rows, width, sums, [](int64_t, int64_t) {}, term);
}

// Row n of the columns as float32, zero in padding.
inline void load_columns(const Columns& z, int64_t n, float* out) {
  load_row(static_cast<const char*>(z.z[n]) + z.first * bytes_of(z.z.element), z.z.element, z.count, 1, out);
  fill(out + z.count, z.width - z.count, 0);
}

void standardise(const Columns& z, int64_t rows, int64_t padded_rows, bool divide, double eps, double divisor,
                 float* panel, float* variance, float* rstd, float* scratch) {
  const int64_t width = z.width;
  float* const shift = scratch;
  float* const mean = scratch + width;
  // The first row is subtracted before the mean is taken, so that a constant column becomes exactly 0.
  load_columns(z, 0, shift);
  const auto load_chunk = [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) load_columns(z, n, panel + n * width);
  };
  sum_rows(rows, width, mean, load_chunk, [&](int64_t n, int64_t c) {
    float* const x = panel + n * width + c;
    const Vec v = load(x) - load(shift + c);
    store(x, v);
    return v;
  });
  for (int64_t c = 0; c < width; ++c) mean[c] /= static_cast<float>(rows);
  sum_rows(rows, width, variance, [&](int64_t n, int64_t c) {
    float* const x = panel + n * width + c;
    const Vec v = load(x) - load(mean + c);
    store(x, v);
    return v * v;
  });
  for (int64_t c = 0; c < width; ++c) {
    variance[c] = static_cast<float>(variance[c] / divisor);
    rstd[c] = divide ? static_cast<float>(1 / __builtin_sqrt(variance[c] + eps)) : 1;
  }
  fill(rstd + z.count, width - z.count, 0);  // where eps is 0, padding would become NaN
  for (int64_t n = 0; divide && n < rows; ++n)
    for (int64_t c = 0; c < width; c += kLanes) {
      float* const x = panel + n * width + c;
      store(x, load(x) * load(rstd + c));
    }
  fill(panel + rows * width, (padded_rows - rows) * width, 0);
}

inline Vec round_to_bfloat16(Vec x) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));
  const Bits u = reinterpret_cast<Bits>(x);
  return x == x ? reinterpret_cast<Vec>((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000) : x;
}

void multiply_columns(const float* a, const float* b, int64_t rows, int64_t width, bool rounded, float* sums) {
  sum_rows(rows, width, sums, [&](int64_t n, int64_t c) {
    const Vec x = load(a + n * width + c), y = load(b + n * width + c);
    return rounded ? round_to_bfloat16(x) * round_to_bfloat16(y) : x * y;
  });
}

void distances(const Columns& x, const Columns& y, int64_t rows, float* sums, float* scratch) {
  static_assert(kScratchRows >= 2 * kChunk);
  const int64_t width = x.width;
  float* const of_y = scratch + kChunk * width;
  int64_t first = 0;
  const auto load_chunk = [&](int64_t from, int64_t to) {
    first = from;
    for (int64_t n = from; n < to; ++n) {
      load_columns(x, n, scratch + (n - first) * width);
      load_columns(y, n, of_y + (n - first) * width);
    }
  };
  sum_rows(rows, width, sums, load_chunk, [&](int64_t n, int64_t c) {
    const Vec apart = load(scratch + (n - first) * width + c) - load(of_y + (n - first) * width + c);
    return apart * apart;
  });
}

void finish(float* P, const float* a, const float* b, const float* row_weight, int64_t rows, float alpha,
            const ColumnTerms& terms, double divisor, float pull, const Columns& x, const Columns& y, float factor,
            float* scratch, Element element, int64_t stride, void* out) {
  const int64_t width = x.width;
  float* const mean = scratch;
  float* const along = scratch + width;
  float* const x_row = scratch + 2 * width;
  float* const y_row = scratch + 3 * width;
  sum_rows(rows, width, mean, [&](int64_t n, int64_t c) {
    float* const p = P + n * width + c;
    const Vec own = load(a + n * width + c), other = load(b + n * width + c);
    const float weight = row_weight ? row_weight[n] : 0;
    const Vec v = (load(p) + own * weight) * alpha + load(terms.own + c) * own + load(terms.other + c) * other;
    store(p, v);
    return v;
  });
  for (int64_t c = 0; c < width; ++c) mean[c] /= static_cast<float>(rows);
  fill(along, width, 0);
  if (divisor != 0) {
    sum_rows(rows, width, along,
             [&](int64_t n, int64_t c) { return load(P + n * width + c) * load(a + n * width + c); });
    for (int64_t c = 0; c < width; ++c) along[c] = static_cast<float>(along[c] / divisor);
  }
  for (int64_t n = 0; n < rows; ++n) {
    float* const p = P + n * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec v = load(p + c) - load(mean + c) - load(a + n * width + c) * load(along + c);
      store(p + c, load(terms.rstd + c) * v);
    }
    if (pull != 0) {
      load_columns(x, n, x_row);
      load_columns(y, n, y_row);
      for (int64_t c = 0; c < width; c += kLanes)
        store(p + c, load(p + c) + (load(x_row + c) - load(y_row + c)) * pull);
    }
    store_row(p, element, x.count, factor, static_cast<char*>(out) + n * stride * bytes_of(element));
  }
}

// In double: the squares of a Gram matrix may be too large for a float.
double inner(const float* x, const float* y, int64_t count) {
  double partial[4 * kLanes] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int64_t k = 0; k < 4 * kLanes; ++k) partial[k] += static_cast<double>(x[i + k]) * y[i + k];
  double total = 0;
  for (; i < count; ++i) total += static_cast<double>(x[i]) * y[i];
  for (const double p : partial) total += p;
  return total;
}

}  // namespace

extern const CorrelationTiles correlation_tiles;
const CorrelationTiles correlation_tiles = {standardise, multiply_columns, distances, finish, inner};

}  // namespace fastssl::FASTSSL_ISA
