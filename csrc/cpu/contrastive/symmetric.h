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

// The sums of a symmetric S over its tiles I <= J. Exponentials are kept as far as `kept` has room.
// `visit(I, J, tile)` gets each tile before entries are left out, `keep(I, J, exponentials)` what was kept of it.
template <typename Visit, typename Keep>
Sums sum_symmetric(const Similarities& S, const Exponent& e, const KeptTiles& kept, const Visit& visit,
                   const Keep& keep) {
  const Side& z = S.x;
  Sums sums(z.padded_count(), e);
  const Blocks tile(z.threads, z.cut.block * z.cut.block * 4);
  const SoftmaxTiles& f = FASTSSL_TABLE_IN_USE(softmax_tiles);
  tournament(z.threads, z.cut, [&](int64_t I, int64_t J) {
    float* const place = kept.floats(I, J);
    float* const s = place ? place : tile.floats(slot(z.threads));
    const int64_t ld = z.padded(J);
    S.compute(I, J, s);
    visit(I, J, s);
    S.exclude_from(I, J, s);
    double* const row_total = &sums.total[z.first(I)];
    double* const column_total = I == J ? nullptr : &sums.total[z.first(J)];
    if (e.shared) {
      void* const exponentials = kept(I, J);
      f.sum_exponentials(s, ld, z.size(I), ld, e.c, e.origin, row_total, nullptr, column_total, nullptr, exponentials,
                         kept.narrow);
      kept.pad(I, J, z.size(I));
      if (exponentials) keep(I, J, exponentials);
    } else {
      f.sum_exponentials_online(s, ld, z.size(I), ld, e.c, row_total, &sums.extreme[z.first(I)], column_total,
                                &sums.extreme[z.first(J)]);
    }
  }, [&] { z.engine.release(); });
  return sums;
}

inline Sums sum_symmetric(const Similarities& S, const Exponent& e, const KeptTiles& kept) {
  const auto nothing = [](int64_t, int64_t, const void*) {};
  return sum_symmetric(S, e, kept, nothing, nothing);
}

// The operands that a backward pass needs of Z.
inline int roles_in_backward(const KeptTiles& kept) {
  return kWeighed | kWeighing | (kept.all() ? kNothing : kRows | kColumns);
}

// The gradients (grad_z, grad_scale) of a symmetric S, given those of its sums. What `gathered` already holds is
// included.
inline std::tuple<Tensor, Tensor> differentiate_self(const Side& z, const Exponent& e, const Coefficients& p,
                                                     const KeptTiles& kept, Gathered& gathered, const Tensor& z_,
                                                     const Tensor& scale) {
  kept.check(e.shared);
  const Similarities S{z, z, e.factor, e.excluded, nullptr, true};
  const Weights weights(S, e, &p, &p);
  tournament(z.threads, z.cut, [&](int64_t I, int64_t J) {
    weights.compute_and_multiply(I, J, kept, &gathered, I == J ? nullptr : &gathered);
  }, [&] { z.engine.release(); });
  const Tensor grad_z = at::empty(z_.sizes(), z_.options());
  const double along = finish_side(gathered, nullptr, e.scale, grad_z);
  return {grad_z, scalar(along / 2, scale.options())};
}

}  // namespace fastssl
