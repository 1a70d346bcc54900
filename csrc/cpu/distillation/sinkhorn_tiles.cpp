// The work of Sinkhorn-Knopp on a few rows of logits, compiled once per instruction set.
//
// Columns are taken in chunks. A chunk of a row is read in place or, if its elements have 16 bits or do not fill
// vectors, copied to a padded buffer. Several rows are taken together, so that the sums and maxima of columns are read
// and written once for all of them.
#include "distillation/sinkhorn_tiles.h"

#include "common/rows.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

inline int64_t chunk_at(int64_t first, int64_t columns) {
  return columns - first < kChunk ? columns - first : kChunk;
}

// Columns [first, first + count) of row i, followed by `pad` up to a whole vector.
inline const float* floats(const Rows& t, int64_t i, int64_t first, int64_t count, float pad, float* buffer) {
  const char* const x = static_cast<const char*>(t[i]) + first * bytes_of(t.element);
  if (t.element == Element::Float32 && count % kLanes == 0) return reinterpret_cast<const float*>(x);
  load_row(x, t.element, count, 1, buffer);
  for (int64_t j = count; j % 32; ++j) buffer[j] = pad;
  return buffer;
}

// Calls visit.operator()<group>(i) for groups of rows, then visit.operator()<1>(i) for those that are left.
template <int group, typename Visit>
void in_groups(int64_t first, int64_t count, const Visit& visit) {
  int64_t i = first;
  for (; i + group <= first + count; i += group) visit.template operator()<group>(i);
  for (; i < first + count; ++i) visit.template operator()<1>(i);
}

void sum_exponentials(const Rows& t, int64_t first, int64_t count, float c, float* total, float* top) {
  in_groups<8>(first, count, [&]<int group>(int64_t i) {
    alignas(64) float buffer[group][kChunk];
    for (int64_t k = 0; k < t.dim; k += kChunk) {
      const int64_t columns = chunk_at(k, t.dim);
      const float* x[group];
      for (int r = 0; r < group; ++r) x[r] = floats(t, i + r, k, columns, -kInfinity, buffer[r]);
      for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec before = load(top + k + j);
        Vec row[group], largest = before;
#pragma GCC unroll 8
        for (int r = 0; r < group; ++r) largest = max(row[r] = load(x[r] + j), largest);
        Vec sum = load(total + k + j) * exp2((before - largest) * c);
#pragma GCC unroll 8
        for (int r = 0; r < group; ++r) sum += exp2((row[r] - largest) * c);
        store(total + k + j, sum);
        store(top + k + j, largest);
      }
    }
  });
}

void add_exponentials(const float* more, const float* more_top, int64_t columns, float c, float* total, float* top) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Vec one = load(top + j), other = load(more_top + j), largest = max(one, other);
    store(total + j, load(total + j) * exp2((one - largest) * c) + load(more + j) * exp2((other - largest) * c));
    store(top + j, largest);
  }
}

// The exponentials of a chunk are relative to the chunk's own maximum, so that they are taken while it is in the
// first-level cache. At the end of the row its maximum and sum are known, and give one factor for each chunk.
template <int group>
void assign_group(const Rows& t, int64_t i, const float* center, float c, float* scratch, float* sums, float* out) {
  const int64_t width = (t.dim + 31) / 32 * 32, chunks = (t.dim + kChunk - 1) / kChunk;
  float *const tops = scratch + group * width, *const factors = tops + group * chunks;
  alignas(64) float buffer[kChunk];
  double total[group] = {};
  float row_top[group];
  for (int r = 0; r < group; ++r) row_top[r] = kLowest;
  for (int64_t k = 0, n = 0; k < t.dim; k += kChunk, ++n) {
    const int64_t columns = chunk_at(k, t.dim);
    for (int r = 0; r < group; ++r) {
      const float* const x = floats(t, i + r, k, columns, -kInfinity, buffer);
      float* const e = scratch + r * width + k;
      Vec top = broadcast(kLowest), total_of_chunk = {};
      for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec apart = load(x + j) - load(center + k + j);
        store(e + j, apart);
        top = max(apart, top);
      }
      const float origin = max(top);
      for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec exponential = exp2((load(e + j) - origin) * c);
        store(e + j, exponential);
        total_of_chunk += exponential;
      }
      tops[r * chunks + n] = origin;
      factors[r * chunks + n] = sum(total_of_chunk);
      row_top[r] = max_of(row_top[r], origin);
    }
  }
  for (int r = 0; r < group; ++r) {
    for (int64_t n = 0; n < chunks; ++n) {
      const int64_t at = r * chunks + n;
      const float scale = exp2(broadcast((tops[at] - row_top[r]) * c))[0];
      total[r] += double(factors[at]) * scale;
      factors[at] = scale;
    }
    const float inverse = static_cast<float>(1 / total[r]);
    for (int64_t n = 0; n < chunks; ++n) factors[r * chunks + n] *= inverse;
  }
  for (int64_t k = 0, n = 0; k < t.dim; k += kChunk, ++n) {
    const int64_t columns = chunk_at(k, t.dim);
    if (sums) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        Vec sum = load(scratch + k + j) * factors[n];
        for (int r = 1; r < group; ++r) sum += load(scratch + r * width + k + j) * factors[r * chunks + n];
        store(sums + k + j, load(sums + k + j) + sum);
      }
    } else {
      for (int r = 0; r < group; ++r) {
        const float *const e = scratch + r * width + k, factor = factors[r * chunks + n];
        float* const row = out + r * t.dim + k;
        for (int64_t j = 0; j < columns; ++j) row[j] = e[j] * factor;
      }
    }
  }
}

void assign(const Rows& t, int64_t first, int64_t count, const float* center, float c, float* scratch, float* sums,
            float* out) {
  const auto f = count == 4 ? assign_group<4> : count == 3 ? assign_group<3> : count == 2 ? assign_group<2> : assign_group<1>;
  f(t, first, center, c, scratch, sums, out);
}

void sum_rows(const Rows& t, int64_t first, int64_t count, float* sums) {
  in_groups<8>(first, count, [&]<int group>(int64_t i) {
    alignas(64) float buffer[group][kChunk];
    for (int64_t k = 0; k < t.dim; k += kChunk) {
      const int64_t columns = chunk_at(k, t.dim);
      const float* x[group];
      for (int r = 0; r < group; ++r) x[r] = floats(t, i + r, k, columns, 0, buffer[r]);
      for (int64_t j = 0; j < columns; j += kLanes) {
        Vec sum = load(x[0] + j);
#pragma GCC unroll 8
        for (int r = 1; r < group; ++r) sum += load(x[r] + j);
        store(sums + k + j, load(sums + k + j) + sum);
      }
    }
  });
}

}  // namespace

extern const SinkhornTiles sinkhorn_tiles;
const SinkhornTiles sinkhorn_tiles = {sum_exponentials, add_exponentials, assign, sum_rows};

}  // namespace fastssl::FASTSSL_ISA
