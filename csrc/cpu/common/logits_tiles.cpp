// The inside of a tile of logits, compiled once per instruction set.
//
// Each tile has origins of its own, the largest logit of each row in it: exponentials are at most 1, nothing has to be
// rescaled when a later tile has a larger logit, and tiles can be visited in any order, by any thread.
#include "common/logits_tiles.h"

#include "common/simd.h"
#include "common/weights.h"

namespace fastssl::FASTSSL_ISA {
namespace {

typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

constexpr float kNegativeInfinity = -__builtin_inff();
constexpr int kGroup = 4;  // classes at a time, so that what is summed is loaded and stored once for four

inline Vec load_bfloat16(const uint16_t* p) {
  return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(p), Words) << 16);
}

template <int group>
void largest_of(const float* L, int64_t rows, const float* shift, float* largest) {
  for (int64_t j = 0; j < rows; j += kLanes) {
    Vec top = load(largest + j);
#pragma GCC unroll 4
    for (int k = 0; k < group; ++k) {
      const Vec v = load(L + k * rows + j);
      top = max(top, shift ? v - shift[k] : v);
    }
    store(largest + j, top);
  }
}

template <int group>
void exponentials_of(const float* L, int64_t rows, int64_t at, const float* shift, float c, float* out, uint16_t* half,
                     const float* largest, float* total, const float* const* targets, int64_t count, float* distance) {
  for (int64_t j = 0; j < rows; j += 2 * kLanes) {
    Vec top[2], sums[2];
    for (int i = 0; i < 2; ++i) {
      top[i] = load(largest + j + i * kLanes);
      top[i] = top[i] == kNegativeInfinity ? Vec{} : top[i];  // of nothing but minus infinity
      sums[i] = load(total + j + i * kLanes);
    }
    Vec below[group][2];
#pragma GCC unroll 4
    for (int k = 0; k < group; ++k) {
      Vec e[2];
      for (int i = 0; i < 2; ++i) {
        const Vec v = load(L + k * rows + j + i * kLanes);
        below[k][i] = top[i] - (shift ? v - shift[k] : v);
        e[i] = exp2(below[k][i] * -c);
        sums[i] += e[i];
        if (out) store(out + k * rows + j + i * kLanes, e[i]);
      }
      if (half) store_bfloat16(e[0], e[1], half + k * rows + j);
    }
    for (int i = 0; i < 2; ++i) store(total + j + i * kLanes, sums[i]);
    for (int64_t t = 0; t < count; ++t)
      for (int i = 0; i < 2; ++i) {
        float* const to = distance + t * rows + j + i * kLanes;
        Vec d = load(to);
#pragma GCC unroll 4
        for (int k = 0; k < group; ++k) d += load(targets[t] + at + k * rows + j + i * kLanes) * below[k][i];
        store(to, d);
      }
  }
}

void exponentials(const float* L, const LogitShape& shape, const float* shift, float c, float* out, void* half_,
                  float* largest, float* total, const float* const* targets, int64_t count, float* distance) {
  uint16_t* const half = static_cast<uint16_t*>(half_);
  const int64_t rows = shape.rows, whole = shape.count / kGroup * kGroup;
  for (int64_t r = 0; r < rows; ++r) largest[r] = kNegativeInfinity, total[r] = 0;
  for (int64_t i = 0; i < count * rows; ++i) distance[i] = 0;
  const auto shift_at = [&](int64_t k) { return shift ? shift + k : nullptr; };
  for (int64_t k = 0; k < whole; k += kGroup) largest_of<kGroup>(L + k * rows, rows, shift_at(k), largest);
  for (int64_t k = whole; k < shape.count; ++k) largest_of<1>(L + k * rows, rows, shift_at(k), largest);
  const auto take = [&]<int group>(int64_t k) {
    exponentials_of<group>(L + k * rows, rows, k * rows, shift_at(k), c, out ? out + k * rows : nullptr,
                           half ? half + k * rows : nullptr, largest, total, targets, count, distance);
  };
  for (int64_t k = 0; k < whole; k += kGroup) take.template operator()<kGroup>(k);
  for (int64_t k = whole; k < shape.count; ++k) take.template operator()<1>(k);
  const auto clear = [&](int64_t k, int64_t from) {
    for (int64_t r = from; r < rows; ++r) {
      if (out) out[k * rows + r] = 0;
      if (half) half[k * rows + r] = 0;
    }
  };
  for (int64_t k = 0; shape.valid < rows && k < shape.count; ++k) clear(k, shape.valid);
  for (int64_t k = shape.count; k < shape.classes; ++k) clear(k, 0);
}

void combine(const float* largest, const float* total, int64_t tiles, int64_t ld, int64_t rows, float c, float* top,
             float* sum) {
  for (int64_t j = 0; j < rows; j += kLanes) {
    Vec peak = broadcast(kNegativeInfinity), all = {};
    for (int64_t i = 0; i < tiles; ++i) peak = max(peak, load(largest + i * ld + j));
    for (int64_t i = 0; i < tiles; ++i) all += load(total + i * ld + j) * exp2((load(largest + i * ld + j) - peak) * c);
    store(top + j, peak);
    store(sum + j, all);
  }
}

void combine_distance(const float* distance, const float* largest, const float* top, const float* target_largest,
                      const float* target_total, const float* target_top, int64_t tiles, int64_t ld, int64_t rows,
                      float target_c, float* out) {
  for (int64_t j = 0; j < rows; j += kLanes) {
    const Vec peak = load(top + j), target_peak = load(target_top + j);
    Vec all = {};
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t at = i * ld + j;
      const Vec factor = exp2((load(target_largest + at) - target_peak) * target_c);
      all += factor * (load(distance + at) + (peak - load(largest + at)) * load(target_total + at));
    }
    store(out + j, all);
  }
}

void factors(const float* a, const float* largest, const float* top, int64_t rows, int64_t valid, float c, float* out) {
  for (int64_t j = 0; j < rows; j += kLanes)
    store(out + j, load(a + j) * exp2((load(largest + j) - load(top + j)) * c));
  for (int64_t r = valid; r < rows; ++r) out[r] = 0;
}

template <typename At>
inline void weights_of(const At& at, const LogitShape& shape, const float* factor, const float* const* target_factors,
                       int64_t count, const float* uniform, const float* uniform_factor, float* out, uint16_t* half,
                       uint16_t* pairs) {
  const int64_t rows = shape.rows;
  for (int64_t k = 0; k < shape.classes; k += 2)
    for (int64_t j = 0; j < rows; j += kLanes) {
      const int64_t i0 = k * rows + j, i1 = i0 + rows;
      const Vec f = load(factor + j);
      Vec w0 = at(-1, i0) * f, w1 = at(-1, i1) * f;
      for (int64_t t = 0; t < count; ++t) {
        const Vec g = load(target_factors[t] + j);
        w0 -= at(t, i0) * g;
        w1 -= at(t, i1) * g;
      }
      if (uniform) {
        const Vec g = load(uniform_factor + j);
        w0 -= uniform[k] * g;
        w1 -= uniform[k + 1] * g;
      }
      if (half) {
        store_pair(w0, w1, half + i0, rows, pairs + pair_at(shape, k, j));
      } else {
        store(out + i0, w0);
        store(out + i1, w1);
      }
    }
}

void weights(void* E, const LogitShape& shape, const float* factor, const void* const* targets,
             const float* const* target_factors, int64_t count, const float* uniform, const float* uniform_factor,
             void* half, void* pairs) {
  if (half) {
    const auto at = [&](int64_t t, int64_t i) {
      return load_bfloat16(static_cast<const uint16_t*>(t < 0 ? E : targets[t]) + i);
    };
    weights_of(at, shape, factor, target_factors, count, uniform, uniform_factor, nullptr,
               static_cast<uint16_t*>(half), static_cast<uint16_t*>(pairs));
  } else {
    const auto at = [&](int64_t t, int64_t i) { return load(static_cast<const float*>(t < 0 ? E : targets[t]) + i); };
    weights_of(at, shape, factor, target_factors, count, uniform, uniform_factor, static_cast<float*>(E), nullptr,
               nullptr);
  }
}

void distances(const float* L, const LogitShape& shape, const float* shift, const float* largest, const float* a,
               float* out) {
  for (int64_t j = 0; j < shape.rows; j += kLanes) {
    Vec top = load(largest + j), sum = {};
    top = top == kNegativeInfinity ? Vec{} : top;
    for (int64_t k = 0; k < shape.count; ++k) {
      const Vec v = load(L + k * shape.rows + j);
      sum += a[k] * (top - (shift ? v - shift[k] : v));
    }
    store(out + j, sum);
  }
}

void class_sums(const void* W, const LogitShape& shape, bool half, float* out) {
  for (int64_t k = 0; k < shape.count; ++k) {
    Vec total = {};
    for (int64_t i = k * shape.rows; i < (k + 1) * shape.rows; i += kLanes)
      total += half ? load_bfloat16(static_cast<const uint16_t*>(W) + i) : load(static_cast<const float*>(W) + i);
    out[k] += sum(total);
  }
}

}  // namespace

extern const LogitsTiles logits_tiles;
const LogitsTiles logits_tiles = {exponentials, combine, combine_distance, factors, distances, weights, class_sums};

}  // namespace fastssl::FASTSSL_ISA
