// The log-sum-exps of a symmetric S = scale Z Z^T without its diagonal, on the CPU:
//
//     rows_i = log sum_{j != i} exp(S_ij).
//
// Algorithm and cost are those of symmetric.h. In units U = 2 N N D of floating-point operations (one product) the
// forward pass takes U / 2, the backward pass U from tiles that were kept, 3 U / 2 from tiles that are computed again.
#include <torch/library.h>

#include "common/checks.h"
#include "common/portable.h"
#include "contrastive/symmetric.h"

namespace fastssl {
namespace {

std::tuple<Tensor, Tensor, Tensor> self_logsumexp(const Tensor& z, const Tensor& scale, int64_t keep,
                                                  c10::string_view precision) {
  check_sides("z and z", z, z, scale);
  const SummedSelf self(z, nullptr, scale, false, keep, precision);
  return std::tuple_cat(finish_sums(self.sum(), self.z.count, self.e), std::tuple(self.kept));
}

std::tuple<Tensor, Tensor> self_logsumexp_backward(const Tensor& grad_total, const Tensor& z, const Tensor& scale,
                                                   const Tensor& shift, const Tensor& kept,
                                                   c10::string_view precision) {
  check_sides("z and z", z, z, scale);
  check_vectors("grad_total and shift", z.size(0), {grad_total, shift});
  check_kept(kept);
  const DerivedSelf self(z, nullptr, scale, false, kept, precision);
  Gathered gathered(self.z, true, &self.z);
  self.multiply(nullptr, Coefficients(grad_total, shift, self.z, self.e), gathered);
  return finish_self(gathered, self.e, z, scale);
}

FASTSSL_KERNELS(CPU, m) {
  implement<&self_logsumexp>(m, "self_logsumexp");
  implement<&self_logsumexp_backward>(m, "self_logsumexp_backward");
}

}  // namespace
}  // namespace fastssl
