// Sums of tokens in float32, compiled once per instruction set.
#include "masking_tiles.h"

#include "common/rows.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr int64_t kRun = 512;  // elements at a time as float32, in the first-level cache

inline const char* at(const void* row, int64_t i, Element element) {
  return static_cast<const char*>(row) + i * bytes_of(element);
}

void add(const void* x, const void* y, Element element, int64_t dim, void* out) {
  float wide_x[kRun], wide_y[kRun];
  for (int64_t i = 0; i < dim; i += kRun) {
    const int64_t run = i + kRun < dim ? kRun : dim - i;
    load_row(at(x, i, element), element, run, 1, wide_x);
    load_row(at(y, i, element), element, run, 1, wide_y);
    for (int64_t d = 0; d < run; ++d) wide_x[d] += wide_y[d];
    store_row(wide_x, element, run, 1, static_cast<char*>(out) + i * bytes_of(element));
  }
}

void accumulate(const void* const* rows, int64_t count, Element element, int64_t dim, float* sums) {
  float sum[kRun], wide[kRun];
  for (int64_t i = 0; i < dim; i += kRun) {
    const int64_t run = i + kRun < dim ? kRun : dim - i;
    for (int64_t d = 0; d < run; ++d) sum[d] = 0;
    for (int64_t j = 0; j < count; ++j) {
      load_row(at(rows[j], i, element), element, run, 1, wide);
      for (int64_t d = 0; d < run; ++d) sum[d] += wide[d];
    }
    for (int64_t d = 0; d < run; ++d) sums[i + d] += sum[d];
  }
}

void round(const float* sums, Element element, int64_t dim, void* out) { store_row(sums, element, dim, 1, out); }

}  // namespace

extern const MaskingTiles masking_tiles;
const MaskingTiles masking_tiles = {add, accumulate, round};

}  // namespace fastssl::FASTSSL_ISA
