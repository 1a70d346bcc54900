// Exponentials of similarities, and their sums: the parts of every softmax.
//
// A softmax subtracts a shift from its logits before it exponentiates. Tiles hold X Y^T, unscaled, so what is
// subtracted from their entries is an "origin": shift = scale origin. No entry is further from 0 than
// M = max |x_i| max |y_j|, which is 1 for unit rows. If |scale| M <= kShared, the largest entry that these norms allow
// is the origin of all rows and columns: every exponential lies between exp(-2 kShared) and 1, and serves both its row
// and its column. That covers unit rows at temperatures from 1/32 up. Otherwise each row's origin is its own maximum.
//
// A backward pass recovers origins from rounded shifts. Where |scale| M exceeds kUnscaled, that rounding would move
// them too far: there tiles hold scale X Y^T, as in eager code, and a shift equals an entry of a tile to the last bit.
#pragma once

#include <cmath>
#include <limits>

#include "common/side.h"

namespace fastssl {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

constexpr double kShared = 32;  // float32 holds exp(-2 kShared) and, with room for gradients, its inverse
constexpr double kUnscaled = 1 << 20;

// The c for which 2^(c S) = exp(scale S). Never 0, which would turn the -inf of an excluded entry into NaN.
inline float exponent_factor(float scale) {
  const float c = static_cast<float>(scale * kLog2E);
  return c == 0 ? std::numeric_limits<float>::min() : c;
}

// The same for a positive scale, at most float32's largest; NaN for any other.
inline float exponent_scale(double scale) {
  constexpr double kMost = std::numeric_limits<float>::max();
  return scale > 0 ? static_cast<float>(std::min(kLog2E * scale, kMost)) : std::numeric_limits<float>::quiet_NaN();
}

// The c for which 2^(c x) = exp(x / temperature); NaN for a temperature that is not positive.
inline float exponent_scale_at(double temperature) {
  return exponent_scale(temperature > 0 ? 1 / temperature : std::numeric_limits<double>::quiet_NaN());
}

// How the exponentials of scale X Y^T are computed from tiles of S = factor X Y^T.
struct Exponent {
  float scale;     // NaN if it is not finite
  float factor;    // 1 or scale
  float rest;      // the other of the two: the exponentials are exp(rest S)
  float c;         // 2^(c S) = exp(rest S)
  double step;     // rest, as rounded in c
  float excluded;  // what S is set to where an entry is left out
  bool shared;     // whether all rows and columns share one origin
  float origin;    // the shared origin

  Exponent(const Tensor& scale_tensor, const Side& x, const Side& y) : scale(number<float>(scale_tensor)) {
    if (!std::isfinite(scale)) scale = std::numeric_limits<float>::quiet_NaN();
    const double largest = std::abs(scale) * std::sqrt(double(x.largest_square)) * std::sqrt(double(y.largest_square));
    const bool scaled = largest > kUnscaled || std::isinf(exponent_factor(scale));
    factor = scaled ? scale : 1;
    rest = scaled ? 1 : scale;
    c = exponent_factor(rest);
    step = c * kLn2;
    excluded = -std::copysign(std::numeric_limits<float>::infinity(), c);
    shared = largest <= kShared;
    origin = rest ? static_cast<float>(largest / rest) : 0;
  }
};

// Sums of exponentials, one for each row of a side, padded; or several for each row, one per split of the columns, to
// be added up.
struct Sums {
  Numbers<double> total;
  Numbers<float> extreme;  // the entry with the largest scale S_ij, infinite with c's sign reversed if there is none

  Sums(int64_t count, const Exponent& e) : total(count, 0), extreme(count, e.excluded) {}

  // total[i], moved to `origin` from the shared origin or from the row's extreme.
  double about(int64_t i, const Exponent& e, float origin) const {
    return total[i] == 0 ? 0 : total[i] * std::exp(e.step * ((e.shared ? e.origin : extreme[i]) - origin));
  }
};

// The shift of an extreme entry; and the origin that backward passes recover from the (rounded) shift.
inline float shift_of(float extreme, const Exponent& e) { return extreme == e.excluded ? 0 : e.rest * extreme; }
inline float origin_of(float shift, const Exponent& e) { return e.rest ? shift / e.rest : 0; }

// (total, shift) from sums about any origin; the shift is that of the extreme entry.
inline std::tuple<Tensor, Tensor> finish_sums(const Sums& sums, int64_t count, const Exponent& e) {
  const Tensor total = at::empty({count}, at::kFloat), shift = at::empty({count}, at::kFloat);
  float* const out_total = total.mutable_data_ptr<float>();
  float* const out_shift = shift.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    out_shift[i] = shift_of(sums.extreme[i], e);
    out_total[i] = static_cast<float>(sums.about(i, e, origin_of(out_shift[i], e)));
  }
  return {total, shift};
}

}  // namespace fastssl
