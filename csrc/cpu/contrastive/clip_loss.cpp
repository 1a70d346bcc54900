// CLIP's loss on the CPU (arXiv:2103.00020): with S = scale X Y^T of (normalised) rows the mean of the
// cross-entropies of rows and of columns, the diagonal being positive.
//
// The positives, whose weights do not average out, do not go through rounded products: they are left out of the tiles,
// and applied to unrounded rows.
#include <torch/library.h>

#include "common/checks.h"
#include "common/portable.h"
#include "contrastive/cross_entropy.h"
#include "contrastive/pairs.h"

namespace fastssl {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> clip_loss(const Tensor& x_, const Tensor& y_,
                                                                     const Tensor& scale, bool normalize,
                                                                     c10::string_view precision) {
  check_pairs("image_features and text_features", x_, y_, scale);
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const Side x(x_, x_.narrow(0, 0, 0), normalize, kRows, engine, threads);
  const Side y(y_, y_.narrow(0, 0, 0), normalize, kColumns, engine, threads);
  const Exponent e(scale, x, y);
  const auto [rows, columns] = sum_pair({x, y, e.factor, e.excluded, nullptr, true}, e);
  const auto [row_total, row_shift] = finish_sums(rows, x.count, e);
  const auto [column_total, column_shift] = finish_sums(columns, y.count, e);
  const Tensor positive = dot_rows(x, y).mul_(e.scale), loss = at::empty({x.count}, at::kFloat);
  const float* const p = positive.const_data_ptr<float>();
  float* const out = loss.mutable_data_ptr<float>();
  const float *const r = row_total.const_data_ptr<float>(), *const c = column_total.const_data_ptr<float>();
  const float *const r_shift = row_shift.const_data_ptr<float>(), *const c_shift = column_shift.const_data_ptr<float>();
  for (int64_t i = 0; i < x.count; ++i) {
    const Softplus row = cross_entropy(r[i], r_shift[i], p[i]), column = cross_entropy(c[i], c_shift[i], p[i]);
    out[i] = static_cast<float>((row.value + column.value) / 2);
  }
  return {loss, positive, row_total, row_shift, column_total, column_shift};
}

std::tuple<Tensor, Tensor, Tensor> clip_loss_backward(const Tensor& grad_loss, const Tensor& x_, const Tensor& y_,
                                                      const Tensor& scale, const Tensor& positive,
                                                      const Tensor& row_total, const Tensor& row_shift,
                                                      const Tensor& column_total, const Tensor& column_shift,
                                                      bool normalize, c10::string_view precision) {
  check_pairs("image_features and text_features", x_, y_, scale);
  check_vectors("grad_loss, positive, totals and shifts", x_.size(0),
                {grad_loss, positive, row_total, row_shift, column_total, column_shift});
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const Side x(x_, x_.narrow(0, 0, 0), normalize, kRows | kWeighing, engine, threads);
  const Side y(y_, y_.narrow(0, 0, 0), normalize, kColumns | kWeighed, engine, threads);
  const Exponent e(scale, x, y);
  const Tensor g = grad_loss.contiguous(), p = positive.contiguous();
  const float *const gradients = g.const_data_ptr<float>(), *const positives = p.const_data_ptr<float>();
  const Tensor weights = at::zeros({x.count}, at::kFloat);
  float* const weight = weights.mutable_data_ptr<float>();
  const auto gradient = [&](const Tensor& total_, const Tensor& shift_) {
    const Tensor total = total_.contiguous(), shift = shift_.contiguous(), grad_total = at::empty_like(total);
    const float *const t = total.const_data_ptr<float>(), *const s = shift.const_data_ptr<float>();
    float* const out = grad_total.mutable_data_ptr<float>();
    for (int64_t i = 0; i < x.count; ++i) {
      const double slope = cross_entropy(t[i], s[i], positives[i]).slope * gradients[i] / 2;
      out[i] = t[i] == 0 ? 0 : static_cast<float>(slope / t[i]);
      weight[i] -= static_cast<float>(slope);
    }
    return grad_total;
  };
  const Coefficients rows(gradient(row_total, row_shift), row_shift, x, e);
  const Coefficients columns(gradient(column_total, column_shift), column_shift, y, e);
  return differentiate_pair({x, y, e.factor, e.excluded, nullptr, true}, e, rows, columns, weight, x_, y_, scale);
}

TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  implement<&clip_loss>(m, "clip_loss");
  implement<&clip_loss_backward>(m, "clip_loss_backward");
}

}  // namespace
}  // namespace fastssl
