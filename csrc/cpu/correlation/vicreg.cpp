// VICReg on the CPU (arXiv:2105.04906), and its variance and covariance of one view.
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
  const auto dz = correlation::backward({views, lambda_param, mu_param, nu_param}, grad_loss, {kept_a, kept_b}, dual,
                                        precision);
  return {dz[0], dz[1]};
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

TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  implement<&vicreg>(m, "vicreg");
  implement<&vicreg_backward>(m, "vicreg_backward");
  implement<&variance_covariance>(m, "variance_covariance");
  implement<&variance_covariance_backward>(m, "variance_covariance_backward");
}

}  // namespace
}  // namespace fastssl
