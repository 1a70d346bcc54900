// The decoupled contrastive loss on the CPU (DCL, arXiv:2110.06848): with Z the N = 2B (normalised) rows of [z1; z2],
// S = scale Z Z^T and pos(i) = (i + B) mod N,
//
//     loss_i = log sum_{j != i, pos(i)} exp(S_ij) - weight_i S_{i, pos(i)}.
//
// Algorithm and cost are those of symmetric.h. In units U = 2 N N D of floating-point operations (one product) the
// forward pass takes U / 2, the backward pass U from tiles that were kept, 3 U / 2 from tiles that are computed again.
//
// The positive's weight does not average out, so it does not go through rounded products: the positive's terms are
// computed from unrounded rows.
#include <torch/library.h>

#include "common/checks.h"
#include "common/portable.h"
#include "contrastive/symmetric.h"

namespace fastssl {
namespace {

void check_weight(const Tensor& weight, int64_t count) { check_vectors("weight", count, {weight}); }

// pos(i) of every row.
Numbers<int64_t> partners(const Side& z) {
  Numbers<int64_t> partner(z.count);
  for (int64_t i = 0; i < z.count; ++i) partner[i] = z.partner(i);
  return partner;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dcl(const Tensor& z1, const Tensor& z2, const Tensor& weight_,
                                                       const Tensor& scale, bool normalize, int64_t keep,
                                                       c10::string_view precision) {
  check_pairs("z1 and z2", z1, z2, scale);
  const int64_t count = 2 * z1.size(0);
  check_weight(weight_, count);
  const SummedSelf self(z1, &z2, scale, normalize, keep, precision);
  const Exponent& e = self.e;
  const Sums sums = self.sum(partners(self.z).data);
  const auto [total, shift] = finish_sums(sums, count, e);
  const Tensor positive = at::empty({count}, at::kFloat), loss = at::empty({count}, at::kFloat);
  const Tensor weight = weight_.contiguous();
  float *const p = positive.mutable_data_ptr<float>(), *const out = loss.mutable_data_ptr<float>();
  const float* const w = weight.const_data_ptr<float>();
  dot_rows(self.z, self.z, p);
  for (int64_t i = 0; i < count; ++i) {
    const double positive_entry = double(w[i]) * e.factor * p[i];
    out[i] = static_cast<float>(std::log(sums.total[i]) + e.step * (sums.extreme[i] - positive_entry));
    p[i] *= e.scale;
  }
  return {loss, positive, shift, total, self.kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dcl_backward(const Tensor& grad_loss, const Tensor& z1, const Tensor& z2,
                                                        const Tensor& weight_, const Tensor& scale,
                                                        const Tensor& positive, const Tensor& shift,
                                                        const Tensor& total, const Tensor& kept, bool normalize,
                                                        c10::string_view precision) {
  check_pairs("z1 and z2", z1, z2, scale);
  const int64_t count = 2 * z1.size(0);
  check_weight(weight_, count);
  check_vectors("grad_loss, positive, shift and total", count, {grad_loss, positive, shift, total});
  check_kept(kept);
  const DerivedSelf self(z1, &z2, scale, normalize, kept, precision);
  const Side& z = self.z;
  const Tensor gradient = grad_loss.contiguous(), totals = total.contiguous(), weight = weight_.contiguous();
  const float *const g = gradient.const_data_ptr<float>(), *const t = totals.const_data_ptr<float>(),
              *const w = weight.const_data_ptr<float>();
  const Numbers<float> positive_weight(count);
  for (int64_t i = 0; i < count; ++i) positive_weight[i] = -(g[i] * w[i] + g[z.partner(i)] * w[z.partner(i)]);
  Gathered gathered(z, true, &z);
  const Coefficients p([&](int64_t i) { return t[i] == 0 ? 0 : g[i] / t[i]; }, shift, z, self.e);
  self.multiply(partners(z).data, p, gathered);
  const auto [grad_z1, grad_z2, grad_scale] = finish_views(gathered, positive_weight.data, self.e, z1, z2, scale);
  return {grad_z1, grad_z2, (gradient * positive).neg_(), grad_scale};
}

FASTSSL_KERNELS(CPU, m) {
  implement<&dcl>(m, "dcl");
  implement<&dcl_backward>(m, "dcl_backward");
}

}  // namespace
}  // namespace fastssl
