// Losses on the correlation and covariance of features on the CPU: Barlow Twins (arXiv:2103.03230) and VICReg
// (arXiv:2105.04906).
//
// A and B are the views Z (N x D) with every column centred and, for Barlow Twins, divided by its standard deviation.
// Both losses sum the squares of the entries off the diagonal of D x D matrices, A^T B or A^T A and B^T B:
//
//     off(A, B) = sum_{i != j} (A^T B)_ij^2,     doff/dA = 2 B (A^T B)^T,     doff/dB = 2 A (A^T B),
//
// where the gradients, too, leave out the diagonal of A^T B.
//
// Algorithms. The caller chooses: dual (dual.cpp), whose products take 2 N N D operations each, where N is well below
// D, else primal (primal.cpp), whose products take 2 N D D. Each file gives its cost.
//
// Threads. No two threads write the same Gram tile, panel or gradient at the same time, and sums are taken in a fixed
// order: the bits are the same in every run with the same number of threads.
//
// Rounding. Diagonals do not average out, so none goes through rounded products: C_ii are column sums of products of
// unrounded A and B, and the diagonals of the Gram matrices multiply unrounded rows.
#include "correlation/passes.h"

#include <algorithm>
#include <cmath>

#include "correlation/dual.h"
#include "correlation/primal.h"

namespace fastssl::correlation {
namespace {

// Standardises every panel for its statistics alone.
void standardise_all(const Panels& panels) {
  const Blocks scratch(panels.threads, (2 * panels.elements() + panels.scratch()) * 4);
  run(panels.threads, panels.count, [&](int64_t p) {
    float* const panel = scratch.floats(slot(panels.threads));
    float* const both[] = {panel, panel + panels.elements()};
    for (int v = 0; v < panels.views.count(); ++v) panels.standardise(v, p, both[v], panel + 2 * panels.elements());
    panels.compare(p, both, panel + 2 * panels.elements());
  });
}

// How many columns a panel may have for all its rows to stay in the second-level cache.
int64_t panel_columns(int64_t rows) { return std::clamp<int64_t>((1 << 19) / rows / kPadding * kPadding, 64, 256); }

// How many columns a tile has: many, so that products take longer than loading their operands, but few enough that
// there are tiles for all threads.
int64_t tile_columns(int64_t dim, int threads) {
  int64_t columns = 256;
  while (columns > 64 && pieces(dim, columns) * pieces(dim, columns) < 8 * threads) columns /= 2;
  return columns;
}

}  // namespace

Result forward(const Loss& loss, bool dual, bool derive, std::string_view precision) {
  const Views& views = loss.views;
  const Engine engine(precision);
  Result result{};
  if (dual) {
    const Panels panels(views, engine, threads_for(views.rows, views.rows, views.dim), panel_columns(views.rows));
    if (loss.off_param != 0) {
      result.kept = gram_matrices(panels, loss.cross());
      for (int v = 0; v < (loss.cross() ? 1 : views.count()); ++v) {
        const double all = inner(panels, result.kept[v], result.kept[loss.cross() ? 1 : v]);
        result.off += std::isinf(all) ? all : all - loss.diagonal(panels, v);
      }
    } else {
      standardise_all(panels);
      for (int v = 0; v < views.count(); ++v) result.kept.push_back(at::zeros({views.rows, views.rows}, at::kFloat));
    }
    result.invariance = views.count() == 2 ? loss.invariance(panels) : 0;
    result.variance = loss.cross() ? 0 : loss.variance(panels);
    if (!derive)
      for (Tensor& kept : result.kept) kept = at::empty({0, views.rows}, at::kFloat);
  } else {
    const int threads = threads_for(views.dim, views.dim, views.rows);
    const Panels panels(views, engine, threads, tile_columns(views.dim, threads));
    const bool products = derive && loss.off_param != 0;
    for (int v = 0; v < views.count(); ++v)
      result.kept.push_back(products ? at::empty({views.rows, views.dim}, at::kFloat)
                                     : at::zeros({derive ? views.rows : 0, views.dim}, at::kFloat));
    if (loss.off_param != 0) {
      result.off = primal(panels, loss, products ? result.kept : std::vector<Tensor>(views.count()));
    } else {
      standardise_all(panels);
    }
    result.invariance = views.count() == 2 ? loss.invariance(panels) : 0;
    result.variance = loss.cross() ? 0 : loss.variance(panels);
  }
  result.off = (result.off < 0 || views.dim == 1 ? result.off - result.off : result.off) * loss.off_factor();
  result.loss = loss.invariance_param * result.invariance + loss.variance_param * result.variance +
      loss.off_param * result.off;
  return result;
}

std::vector<Tensor> backward(const Loss& loss, const Tensor& grad_loss, const std::vector<Tensor>& kept, bool dual,
                             std::string_view precision) {
  const Views& views = loss.views;
  TORCH_CHECK_VALUE(grad_loss.numel() == 1, "grad_loss must have one element, got shape ", grad_loss.sizes());
  std::vector<Tensor> gradients, held;
  for (int v = 0; v < views.count(); ++v) {
    TORCH_CHECK_VALUE(kept[v].scalar_type() == at::kFloat && kept[v].dim() == 2 && kept[v].size(0) == views.rows &&
                          kept[v].size(1) == (dual ? views.rows : views.dim),
                      "kept must be what the forward pass kept, got shape ", kept[v].sizes());
    held.push_back(kept[v].contiguous());
    gradients.push_back(at::empty({views.rows, views.dim}, views.z[v].options()));
  }
  const Engine engine(precision);
  const int64_t smaller = std::min(views.rows, views.dim);
  const Panels panels(views, engine, threads_for(smaller, views.rows, views.dim), panel_columns(views.rows));
  (dual ? derive_dual : derive_primal)(panels, loss, held, grad_loss.item<float>(), gradients);
  return gradients;
}

}  // namespace fastssl::correlation
