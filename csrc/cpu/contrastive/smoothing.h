// Label smoothing: a share e of each row's target is spread over all of its columns. With the positive on the diagonal,
//
//     loss_i = lse_i - (1 - e) S_ii - e mean_j S_ij = (lse_i - S_ii) + e (S_ii - scale <x_i, mean_j y_j>).
//
// That is O(N D), and so is its gradient: given g_i = dL/dloss_i, it adds e g_i to the weight of the positive, and
// -e g_i / N to those of all of row i, which no tile needs to know (`EvenWeights`).
#pragma once

#include "common/side.h"

namespace fastssl {

// The share that is spread: none where there is only one column to spread it over.
inline float share_of(double label_smoothing, int64_t count) {
  return count > 1 ? static_cast<float>(label_smoothing) : 0;
}

inline Numbers<float> mean_row(const Side& z) {
  return sum_rows(z, [&](int64_t) { return 1 / static_cast<float>(z.count); });
}

// loss_i += share (positive_i - scale <x_i, mean>).
inline void smooth(const Side& x, const float* mean, float share, float scale, const float* positive, float* loss) {
  const Blocks scratch(x.threads, 2 * x.dim * 4);
  run(x.threads, x.cut.blocks, [&](int64_t b) {
    float* const spare = scratch.floats(slot(x.threads));
    for (int64_t i = x.first(b); i < x.first(b) + x.size(b); ++i) {
      const double dot = x.engine.tile.dot(x.rows[i], x.rows.element, mean, Element::Float32, x.rows.dim, spare);
      loss[i] += static_cast<float>(share * (positive[i] - scale * dot * std::abs(x.inverse_norm[i])));
    }
  });
}

}  // namespace fastssl
