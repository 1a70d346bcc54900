// Sums of the exponentials of S = scale X Y^T, over rows and over columns, and their gradients.
//
// Forward, a tile's exponentials are added to the sums of its rows and of its columns: 1 U, in units U = 2 M N D of
// floating-point operations (one product). Backward, they are turned into weights W, which are multiplied twice, W Y_J
// for the gradients of rows and W^T X_I for those of columns. That is 3 U in all where the forward pass keeps its tiles
// (common/kept_tiles.h); a tile that was not kept is computed again: 4 U if none is.
//
// No two tiles that share a block run at once, and a block's tiles come in a fixed order (`match`): the bits are the
// same in every run, and depend on the number of threads only where that changes the cut.
#pragma once

#include <utility>

#include "common/exponents.h"
#include "common/kept_tiles.h"
#include "common/similarities.h"
#include "common/softmax_tiles.h"
#include "common/softmax_weights.h"

namespace fastssl {

// The sides of a forward pass, and what it keeps.
struct SummedPair {
  const Engine engine;
  const Sides sides;
  const Side &x = sides.x, &y = sides.y;
  const Exponent e;
  Tensor kept;
  const KeptTiles tiles;

  SummedPair(const Tensor& x_, const Tensor& y_, const Tensor& scale, bool normalize, int64_t keep,
             c10::string_view precision)
      : engine(precision),
        sides(x_, y_, normalize, kRows, kColumns, engine, threads_for(x_.size(0), y_.size(0), x_.size(1))),
        e(scale, x, y),
        kept(at::empty({keep}, at::kByte)),
        tiles(kept, {x.count, y.count, x.rows.dim, x.threads, false}, engine, e.shared, x.largest_square,
              y.largest_square) {}

  // The sums of rows and of columns over all tiles of S, without column exclude[i] of row i, unless `exclude` is null,
  // and without the diagonal if `diagonal`; `positive`, unless null, then gets scale S_ii of every row, as tiles have it.
  std::pair<Sums, Sums> sum(const int64_t* exclude, bool diagonal, float* positive = nullptr) const {
    const Similarities S{x, y, e.factor, e.excluded, exclude, diagonal};
    Sums rows(x.padded_count(), e), columns(y.padded_count(), e);
    const Blocks tile(x.threads, x.cut.block * y.cut.block * 4);
    const SoftmaxTiles& f = FASTSSL_TABLE_IN_USE(softmax_tiles);
    match(x.threads, x.cut, y.cut, [&](int64_t I, int64_t J) {
      float* const place = tiles.floats(I, J);
      float* const s = place ? place : tile.floats(slot(x.threads));
      const int64_t n = y.padded(J), i = x.first(I), j = y.first(J);
      S.compute(I, J, s);
      if (positive && I == J)
        for (int64_t r = 0; r < x.size(I); ++r) positive[i + r] = e.rest * s[r * n + r];
      S.exclude_from(I, J, s);
      if (e.shared) {
        f.sum_exponentials(s, n, x.size(I), n, e.c, e.origin, &rows.total[i], &rows.extreme[i], &columns.total[j],
                           &columns.extreme[j], tiles(I, J), tiles.narrow);
        tiles.pad(I, J, x.size(I));
      } else {
        f.sum_exponentials_online(s, n, x.size(I), n, e.c, &rows.total[i], &rows.extreme[i], &columns.total[j],
                                  &columns.extreme[j]);
      }
    }, [&] { engine.release(); });
    return {std::move(rows), std::move(columns)};
  }
};

// The sides of a backward pass. If all tiles were kept, operands that only serve to compute S again are not packed.
struct DerivedPair {
  const Engine engine;
  const int threads;
  const KeptTiles tiles;
  const Sides sides;
  const Side &x = sides.x, &y = sides.y;
  const Exponent e;

  DerivedPair(const Tensor& x_, const Tensor& y_, const Tensor& scale, bool normalize, const Tensor& kept,
              c10::string_view precision)
      : engine(precision),
        threads(threads_for(x_.size(0), y_.size(0), x_.size(1))),
        tiles(kept, {x_.size(0), y_.size(0), x_.size(1), threads, false}, engine),
        sides(x_, y_, normalize, kWeighing | (tiles.all() ? kNothing : kRows),
              kWeighed | (tiles.all() ? kNothing : kColumns), engine, threads, tiles.largest_square(0),
              tiles.largest_square(1)),
        e(scale, x, y) {
    tiles.check(e.shared);
  }

  // (grad_x, grad_y, grad_scale) from the weights of all tiles and, unless they are null, of the positive pairs (x_i,
  // y_i), and the weights even_i + even_j of all pairs.
  std::tuple<Tensor, Tensor, Tensor> differentiate(const int64_t* exclude, bool diagonal, Coefficients& rows,
                                                   Coefficients& columns, Numbers<float>* positive_weight,
                                                   const float* even, const Tensor& scale) const {
    const bool exact = engine.operand == Operand::Float32;
    // A scale that is no extreme number goes into the weights: the sums are then gradients as they are.
    const bool scaled = exact && !even && std::abs(e.scale) > 1e-3f && std::abs(e.scale) < 1e3f;
    if (scaled) {
      for (int64_t i = 0; i < x.count; ++i) rows.a[i] *= e.scale;
      for (int64_t j = 0; j < y.count; ++j) columns.a[j] *= e.scale;
      for (int64_t i = 0; positive_weight && i < x.count; ++i) (*positive_weight)[i] *= e.scale;
    }
    const float *const positive = positive_weight ? positive_weight->data : nullptr, left = scaled ? 1 : e.scale;
    const Similarities S{x, y, e.factor, e.excluded, exclude, diagonal};
    const Weights weights(S, e, &rows, &columns, exact ? positive : nullptr);
    const Tensor grad_x = gradient_of(x), grad_y = gradient_of(y);
    Gathered of_x(x, true, nullptr, &grad_x), of_y(y, false, &x, &grad_y);
    const Positives columns_of{y, positive}, rows_of{x, positive};
    const EvenSums even_rows(y, even), even_columns(x, even);
    const bool apart = positive && !exact;
    const Finish finish_x(of_x, apart ? &columns_of : nullptr, left, grad_x, nullptr, even_rows.weights());
    const Finish finish_y(of_y, apart ? &rows_of : nullptr, left, grad_y, nullptr, even_columns.weights(), false);
    match(threads, x.cut, y.cut, [&](int64_t I, int64_t J) {
      weights.compute_and_multiply(I, J, tiles, &of_x, &of_y);
    }, finish_x, finish_y, [&] { engine.release(); });
    return {grad_x, grad_y, scalar(finish_x.total() / (scaled ? e.scale : 1), scale.options())};
  }

 private:
  static Tensor gradient_of(const Side& z) {
    return at::empty({z.count, z.rows.dim}, z.first_part.options());
  }

  // The sums over the other side's rows that weights even_i + even_j take; none if `even` is null.
  struct EvenSums {
    Numbers<float> sum, weighted;
    EvenWeights taken;

    EvenSums(const Side& other, const float* even)
        : sum(even ? sum_rows(other, [](int64_t) { return 1.f; }) : Numbers<float>(0)),
          weighted(even ? sum_rows(other, [&](int64_t i) { return even[i]; }) : Numbers<float>(0)),
          taken{even, sum.data, weighted.data} {}
    const EvenWeights* weights() const { return taken.u ? &taken : nullptr; }
  };
};

}  // namespace fastssl
