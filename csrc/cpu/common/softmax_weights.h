// Weights of a softmax's gradient: tiles of exponentials times coefficients, and their products.
#pragma once

#include <cmath>

#include "common/exponents.h"
#include "common/similarities.h"
#include "common/softmax_tiles.h"

namespace fastssl {

// What a backward pass needs for each row of a side, padded: W's coefficient a_i, and the origin of its exponentials.
struct Coefficients {
  Tensor coefficients, origins;
  const float* a;
  const float* origin;

  // a_i = gradient_i, moved to the shared origin if there is one.
  Coefficients(const Tensor& gradient, const Tensor& shift, const Side& side, const Exponent& e)
      : coefficients(at::zeros({side.padded_count()}, at::kFloat)), origins(at::zeros_like(coefficients)) {
    const Tensor g = gradient.contiguous(), s = shift.contiguous();
    const float* const from = g.const_data_ptr<float>();
    const float* const shifts = s.const_data_ptr<float>();
    float* const to = coefficients.mutable_data_ptr<float>();
    float* const to_origin = origins.mutable_data_ptr<float>();
    for (int64_t i = 0; i < side.count; ++i) {
      to_origin[i] = origin_of(shifts[i], e);
      to[i] = e.shared ? static_cast<float>(from[i] * std::exp(e.step * (e.origin - to_origin[i]))) : from[i];
    }
    a = to;
    origin = to_origin;
  }
};

// The weights of tiles, and their products: W Y, which x's rows gather, and W^T X, which y's do.
struct Weights {
  const Similarities& S;
  const Exponent& e;
  const Coefficients* rows;     // null: no term of rows
  const Coefficients* columns;  // null: no term of columns
  const SoftmaxTiles& tile = FASTSSL_TABLE_IN_USE(softmax_tiles);
  Blocks tiles, narrow;

  Weights(const Similarities& S, const Exponent& e, const Coefficients* rows, const Coefficients* columns)
      : S(S),
        e(e),
        rows(rows),
        columns(columns),
        tiles(S.x.threads, S.x.cut.block * S.y.cut.block * 4),
        narrow(S.x.threads, S.x.engine.half() ? 2 * S.x.cut.block * S.y.cut.block * 2 : 0) {}

  // Tile (I, J) of S is `tile_of()`, excluded entries and all; it is overwritten.
  float* tile_of() const { return tiles.floats(slot(S.x.threads)); }

  void multiply(int64_t I, int64_t J, Gathered* of_x, Gathered* of_y) const {
    float* const s = tile_of();
    const Engine& engine = S.x.engine;
    const int64_t m = S.x.padded(I), n = S.y.padded(J);
    auto* half = engine.half() ? static_cast<at::BFloat16*>(narrow[slot(S.x.threads)]) : nullptr;
    auto* pairs = engine.half() ? half + m * n : nullptr;
    const float* const a = rows->a + S.x.first(I);
    const float* const b = columns ? columns->a + S.y.first(J) : nullptr;
    if (e.shared) {
      tile.weights(s, n, m, n, e.c, e.origin, a, b, half, pairs);
    } else {
      tile.weights_online(s, n, m, n, e.c, a, rows->origin + S.x.first(I), b,
                          columns ? columns->origin + S.y.first(J) : nullptr, half, pairs);
    }
    if (of_x) of_x->add(I, half ? static_cast<void*>(half) : s, S.y, J);
    if (of_y) of_y->add_columns(J, half ? static_cast<void*>(pairs) : s, S.x, I);
  }
};

}  // namespace fastssl
