// CLIP's loss on the CPU (arXiv:2103.00020): with S = scale X Y^T of N (normalised) rows each, whose diagonal holds the
// positive pairs,
//
//     loss_i = (log sum_j exp(S_ij) + log sum_j exp(S_ji)) / 2 - S_ii,
//
// and with label smoothing what smoothing.h adds for either side.
//
// Algorithm and cost are those of pairs.h. In units U = 2 N N D of floating-point operations (one product) the forward
// pass takes 1 U, the backward pass 2 U from tiles that were kept, 3 U from tiles that are computed again.
//
// The weights of positive pairs do not average out, so they do not go through rounded products: the diagonal is left
// out of the tiles, and its terms are computed from unrounded rows. In float32 the tiles have both, as they lie.
#include <torch/library.h>

#include "common/checks.h"
#include "common/portable.h"
#include "contrastive/cross_entropy.h"
#include "contrastive/pairs.h"
#include "contrastive/smoothing.h"

namespace fastssl {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> clip_loss(const Tensor& x_, const Tensor& y_,
                                                                             const Tensor& scale,
                                                                             double label_smoothing, bool normalize,
                                                                             int64_t keep, c10::string_view precision) {
  check_pairs("image_features and text_features", x_, y_, scale);
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const Side x(x_, normalize, kRows, engine, threads), y(y_, normalize, kColumns, engine, threads);
  const Exponent e(scale, x, y);
  Tensor kept = at::empty({keep}, at::kByte);
  const KeptTiles tiles(kept, {x.count, y.count, x.rows.dim, threads, false}, engine, e.shared, x.largest_square,
                        y.largest_square);
  const Tensor positive = at::empty({x.count}, at::kFloat), loss = at::empty({x.count}, at::kFloat);
  float* const p = positive.mutable_data_ptr<float>();
  const bool exact = engine.operand == Operand::Float32;
  const auto [rows, columns] = sum_pair({x, y, e.factor, e.excluded, nullptr, true}, e, tiles, exact ? p : nullptr);
  const auto [row_total, row_shift] = finish_sums(rows, x.count, e);
  const auto [column_total, column_shift] = finish_sums(columns, y.count, e);
  if (!exact) {
    dot_rows(x, y, p);
    for (int64_t i = 0; i < x.count; ++i) p[i] *= e.scale;
  }
  float* const out = loss.mutable_data_ptr<float>();
  const float *const r = row_total.const_data_ptr<float>(), *const c = column_total.const_data_ptr<float>();
  const float *const r_shift = row_shift.const_data_ptr<float>(), *const c_shift = column_shift.const_data_ptr<float>();
  for (int64_t i = 0; i < x.count; ++i) {
    const Softplus row = cross_entropy(r[i], r_shift[i], p[i]), column = cross_entropy(c[i], c_shift[i], p[i]);
    out[i] = static_cast<float>((row.value + column.value) / 2);
  }
  if (const float share = share_of(label_smoothing, x.count)) {
    smooth(x, mean_row(y).data, share / 2, e.scale, p, out);
    smooth(y, mean_row(x).data, share / 2, e.scale, p, out);
  }
  return {loss, positive, row_total, row_shift, column_total, column_shift, kept};
}

std::tuple<Tensor, Tensor, Tensor> clip_loss_backward(const Tensor& grad_loss, const Tensor& x_, const Tensor& y_,
                                                      const Tensor& scale, const Tensor& positive,
                                                      const Tensor& row_total, const Tensor& row_shift,
                                                      const Tensor& column_total, const Tensor& column_shift,
                                                      const Tensor& kept, double label_smoothing, bool normalize,
                                                      c10::string_view precision) {
  check_pairs("image_features and text_features", x_, y_, scale);
  check_vectors("grad_loss, positive, totals and shifts", x_.size(0),
                {grad_loss, positive, row_total, row_shift, column_total, column_shift});
  check_kept(kept);
  const int64_t count = x_.size(0);
  const Engine engine(precision);
  const int threads = threads_for(count, count, x_.size(1));
  const KeptTiles tiles(kept, {count, count, x_.size(1), threads, false}, engine);
  const DerivedPair pair(x_, y_, scale, normalize, engine, threads, tiles);
  const Tensor g = grad_loss.contiguous(), p = positive.contiguous();
  const float *const gradients = g.const_data_ptr<float>(), *const positives = p.const_data_ptr<float>();
  const float share = share_of(label_smoothing, count);
  const Numbers<float> weights(count), even(share ? count : 0);
  for (int64_t i = 0; i < count; ++i) weights[i] = share ? share * gradients[i] : 0;
  for (int64_t i = 0; share && i < count; ++i) even[i] = -weights[i] / (2 * static_cast<float>(count));
  const auto coefficients = [&](const Tensor& total_, const Tensor& shift_, const Side& side) {
    const Tensor total = total_.contiguous(), shift = shift_.contiguous();
    const float *const t = total.const_data_ptr<float>(), *const s = shift.const_data_ptr<float>();
    return Coefficients([&](int64_t i) {
      const double slope = cross_entropy(t[i], s[i], positives[i]).slope * gradients[i] / 2;
      weights[i] -= static_cast<float>(slope);
      return t[i] == 0 ? 0 : static_cast<float>(slope / t[i]);
    }, shift, side, pair.e);
  };
  const Coefficients rows = coefficients(row_total, row_shift, pair.x);
  const Coefficients columns = coefficients(column_total, column_shift, pair.y);
  return pair.differentiate(nullptr, true, rows, columns, weights.data, share ? even.data : nullptr, x_, y_,
                            scale);
}

FASTSSL_KERNELS(CPU, m) {
  implement<&clip_loss>(m, "clip_loss");
  implement<&clip_loss_backward>(m, "clip_loss_backward");
}

}  // namespace
}  // namespace fastssl
