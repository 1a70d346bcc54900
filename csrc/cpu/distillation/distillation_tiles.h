// What the losses of self-distillation do with one row: a table of plain functions, one per instruction set.
#pragma once

#include <cstdint>

#include "common/product_tiles.h"

namespace fastssl {

// A row's softmax without its shift: with M its largest logit, Z = sum_k exp2(scale (x_k - M)); and of the student
// sum_k P_k (M - x_k).
struct RowSums {
  float total, distance;
};

// A distribution of a teacher, up to a factor.
struct Target {
  const float* data;
  float factor;
};

// The rows of float are aligned, and as long as `padded_row` says; what is behind the logits is 0.
struct DistillationTiles {
  // exps_k = exp2(scale (x_k - center_k - M)), M the largest x_k - center_k; returns their sum. `center` may be null.
  float (*teacher)(const void* x, Element element, const float* center, int64_t columns, float scale, float* exps);

  // out = the sum of `count` targets, one at least. `out` may be the data of the first.
  void (*add)(const Target* targets, int64_t count, int64_t columns, float* out);

  // Of a student's row x and the distribution that `target` is; exps_k = exp2(scale (x_k - M)), unless null.
  RowSums (*student)(const void* x, Element element, const Target& target, int64_t columns, float scale, float* exps);

  // out_k = exps_factor exps_k - target_factor target_k, by the cache where `stream`.
  void (*gradient)(const float* exps, float exps_factor, const float* target, float target_factor, int64_t columns,
                   Element element, bool stream, void* out);

  // What was written by the cache is written once this returns.
  void (*finish_streams)();
};

constexpr int64_t padded_row(int64_t columns) { return (columns + 63) / 64 * 64; }

FASTSSL_TABLE(DistillationTiles, distillation_tiles)

}  // namespace fastssl
