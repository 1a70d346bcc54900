// log sum_{j != i} exp(scale <z_i, z_j>) on the CPU, for all rows i of Z.
#include <torch/library.h>

#include "common/checks.h"
#include "common/portable.h"
#include "contrastive/symmetric.h"

namespace fastssl {
namespace {

std::tuple<Tensor, Tensor> self_logsumexp(const Tensor& z_, const Tensor& scale, c10::string_view precision) {
  check_sides("z and z", z_, z_, scale);
  const Engine engine(precision);
  const Side z(z_, kRows | kColumns, engine, threads_for(z_.size(0), z_.size(0), z_.size(1)));
  const Exponent e(scale, z, z);
  const Sums sums = sum_symmetric({z, z, e.factor, e.excluded, nullptr, true}, e, [](int64_t, int64_t, float*) {});
  if (e.shared) sums.extremes.fill_(e.origin);
  return finish_sums(sums, z.count, e);
}

std::tuple<Tensor, Tensor> self_logsumexp_backward(const Tensor& grad_total, const Tensor& z_, const Tensor& scale,
                                                   const Tensor& shift, c10::string_view precision) {
  check_sides("z and z", z_, z_, scale);
  check_vectors("grad_total and shift", z_.size(0), {grad_total, shift});
  const Engine engine(precision);
  const Side z(z_, kRows | kColumns | kWeighed | kWeighing, engine, threads_for(z_.size(0), z_.size(0), z_.size(1)));
  Gathered gathered(z, true, &z);
  return differentiate_self(z, Exponent(scale, z, z), grad_total, shift, gathered, z_, scale);
}

TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  implement<&self_logsumexp>(m, "self_logsumexp");
  implement<&self_logsumexp_backward>(m, "self_logsumexp_backward");
}

}  // namespace
}  // namespace fastssl
