// Log-sum-exps of similarities with chosen rows on the CPU: with S_ik = scale <x_i, y_j>, j = ids[i][k], (normalised)
// rows of Y, and none where that is negative,
//
//     rows_i = log sum_k exp(S_ik).
//
// Algorithm. The K rows that a row chooses are gathered by nobody: they are read where they are, once for the dot
// products and once, from the second-level cache, for the weighted sum that is the gradient of x_i. What remains for
// the backward pass is the exponentials, K numbers for each row. The gradient of Y gathers the rows of X that chose a
// row, in ascending order of (i, k): these are listed by counting. So every sum has one order, whatever the number of
// threads.
//
// Cost. 2 M K D multiplications and additions forward, half as many backward, out of a cache where Y fits into one.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "common/pages.h"
#include "common/portable.h"
#include "common/token_rows.h"
#include "contrastive/selected_tiles.h"

namespace fastssl {
namespace {

constexpr float kEps = 1e-12f;  // torch.nn.functional.normalize's

// The rows of a matrix, to be read.
struct Matrix {
  Tensor tensor;
  Element element;
  const char* data;
  int64_t count, dim, stride;  // between rows, in bytes

  explicit Matrix(const Tensor& x)
      : tensor(with_unit_stride(x)),
        element(element_of(x)),
        data(static_cast<const char*>(tensor.const_data_ptr())),
        count(x.size(0)),
        dim(x.size(1)),
        stride(tensor.stride(0) * bytes_of(element)) {}

  const void* operator[](int64_t i) const { return data + i * stride; }
  int64_t padded() const { return round_up(dim, 32); }
};

void check_selected(const Tensor& x, const Tensor& y, const Tensor& ids, const Tensor& scale) {
  for (const Tensor& t : {x, y})
    TORCH_CHECK_VALUE(t.dim() == 2 && has_element(t), "x and y must be float32, bfloat16 or float16 matrices, got ",
                      t.scalar_type(), " of shape ", t.sizes());
  TORCH_CHECK_VALUE(x.size(1) > 0 && x.size(1) == y.size(1), "x and y must have as many features, got ", x.sizes(),
                    " and ", y.sizes());
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong && ids.dim() == 2 && ids.size(0) == x.size(0),
                    "ids must be int64 of shape (", x.size(0), ", K), got ", ids.scalar_type(),
                    " of shape ", ids.sizes());
  TORCH_CHECK_VALUE(scale.numel() == 1, "scale must have one element, got shape ", scale.sizes());
}

void check_range(const Tensor& ids, int64_t count) {
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  for (int64_t p = 0; p < ids.numel(); ++p)
    TORCH_CHECK_INDEX(id[p] < count, "negative_ids must be below ", count, ", got ", id[p]);
}

int64_t grain(int64_t elements) { return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(elements, 1)); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> selected_logsumexp(const Tensor& x_, const Tensor& y_,
                                                                      const Tensor& ids_, const Tensor& scale_,
                                                                      bool normalize, bool weigh) {
  check_selected(x_, y_, ids_, scale_);
  const Matrix x(x_), y(y_);
  const Tensor ids = ids_.contiguous();
  const int64_t count = ids.size(1), dim = x.dim;
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  check_range(ids, y.count);
  const float scale = scale_.to(at::kFloat).item<float>();
  const Tensor total = at::zeros({x.count}, at::kFloat), shift = at::zeros({x.count}, at::kFloat);
  const Tensor weighted = at::zeros({weigh ? x.count : 0, dim}, at::kFloat);
  const Tensor exponentials = at::zeros({weigh ? x.count : 0, count}, at::kFloat);
  const Tensor norms = at::empty({normalize ? y.count : 0}, at::kFloat);
  float *const out_total = total.mutable_data_ptr<float>(), *const out_shift = shift.mutable_data_ptr<float>();
  float *const out_weighted = weighted.mutable_data_ptr<float>(), *const norm = norms.mutable_data_ptr<float>();
  float* const out_exponentials = exponentials.mutable_data_ptr<float>();
  const SelectedTiles& tile = FASTSSL_TABLE_IN_USE(selected_tiles);

  const auto measure = [&](int64_t first, int64_t last, float* spare) {
    for (int64_t j = first; j < last; ++j) norm[j] = tile.norm(y[j], y.element, dim, spare);
  };
  // Where each row has rows of its own, their norms are taken while they are in a cache.
  bool own = normalize && y.count == ids.numel();
  for (int64_t p = 0; own && p < y.count; ++p) own = id[p] == p;
  if (normalize && !own)
    at::parallel_for(0, y.count, grain(dim), [&](int64_t first, int64_t last) {
      std::vector<float> spare(y.padded());
      measure(first, last, spare.data());
    });

  at::parallel_for(0, x.count, grain(count * dim), [&](int64_t first, int64_t last) {
    std::vector<float> row(x.padded()), spare(x.padded()), sum(x.padded()), values(round_up(count, 32)), inverse(count);
    std::vector<const void*> rows(count);
    std::vector<int64_t> place(count);
    for (int64_t i = first; i < last; ++i) {
      if (own) measure(i * count, (i + 1) * count, spare.data());
      int64_t found = 0;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t j = id[i * count + k];
        if (j < 0) continue;
        rows[found] = y[j];
        inverse[found] = normalize ? 1 / (norm[j] < kEps ? kEps : norm[j]) : 1;
        place[found++] = k;
      }
      tile.widen(x[i], x.element, dim, row.data());
      tile.dots(row.data(), rows.data(), found, y.element, dim, spare.data(), values.data());
      float extreme = -std::numeric_limits<float>::infinity();
      for (int64_t k = 0; k < found; ++k) {
        values[k] *= inverse[k];
        extreme = std::max(extreme, scale < 0 ? -values[k] : values[k]);
      }
      if (scale < 0) extreme = -extreme;
      if (std::isinf(extreme) && extreme * scale < 0) extreme = 0;  // nothing, or nothing but minus infinity
      out_shift[i] = extreme * scale;
      out_total[i] = static_cast<float>(tile.exponentials(values.data(), found, scale, extreme));
      if (!weigh) continue;
      for (int64_t k = 0; k < found; ++k) {
        out_exponentials[i * count + place[k]] = values[k];
        values[k] *= inverse[k];
      }
      std::fill(sum.begin(), sum.end(), 0.f);
      tile.add(values.data(), rows.data(), found, y.element, dim, spare.data(), sum.data());
      std::copy_n(sum.data(), dim, out_weighted + i * dim);
    }
  });
  return {total, shift, weighted, exponentials, norms};
}

// The places of ids that name each row, in ascending order: those of row j are list[start[j]] to
// list[start[j + 1] - 1].
struct Named {
  std::vector<int64_t> start, list;

  Named(const int64_t* id, int64_t count, int64_t rows) : start(rows + 2, 0), list(count) {
    for (int64_t p = 0; p < count; ++p)
      if (id[p] >= 0) ++start[id[p] + 2];
    for (int64_t j = 0; j <= rows; ++j) start[j + 1] += start[j];
    for (int64_t p = 0; p < count; ++p)
      if (id[p] >= 0) list[start[id[p] + 1]++] = p;
  }
};

std::tuple<Tensor, Tensor, Tensor> selected_logsumexp_backward(const Tensor& grad_total, const Tensor& x_,
                                                               const Tensor& y_, const Tensor& ids_,
                                                               const Tensor& scale_, const Tensor& shift,
                                                               const Tensor& weighted_, const Tensor& exponentials_,
                                                               const Tensor& norms_, bool needs_y, bool normalize) {
  check_selected(x_, y_, ids_, scale_);
  check_vectors("grad_total and shift", x_.size(0), {grad_total, shift});
  check_vectors("norms", normalize ? y_.size(0) : 0, {norms_});
  TORCH_CHECK_VALUE(weighted_.scalar_type() == at::kFloat && weighted_.sizes() == x_.sizes() &&
                        exponentials_.scalar_type() == at::kFloat && exponentials_.sizes() == ids_.sizes(),
                    "weighted and exponentials must be float32 of shapes ", x_.sizes(), " and ", ids_.sizes(), ", got ",
                    weighted_.sizes(), " and ", exponentials_.sizes());
  const Tensor gradient = grad_total.contiguous(), weighted = weighted_.contiguous();
  const Tensor grad_x = weighted.mul(gradient.unsqueeze(1)).mul_(scale_).to(x_.scalar_type());
  const Tensor along = at::linalg_vecdot(weighted, x_.to(at::kFloat)).to(at::kDouble);
  const Tensor grad_scale = gradient.to(at::kDouble).dot(along).to(scale_.scalar_type());
  if (!needs_y) return {grad_x, at::empty({0, y_.size(1)}, y_.options()), grad_scale};

  const Tensor wide = x_.to(at::kFloat), ids = ids_.contiguous();
  const Tensor exponentials = exponentials_.contiguous(), norms = norms_.contiguous();
  const Tensor grad_y = empty_in_large_pages(y_.sizes(), y_.options());
  const Matrix x(wide), y(y_);
  const int64_t count = ids.size(1), dim = x.dim;
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  check_range(ids, y.count);
  const float* const g = gradient.const_data_ptr<float>();
  const float *const e = exponentials.const_data_ptr<float>(), *const norm = norms.const_data_ptr<float>();
  const float scale = scale_.to(at::kFloat).item<float>();
  char* const out = static_cast<char*>(grad_y.mutable_data_ptr());
  const SelectedTiles& tile = FASTSSL_TABLE_IN_USE(selected_tiles);
  const Named named(id, ids.numel(), y.count);
  at::parallel_for(0, y.count, grain(dim), [&](int64_t first, int64_t last) {
    std::vector<float> spare(x.padded()), sum(x.padded()), weights;
    std::vector<const void*> rows;
    for (int64_t j = first; j < last; ++j) {
      char* const to = out + j * dim * bytes_of(y.element);
      if (named.start[j] == named.start[j + 1]) {
        std::memset(to, 0, dim * bytes_of(y.element));
        continue;
      }
      rows.clear();
      weights.clear();
      for (int64_t n = named.start[j]; n < named.start[j + 1]; ++n) {
        const int64_t p = named.list[n], i = p / count;
        rows.push_back(x[i]);
        weights.push_back(scale * g[i] * e[p]);
      }
      std::fill(sum.begin(), sum.end(), 0.f);
      tile.add(weights.data(), rows.data(), static_cast<int64_t>(rows.size()), x.element, dim, spare.data(),
               sum.data());
      float inverse = 1, along_y = 0;
      if (normalize) {
        inverse = 1 / (norm[j] < kEps ? kEps : norm[j]);
        const void* const row = y[j];
        if (!(norm[j] < kEps)) tile.dots(sum.data(), &row, 1, y.element, dim, spare.data(), &along_y);
        along_y *= inverse;
      }
      tile.project(sum.data(), normalize ? y[j] : nullptr, y.element, dim, along_y * inverse, inverse, spare.data(),
                   to);
    }
  });
  return {grad_x, grad_y, grad_scale};
}

FASTSSL_KERNELS(CPU, m) {
  implement<&selected_logsumexp>(m, "selected_logsumexp");
  implement<&selected_logsumexp_backward>(m, "selected_logsumexp_backward");
}

}  // namespace
}  // namespace fastssl
