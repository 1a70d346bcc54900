// The work of an exponential moving average on a run of elements, compiled once per instruction set.
#include "ema_tiles.h"

#include <cstring>

#include "common/rows.h"

namespace fastssl::FASTSSL_ISA {
namespace {

// torch.lerp's formula.
inline float lerp(float start, float end, float weight) {
  const float apart = end - start;
  return weight < 0.5f ? start + apart * weight : end - apart * (1 - weight);
}

// near (1 - share) + far share; equal values stay as they are. 1 - share = rest + little: float32 would round it, and
// over many steps the error would add up. Both are positive, so that infinities stay infinite; no differences are
// taken, which might overflow.
template <typename Floats>
inline Floats towards(Floats near, Floats far, float share, float rest, float little) {
  return near == far ? near : near * rest + (far * share + near * little);
}

void blend_floats(float* target, const float* source, int64_t count, Shares of) {
  if (of.target == 0) {  // the target's old value does not count, even if it is NaN
    std::memcpy(target, source, count * sizeof(float));
    return;
  }
  const bool stays = of.source < 0.5f;
  const float *const near = stays ? target : source, *const far = stays ? source : target;
  const float share = stays ? of.source : of.target;  // at most 1/2
  const float rest = static_cast<float>(1. - share) - 0x1p-24f, little = static_cast<float>(1. - share - rest);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(target + i, towards(load(near + i), load(far + i), share, rest, little));
  for (; i < count; ++i) target[i] = towards(near[i], far[i], share, rest, little);
}

void blend(void* target, Element target_element, const void* source, Element source_element, int64_t count,
           Shares of) {
  if (of.source == 0) return;
  if (target_element == Element::Float32 && source_element == Element::Float32)
    return blend_floats(static_cast<float*>(target), static_cast<const float*>(source), count, of);
  constexpr int64_t kRun = 512;  // elements at a time as float32, in the first-level cache
  float wide_target[kRun], wide_source[kRun];
  for (int64_t i = 0; i < count; i += kRun) {
    const int64_t run = i + kRun < count ? kRun : count - i;
    char* const t = static_cast<char*>(target) + i * bytes_of(target_element);
    const char* const s = static_cast<const char*>(source) + i * bytes_of(source_element);
    load_row(t, target_element, run, 1, wide_target);
    load_row(s, source_element, run, 1, wide_source);
    blend_floats(wide_target, wide_source, run, of);
    store_row(wide_target, target_element, run, 1, t);
  }
}

void adamw(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, void* ema, Element ema_element,
           int64_t count, const AdamWStep& step, Shares of) {
  constexpr int64_t kRun = 1024;  // few enough to stay in the first-level cache between the two steps
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
    blend(static_cast<char*>(ema) + begin * bytes_of(ema_element), ema_element, p, Element::Float32, run, of);
  }
}

}  // namespace

extern const EmaTiles ema_tiles;
const EmaTiles ema_tiles = {blend, adamw};

}  // namespace fastssl::FASTSSL_ISA
