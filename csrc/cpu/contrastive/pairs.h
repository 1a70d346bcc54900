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

// The sums of rows and of columns over all tiles of S. Exponentials are kept as far as `kept` has room. `diagonal`,
// unless null, gets scale S_ii of every row, as the tiles have it, whether it is left out of the sums or not.
inline std::pair<Sums, Sums> sum_pair(const Similarities& S, const Exponent& e, const KeptTiles& kept,
                                      float* diagonal = nullptr) {
  const Side &x = S.x, &y = S.y;
  Sums rows(x.padded_count(), e), columns(y.padded_count(), e);
  const Blocks tile(x.threads, x.cut.block * y.cut.block * 4);
  const SoftmaxTiles& f = FASTSSL_TABLE_IN_USE(softmax_tiles);
  match(x.threads, x.cut, y.cut, [&](int64_t I, int64_t J) {
    float* const place = kept.floats(I, J);
    float* const s = place ? place : tile.floats(slot(x.threads));
    const int64_t n = y.padded(J), i = x.first(I), j = y.first(J);
    S.compute(I, J, s);
    if (diagonal && I == J)
      for (int64_t r = 0; r < x.size(I); ++r) diagonal[i + r] = e.rest * s[r * n + r];
    S.exclude_from(I, J, s);
    if (e.shared) {
      f.sum_exponentials(s, n, x.size(I), n, e.c, e.origin, &rows.total[i], &rows.extreme[i], &columns.total[j],
                         &columns.extreme[j], kept(I, J), kept.narrow);
      kept.pad(I, J, x.size(I));
    } else {
      f.sum_exponentials_online(s, n, x.size(I), n, e.c, &rows.total[i], &rows.extreme[i], &columns.total[j],
                                &columns.extreme[j]);
    }
  }, [&] { x.engine.release(); });
  return {std::move(rows), std::move(columns)};
}

// The sides of a backward pass. If all tiles were kept, operands that only serve to compute S again are not packed.
struct DerivedPair {
  const KeptTiles& kept;
  Side x, y;
  Exponent e;

  DerivedPair(const Tensor& x_, const Tensor& y_, const Tensor& scale, bool normalize, const Engine& engine,
              int threads, const KeptTiles& kept)
      : kept(kept),
        x(x_, normalize, kWeighing | (kept.all() ? kNothing : kRows), engine, threads, false, kept.largest_square(0)),
        y(y_, normalize, kWeighed | (kept.all() ? kNothing : kColumns), engine, threads, false, kept.largest_square(1)),
        e(scale, x, y) {
    kept.check(e.shared);
  }

  // (grad_x, grad_y, grad_scale) from the weights of all tiles and, unless they are null, of the positive pairs (x_i,
  // y_i), and the weights even_i + even_j of all pairs.
  std::tuple<Tensor, Tensor, Tensor> differentiate(const int64_t* exclude, bool diagonal, const Coefficients& rows,
                                                   const Coefficients& columns, const float* positive_weight,
                                                   const float* even, const Tensor& x_, const Tensor& y_,
                                                   const Tensor& scale) const {
    const Similarities S{x, y, e.factor, e.excluded, exclude, diagonal};
    const bool exact = x.engine.operand == Operand::Float32;
    const Weights weights(S, e, &rows, &columns, exact ? positive_weight : nullptr);
    const Tensor grad_x = at::empty(x_.sizes(), x_.options()), grad_y = at::empty(y_.sizes(), y_.options());
    Gathered of_x(x, true, nullptr, &grad_x), of_y(y, false, &x, &grad_y);
    match(x.threads, x.cut, y.cut, [&](int64_t I, int64_t J) {
      weights.compute_and_multiply(I, J, kept, &of_x, &of_y);
    }, [&] { x.engine.release(); });
    const Positives columns_of{y, positive_weight}, rows_of{x, positive_weight};
    const double grad_scale = finish(of_x, positive_weight && !exact ? &columns_of : nullptr, y, even, grad_x, true);
    finish(of_y, positive_weight && !exact ? &rows_of : nullptr, x, even, grad_y, false);
    return {grad_x, grad_y, scalar(grad_scale, scale.options())};
  }

 private:
  double finish(const Gathered& gathered, const Positives* positives, const Side& other, const float* even,
                const Tensor& grad, bool along_wanted) const {
    if (!even) return finish_side(gathered, positives, e.scale, grad, nullptr, nullptr, along_wanted);
    const Numbers<float> sum = sum_rows(other, [](int64_t) { return 1.f; });
    const Numbers<float> weighted = sum_rows(other, [&](int64_t i) { return even[i]; });
    const EvenWeights weights{even, sum.data, weighted.data};
    return finish_side(gathered, positives, e.scale, grad, nullptr, &weights, along_wanted);
  }
};

}  // namespace fastssl
