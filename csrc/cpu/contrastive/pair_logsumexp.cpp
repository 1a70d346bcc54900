// The log-sum-exps of rows and of columns on the CPU: with S = scale X Y^T, M x N, where row i leaves out column
// exclude[i],
//
//     rows_i = log sum_j exp(S_ij),     columns_j = log sum_i exp(S_ij).
//
// Algorithm and cost are those of pairs.h. In units U = 2 M N D of floating-point operations (one product) the forward
// pass takes 1 U, the backward pass 2 U from tiles that were kept, 3 U from tiles that are computed again.
#include <torch/library.h>

#include "common/checks.h"
#include "common/portable.h"
#include "contrastive/pairs.h"

namespace fastssl {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pair_logsumexp(const Tensor& x_, const Tensor& y_,
                                                                  const Tensor& scale,
                                                                  const std::optional<Tensor>& exclude_, int64_t keep,
                                                                  c10::string_view precision) {
  check_sides("x and y", x_, y_, scale);
  const Tensor exclude = checked_exclude(exclude_, x_);
  const SummedPair pair(x_, y_, scale, false, keep, precision);
  const auto [rows, columns] = pair.sum(data_of(exclude), false);
  return std::tuple_cat(finish_sums(rows, pair.x.count, pair.e), finish_sums(columns, pair.y.count, pair.e),
                        std::tuple(pair.kept));
}

std::tuple<Tensor, Tensor, Tensor> pair_logsumexp_backward(const Tensor& grad_row_total,
                                                           const Tensor& grad_column_total, const Tensor& x_,
                                                           const Tensor& y_, const Tensor& scale,
                                                           const std::optional<Tensor>& exclude_,
                                                           const Tensor& row_shift, const Tensor& column_shift,
                                                           const Tensor& kept, c10::string_view precision) {
  check_sides("x and y", x_, y_, scale);
  check_vectors("grad_row_total and row_shift", x_.size(0), {grad_row_total, row_shift});
  check_vectors("grad_column_total and column_shift", y_.size(0), {grad_column_total, column_shift});
  check_kept(kept);
  const Tensor exclude = checked_exclude(exclude_, x_);
  const DerivedPair pair(x_, y_, scale, false, kept, precision);
  Coefficients rows(grad_row_total, row_shift, pair.x, pair.e);
  Coefficients columns(grad_column_total, column_shift, pair.y, pair.e);
  return pair.differentiate(data_of(exclude), false, rows, columns, nullptr, nullptr, scale);
}

FASTSSL_KERNELS(CPU, m) {
  implement<&pair_logsumexp>(m, "pair_logsumexp");
  implement<&pair_logsumexp_backward>(m, "pair_logsumexp_backward");
}

}  // namespace
}  // namespace fastssl
