// What the losses of self-distillation do to one row: a table of plain functions, one per instruction set.
#pragma once

#include <cstdint>

#include "common/product_tiles.h"

namespace fastssl {

// Columns come in chunks, few enough for the first-level cache, of which one in kMostLanes columns share a factor.
constexpr int64_t kColumnChunk = 512, kMostLanes = 16;

// A distribution over a row's columns, in floats: P_k = factors[k / kColumnChunk * kMostLanes + k % lanes] data[k],
// where lanes <= kMostLanes is what the instruction set has. Both are aligned.
struct Distribution {
  float* data;     // padded_row(columns), padding is 0
  float* factors;  // factors_of_row(columns)
};

// Sums over a student's row x, with M its largest logit: total = sum_k exp2(scale (x_k - M)), and for a target P
// distance = sum_k P_k (M / 2 - x_k / 2), in halves lest it overflow.
struct RowSums {
  float total, distance;
};

struct DistillationTiles {
  // out_k is proportional to exp2(scale (x_k - center_k)). `center` may be null.
  void (*teacher)(const void* x, Element element, const float* center, int64_t columns, float scale,
                  const Distribution& out);

  // out = the sum of `count` distributions, at least one. `out` may be the first.
  void (*add)(const Distribution* targets, int64_t count, int64_t columns, const Distribution& out);

  // The sums of a student's row x against `target`; out_k is proportional to exp2(scale x_k), unless its data is null.
  RowSums (*student)(const void* x, Element element, const Distribution& target, int64_t columns, float scale,
                     const Distribution& out);

  // out_k = q_factor q_k - p_factor p_k, bypassing the cache if `stream`.
  void (*gradient)(const Distribution& q, float q_factor, const Distribution& p, float p_factor, int64_t columns,
                   Element element, bool stream, void* out);

  // Waits until everything that bypassed the cache is written.
  void (*finish_streams)();
};

constexpr int64_t padded_row(int64_t columns) { return (columns + 63) / 64 * 64; }
constexpr int64_t factors_of_row(int64_t columns) { return (columns + kColumnChunk - 1) / kColumnChunk * kMostLanes; }

FASTSSL_TABLE(DistillationTiles, distillation_tiles)

}  // namespace fastssl
