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

std::tuple<Tensor, Tensor, Tensor> self_logsumexp(const Tensor& z_, const Tensor& scale, int64_t keep,
                                                  c10::string_view precision) {
  check_sides("z and z", z_, z_, scale);
  const Engine engine(precision);
  const Side z(z_, nullptr, false, kRows | kColumns, engine, threads_for(z_.size(0), z_.size(0), z_.size(1)));
  const Exponent e(scale, z, z);
  Tensor kept = at::empty({keep}, at::kByte);
  const KeptTiles tiles(kept, {z.count, z.count, z.rows.dim, z.threads, true}, engine, e.shared, z.largest_square,
                        z.largest_square);
  const Sums sums = sum_symmetric({z, z, e.factor, e.excluded, nullptr, true}, e, tiles);
  if (e.shared) std::fill_n(sums.extreme.data, z.count, e.origin);
  return std::tuple_cat(finish_sums(sums, z.count, e), std::tuple(kept));
}

std::tuple<Tensor, Tensor> self_logsumexp_backward(const Tensor& grad_total, const Tensor& z_, const Tensor& scale,
                                                   const Tensor& shift, const Tensor& kept,
                                                   c10::string_view precision) {
  check_sides("z and z", z_, z_, scale);
  check_vectors("grad_total and shift", z_.size(0), {grad_total, shift});
  check_kept(kept);
  const Engine engine(precision);
  const int threads = threads_for(z_.size(0), z_.size(0), z_.size(1));
  const KeptTiles tiles(kept, {z_.size(0), z_.size(0), z_.size(1), threads, true}, engine);
  const Side z(z_, nullptr, false, roles_in_backward(tiles), engine, threads, tiles.largest_square(0));
  const Exponent e(scale, z, z);
  Gathered gathered(z, true, &z);
  return differentiate_self(z, e, Coefficients(grad_total, shift, z, e), tiles, gathered, z_, scale);
}

FASTSSL_KERNELS(CPU, m) {
  implement<&self_logsumexp>(m, "self_logsumexp");
  implement<&self_logsumexp_backward>(m, "self_logsumexp_backward");
}

}  // namespace
}  // namespace fastssl
