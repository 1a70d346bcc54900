// What the losses of self-distillation do to one row: a table of plain functions, one per instruction set.
#pragma once

#include <cstdint>

#include "common/product_tiles.h"

namespace fastssl {

// Sums over a student's row x, with M its largest logit: total = sum_k exp2(scale (x_k - M)), and for a target P
// distance = sum_k P_k (M / 2 - x_k / 2), in halves lest it overflow.
struct RowSums {
  float total, distance;
};

// A teacher's distribution: P_k = factor data[k].
struct Target {
  const float* data;
  float factor;
};

// Rows of float are aligned, and of length padded_row(columns); padding is 0.
struct DistillationTiles {
  // exps_k = exp2(scale (x_k - center_k - M)), where M is the largest x_k - center_k; returns their sum. `center` may
  // be null.
  float (*teacher)(const void* x, Element element, const float* center, int64_t columns, float scale, float* exps);

  // out = the sum of `count` targets, at least one. `out` may be the data of the first.
  void (*add)(const Target* targets, int64_t count, int64_t columns, float* out);

  // The sums of a student's row x against `target`; exps_k = exp2(scale (x_k - M)), unless null.
  RowSums (*student)(const void* x, Element element, const Target& target, int64_t columns, float scale, float* exps);

  // out_k = exps_factor exps_k - target_factor target_k, bypassing the cache if `stream`.
  void (*gradient)(const float* exps, float exps_factor, const float* target, float target_factor, int64_t columns,
                   Element element, bool stream, void* out);

  // Waits until everything that bypassed the cache is written.
  void (*finish_streams)();
};

constexpr int64_t padded_row(int64_t columns) { return (columns + 63) / 64 * 64; }

FASTSSL_TABLE(DistillationTiles, distillation_tiles)

}  // namespace fastssl
