// The dual algorithm: sum_ij (A^T B)_ij^2 = <A A^T, B B^T>.
//
// The forward pass computes the Gram matrices. They are symmetric, so half of each suffices: 1 U for both, in units
// U = 2 N N D of floating-point operations (one product). The backward pass, dA = 2 (B B^T) A and dB = 2 (A A^T) B, is
// 2 U. Only the Gram matrices are kept between the two.
//
// The diagonals of the Gram matrices do not average out, so they do not go through rounded products: they multiply
// unrounded rows.
#include "correlation/dual.h"

#include <algorithm>

#include "correlation/derive.h"

namespace fastssl::correlation {
namespace {

struct GramTile {
  int64_t view, I, J;  // blocks of rows I <= J
};

// Writes the products of panels [first, last) of each view with themselves, tile by tile, into `sums` from `place` on.
// `cross`: whether the two views' Gram matrices will be multiplied with each other.
void add_panels(const Panels& panels, int threads, int64_t first, int64_t last, const std::vector<GramTile>& tiles,
                bool cross, const Blocks& sums, int64_t place) {
  const Engine& engine = panels.engine;
  const int views = panels.views.count();
  const int64_t together = std::min<int64_t>(last - first, 2 * threads);  // panels between two rounds of products
  const Blocks left(views * together, panels.elements() * engine.bytes());
  const Blocks right(views * together, panels.elements() * engine.bytes());
  const int64_t wide = engine.half() ? views * panels.elements() : 0;
  const int64_t spare = std::max(panels.rows.block * panels.width, panels.scratch());
  const Blocks scratch(threads, (wide + spare) * 4);
  for (int64_t begin = first; begin < last; begin += together) {
    const int64_t some = std::min(together, last - begin);
    run(threads, some, [&](int64_t t) {
      float* const own = scratch.floats(slot(threads));
      float* panel[2] = {};
      for (int v = 0; v < views; ++v)
        panel[v] = engine.half() ? own + v * panels.elements() : left.floats(t * views + v);
      for (int v = 0; v < views; ++v) panels.standardise(v, begin + t, panel[v], own + wide);
      panels.compare(begin + t, panel, own + wide);
      for (int v = 0; panels.rounded() && v < (cross ? 1 : views); ++v)
        panels.tile.multiply_columns(panel[v], panel[cross ? 1 : v], panels.views.rows, panels.width, true,
                                     panels.of(panels.rounded_squares[v], begin + t));
      for (int v = 0; v < views; ++v)
        panels.arrange(panel[v], own + wide, {left[t * views + v], right[t * views + v], nullptr, nullptr});
    });
    run(threads, tiles.size(), [&](int64_t k) {
      const auto [v, I, J] = tiles[k];
      for (int64_t t = 0; t < some; ++t)
        engine.multiply(panels.padded(I), panels.padded(J), panels.width, begin + t > first,
                        panels.cell(left[t * views + v], I, engine.bytes()),
                        panels.cell(right[t * views + v], J, engine.bytes()), sums.floats(place + k));
    }, [&] { engine.release(); });
  }
}

}  // namespace

// The Gram matrix of each view, (N, N). If it is small, each thread sums one up over its own panels, and these are
// added; if it is large, the threads share its tiles.
std::vector<Tensor> gram_matrices(const Panels& panels, bool cross) {
  const Cut& rows = panels.rows;
  const int threads = panels.threads;
  const int64_t views = panels.views.count(), count = panels.views.rows;
  std::vector<GramTile> tiles;
  for (int64_t v = 0; v < views; ++v)
    for (int64_t I = 0; I < rows.blocks; ++I)
      for (int64_t J = I; J < rows.blocks; ++J) tiles.push_back({v, I, J});
  const int64_t parts = count <= 512 ? std::min<int64_t>(threads, panels.count) : 1;
  const int64_t places = tiles.size();
  const Blocks sums(parts * places, rows.block * rows.block * 4);
  if (parts == 1) {
    add_panels(panels, threads, 0, panels.count, tiles, cross, sums, 0);
  } else {
    run(threads, parts, [&](int64_t part) {
      add_panels(panels, 1, part * panels.count / parts, (part + 1) * panels.count / parts, tiles, cross, sums,
                 part * places);
    });
  }
  std::vector<Tensor> grams;
  for (int64_t v = 0; v < views; ++v) grams.push_back(at::empty({count, count}, at::kFloat));
  run(threads, places, [&](int64_t k) {
    const auto [v, I, J] = tiles[k];
    float* const gram = grams[v].mutable_data_ptr<float>();
    float* const sum = sums.floats(k);
    for (int64_t part = 1; part < parts; ++part) {
      const float* const more = sums.floats(part * places + k);
      for (int64_t i = 0; i < panels.padded(I) * panels.padded(J); ++i) sum[i] += more[i];
    }
    constexpr int64_t kSquare = 16;  // by squares whose rows and columns are cache lines: mirrored writes stay in them
    for (int64_t r0 = 0; r0 < panels.size(I); r0 += kSquare)
      for (int64_t c0 = 0; c0 < panels.size(J); c0 += kSquare)
        for (int64_t r = r0; r < std::min(r0 + kSquare, panels.size(I)); ++r)
          for (int64_t c = c0; c < std::min(c0 + kSquare, panels.size(J)); ++c) {
            const int64_t i = I * rows.block + r, j = J * rows.block + c;
            gram[i * count + j] = gram[j * count + i] = sum[r * panels.padded(J) + c];
          }
  });
  return grams;
}

double inner(const Panels& panels, const Tensor& x, const Tensor& y) {
  const int64_t rows = x.size(0);
  const Tensor totals = at::empty({rows}, at::kDouble);
  double* const total = totals.mutable_data_ptr<double>();
  run(panels.threads, panels.rows.blocks, [&](int64_t I) {
    for (int64_t i = I * panels.rows.block; i < I * panels.rows.block + panels.size(I); ++i)
      total[i] = panels.tile.inner(x.const_data_ptr<float>() + i * rows, y.const_data_ptr<float>() + i * rows, rows);
  });
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) sum += total[i];
  return sum;
}

void derive_dual(const Panels& panels, const Loss& loss, const std::vector<Tensor>& grams, float factor,
                 const std::vector<Tensor>& out) {
  const Engine& engine = panels.engine;
  const Cut& rows = panels.rows;
  const int views = panels.views.count(), threads = panels.threads;
  const int64_t count = panels.views.rows, elements = panels.elements();
  const bool products = loss.alpha() != 0;
  // Row block I of a Gram matrix without its diagonal, as left operands (I, J).
  const Blocks left(products ? views * rows.blocks : 0, rows.block * panels.padded_rows * engine.bytes());
  const Tensor diagonals = at::zeros({views, count}, at::kFloat);
  const Blocks spares(threads, 2 * rows.block * rows.block * 4);
  run(threads, products ? views * rows.blocks : 0, [&](int64_t k) {
    const int64_t v = k / rows.blocks, I = k % rows.blocks, m = panels.padded(I);
    const float* const gram = grams[v].const_data_ptr<float>();
    float* const wide = spares.floats(slot(threads));
    for (int64_t J = 0; J < rows.blocks; ++J) {
      const int64_t n = panels.padded(J);
      std::fill_n(wide, m * n, 0.f);
      for (int64_t r = 0; r < panels.size(I); ++r)
        std::copy_n(gram + (I * rows.block + r) * count + J * rows.block, panels.size(J), wide + r * n);
      for (int64_t r = 0; I == J && r < panels.size(I); ++r) {
        diagonals.mutable_data_ptr<float>()[v * count + I * rows.block + r] = wide[r * n + r];
        wide[r * n + r] = 0;
      }
      engine.tile.arrange(wide, m, n, engine.operand, wide + rows.block * rows.block,
                          {static_cast<char*>(left[k]) + J * rows.block * m * engine.bytes(), nullptr, nullptr, nullptr});
    }
  });
  const bool rounded = panels.rounded();
  const Blocks operands(threads, rounded ? elements * engine.bytes() : 0);
  derive(panels, loss, true, diagonals, factor, out, [&](int v, int64_t, float* const* panel, float* free, float* P) {
    void* const operand = rounded ? operands[slot(threads)] : panel[v];
    if (rounded)
      panels.arrange(panel[v], free,
                     {engine.half() ? nullptr : operand, nullptr, engine.half() ? operand : nullptr, nullptr});
    const int gram = loss.cross() ? 1 - v : v;
    if (!products) std::fill_n(P, elements, 0.f);
    for (int64_t I = 0; products && I < rows.blocks; ++I)
      for (int64_t J = 0; J < rows.blocks; ++J)
        engine.multiply(panels.padded(I), panels.width, panels.padded(J), J > 0,
                        static_cast<char*>(left[gram * rows.blocks + I]) +
                            J * rows.block * panels.padded(I) * engine.bytes(),
                        panels.cell(operand, J, engine.bytes()), panels.cell(P, I));
  }, [&] { engine.release(); });
}

}  // namespace fastssl::correlation
