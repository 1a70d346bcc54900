// Tiles of similarities S = X Y^T.
//
// Each is computed in float32, used, and forgotten before the next.
#pragma once

#include <algorithm>

#include "common/side.h"

namespace fastssl {

// Tiles of S = factor X Y^T, and which entries are left out of it.
struct Similarities {
  const Side& x;
  const Side& y;
  float factor;            // of every entry: Exponent::factor
  float excluded;          // replaces entries that are left out, and padding
  const int64_t* exclude;  // the column to leave out of each row, or null
  bool diagonal;           // leave out the diagonal, where x and y are one side

  void compute(int64_t I, int64_t J, float* S) const {
    const int64_t m = x.padded(I), n = y.padded(J);
    x.engine.multiply(m, n, x.dim, false, x.as_rows(I), y.as_columns(J), S);
    if (factor != 1)
      for (int64_t i = 0; i < m * n; ++i) S[i] *= factor;
  }

  void exclude_from(int64_t I, int64_t J, float* S) const {
    const int64_t rows = x.size(I), columns = y.size(J), ld = y.padded(J);
    if (diagonal && I == J)
      for (int64_t r = 0; r < rows; ++r) S[r * ld + r] = excluded;
    if (exclude)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t column = exclude[x.first(I) + r] - y.first(J);
        if (column >= 0 && column < columns) S[r * ld + column] = excluded;
      }
    if (columns < ld)
      for (int64_t r = 0; r < rows; ++r) std::fill(S + r * ld + columns, S + (r + 1) * ld, excluded);
    std::fill(S + rows * ld, S + x.padded(I) * ld, excluded);
  }

  void operator()(int64_t I, int64_t J, float* S) const {
    compute(I, J, S);
    exclude_from(I, J, S);
  }
};

}  // namespace fastssl
