// One patch of the losses on masked patches, compiled once per instruction set.
#include "patches_tiles.h"

#include "common/convert.h"
#include "common/simd.h"

namespace fastssl::FASTSSL_ISA {
namespace {

constexpr int64_t kAhead = 768;  // elements: a prediction's next row, which the hardware does not foresee

inline float absolute(float x) { return __builtin_fabsf(x); }
inline Vec absolute(Vec x) { return x < 0.f ? -x : x; }
inline float sign(float x) { return x > 0.f ? 1.f : x < 0.f ? -1.f : x; }
inline Vec sign(Vec x) { return x > 0.f ? broadcast(1.f) : x < 0.f ? broadcast(-1.f) : x; }

// The sum of term(x, y) over all elements, of vectors of them where `term` is given one. As it goes, `ahead` elements
// further on x is fetched from memory.
template <int64_t ahead = 0, typename Term>
inline float sum_of(const float* x, const float* y, int64_t count, Term term) {
  constexpr int kSums = 4;
  Vec sums[kSums]{};
  int64_t i = 0;
  for (; i + kSums * kLanes <= count; i += kSums * kLanes)
    for (int k = 0; k < kSums; ++k) {
      const int64_t j = i + k * kLanes;
      if (ahead) __builtin_prefetch(x + j + ahead);
      sums[k] += term(load(x + j), load(y + j));
    }
  for (; i + kLanes <= count; i += kLanes) sums[0] += term(load(x + i), load(y + i));
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) total += term(x[i], y[i]);
  return total;
}

template <int64_t ahead = 0, typename Result>
inline void write(const float* x, const float* y, int64_t count, float* out, Result result) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (ahead) __builtin_prefetch(x + i + ahead);
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

// Subtracts the mean, and returns what the rest is to be multiplied with: 1 / deviation. The variance is unbiased, and
// taken of the differences from the mean.
float centre(float* x, int64_t count, float mean, Norm norm) {
  const float squares = sum_of(x, x, count, [&](auto v, auto) { return (v - mean) * (v - mean); });
  write(x, x, count, x, [=](auto v, auto) { return v - mean; });
  const float var = squares / (count - 1);
  return 1 / (norm == Norm::Patch ? __builtin_sqrtf(var + 1e-6f) : __builtin_sqrtf(var) + 1e-6f);
}

// Of three vectors a, b, c the elements a0 b0 c0 a1 ..., as three vectors: each takes from a and b, then from c.
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

// (channels, pixels) to (pixels, channels), times `factor`.
void interleave(const float* x, int64_t channels, int64_t pixels, float factor, float* out) {
  int64_t i = 0;
  if (channels == 3) {
    for (; i + kLanes <= pixels; i += kLanes) {
      const Vec a = load(x + i) * factor, b = load(x + pixels + i) * factor, c = load(x + 2 * pixels + i) * factor;
      for (int k = 0; k < 3; ++k) {
        const Vec two = __builtin_shuffle(a, b, load(kThreeChannels.two[k]));
        store(out + 3 * i + k * kLanes, __builtin_shuffle(two, c, load(kThreeChannels.three[k])));
      }
    }
  }
  for (; i < pixels; ++i)
    for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = x[c * pixels + i] * factor;
}

void load_row_of_patches(const void* images, Element element, const PatchShape& shape, int64_t width, float* out) {
  for (int64_t c = 0; c < shape.channels; ++c)
    for (int64_t t = 0; t < shape.frames; ++t)
      for (int64_t p = 0; p < shape.rows; ++p, out += width) {
        const int64_t row = c * shape.channel + t * shape.frame + p * shape.row;
        widen(static_cast<const char*>(images) + row * bytes_of(element), element, shape.column, width, out);
      }
}

const float* target(const float* x, int64_t width, const PatchShape& shape, Norm norm, float* spare) {
  const int64_t pixels = shape.frames * shape.rows * shape.columns, elements = shape.channels * pixels;
  const auto itself = [](auto v, auto) { return v; };
  for (int64_t i = 0; i < elements; i += shape.columns, x += width) write(x, x, shape.columns, spare + i, itself);
  float factor = 1;
  if (norm == Norm::Patch) {
    factor = centre(spare, elements, sum_of(spare, spare, elements, itself) / elements, norm);
  } else if (norm == Norm::Channel) {
    for (float* y = spare; y < spare + elements; y += pixels) {
      const float scale = centre(y, pixels, sum_of(y, y, pixels, itself) / pixels, norm);
      write(y, y, pixels, y, [=](auto v, auto) { return v * scale; });
    }
  }
  interleave(spare, shape.channels, pixels, factor, spare + elements);
  return spare + elements;
}

const float* as_floats(const void* x, Element element, int64_t count, float* spare) {
  if (element == Element::Float32) return static_cast<const float*>(x);
  widen(x, element, 1, count, spare);
  return spare;
}

// Lengths |x| and |y|, 1e-12 at least as in torch.nn.functional.normalize, and the cosine of their angle.
struct Angle {
  float x, y, cosine;
  bool above;  // |x| is 1e-12 or more

  Angle(const float* x_, const float* y_, int64_t count) {
    const auto product = [](auto v, auto w) { return v * w; };
    x = __builtin_sqrtf(sum_of(x_, x_, count, product));
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
  if (loss == Loss::Cosine) return 1 - Angle(x, y, count).cosine;
  if (loss == Loss::MeanSquare)
    return sum_of<kAhead>(x, y, count, [](auto v, auto w) { return (v - w) * (v - w); }) / count;
  const float half_inverse = beta > 0 ? 0.5f / beta : 0, half = 0.5f * beta;
  return sum_of(x, y, count, [=](auto v, auto w) {
    const auto apart = absolute(v - w);
    return apart < beta ? apart * apart * half_inverse : apart - half;
  }) / count;
}

void gradient(const Compared& rows, Loss loss, float beta, float factor, float* spare, void* out) {
  const int64_t count = rows.count;
  const float* const x = as_floats(rows.pred, rows.pred_element, count, spare);
  const float* const y = as_floats(rows.target, rows.target_element, count, spare + count);
  float* const to = rows.pred_element == Element::Float32 ? static_cast<float*>(out) : spare;
  if (loss == Loss::Cosine) {
    const Angle angle(x, y, count);
    const float along = angle.above ? factor * angle.cosine / angle.x / angle.x : 0, away = factor / angle.x / angle.y;
    write(x, y, count, to, [=](auto v, auto w) { return along * v - away * w; });
  } else if (loss == Loss::MeanSquare) {
    const float scale = 2 * factor / count;
    write<kAhead>(x, y, count, to, [=](auto v, auto w) { return (v - w) * scale; });
  } else {
    const float inverse = beta > 0 ? 1 / beta : 0, scale = factor / count;
    write(x, y, count, to, [=](auto v, auto w) {
      const auto apart = v - w;
      return (absolute(apart) < beta ? apart * inverse : sign(apart)) * scale;
    });
  }
  if (rows.pred_element != Element::Float32) narrow(to, rows.pred_element, count, out);
}

}  // namespace

extern const PatchTiles patch_tiles;
const PatchTiles patch_tiles = {load_row_of_patches, target, loss, gradient};

}  // namespace fastssl::FASTSSL_ISA
