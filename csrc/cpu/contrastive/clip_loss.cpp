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
#include "contrastive/reduction.h"
#include "contrastive/smoothing.h"

namespace fastssl {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> clip_loss(const Tensor& x_, const Tensor& y_,
                                                                             const Tensor& scale,
                                                                             double label_smoothing,
                                                                             c10::string_view reduction_name,
                                                                             bool normalize, int64_t keep,
                                                                             c10::string_view precision) {
  check_pairs("image_features and text_features", x_, y_, scale);
  const Reduction reduction = reduction_of(reduction_name);
  const SummedPair pair(x_, y_, scale, normalize, keep, precision);
  const Side &x = pair.x, &y = pair.y;
  const Exponent& e = pair.e;
  const Tensor positive = at::empty({x.count}, at::kFloat), loss = at::empty({x.count}, at::kFloat);
  float* const p = positive.mutable_data_ptr<float>();
  const bool exact = pair.engine.operand == Operand::Float32;
  const auto [rows, columns] = pair.sum(nullptr, true, exact ? p : nullptr);
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
    const CrossEntropy row(r[i], r_shift[i], p[i]), column(c[i], c_shift[i], p[i]);
    out[i] = static_cast<float>((row.value() + column.value()) / 2);
  }
  if (const float share = share_of(label_smoothing, x.count)) {
    smooth(x, mean_row(y).data, share / 2, e.scale, p, out);
    smooth(y, mean_row(x).data, share / 2, e.scale, p, out);
  }
  return {reduce(loss, reduction), positive, row_total, row_shift, column_total, column_shift, pair.kept};
}

std::tuple<Tensor, Tensor, Tensor> clip_loss_backward(const Tensor& grad_loss, const Tensor& x_, const Tensor& y_,
                                                      const Tensor& scale, const Tensor& positive,
                                                      const Tensor& row_total, const Tensor& row_shift,
                                                      const Tensor& column_total, const Tensor& column_shift,
                                                      const Tensor& kept, double label_smoothing,
                                                      c10::string_view reduction, bool normalize,
                                                      c10::string_view precision) {
  check_pairs("image_features and text_features", x_, y_, scale);
  check_vectors("positive, totals and shifts", x_.size(0), {positive, row_total, row_shift, column_total, column_shift});
  check_kept(kept);
  const int64_t count = x_.size(0);
  const DerivedPair pair(x_, y_, scale, normalize, kept, precision);
  const Numbers<float> gradients = gradient_of_rows(grad_loss, reduction_of(reduction), count);
  const Tensor p = positive.contiguous();
  const float* const positives = p.const_data_ptr<float>();
  const float share = share_of(label_smoothing, count);
  Numbers<float> weights(count), even(share ? count : 0);
  for (int64_t i = 0; i < count; ++i) weights[i] = share ? share * gradients[i] : 0;
  for (int64_t i = 0; share && i < count; ++i) even[i] = -weights[i] / (2 * static_cast<float>(count));
  const auto coefficients = [&](const Tensor& total_, const Tensor& shift_, const Side& side) {
    const Tensor total = total_.contiguous(), shift = shift_.contiguous();
    const float *const t = total.const_data_ptr<float>(), *const s = shift.const_data_ptr<float>();
    return Coefficients([&](int64_t i) {
      const CrossEntropy found(t[i], s[i], positives[i]);
      weights[i] -= static_cast<float>(found.slope() * gradients[i] / 2);
      return static_cast<float>(found.slope_of_total() * gradients[i] / 2);
    }, shift, side, pair.e);
  };
  Coefficients rows = coefficients(row_total, row_shift, pair.x);
  Coefficients columns = coefficients(column_total, column_shift, pair.y);
  return pair.differentiate(nullptr, true, rows, columns, &weights, share ? even.data : nullptr, scale);
}

FASTSSL_KERNELS(CPU, m) {
  implement<&clip_loss>(m, "clip_loss");
  implement<&clip_loss_backward>(m, "clip_loss_backward");
}

}  // namespace
}  // namespace fastssl
