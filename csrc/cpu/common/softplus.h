// log(1 + exp(x)), in double.
#pragma once

#include <algorithm>
#include <cmath>

namespace fastssl {

// log(1 + exp(x)), and its derivative.
struct Softplus {
  double value, slope;

  explicit Softplus(double x) {
    const double t = std::exp(-std::abs(x));
    value = std::isnan(x) ? x : std::max(x, 0.) + std::log1p(t);
    slope = (x >= 0 ? 1 : t) / (1 + t);
  }
};

}  // namespace fastssl
