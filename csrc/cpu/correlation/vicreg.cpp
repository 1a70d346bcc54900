// VICReg on the CPU (arXiv:2105.04906), and its variance and covariance terms for one view:
//
//     loss = lambda_param mean (z_a - z_b)^2
//          + mu_param times the mean over views and columns of max(0, 1 - sqrt(var_i + eps))
//          + nu_param times the sum over views of sum_{i != j} C_ij^2 / D,
//
// where var_i are the variances of a view's columns and C is its D x D covariance matrix.
//
// Algorithms and cost are those of passes.cpp: of the order of N D min(N, D) operations, not N D D.
#include <torch/library.h>

#include "common/portable.h"
#include "correlation/passes.h"

namespace fastssl {
namespace {

using correlation::Result;
using correlation::Views;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vicreg(const Tensor& z_a, const Tensor& z_b,
                                                                  double lambda_param, double mu_param,
                                                                  double nu_param, double eps, bool unbiased, bool dual,
                                                                  bool derive, c10::string_view precision) {
  const Views views({z_a, z_b}, false, eps, unbiased);
  const Result r = correlation::forward({views, lambda_param, mu_param, nu_param}, dual, derive, precision);
  return {scalar(r.loss), scalar(r.invariance), scalar(r.variance), scalar(r.off), r.kept[0], r.kept[1]};
}

std::tuple<Tensor, Tensor> vicreg_backward(const Tensor& grad_loss, const Tensor& z_a, const Tensor& z_b,
                                           const Tensor& kept_a, const Tensor& kept_b, double lambda_param,
                                           double mu_param, double nu_param, double eps, bool unbiased, bool dual,
                                           c10::string_view precision) {
  const Views views({z_a, z_b}, false, eps, unbiased);
  const auto grad_z = correlation::backward({views, lambda_param, mu_param, nu_param}, grad_loss, {kept_a, kept_b},
                                            dual, precision);
  return {grad_z[0], grad_z[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> variance_covariance(const Tensor& z, double mu_param, double nu_param,
                                                               double eps, bool unbiased, bool dual, bool derive,
                                                               c10::string_view precision) {
  const Views views({z}, false, eps, unbiased);
  const Result r = correlation::forward({views, 0, mu_param, nu_param}, dual, derive, precision);
  return {scalar(r.loss), scalar(r.variance), scalar(r.off), r.kept[0]};
}

Tensor variance_covariance_backward(const Tensor& grad_loss, const Tensor& z, const Tensor& kept, double mu_param,
                                    double nu_param, double eps, bool unbiased, bool dual,
                                    c10::string_view precision) {
  const Views views({z}, false, eps, unbiased);
  return correlation::backward({views, 0, mu_param, nu_param}, grad_loss, {kept}, dual, precision)[0];
}

FASTSSL_KERNELS(CPU, m) {
  implement<&vicreg>(m, "vicreg");
  implement<&vicreg_backward>(m, "vicreg_backward");
  implement<&variance_covariance>(m, "variance_covariance");
  implement<&variance_covariance_backward>(m, "variance_covariance_backward");
}

}  // namespace
}  // namespace fastssl
