// The primal algorithm: with C = A^T B,
//
//     off = sum_{i != j} C_ij^2,     doff/dA = 2 B C^T,     doff/dB = 2 A C,     without the diagonal of C.
//
// C is computed in squares, each once, in the forward pass, for the loss and for both gradients: 3 V, in units
// V = 2 N D D of floating-point operations. A^T A is symmetric: half the tiles, 3/2 V for each view. Squares are
// forgotten; the products A C and B C^T are kept, and the backward pass finishes them, panel by panel. Operands are
// packed in cells of a block of rows by a block of columns, so that those of every product fit the second-level cache.
#include "correlation/primal.h"

#include <algorithm>
#include <utility>

#include "correlation/derive.h"

namespace fastssl::correlation {
namespace {

// All panels of a view Z as operands: left (`columns`) and right operands of Z^T Z', and left operands of Z W (`rows`).
// In float32 the last two are the same.
struct Operands {
  Blocks rows, columns, pairs;
  bool half;

  Operands(const Panels& panels, bool from_left, bool from_right, bool derive)
      : rows(panels.count, bytes(panels, derive || (from_right && !panels.engine.half()))),
        columns(panels.count, bytes(panels, from_left)),
        pairs(panels.count, bytes(panels, from_right && panels.engine.half())),
        half(panels.engine.half()) {}

  static int64_t bytes(const Panels& panels, bool wanted) { return wanted ? panels.elements() * panels.engine.bytes() : 0; }
  // Where panel p is to be packed.
  Packed operator[](int64_t p) const {
    return half ? Packed{rows[p], nullptr, pairs[p], columns[p]} : Packed{rows[p], columns[p], nullptr, nullptr};
  }
  const void* from_right(int64_t p) const { return half ? pairs[p] : rows[p]; }
};

// The sum of squares of C = A^T B off its diagonal; and if gradients are wanted, A C into `grad_b` and B C^T into
// `grad_a`, (N, D) each. If a and b are the same, so are `grad_a` and `grad_b`, to which A C = B C^T is added only
// once.
//
// A square of C, small enough for the third-level cache, is computed tile by tile; then every block of rows is
// multiplied with it. So operands are read from memory once for each square, and no two threads write the same place.
double multiply_views(const Panels& panels, const Operands& a, const Operands& b, const Tensor& grad_a,
                      const Tensor& grad_b) {
  constexpr int64_t kSquare = 1024;  // columns
  const Engine& engine = panels.engine;
  const int threads = panels.threads;
  const bool self = &a == &b, derive = grad_b.defined(), half = engine.half();
  const int64_t width = panels.width, blocks = panels.rows.blocks, area = width * width;
  const int64_t side = std::clamp<int64_t>(kSquare / width, 1, panels.count);
  const Blocks forth(derive ? side * side : 0, area * engine.bytes()), back(derive ? side * side : 0, area * engine.bytes());
  const Blocks scratch(threads, (area + std::max(area, panels.rows.block * width)) * 4);
  const auto at = [&](const void* panel, int64_t r) { return panels.cell(const_cast<void*>(panel), r, engine.bytes()); };
  // Cell (r, p) of a gradient [+]= sum_k z_k W_k.
  const auto add_products = [&](const Operands& z, int64_t first, int64_t last, const Blocks& W, int64_t column,
                                int64_t r, int64_t p, bool add, const Tensor& out) {
    float* cell = scratch.floats(slot(threads));
    for (int64_t k = first; k < last; ++k)
      engine.multiply(panels.padded(r), width, width, k > first, at(z.rows[k], r), W[(k - first) * side + column], cell);
    float* to = out.mutable_data_ptr<float>() + r * panels.rows.block * panels.views.dim + p * width;
    const int64_t columns = panels.columns(p);
    for (int64_t n = 0; n < panels.size(r); ++n, to += panels.views.dim, cell += width)
      for (int64_t c = 0; c < columns; ++c) to[c] = add ? to[c] + cell[c] : cell[c];
  };
  double sum = 0;
  for (int64_t p0 = 0; p0 < panels.count; p0 += side)
    for (int64_t q0 = self ? p0 : 0; q0 < panels.count; q0 += side) {
      const int64_t p1 = std::min(p0 + side, panels.count), q1 = std::min(q0 + side, panels.count);
      const bool symmetric = self && p0 == q0;
      std::vector<std::pair<int64_t, int64_t>> tiles;
      for (int64_t I = p0; I < p1; ++I)
        for (int64_t J = symmetric ? I : q0; J < q1; ++J) tiles.emplace_back(I, J);
      std::vector<double> squares(tiles.size());
      const auto done = [&] { engine.release(); };
      run(threads, tiles.size(), [&](int64_t k) {
        const auto [I, J] = tiles[k];
        const int64_t place = (I - p0) * side + J - q0, mirrored = (J - q0) * side + I - p0;
        float* const spare = scratch.floats(slot(threads));
        float* const C = half || !derive ? spare + std::max(area, panels.rows.block * width) : forth.floats(place);
        for (int64_t r = 0; r < blocks; ++r)
          engine.multiply(width, width, panels.padded(r), r > 0, at(a.columns[I], r), at(b.from_right(J), r), C);
        for (int64_t i = 0; I == J && i < width; ++i) C[i * width + i] = 0;
        squares[k] = (self && I != J ? 2 : 1) * panels.tile.inner(C, C, area);
        if (!derive) return;
        void* const transposed = !symmetric ? back[mirrored] : I == J ? nullptr : forth[mirrored];
        engine.tile.arrange(C, width, width, engine.operand, spare,
                            {half ? nullptr : C, transposed, half ? forth[place] : nullptr, nullptr});
      }, done);
      for (const double square : squares) sum += square;
      const int64_t of_b = q1 - q0, cells = of_b + (symmetric ? 0 : p1 - p0);
      run(threads, derive ? blocks * cells : 0, [&](int64_t k) {
        const int64_t r = k / cells, c = k % cells;
        if (c < of_b) {
          add_products(a, p0, p1, forth, c, r, q0 + c, p0 > 0, grad_b);
        } else {
          add_products(b, q0, q1, back, c - of_b, r, p0 + c - of_b, q0 > 0, grad_a);
        }
      }, done);
    }
  return sum;
}

}  // namespace

double primal(const Panels& panels, const Loss& loss, const std::vector<Tensor>& products) {
  const int views = panels.views.count(), threads = panels.threads;
  const int64_t elements = panels.elements();
  const bool derive = products[0].defined();
  const Blocks scratch(threads, (2 * elements + std::max(panels.rows.block * panels.width, panels.scratch())) * 4);
  // Standardises panel p of view v: in float32 in its place in the operand `rows`, else in `own`.
  const auto pack = [&](int v, int64_t p, const Operands& z, float* own, float* free) {
    float* const panel = z.half || !z.rows[p] ? own : z.rows.floats(p);
    panels.standardise(v, p, panel, free);
    return panel;
  };
  if (loss.cross()) {
    const Operands a(panels, true, false, derive), b(panels, false, true, derive);
    run(threads, panels.count, [&](int64_t p) {
      float* const own = scratch.floats(slot(threads));
      float* const free = own + 2 * elements;
      float* const panel[] = {pack(0, p, a, own, free), pack(1, p, b, own + elements, free)};
      panels.compare(p, panel, free);
      panels.arrange(panel[0], free, a[p]);
      panels.arrange(panel[1], free, b[p]);
    });
    return multiply_views(panels, a, b, products[0], products[1]);
  }
  double off = 0;
  for (int v = 0; v < views; ++v) {
    const Operands z(panels, true, true, derive);
    run(threads, panels.count, [&](int64_t p) {
      float* const own = scratch.floats(slot(threads));
      float* const free = own + 2 * elements;
      float* const panel = pack(v, p, z, own, free);
      if (v == 0) panels.compare(p, nullptr, free);
      panels.arrange(panel, free, z[p]);
    });
    off += multiply_views(panels, z, z, products[v], products[v]);
  }
  return off;
}

void derive_primal(const Panels& panels, const Loss& loss, const std::vector<Tensor>& products, float factor,
                   const std::vector<Tensor>& out) {
  const int64_t rows = panels.views.rows, dim = panels.views.dim, width = panels.width;
  derive(panels, loss, false, Tensor(), factor, out, [&](int v, int64_t p, float* const*, float*, float* P) {
    const float* from = products[v].const_data_ptr<float>() + p * width;
    for (int64_t n = 0; n < rows; ++n, from += dim, P += width) std::copy_n(from, panels.columns(p), P);
  }, [] {});
}

}  // namespace fastssl::correlation
