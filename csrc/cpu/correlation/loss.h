// The parts of the losses, and the terms of their gradients that depend on statistics of single columns.
#pragma once

#include <algorithm>
#include <cmath>

#include "correlation/panels.h"

namespace fastssl::correlation {

// A loss: the weights of its parts, and their values and derivatives given the statistics of the columns.
struct Loss {
  const Views& views;
  double invariance_param, variance_param, off_param;

  // Whether products are those of A with B (Barlow Twins), or of A with itself and of B with itself (VICReg).
  bool cross() const { return views.divide; }
  // The factor of the sum of squares off the diagonal.
  double off_factor() const {
    return cross() ? 1 / (double(views.rows) * views.rows) : 1 / (views.dim * views.divisor * views.divisor);
  }
  // The factor of B (A^T B)^T in the gradient of A.
  double alpha() const { return (cross() ? 2 : 4) * off_param * off_factor(); }

  template <typename F>
  double sum(const F& f) const {
    double total = 0;
    for (int64_t i = 0; i < views.dim; ++i) total += f(i);
    return total;
  }

  double invariance(const Panels& panels) const {
    const float* const compared = panels.compared.const_data_ptr<float>();
    if (!cross()) return sum([&](int64_t i) { return compared[i]; }) / (double(views.rows) * views.dim);
    return sum([&](int64_t i) {
      const double apart = compared[i] / double(views.rows) - 1;
      return apart * apart;
    });
  }

  double variance(const Panels& panels) const {
    double total = 0;
    for (int v = 0; v < views.count(); ++v) {
      const float* const variance = panels.variance[v].const_data_ptr<float>();
      total += sum([&](int64_t i) {
        const double below = 1 - std::sqrt(variance[i] + views.eps);
        return below < 0 ? 0 : below;  // NaN stays NaN
      });
    }
    return total / (double(views.dim) * views.count());
  }

  // The sum of squares of the diagonal of A^T B, or of view v's A^T A, rounded as in the products.
  double diagonal(const Panels& panels, int v) const {
    const Tensor& exact = cross() ? panels.compared : panels.variance[v];
    const float* const value = (panels.rounded() ? panels.rounded_squares[v] : exact).const_data_ptr<float>();
    const double factor = cross() || panels.rounded() ? 1 : views.divisor;
    return sum([&](int64_t i) { return factor * value[i] * factor * value[i]; });
  }

  // The factor of z_a - z_b in the gradient of z_a, and of z_b - z_a in that of z_b.
  double pull() const {
    return cross() || views.count() == 1 ? 0 : 2 * invariance_param / (double(views.rows) * views.dim);
  }

  // The terms of a panel's gradient that are not products of panels, in `out`, 2 width floats. With `dual` the products
  // include the diagonal of A^T B, which is subtracted here.
  ColumnTerms terms(const Panels& panels, int64_t p, int v, bool dual, float* out) const {
    const int64_t width = panels.width;
    float* const own = out;
    float* const other = out + width;
    const double subtracted = dual ? alpha() : 0;
    std::fill_n(out, 2 * width, 0.f);
    if (cross()) {
      const float* const compared = panels.of(panels.compared, p);
      const double rows = double(views.rows);
      for (int64_t c = 0; c < width; ++c)
        other[c] = static_cast<float>(2 * invariance_param * (compared[c] / rows - 1) / rows - subtracted * compared[c]);
    } else {
      const double hinge = variance_param / (double(views.dim) * views.count() * views.divisor);
      const float* const variance = panels.of(panels.variance[v], p);
      for (int64_t c = 0; c < width; ++c) {
        const double deviation = std::sqrt(variance[c] + views.eps);
        // A variance may be infinite, and 0 times it NaN.
        const double diagonal = subtracted == 0 ? 0 : subtracted * variance[c] * views.divisor;
        own[c] = static_cast<float>((deviation < 1 ? -hinge / deviation : 0) - diagonal);
      }
    }
    return {own, other, panels.of(panels.rstd[v], p)};
  }

  double projection() const { return cross() ? views.divisor : 0; }
};

}  // namespace fastssl::correlation
