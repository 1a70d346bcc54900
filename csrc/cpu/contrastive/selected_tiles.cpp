// A row with rows from anywhere, in float32, compiled once per instruction set.
#include "contrastive/selected_tiles.h"

#include "common/rows.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr int kAtOnce = 4;  // rows that share the loads of one

int64_t padded(int64_t dim) { return (dim + 31) / 32 * 32; }

void widen(const void* x, Element element, int64_t dim, float* out) { load_row(x, element, dim, 1, out); }

// Sums in as many registers as hide the latency of one.
template <int Count>
void dots_of(const float* x, const float* const* rows, int64_t dim, float* out) {
  Vec sums[Count][2] = {};
  for (int64_t d = 0; d < dim; d += 2 * kLanes)
    for (int half = 0; half < 2; ++half) {
      const Vec v = load(x + d + half * kLanes);
      for (int j = 0; j < Count; ++j) sums[j][half] += v * load(rows[j] + d + half * kLanes);
    }
  for (int j = 0; j < Count; ++j) out[j] = sum(sums[j][0] + sums[j][1]);
}

void dots(const float* x, const void* const* rows, int64_t count, Element element, int64_t dim, float* spare,
          float* out) {
  const bool as_they_are = element == Element::Float32 && dim % 32 == 0;
  int64_t j = 0;
  for (; as_they_are && j + kAtOnce <= count; j += kAtOnce)
    dots_of<kAtOnce>(x, reinterpret_cast<const float* const*>(rows + j), dim, out + j);
  for (; j < count; ++j) {
    const float* const row = row_of(rows[j], element, dim, 1, spare);
    dots_of<1>(x, &row, padded(dim), out + j);
  }
}

template <int Count>
void add_to(const float* weights, const float* const* rows, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    Vec total = load(out + d);
    for (int j = 0; j < Count; ++j) total += weights[j] * load(rows[j] + d);
    store(out + d, total);
  }
}

void add(const float* weights, const void* const* rows, int64_t count, Element element, int64_t dim, float* spare,
         float* out) {
  const bool as_they_are = element == Element::Float32 && dim % 32 == 0;
  int64_t j = 0;
  for (; as_they_are && j + kAtOnce <= count; j += kAtOnce)
    add_to<kAtOnce>(weights + j, reinterpret_cast<const float* const*>(rows + j), dim, out);
  for (; j < count; ++j) {
    const float* const row = row_of(rows[j], element, dim, 1, spare);
    add_to<1>(weights + j, &row, padded(dim), out);
  }
}

double exponentials(float* values, int64_t count, float scale, float origin) {
  const float factor = scale * 1.44269504f;
  for (int64_t i = 0; i < count; i += kLanes) store(values + i, exp2((load(values + i) - origin) * factor));
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

float norm(const void* x, Element element, int64_t dim, float* spare) {
  const float* const row = row_of(x, element, dim, 1, spare);
  float square;
  dots_of<1>(row, &row, padded(dim), &square);
  if (square > 1e-20f && square < 1e30f) return __builtin_sqrtf(square);
  double exact = 0;
  for (int64_t d = 0; d < dim; ++d) exact += static_cast<double>(row[d]) * row[d];
  return static_cast<float>(__builtin_sqrt(exact));
}

void project(const float* sum, const void* x, Element element, int64_t dim, float along, float factor, float* spare,
             void* out) {
  if (x) {
    const float* const row = row_of(x, element, dim, 1, spare);
    for (int64_t d = 0; d < dim; ++d) spare[d] = sum[d] - along * row[d];
  }
  store_row(x ? spare : sum, element, dim, factor, out);
}

}  // namespace

extern const SelectedTiles selected_tiles;
const SelectedTiles selected_tiles = {widen, dots, add, exponentials, norm, project};

}  // namespace fastssl::FASTSSL_ISA
