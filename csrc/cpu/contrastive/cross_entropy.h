// The cross-entropy of a row of S whose positive was left out of the sum of exponentials.
#pragma once

#include <cmath>
#include <limits>

namespace fastssl {

// log(1 + exp(n - p)), where n = shift + log(total) is the log-sum-exp of the negatives and p the positive's entry of
// S, in double and without cancellation. NaN where p is infinite.
class CrossEntropy {
 public:
  CrossEntropy(float total, float shift, float p)
      : total(total), lead(std::isinf(p) ? std::numeric_limits<double>::quiet_NaN() : double(p) - shift),
        positive(std::exp(lead)) {}

  double value() const {
    if (total == 0) return std::isnan(lead) ? lead : 0;
    return positive > total ? std::log1p(total / positive) : std::log(total + positive) - lead;
  }

  // Its derivative with respect to n, and minus that with respect to p.
  double slope() const { return total * slope_of_total(); }

  // Its derivative with respect to the total.
  double slope_of_total() const { return total == 0 ? 0 : 1 / (total + positive); }

 private:
  double total, lead, positive;  // about the shift
};

}  // namespace fastssl
