// Views, whose columns are processed in panels that fit the second-level cache: a panel is read, standardised, packed
// and multiplied before the next one.
#pragma once

#include <algorithm>
#include <vector>

#include "common/engine.h"
#include "common/schedule.h"
#include "common/tensors.h"
#include "correlation/correlation_tiles.h"

namespace fastssl::correlation {

// One or two views, and how their columns are standardised: centred, and divided by their deviations if `divide`.
struct Views {
  std::vector<Tensor> z;
  bool divide;
  double eps;
  int64_t rows, dim;
  double divisor;  // a variance is a sum of squares over this

  Views(std::vector<Tensor> tensors, bool divide, double eps, bool unbiased)
      : z(std::move(tensors)), divide(divide), eps(eps) {
    const Tensor& first = z[0];
    const at::ScalarType dtype = first.scalar_type();
    for (Tensor& x : z) {
      TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) > 1 && x.size(1) > 0 && x.sizes() == first.sizes(),
                        "views must have shape (N, D), N > 1, D > 0, got ", first.sizes(), " and ", x.sizes());
      TORCH_CHECK_VALUE(x.scalar_type() == dtype && has_element(x),
                        "views must be float32, bfloat16 or float16, got ", dtype, " and ", x.scalar_type());
      if (x.stride(1) != 1) x = x.contiguous();
    }
    rows = first.size(0);
    dim = first.size(1);
    divisor = double(rows - unbiased);
  }

  int count() const { return static_cast<int>(z.size()); }
};

// The columns of the views in panels, and the statistics of each column, known once its panel has been standardised.
struct Panels {
  const Views& views;
  const Engine& engine;
  int threads;
  Cut rows;              // blocks of rows
  int64_t width, count;  // of a panel; of panels
  int64_t padded_rows;
  Tensor variance[2], rstd[2];
  Tensor compared;            // sum_n a_ni b_ni, or of (z_a - z_b)^2, of each column
  Tensor rounded_squares[2];  // sum_n a_ni b_ni, or a_ni^2, of rounded operands, where the products round them
  const CorrelationTiles& tile = FASTSSL_TABLE_IN_USE(correlation_tiles);

  Panels(const Views& views, const Engine& engine, int threads, int64_t columns)
      : views(views),
        engine(engine),
        threads(threads),
        rows(views.rows, 256, threads),
        width(round_up(pieces(views.dim, pieces(views.dim, columns)), kPadding)),
        count(pieces(views.dim, width)),
        padded_rows((rows.blocks - 1) * rows.block + padded(rows.blocks - 1)) {
    for (int v = 0; v < views.count(); ++v)
      for (Tensor* t : {&variance[v], &rstd[v]}) *t = at::empty({count * width}, at::kFloat);
    compared = at::empty({count * width}, at::kFloat);
    if (rounded())
      for (Tensor& t : rounded_squares) t = at::empty_like(compared);
  }

  int64_t columns(int64_t p) const { return std::min(width, views.dim - p * width); }
  int64_t size(int64_t I) const { return std::min(rows.block, views.rows - I * rows.block); }
  int64_t padded(int64_t I) const { return round_up(size(I), kPadding); }
  int64_t elements() const { return padded_rows * width; }
  bool rounded() const { return engine.operand != Operand::Float32; }
  // A panel consists of cells, one for each block of rows.
  void* cell(void* panel, int64_t I, int64_t bytes) const {
    return panel ? static_cast<char*>(panel) + I * rows.block * width * bytes : nullptr;
  }
  float* cell(float* panel, int64_t I) const { return panel + I * rows.block * width; }
  float* of(const Tensor& statistic, int64_t p) const { return statistic.mutable_data_ptr<float>() + p * width; }

  int64_t scratch() const { return kScratchRows * width; }

  Rows raw(int v) const {
    const Tensor& z = views.z[v];
    return {{z.const_data_ptr(), nullptr}, {z.stride(0), 0}, views.rows, views.dim, element_of(z)};
  }
  Columns of(const Rows& view, int64_t p) const { return {view, p * width, columns(p), width}; }

  // Computes panel p of view v, and its statistics.
  void standardise(int v, int64_t p, float* panel, float* scratch) const {
    tile.standardise(of(raw(v), p), views.rows, padded_rows, views.divide, views.eps, views.divisor, panel,
                     of(variance[v], p), of(rstd[v], p), scratch);
  }

  // Computes `compared` from panels p of both views, once they are standardised.
  void compare(int64_t p, float* const* panels, float* scratch) const {
    if (views.count() == 1) return;
    if (views.divide) {
      tile.multiply_columns(panels[0], panels[1], views.rows, width, false, of(compared, p));
    } else {
      tile.distances(of(raw(0), p), of(raw(1), p), views.rows, of(compared, p), scratch);
    }
  }

  // Computes the gradient of view v's panel p from its products P, as described at CorrelationTiles::finish.
  void finish(int64_t p, int v, float* P, float* const* panels, const float* row_weight, float alpha,
              const ColumnTerms& terms, double projection, float pull, float factor, float* scratch,
              const Tensor& out) const {
    const int other = views.count() - 1 - v;
    const Rows x = raw(v), y = raw(other);
    tile.finish(P, panels[v], panels[other], row_weight, views.rows, alpha, terms, projection, pull, of(x, p), of(y, p),
                factor, scratch, element_of(out), views.dim,
                static_cast<char*>(out.mutable_data_ptr()) + p * width * out.element_size());
  }

  // Writes the cells of a panel as operands; `out` points to the first cell of each.
  void arrange(float* panel, float* spare, const Packed& out) const {
    for (int64_t I = 0; I < rows.blocks; ++I) {
      const auto at = [&](void* operand) { return cell(operand, I, engine.bytes()); };
      engine.tile.arrange(cell(panel, I), padded(I), width, engine.operand, spare,
                          {at(out.left), at(out.right), at(out.right_pairs), at(out.left_columns)});
    }
  }
};

}  // namespace fastssl::correlation
