// The supervised contrastive loss on the CPU (arXiv:2004.11362): with S = scale Z Z^T,
//
//     loss_i = log sum_{j != i} exp(S_ij) - mean of S_ij over the other rows j with row i's label.
//
// Algorithm and cost are those of symmetric.h. In units U = 2 N N D of floating-point operations (one product) the
// forward pass takes U / 2, the backward pass U from tiles that were kept, 3 U / 2 from tiles that are computed again.
// The positives add O(N D), as sums of the unrounded rows of each label.
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/portable.h"
#include "contrastive/symmetric.h"

namespace fastssl {
namespace {

// Which rows have the same label.
struct Classes {
  Tensor rows;  // (N, D), (normalised) float32, unrounded
  std::vector<int64_t> key;    // in [0, N), equal for rows with the same label
  std::vector<double> others;  // how many other rows have the label

  Classes(const Side& z, const Tensor& z_, const Tensor& labels_) : key(z.count), others(z.count) {
    rows = z_.to(at::kFloat).contiguous();
    if (z.normalize) rows = rows * at::from_blob(z.inverse_norm.data, {z.count, 1}, at::kFloat).abs();
    const Tensor contiguous = labels_.contiguous();
    const int64_t* const labels = contiguous.const_data_ptr<int64_t>();
    std::vector<int64_t> order(labels, labels + z.count);
    std::sort(order.begin(), order.end());
    for (int64_t i = 0; i < z.count; ++i) {
      const auto [first, last] = std::equal_range(order.begin(), order.end(), labels[i]);
      key[i] = first - order.begin();
      others[i] = static_cast<double>(last - first - 1);
    }
  }

  // (N, D): for each key, the sum of its rows, each times weight(i).
  template <typename Weight>
  Tensor sum(const Weight& weight) const {
    const Tensor sums = at::zeros_like(rows);
    const float* const from = rows.const_data_ptr<float>();
    float* const to = sums.mutable_data_ptr<float>();
    const int64_t dim = rows.size(1);
    for (size_t i = 0; i < key.size(); ++i) {
      const float w = weight(i);
      for (int64_t d = 0; d < dim; ++d) to[key[i] * dim + d] += w * from[i * dim + d];
    }
    return sums;
  }
};

void check_labels(const Tensor& labels, const Tensor& z) {
  TORCH_CHECK_VALUE(labels.scalar_type() == at::kLong && labels.dim() == 1 && labels.size(0) == z.size(0),
                    "labels must be int64 of shape (", z.size(0), "), got ", labels.scalar_type(), " of shape ",
                    labels.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sup_con(const Tensor& z_, const Tensor& labels, const Tensor& scale,
                                                   bool normalize, int64_t keep, c10::string_view precision) {
  check_sides("features and features", z_, z_, scale);
  check_labels(labels, z_);
  const SummedSelf self(z_, nullptr, scale, normalize, keep, precision);
  const Side& z = self.z;
  const Exponent& e = self.e;
  const Sums sums = self.sum();
  const auto [total, shift] = finish_sums(sums, z.count, e);
  const Classes classes(z, z_, labels);
  const Tensor class_sums = classes.sum([](int64_t) { return 1.f; }), loss = at::empty({z.count}, at::kFloat);
  const float* const rows = classes.rows.const_data_ptr<float>();
  const float* const of_class = class_sums.const_data_ptr<float>();
  float* const out = loss.mutable_data_ptr<float>();
  const int64_t dim = z.rows.dim;
  at::parallel_for(0, z.count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double aligned = 0;
      for (int64_t d = 0; d < dim; ++d)
        aligned += double(rows[i * dim + d]) * (of_class[classes.key[i] * dim + d] - rows[i * dim + d]);
      const double mean = e.factor * aligned / classes.others[i];
      const double value = std::log(sums.total[i]) + e.step * (sums.extreme[i] - mean);
      out[i] = classes.others[i] ? static_cast<float>(value) : 0;
    }
  });
  return {loss, shift, total, self.kept};
}

// The positives' part of the gradient, with p_i = g_i / (number of others) and sums over all rows j with row i's label:
// G_i -= p_i (sum_j z_j - z_i) + sum_j p_j z_j - p_i z_i
std::tuple<Tensor, Tensor> sup_con_backward(const Tensor& grad_loss, const Tensor& z_, const Tensor& labels,
                                            const Tensor& scale, const Tensor& shift, const Tensor& total,
                                            const Tensor& kept, bool normalize, c10::string_view precision) {
  check_sides("features and features", z_, z_, scale);
  check_labels(labels, z_);
  check_vectors("grad_loss, shift and total", z_.size(0), {grad_loss, shift, total});
  check_kept(kept);
  const DerivedSelf self(z_, nullptr, scale, normalize, kept, precision);
  const Side& z = self.z;
  const Classes classes(z, z_, labels);
  const Tensor gradient = grad_loss.contiguous(), totals = total.contiguous();
  const float *const g = gradient.const_data_ptr<float>(), *const t = totals.const_data_ptr<float>();
  const Numbers<float> p(z.count);
  const Coefficients coefficients([&](int64_t i) {
    p[i] = classes.others[i] ? static_cast<float>(g[i] / classes.others[i]) : 0;
    return classes.others[i] ? g[i] / t[i] : 0;
  }, shift, z, self.e);
  const Tensor class_sums = classes.sum([](int64_t) { return 1.f; });
  const Tensor class_gradients = classes.sum([&p](int64_t i) { return p[i]; });
  Gathered gathered(z, true, &z);
  const float* const rows = classes.rows.const_data_ptr<float>();
  const float* const of_class = class_sums.const_data_ptr<float>();
  const float* const gradient_of_class = class_gradients.const_data_ptr<float>();
  const int64_t dim = z.rows.dim;
  run(z.threads, z.cut.blocks, [&](int64_t b) {
    gathered.has_sums[b] = 1;
    float* const sums = gathered.sums.floats(b);
    std::fill_n(sums, z.padded(b) * z.dim, 0.f);
    for (int64_t r = 0; r < z.size(b); ++r) {
      const int64_t i = z.first(b) + r, k = classes.key[i];
      for (int64_t d = 0; d < dim; ++d)
        sums[r * z.dim + d] =
            -(p[i] * (of_class[k * dim + d] - 2 * rows[i * dim + d]) + gradient_of_class[k * dim + d]);
    }
  });
  self.multiply(nullptr, coefficients, gathered);
  return finish_self(gathered, self.e, z_, scale);
}

FASTSSL_KERNELS(CPU, m) {
  implement<&sup_con>(m, "sup_con");
  implement<&sup_con_backward>(m, "sup_con_backward");
}

}  // namespace
}  // namespace fastssl
