// The weights of a softmax's gradient, which are exponentials times coefficients, tile by tile; and their products.
#pragma once

#include <cmath>

#include "common/exponents.h"
#include "common/kept_tiles.h"
#include "common/similarities.h"
#include "common/softmax_tiles.h"

namespace fastssl {

// What a backward pass needs for each row of a side, padded: the coefficient a_i of its weights, and the origin of its
// exponentials.
struct Coefficients {
  Numbers<float> a, origin;

  // a_i = gradient(i), moved to the shared origin if there is one.
  template <typename Gradient>
  Coefficients(const Gradient& gradient, const Tensor& shift, const Side& side, const Exponent& e)
      : a(side.padded_count()), origin(side.padded_count()) {
    const Tensor contiguous = shift.contiguous();
    const float* const shifts = contiguous.const_data_ptr<float>();
    for (int64_t i = 0; i < side.count; ++i) {
      const float g = gradient(i);
      origin[i] = origin_of(shifts[i], e);
      a[i] = e.shared ? static_cast<float>(g * std::exp(e.step * (e.origin - origin[i]))) : g;
    }
    std::fill(a.data + side.count, a.data + side.padded_count(), 0.f);
    std::fill(origin.data + side.count, origin.data + side.padded_count(), 0.f);
  }

  Coefficients(const Tensor& gradient, const Tensor& shift, const Side& side, const Exponent& e)
      : Coefficients(Elements(gradient), shift, side, e) {}

 private:
  struct Elements {
    Tensor contiguous;
    const float* data;

    explicit Elements(const Tensor& x) : contiguous(x.contiguous()), data(contiguous.const_data_ptr<float>()) {}
    float operator()(int64_t i) const { return data[i]; }
  };
};

// The weights W of tiles, and their products: W Y, gathered by the rows of x, and W^T X, gathered by those of y.
struct Weights {
  const Similarities& S;
  const Exponent& e;
  const Coefficients* rows;     // null: no term of rows
  const Coefficients* columns;  // null: no term for columns
  const float* diagonal;        // null: as the others; only where products are float32
  const SoftmaxTiles& tile = FASTSSL_TABLE_IN_USE(softmax_tiles);
  Blocks tiles, narrow;

  Weights(const Similarities& S, const Exponent& e, const Coefficients* rows, const Coefficients* columns,
          const float* diagonal = nullptr)
      : S(S),
        e(e),
        rows(rows),
        columns(columns),
        diagonal(diagonal),
        tiles(S.x.threads, S.x.cut.block * S.y.cut.block * 4),
        narrow(S.x.threads, S.x.engine.half() ? 2 * S.x.cut.block * S.y.cut.block * 2 : 0) {}

  // Where the caller puts tile (I, J) of S, with its excluded entries, unless its exponentials were kept; `multiply`
  // overwrites it.
  float* tile_of() const { return tiles.floats(slot(S.x.threads)); }

  void multiply(int64_t I, int64_t J, const void* kept, Gathered* of_x, Gathered* of_y) const {
    float* const s = tile_of();
    const int64_t m = S.x.padded(I), n = S.y.padded(J);
    auto* half = S.x.engine.half() ? static_cast<at::BFloat16*>(narrow[slot(S.x.threads)]) : nullptr;
    auto* pairs = half ? half + m * n : nullptr;
    const float* const a = rows->a.data + S.x.first(I);
    const float* const b = columns ? columns->a.data + S.y.first(J) : nullptr;
    if (kept) {
      tile.weights_of_kept(kept, m, n, a, b, s, half, pairs);
    } else if (e.shared) {
      tile.weights(s, n, m, n, e.c, e.origin, a, b, half, pairs);
    } else {
      tile.weights_online(s, n, m, n, e.c, a, rows->origin.data + S.x.first(I), b,
                          columns ? columns->origin.data + S.y.first(J) : nullptr, half, pairs);
    }
    if (diagonal && I == J)
      for (int64_t r = 0; r < S.x.size(I); ++r) s[r * n + r] = diagonal[S.x.first(I) + r];
    if (of_x) of_x->add(I, half ? static_cast<void*>(half) : s, S.y, J);
    if (of_y) of_y->add_columns(J, half ? static_cast<void*>(pairs) : s, S.x, I);
  }

  // The same, for a tile that was kept or else is computed again.
  void compute_and_multiply(int64_t I, int64_t J, const KeptTiles& kept, Gathered* of_x, Gathered* of_y) const {
    const void* const exponentials = kept(I, J);
    if (!exponentials) S(I, J, tile_of());
    multiply(I, J, exponentials, of_x, of_y);
  }
};

}  // namespace fastssl
