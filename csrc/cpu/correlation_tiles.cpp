// The inside of a panel and of a tile of the correlation losses, compiled once per instruction set.
//
// Sums over rows are taken in two levels, kChunk rows at a time, so that their rounding errors grow as the square
// root of what a plain loop's would.
#include "correlation_tiles.h"

#include "common/rows.h"
#include "common/simd.h"
#include "common/weights.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr int64_t kChunk = 32;   // rows: kChunk of a panel's fit the first-level cache
constexpr int64_t kColumns = 32;  // summed up in registers
constexpr int64_t kVectors = kColumns / kLanes;

void fill(float* x, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) x[i] = value;
}

// sums[c] = sum_n term(n, c), terms being vectors of columns from c on, each asked for once. `begin` is called with the
// rows of each chunk before they are summed.
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

void standardise(const Rows& z, int64_t rows, int64_t padded_rows, int64_t first, int64_t count, int64_t width,
                 bool divide, double eps, double divisor, float* panel, float* mean, float* variance, float* rstd,
                 float* scratch) {
  float* const shift = scratch;
  const int64_t offset = first * (z.element == Element::Float32 ? 4 : 2);
  const auto load_columns = [&](int64_t n, float* out) {
    load_row(static_cast<const char*>(z[n]) + offset, z.element, count, 1, out);
    for (int64_t c = count; c < width; ++c) out[c] = 0;
  };
  // Of what is left when the first row is subtracted: a constant column is then exactly 0.
  load_columns(0, shift);
  const auto load_chunk = [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) load_columns(n, panel + n * width);
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
    mean[c] += shift[c];
    variance[c] = static_cast<float>(variance[c] / divisor);
    rstd[c] = divide ? static_cast<float>(1 / __builtin_sqrt(variance[c] + eps)) : 1;
  }
  fill(rstd + count, width - count, 0);  // where eps is 0, padding would become NaN
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

void compare(const float* a, const float* b, int64_t rows, int64_t width, Comparison comparison, float* sums) {
  sum_rows(rows, width, sums, [&](int64_t n, int64_t c) {
    const Vec x = load(a + n * width + c), y = load(b + n * width + c);
    if (comparison == Comparison::SquaredDistances) return (x - y) * (x - y);
    return comparison == Comparison::Products ? x * y : round_to_bfloat16(x) * round_to_bfloat16(y);
  });
}

void finish(float* P, const float* a, const float* b, const float* row_weight, int64_t rows, int64_t width,
            int64_t count, float alpha, const ColumnTerms& terms, double divisor, float factor, float* scratch,
            Element element, int64_t stride, void* out) {
  float* const mean = scratch;
  float* const along = scratch + width;
  sum_rows(rows, width, mean, [&](int64_t n, int64_t c) {
    float* const p = P + n * width + c;
    const Vec x = load(a + n * width + c), y = load(b + n * width + c);
    const float weight = row_weight ? row_weight[n] : 0;
    const Vec v = (load(p) + x * weight) * alpha + load(terms.own + c) * x + load(terms.other + c) * y;
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
  const int64_t bytes = element == Element::Float32 ? 4 : 2;
  for (int64_t n = 0; n < rows; ++n) {
    float* const p = P + n * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec v = load(p + c) - load(mean + c) - load(a + n * width + c) * load(along + c);
      store(p + c, load(terms.rstd + c) * v + load(terms.constant + c));
    }
    store_row(p, element, count, factor, static_cast<char*>(out) + n * stride * bytes);
  }
}

double inner(const float* x, const float* y, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += 16 * kChunk) {  // float sums of a few products, double sums of those
    const int64_t last = first + 16 * kChunk < count ? first + 16 * kChunk : count;
    Vec some[4] = {};
    int64_t i = first;
    for (; i + 4 * kLanes <= last; i += 4 * kLanes)
      for (int k = 0; k < 4; ++k) some[k] += load(x + i + k * kLanes) * load(y + i + k * kLanes);
    for (; i < last; ++i) total += x[i] * y[i];
    total += sum(some[0] + some[1] + (some[2] + some[3]));
  }
  return total;
}

void round_tile(const float* C, int64_t rows, int64_t columns, void* half, void* pairs) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t j = 0; j < columns; j += kLanes)
      store_pair(load(C + r * columns + j), load(C + (r + 1) * columns + j),
                 static_cast<uint16_t*>(half) + r * columns + j, columns,
                 static_cast<uint16_t*>(pairs) + r * columns + 2 * j);
}

}  // namespace

extern const CorrelationTiles correlation_tiles;
const CorrelationTiles correlation_tiles = {standardise, compare, finish, inner, round_tile};

}  // namespace fastssl::FASTSSL_ISA
