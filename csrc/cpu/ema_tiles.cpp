// A run of elements of an exponential moving average, compiled once per instruction set.
#include "ema_tiles.h"

#include "common/rows.h"

namespace fastssl::FASTSSL_ISA {
namespace {

// torch.lerp's formula: exact at either end, the nearer one being the starting point.
template <typename Floats>
inline Floats lerp(Floats target, Floats source, float weight) {
  const Floats apart = source - target;
  return weight < 0.5f ? target + apart * weight : source - apart * (1 - weight);
}

void blend_floats(float* target, const float* source, int64_t count, float weight) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(target + i, lerp(load(target + i), load(source + i), weight));
  for (; i < count; ++i) target[i] = lerp(target[i], source[i], weight);
}

void blend(void* target, Element target_element, const void* source, Element source_element, int64_t count,
           float weight) {
  if (target_element == Element::Float32 && source_element == Element::Float32)
    return blend_floats(static_cast<float*>(target), static_cast<const float*>(source), count, weight);
  constexpr int64_t kRun = 512;  // elements at a time as float32, in the first-level cache
  float wide_target[kRun], wide_source[kRun];
  for (int64_t i = 0; i < count; i += kRun) {
    const int64_t run = i + kRun < count ? kRun : count - i;
    char* const t = static_cast<char*>(target) + i * bytes_of(target_element);
    const char* const s = static_cast<const char*>(source) + i * bytes_of(source_element);
    load_row(t, target_element, run, 1, wide_target);
    load_row(s, source_element, run, 1, wide_source);
    blend_floats(wide_target, wide_source, run, weight);
    store_row(wide_target, target_element, run, 1, t);
  }
}

void adamw(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, void* ema, Element ema_element,
           int64_t count, const AdamWStep& step, float weight) {
  constexpr int64_t kRun = 1024;  // elements that the first-level cache holds between the two
  const auto [weight1, beta2, weight2, eps, decay, size, scale] = step;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t run = begin + kRun < count ? kRun : count - begin;
    float *__restrict p = param + begin, *__restrict m = exp_avg + begin, *__restrict v = exp_avg_sq + begin;
    const float* __restrict const g = grad + begin;
    for (int64_t i = 0; i < run; ++i) {
      m[i] = lerp(m[i], g[i], weight1);
      v[i] = beta2 * v[i] + weight2 * g[i] * g[i];
      p[i] = decay * p[i] - size * m[i] / (scale * __builtin_sqrtf(v[i]) + eps);
    }
    blend(static_cast<char*>(ema) + begin * bytes_of(ema_element), ema_element, p, Element::Float32, run, weight);
  }
}

}  // namespace

extern const EmaTiles ema_tiles;
const EmaTiles ema_tiles = {blend, adamw};

}  // namespace fastssl::FASTSSL_ISA
