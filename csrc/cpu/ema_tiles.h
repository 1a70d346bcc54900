// What an exponential moving average does to a run of elements: a table of plain functions, one per instruction set.
#pragma once

#include <cstdint>

#include "common/table.h"
#include "product_tiles.h"

namespace fastssl {

struct EmaTiles {
  // target += weight (source - target), in float32, of `count` elements.
  void (*blend)(void* target, Element target_element, const void* source, Element source_element, int64_t count,
                float weight);
};

FASTSSL_TABLE(EmaTiles, ema_tiles)

}  // namespace fastssl
