// Sums of the exponentials of a symmetric S = scale Z Z^T without its diagonal, and their gradients.
//
// Only tiles (I, J) with I <= J are visited, each for its rows and for its columns. In units U = 2 N N D of
// floating-point operations (one product) the forward pass costs U / 2, and the backward pass U where tiles were kept
// (common/kept_tiles.h) and 3 U / 2 where they are computed again: 3 U / 2 to 2 U in all, where eager PyTorch takes 3 U
// and keeps several N x N matrices.
//
// No two tiles that share a block run at once, and a block's tiles come in a fixed order (`tournament`): the bits are
// the same in every run, and depend on the number of threads only where that changes the cut.
#pragma once

#include "common/exponents.h"
#include "common/kept_tiles.h"
#include "common/similarities.h"
#include "common/softmax_tiles.h"
#include "common/softmax_weights.h"

namespace fastssl {

inline int64_t rows_of(const Tensor& z1, const Tensor* z2) { return z1.size(0) + (z2 ? z2->size(0) : 0); }

// The side of a forward pass, the rows of z1 and, unless null, of z2; and what the pass keeps, `numbers` of the
// operation's own included.
struct SummedSelf {
  const Engine engine;
  const Side z;
  const Exponent e;
  Tensor kept;
  const KeptTiles tiles;

  SummedSelf(const Tensor& z1, const Tensor* z2, const Tensor& scale, bool normalize, int64_t keep,
             c10::string_view precision, int64_t numbers = 0)
      : engine(precision),
        z(z1, z2, normalize, kRows | kColumns, engine, threads_for(rows_of(z1, z2), rows_of(z1, z2), z1.size(1))),
        e(scale, z, z),
        kept(at::empty({keep}, at::kByte)),
        tiles(kept, {z.count, z.count, z.rows.dim, z.threads, true}, engine, e.shared, z.largest_square,
              z.largest_square, numbers) {}

  // The sums of all rows. Row i leaves out column exclude[i], and row exclude[i] column i, unless `exclude` is null.
  // `visit(I, J, tile)` gets each tile before entries are left out, `keep(I, J, exponentials)` what was kept of it.
  template <typename Visit, typename Keep>
  Sums sum(const int64_t* exclude, const Visit& visit, const Keep& keep) const {
    const Similarities S{z, z, e.factor, e.excluded, exclude, true};
    Sums sums(z.padded_count(), e);
    const Blocks tile(z.threads, z.cut.block * z.cut.block * 4);
    const SoftmaxTiles& f = FASTSSL_TABLE_IN_USE(softmax_tiles);
    tournament(z.threads, z.cut, [&](int64_t I, int64_t J) {
      float* const place = tiles.floats(I, J);
      float* const s = place ? place : tile.floats(slot(z.threads));
      const int64_t ld = z.padded(J);
      S.compute(I, J, s);
      visit(I, J, s);
      S.exclude_from(I, J, s);
      double* const row_total = &sums.total[z.first(I)];
      double* const column_total = I == J ? nullptr : &sums.total[z.first(J)];
      if (e.shared) {
        void* const exponentials = tiles(I, J);
        f.sum_exponentials(s, ld, z.size(I), ld, e.c, e.origin, row_total, nullptr, column_total, nullptr, exponentials,
                           tiles.narrow);
        tiles.pad(I, J, z.size(I));
        if (exponentials) keep(I, J, exponentials);
      } else {
        f.sum_exponentials_online(s, ld, z.size(I), ld, e.c, row_total, &sums.extreme[z.first(I)], column_total,
                                  &sums.extreme[z.first(J)]);
      }
    }, [&] { engine.release(); });
    if (e.shared) std::fill_n(sums.extreme.data, z.count, e.origin);
    return sums;
  }

  Sums sum(const int64_t* exclude = nullptr) const {
    const auto nothing = [](int64_t, int64_t, const void*) {};
    return sum(exclude, nothing, nothing);
  }
};

// The side of a backward pass. If all tiles were kept, operands that only serve to compute S again are not packed.
struct DerivedSelf {
  const Engine engine;
  const int threads;
  const KeptTiles tiles;
  const Side z;
  const Exponent e;

  DerivedSelf(const Tensor& z1, const Tensor* z2, const Tensor& scale, bool normalize, const Tensor& kept,
              c10::string_view precision, int64_t numbers = 0)
      : engine(precision),
        threads(threads_for(rows_of(z1, z2), rows_of(z1, z2), z1.size(1))),
        tiles(kept, {rows_of(z1, z2), rows_of(z1, z2), z1.size(1), threads, true}, engine, numbers),
        z(z1, z2, normalize, kWeighed | kWeighing | (tiles.all() ? kNothing : kRows | kColumns), engine, threads,
          tiles.largest_square(0)),
        e(scale, z, z) {
    tiles.check(e.shared);
  }

  // `gathered` gets the products of all tiles' weights. `exclude` is as in the forward pass.
  void multiply(const int64_t* exclude, const Coefficients& p, Gathered& gathered) const {
    const Similarities S{z, z, e.factor, e.excluded, exclude, true};
    const Weights weights(S, e, &p, &p);
    tournament(threads, z.cut, [&](int64_t I, int64_t J) {
      weights.compute_and_multiply(I, J, tiles, &gathered, I == J ? nullptr : &gathered);
    }, [&] { engine.release(); });
  }
};

// (grad_z, grad_scale) from what was gathered.
inline std::tuple<Tensor, Tensor> finish_self(const Gathered& gathered, const Exponent& e, const Tensor& z,
                                              const Tensor& scale) {
  const Tensor grad_z = at::empty(z.sizes(), z.options());
  const double along = finish_side(gathered, nullptr, e.scale, grad_z);
  return {grad_z, scalar(along / 2, scale.options())};
}

// (grad_z1, grad_z2, grad_scale) from what was gathered and the weights of positives, the rows of the other view.
inline std::tuple<Tensor, Tensor, Tensor> finish_views(const Gathered& gathered, const float* positive_weight,
                                                       const Exponent& e, const Tensor& z1, const Tensor& z2,
                                                       const Tensor& scale) {
  const Tensor grad_z1 = at::empty(z1.sizes(), z1.options()), grad_z2 = at::empty(z2.sizes(), z2.options());
  const Positives positives{gathered.side, positive_weight};
  const double along = finish_side(gathered, &positives, e.scale, grad_z1, &grad_z2);
  return {grad_z1, grad_z2, scalar(along / 2, scale.options())};
}

}  // namespace fastssl
