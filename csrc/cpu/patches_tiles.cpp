// The work on one patch in the losses on masked patches, compiled once per instruction set.
#include "patches_tiles.h"

#include "common/convert.h"
#include "common/simd.h"

namespace fastssl::FASTSSL_ISA {
namespace {

inline float absolute(float x) { return __builtin_fabsf(x); }
inline Vec absolute(Vec x) { return x < 0.f ? -x : x; }
inline float sign(float x) { return x > 0.f ? 1.f : x < 0.f ? -1.f : x; }
inline Vec sign(Vec x) { return x > 0.f ? broadcast(1.f) : x < 0.f ? broadcast(-1.f) : x; }

// Memory that will be needed next, prefetched while a loop runs: at element i of the loop, what lies i * step bytes on.
struct Next {
  const char* data = nullptr;
  int64_t step = 0;

  void fetch(int64_t i) const {
    if (data) __builtin_prefetch(data + i * step);
  }
};

// The sum of term(x, y) over all elements. `term` takes vectors of elements, and single ones at the end.
template <typename Term>
inline float sum_of(const float* x, const float* y, int64_t count, Term term, Next next = {}) {
  constexpr int kSums = 4;
  Vec sums[kSums]{};
  int64_t i = 0;
  for (; i + kSums * kLanes <= count; i += kSums * kLanes)
    for (int k = 0; k < kSums; ++k) {
      const int64_t j = i + k * kLanes;
      next.fetch(j);
      sums[k] += term(load(x + j), load(y + j));
    }
  for (; i + kLanes <= count; i += kLanes) sums[0] += term(load(x + i), load(y + i));
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) total += term(x[i], y[i]);
  return total;
}

template <typename Result>
inline void write(const float* x, const float* y, int64_t count, float* out, Result result, Next next = {}) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    next.fetch(i);
    store(out + i, result(load(x + i), load(y + i)));
  }
  for (; i < count; ++i) out[i] = result(x[i], y[i]);
}

// `count` elements, `stride` apart, as float32.
void widen(const void* x, Element element, int64_t stride, int64_t count, float* out) {
  if (element == Element::Float32) {
    const float* const from = static_cast<const float*>(x);
    if (stride == 1) return write(from, from, count, out, [](auto v, auto) { return v; });
    for (int64_t i = 0; i < count; ++i) out[i] = from[i * stride];
    return;
  }
  const uint16_t* const from = static_cast<const uint16_t*>(x);
  const auto each = [&](auto convert) {
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) out[i] = convert(from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = convert(from[i * stride]);
    }
  };
  if (element == Element::BFloat16) each(bfloat16_to_float);
  else each(half_to_float);
}

void narrow(const float* x, Element element, int64_t count, void* out) {
  uint16_t* const to = static_cast<uint16_t*>(out);
  if (element == Element::BFloat16) {
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_bfloat16(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_half(x[i]);
  }
}

// The normalisation of elements: (x - mean) * scale.
struct Standard {
  float mean, scale;
};

// The variance is unbiased, and is computed from the differences to the mean.
Standard standard_of(const float* x, int64_t count, Norm norm) {
  const float mean = sum_of(x, x, count, [](auto v, auto) { return v; }) / count;
  const float var = sum_of(x, x, count, [=](auto v, auto) { return (v - mean) * (v - mean); }) / (count - 1);
  return {mean, 1 / (norm == Norm::Patch ? __builtin_sqrtf(var + 1e-6f) : __builtin_sqrtf(var) + 1e-6f)};
}

// Three vectors a, b, c interleaved into a0 b0 c0 a1 ..., as three vectors. Each takes elements from a and b first,
// then from c.
struct Lanes {
  int32_t two[3][kLanes], three[3][kLanes];

  constexpr Lanes() : two{}, three{} {
    for (int i = 0; i < 3 * kLanes; ++i) {
      const int channel = i % 3, place = i / 3, lane = i % kLanes;
      two[i / kLanes][lane] = channel == 1 ? kLanes + place : place;
      three[i / kLanes][lane] = channel == 2 ? kLanes + place : lane;
    }
  }
};
constexpr Lanes kThreeChannels;

// Transposes (channels, pixels) to (pixels, channels), normalised.
void interleave(const float* x, int64_t channels, int64_t pixels, Standard by, float* out) {
  const auto value = [=](auto v) { return (v - by.mean) * by.scale; };
  int64_t i = 0;
  if (channels == 3) {
    for (; i + kLanes <= pixels; i += kLanes) {
      const Vec a = value(load(x + i)), b = value(load(x + pixels + i)), c = value(load(x + 2 * pixels + i));
      for (int k = 0; k < 3; ++k) {
        const Vec two = __builtin_shuffle(a, b, load(kThreeChannels.two[k]));
        store(out + 3 * i + k * kLanes, __builtin_shuffle(two, c, load(kThreeChannels.three[k])));
      }
    }
  }
  for (; i < pixels; ++i)
    for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = value(x[c * pixels + i]);
}

const float* target(const void* image, Element element, const PatchShape& shape, Norm norm, const void* next,
                    float* spare) {
  const int64_t pixels = shape.frames * shape.rows * shape.columns, size = bytes_of(element);
  const int64_t run = ((shape.columns - 1) * shape.column + 1) * size;  // in bytes
  float* out = spare;
  for (int64_t c = 0; c < shape.channels; ++c)
    for (int64_t t = 0; t < shape.frames; ++t)
      for (int64_t p = 0; p < shape.rows; ++p, out += shape.columns) {
        const int64_t start = (c * shape.channel + t * shape.frame + p * shape.row) * size;
        for (int64_t i = 0; i < run; i += 64) __builtin_prefetch(static_cast<const char*>(next) + start + i);
        widen(static_cast<const char*>(image) + start, element, shape.column, shape.columns, out);
      }
  Standard all{0, 1};
  if (norm == Norm::Patch) {
    all = standard_of(spare, shape.channels * pixels, norm);
  } else if (norm == Norm::Channel) {
    for (float* channel = spare; channel < out; channel += pixels) {
      const Standard own = standard_of(channel, pixels, norm);
      write(channel, channel, pixels, channel, [=](auto v, auto) { return (v - own.mean) * own.scale; });
    }
  }
  interleave(spare, shape.channels, pixels, all, out);
  return out;
}

const float* as_floats(const void* x, Element element, int64_t count, float* spare) {
  if (element == Element::Float32) return static_cast<const float*>(x);
  widen(x, element, 1, count, spare);
  return spare;
}

// The lengths |x| and |y|, at least 1e-12 as in torch.nn.functional.normalize, and the cosine of their angle.
struct Angle {
  float x, y, cosine;
  bool above;  // |x| is 1e-12 or more

  Angle(const float* x_, const float* y_, int64_t count, Next next) {
    const auto product = [](auto v, auto w) { return v * w; };
    x = __builtin_sqrtf(sum_of(x_, x_, count, product, next));
    y = __builtin_sqrtf(sum_of(y_, y_, count, product));
    above = !(x < 1e-12f);
    if (x < 1e-12f) x = 1e-12f;
    if (y < 1e-12f) y = 1e-12f;
    cosine = sum_of(x_, y_, count, product) / x / y;
  }
};

float loss(const Compared& rows, Loss loss, float beta, float* spare) {
  const int64_t count = rows.count;
  const float* const x = as_floats(rows.pred, rows.pred_element, count, spare);
  const float* const y = as_floats(rows.target, rows.target_element, count, spare + count);
  const Next next{static_cast<const char*>(rows.next_pred), bytes_of(rows.pred_element)};
  if (loss == Loss::Cosine) return 1 - Angle(x, y, count, next).cosine;
  if (loss == Loss::MeanSquare)
    return sum_of(x, y, count, [](auto v, auto w) { return (v - w) * (v - w); }, next) / count;
  const float half_inverse = beta > 0 ? 0.5f / beta : 0, half = 0.5f * beta;
  return sum_of(x, y, count, [=](auto v, auto w) {
    const auto apart = absolute(v - w);
    return apart < beta ? apart * apart * half_inverse : apart - half;
  }, next) / count;
}

void gradient(const Compared& rows, Loss loss, float beta, float factor, float* spare, void* out) {
  const int64_t count = rows.count;
  const float* const x = as_floats(rows.pred, rows.pred_element, count, spare);
  const float* const y = as_floats(rows.target, rows.target_element, count, spare + count);
  float* const to = rows.pred_element == Element::Float32 ? static_cast<float*>(out) : spare;
  const Next next{static_cast<const char*>(rows.next_pred), bytes_of(rows.pred_element)};
  if (loss == Loss::Cosine) {
    const Angle angle(x, y, count, next);
    const float along = angle.above ? factor * angle.cosine / angle.x / angle.x : 0, away = factor / angle.x / angle.y;
    write(x, y, count, to, [=](auto v, auto w) { return along * v - away * w; });
  } else if (loss == Loss::MeanSquare) {
    const float scale = 2 * factor / count;
    write(x, y, count, to, [=](auto v, auto w) { return (v - w) * scale; }, next);
  } else {
    const float inverse = beta > 0 ? 1 / beta : 0, scale = factor / count;
    write(x, y, count, to, [=](auto v, auto w) {
      const auto apart = v - w;
      return (absolute(apart) < beta ? apart * inverse : sign(apart)) * scale;
    }, next);
  }
  if (rows.pred_element != Element::Float32) narrow(to, rows.pred_element, count, out);
}

}  // namespace

extern const PatchTiles patch_tiles;
const PatchTiles patch_tiles = {target, loss, gradient};

}  // namespace fastssl::FASTSSL_ISA
