// The gradient that the columns of S gather where only its rows have a loss: W^T X. In units U of one product that is
// 1 U of tiles that were kept (common/kept_tiles.h), 2 U of tiles that are computed again.
#pragma once

#include "common/softmax_weights.h"

namespace fastssl {

// Each thread owns some columns, and finishes them; the bits do not depend on which.
inline void gather_columns(const Similarities& S, const Exponent& e, const Coefficients& rows, const KeptTiles& kept,
                           Gathered& gathered, const Finish& finish, const float* diagonal = nullptr) {
  const Weights weights(S, e, &rows, nullptr, diagonal);
  run(S.y.threads, S.y.cut.blocks, [&](int64_t J) {
    // If the last tile of a column of tiles was kept, all of that column's were.
    if (S.y.lazy && S.x.cut.blocks && !kept(S.x.cut.blocks - 1, J)) S.y.prepare(J);
    for (int64_t I = 0; I < S.x.cut.blocks; ++I) weights.compute_and_multiply(I, J, kept, nullptr, &gathered);
    finish(J);
  }, [&] { S.y.engine.release(); });
}

}  // namespace fastssl
