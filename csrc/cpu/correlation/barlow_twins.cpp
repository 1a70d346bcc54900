// Barlow Twins on the CPU (arXiv:2103.03230): with A and B the standardised columns of two views (N, D) and
// C = A^T B / N,
//
//     loss = invariance_param sum_i (C_ii - 1)^2 + lambda_param sum_{i != j} C_ij^2.
//
// Algorithms and cost are those of passes.cpp: of the order of N D min(N, D) operations, not N D D.
#include <torch/library.h>

#include "common/portable.h"
#include "correlation/passes.h"

namespace fastssl {
namespace {

using correlation::Result;
using correlation::Views;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> barlow_twins(const Tensor& z_a, const Tensor& z_b,
                                                                double invariance_param, double lambda_param,
                                                                double eps, bool unbiased, bool dual, bool derive,
                                                                c10::string_view precision) {
  const Views views({z_a, z_b}, true, eps, unbiased);
  const Result r = correlation::forward({views, invariance_param, 0, lambda_param}, dual, derive, precision);
  return {scalar(r.loss), scalar(r.invariance), scalar(r.off), r.kept[0], r.kept[1]};
}

std::tuple<Tensor, Tensor> barlow_twins_backward(const Tensor& grad_loss, const Tensor& z_a, const Tensor& z_b,
                                                 const Tensor& kept_a, const Tensor& kept_b, double invariance_param,
                                                 double lambda_param, double eps, bool unbiased, bool dual,
                                                 c10::string_view precision) {
  const Views views({z_a, z_b}, true, eps, unbiased);
  const auto grad_z = correlation::backward({views, invariance_param, 0, lambda_param}, grad_loss, {kept_a, kept_b},
                                            dual, precision);
  return {grad_z[0], grad_z[1]};
}

FASTSSL_KERNELS(CPU, m) {
  implement<&barlow_twins>(m, "barlow_twins");
  implement<&barlow_twins_backward>(m, "barlow_twins_backward");
}

}  // namespace
}  // namespace fastssl
