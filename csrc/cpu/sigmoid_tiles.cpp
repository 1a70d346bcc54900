// The work within one tile of the sigmoid loss, compiled once per instruction set.
//
// With t = exp(-|x|), which never overflows, both functions of x come from one exponential and one division:
//
//     softplus(x) = max(x, 0) + log(1 + t)        sigmoid(x) = (x >= 0 ? 1 : t) / (1 + t)
//
// log(1 + t) on [0, 1] is t times a polynomial, so that a small t keeps all its digits.
#include "sigmoid_tiles.h"

#include "common/rows.h"
#include "common/simd.h"
#include "common/weights.h"

namespace fastssl::FASTSSL_ISA {
namespace {

// log(1 + t) for 0 <= t <= 1, with a relative error of 2e-7.
inline Vec log1p(Vec t) {
  Vec p = broadcast(5.23268791e-3f);
  p = p * t - 2.95052133e-2f;
  p = p * t + 7.82259104e-2f;
  p = p * t - 1.36632423e-1f;
  p = p * t + 1.91060051e-1f;
  p = p * t - 2.48429818e-1f;
  p = p * t + 3.33190968e-1f;
  p = p * t - 4.99994931e-1f;
  p = p * t + 9.9999997e-1f;
  return p * t;
}

struct Both {
  Vec softplus, sigmoid;
};

inline Both evaluate(Vec s, float scale, float bias) {
  const Vec x = s * scale + bias;
  const Vec t = exp2(max(x, -x) * -1.44269504f);
  return {max(x, Vec{}) + log1p(t), (x >= 0.f ? broadcast(1) : t) / (t + 1.f)};
}

double softplus(const float* S, int64_t ld, int64_t rows, int64_t columns, float scale, float bias) {
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    Vec row = {};
    for (int64_t j = 0; j < columns; j += kLanes) row += evaluate(load(S + r * ld + j), scale, bias).softplus;
    total += sum(row);
  }
  return total;
}

double softplus_and_weights(float* S, int64_t ld, int64_t rows, int64_t columns, float scale, float bias,
                            double* weight, void* half, void* pairs) {
  double total = 0;
  Vec row = {}, row_weight = {};
  each_weight(S, ld, rows, columns, static_cast<uint16_t*>(half), static_cast<uint16_t*>(pairs),
              [&](int64_t r, int64_t j) {
                const Both both = evaluate(load(S + r * ld + j), scale, bias);
                row += both.softplus;
                row_weight += both.sigmoid;
                if (j + kLanes == columns && r % 2) {
                  total += sum(row);
                  *weight += sum(row_weight);
                  row = row_weight = Vec{};
                }
                return both.sigmoid;
              });
  return total;
}

void scaled(const float* x, int64_t count, float factor, Element element, void* out) {
  store_row(x, element, count, factor, out);
}

}  // namespace

extern const SigmoidTiles sigmoid_tiles;
const SigmoidTiles sigmoid_tiles = {softplus, softplus_and_weights, scaled};

}  // namespace fastssl::FASTSSL_ISA
