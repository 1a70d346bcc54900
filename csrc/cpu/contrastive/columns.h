// What the columns of S gather from the weights of its rows: W^T X.
#pragma once

#include "common/softmax_weights.h"

namespace fastssl {

// A thread owns columns: the bits do not depend on which.
inline void gather_columns(const Similarities& S, const Exponent& e, const Coefficients& rows, const KeptTiles& kept,
                           Gathered& gathered) {
  const Weights weights(S, e, &rows, nullptr);
  run(S.y.threads, S.y.cut.blocks, [&](int64_t J) {
    // Where the last tile of a column of tiles was kept, all were.
    if (S.y.lazy && S.x.cut.blocks && !kept(S.x.cut.blocks - 1, J)) S.y.prepare(J);
    for (int64_t I = 0; I < S.x.cut.blocks; ++I) weights.compute_and_multiply(I, J, kept, nullptr, &gathered);
  }, [&] { S.y.engine.release(); });
}

}  // namespace fastssl
