// The cross-entropy of a row of S whose positive was left out of the sum of exponentials.
#pragma once

#include <cmath>
#include <limits>

#include "common/softplus.h"

namespace fastssl {

// softplus(n - p), where n = shift + log(total) is the log-sum-exp of the negatives and p the positive's entry of S.
// Its slope is the derivative with respect to n, and minus that with respect to p. NaN where p is infinite.
inline Softplus cross_entropy(float total, float shift, float p) {
  if (std::isinf(p)) p = std::numeric_limits<float>::quiet_NaN();
  return Softplus(total == 0 ? (std::isnan(p) ? p : -std::numeric_limits<double>::infinity())
                             : std::log(double(total)) + shift - p);
}

}  // namespace fastssl
