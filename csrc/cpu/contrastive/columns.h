// What the columns of S gather from the weights of its rows: W^T X.
#pragma once

#include "common/softmax_weights.h"

namespace fastssl {

// A thread owns columns: the bits do not depend on which.
inline void gather_columns(const Similarities& S, const Exponent& e, const Coefficients& rows, Gathered& gathered) {
  const Weights weights(S, e, &rows, nullptr);
  run(S.y.threads, S.y.cut.blocks, [&](int64_t J) {
    if (S.y.lazy) S.y.prepare(J);
    for (int64_t I = 0; I < S.x.cut.blocks; ++I) {
      S(I, J, weights.tile_of());
      weights.multiply(I, J, nullptr, &gathered);
    }
  }, [&] { S.y.engine.release(); });
}

}  // namespace fastssl
