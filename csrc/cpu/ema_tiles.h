// What an exponential moving average does to a run of elements, alone or after AdamW: a table of plain functions, one
// per instruction set.
#pragma once

#include <cstdint>

#include "common/table.h"
#include "common/product_tiles.h"

namespace fastssl {

// AdamW's numbers for one parameter at its step t.
struct AdamWStep {
  float weight1;         // 1 - beta1
  float beta2, weight2;  // and 1 - beta2
  float eps;
  float decay;  // 1 - lr weight_decay
  float size;   // lr / (1 - beta1^t)
  float scale;  // 1 / sqrt(1 - beta2^t)
};

// The weights of a moving average: momentum for the target, 1 - momentum for the source.
struct Shares {
  float target, source;
};

struct EmaTiles {
  // target = momentum target + (1 - momentum) source for `count` elements, in float32.
  void (*blend)(void* target, Element target_element, const void* source, Element source_element, int64_t count,
                Shares of);

  // AdamW's step for `count` elements, then ema = momentum ema + (1 - momentum) param. `ema` may be `param`.
  void (*adamw)(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, void* ema, Element ema_element,
                int64_t count, const AdamWStep& step, Shares of);
};

FASTSSL_TABLE(EmaTiles, ema_tiles)

}  // namespace fastssl
