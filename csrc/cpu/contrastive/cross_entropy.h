// The cross-entropy of a row of S whose positive was left out of its sum.
#pragma once

#include <cmath>
#include <limits>

#include "common/softplus.h"

namespace fastssl {

// The softplus of n - p, n = shift + log(total) being the log-sum-exp of the negatives and p the positive's S. Its slope
// is the derivative by n, and minus that by p. NaN where p is infinite.
inline Softplus cross_entropy(float total, float shift, float p) {
  if (std::isinf(p)) p = std::numeric_limits<float>::quiet_NaN();
  return Softplus(total == 0 ? (std::isnan(p) ? p : -std::numeric_limits<double>::infinity())
                             : std::log(double(total)) + shift - p);
}

}  // namespace fastssl
