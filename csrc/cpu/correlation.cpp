// Losses on the correlation and covariance of features on the CPU: Barlow Twins (arXiv:2103.03230) and VICReg
// (arXiv:2105.04906).
//
// A and B are the views Z (N x D) with every column centred and, for Barlow Twins, divided by its standard deviation.
// Both losses sum up the squares of a D x D matrix off its diagonal, of A^T B or of A^T A and B^T B:
//
//     off(A, B) = sum_{i != j} (A^T B)_ij^2,     doff/dA = 2 B (A^T B)^T,     doff/dB = 2 A (A^T B),     no diagonal.
//
// Algorithms and costs, in units of one product: U = 2 N N D floating-point operations, or V = 2 N D D.
//
// Dual, where N is the smaller: sum_ij (A^T B)_ij^2 = <A A^T, B B^T>. The forward pass makes the N x N Gram matrices,
// of which symmetry leaves half, 1 U for both; the backward pass dA = 2 (B B^T) A, dB = 2 (A A^T) B is 2 U. Columns are
// taken in panels that fit the second-level cache: a panel is read, standardised, packed and multiplied before the
// next. In the backward pass a panel is read once more and its gradient finished, the standardisation's derivative
// included, since that needs nothing but the column. All that is kept between the two is the Gram matrices.
//
// Primal, where D is: A^T B in squares, each computed once and in the forward pass, for the loss and for both
// gradients: 3 V. A^T A is symmetric: half the tiles, 3/2 V for each view. Squares are forgotten; what is kept are the
// products A (A^T B) and B (A^T B)^T, which the backward pass finishes, panel by panel. Operands are packed in cells of
// a block of rows by a block of columns, so that those of every product fit the second-level cache.
//
// Threads. No two that run at once write the same Gram tile, panel, or gradient, and sums come in one order: the bits
// are the same in every run with as many threads.
//
// Rounding. Diagonals do not average out, so none goes through rounded products: C_ii are column sums of unrounded A B,
// the Gram matrices' diagonals multiply unrounded rows.
#include <torch/library.h>

#include <array>
#include <vector>

#include "common/tiled.h"
#include "correlation_tiles.h"

namespace fastssl {
namespace {

// One or two views, and how their columns are standardised: centred, and divided by their deviations if `divide`.
struct Views {
  std::vector<Tensor> z;
  bool divide;
  double eps;
  int64_t rows, dim;
  double divisor;  // of sums of squares: variances

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

// The columns of the views in panels, and what is known of each column once its panel has been standardised.
struct Panels {
  const Views& views;
  const Engine& engine;
  int threads;
  Cut rows;              // blocks of rows
  int64_t width, count;  // columns of a panel, panels
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

  // Panel p of view v, and its statistics.
  void standardise(int v, int64_t p, float* panel, float* scratch) const {
    tile.standardise(of(raw(v), p), views.rows, padded_rows, views.divide, views.eps, views.divisor, panel,
                     of(variance[v], p), of(rstd[v], p), scratch);
  }

  // What the two views' panels p give together, once they are standardised.
  void compare(int64_t p, float* const* panels, float* scratch) const {
    if (views.count() == 1) return;
    if (views.divide) {
      tile.multiply_columns(panels[0], panels[1], views.rows, width, false, of(compared, p));
    } else {
      tile.distances(of(raw(0), p), of(raw(1), p), views.rows, of(compared, p), scratch);
    }
  }

  // The gradient of view v's panel p, from its products P, as `finish` of the tiles has it.
  void finish(int64_t p, int v, float* P, float* const* panels, const float* row_weight, float alpha,
              const ColumnTerms& terms, double projection, float pull, float factor, float* scratch,
              const Tensor& out) const {
    const int other = views.count() - 1 - v;
    const Rows x = raw(v), y = raw(other);
    tile.finish(P, panels[v], panels[other], row_weight, views.rows, alpha, terms, projection, pull, of(x, p), of(y, p),
                factor, scratch, element_of(out), views.dim,
                static_cast<char*>(out.mutable_data_ptr()) + p * width * out.element_size());
  }

  // The cells of a panel as operands; `out` are the panels' first.
  void arrange(float* panel, float* spare, const Packed& out) const {
    for (int64_t I = 0; I < rows.blocks; ++I) {
      const auto at = [&](void* operand) { return cell(operand, I, engine.bytes()); };
      engine.tile.arrange(cell(panel, I), padded(I), width, engine.operand, spare,
                          {at(out.left), at(out.right), at(out.right_pairs), at(out.left_columns)});
    }
  }
};

// A loss: its parts' weights, and what they make of the statistics.
struct Loss {
  const Views& views;
  double invariance_param, variance_param, off_param;

  // Products of A and B, or of A with itself and of B with itself.
  bool cross() const { return views.divide; }
  // What the sum of squares off the diagonal counts.
  double off_factor() const {
    return cross() ? 1 / (double(views.rows) * views.rows) : 1 / (views.dim * views.divisor * views.divisor);
  }
  // What B (A^T B)^T counts in the gradient of A.
  double alpha() const { return (cross() ? 2 : 4) * off_param * off_factor(); }

  template <typename F>
  double sum(const F& f) const {
    double total = 0;
    for (int64_t i = 0; i < views.dim; ++i) total += f(i);
    return total;
  }

  double invariance(const Panels& panels) const {
    const float* const compared = panels.compared.const_data_ptr<float>();
    if (!cross()) return sum([&](int64_t i) { return compared[i]; }) / (double(views.rows) * views.dim);
    return sum([&](int64_t i) {
      const double apart = compared[i] / double(views.rows) - 1;
      return apart * apart;
    });
  }

  double variance(const Panels& panels) const {
    double total = 0;
    for (int v = 0; v < views.count(); ++v) {
      const float* const variance = panels.variance[v].const_data_ptr<float>();
      total += sum([&](int64_t i) {
        const double below = 1 - std::sqrt(variance[i] + views.eps);
        return below < 0 ? 0 : below;  // keeps a NaN
      });
    }
    return total / (double(views.dim) * views.count());
  }

  // The sum of squares of the diagonal of A^T B, or of view v's A^T A, as the products have it.
  double diagonal(const Panels& panels, int v) const {
    const Tensor& exact = cross() ? panels.compared : panels.variance[v];
    const float* const value = (panels.rounded() ? panels.rounded_squares[v] : exact).const_data_ptr<float>();
    const double factor = cross() || panels.rounded() ? 1 : views.divisor;
    return sum([&](int64_t i) { return factor * value[i] * factor * value[i]; });
  }

  // What the distance of the two views counts in the gradient of either.
  double pull() const {
    return cross() || views.count() == 1 ? 0 : 2 * invariance_param / (double(views.rows) * views.dim);
  }

  // The terms of a panel's gradient that are not products of panels, into `out`, 2 width floats. With `dual` its
  // products have the diagonal.
  ColumnTerms terms(const Panels& panels, int64_t p, int v, bool dual, float* out) const {
    const int64_t width = panels.width;
    float* const own = out;
    float* const other = out + width;
    const double subtracted = dual ? alpha() : 0;
    std::fill_n(out, 2 * width, 0.f);
    if (cross()) {
      const float* const compared = panels.of(panels.compared, p);
      const double rows = double(views.rows);
      for (int64_t c = 0; c < width; ++c)
        other[c] = static_cast<float>(2 * invariance_param * (compared[c] / rows - 1) / rows - subtracted * compared[c]);
    } else {
      const double hinge = variance_param / (double(views.dim) * views.count() * views.divisor);
      const float* const variance = panels.of(panels.variance[v], p);
      for (int64_t c = 0; c < width; ++c) {
        const double deviation = std::sqrt(variance[c] + views.eps);
        own[c] = static_cast<float>((deviation < 1 ? -hinge / deviation : 0) - subtracted * variance[c] * views.divisor);
      }
    }
    return {own, other, panels.of(panels.rstd[v], p)};
  }

  double projection() const { return cross() ? views.divisor : 0; }
};

// Standardises every panel and forgets it: for the statistics.
void standardise_all(const Panels& panels) {
  const Blocks scratch(panels.threads, (2 * panels.elements() + panels.scratch()) * 4);
  run(panels.threads, panels.count, [&](int64_t p) {
    float* const panel = scratch.floats(slot(panels.threads));
    float* const both[] = {panel, panel + panels.elements()};
    for (int v = 0; v < panels.views.count(); ++v) panels.standardise(v, p, both[v], panel + 2 * panels.elements());
    panels.compare(p, both, panel + 2 * panels.elements());
  });
}

struct GramTile {
  int64_t view, I, J;  // blocks of rows I <= J
};

// The products of panels [first, last) of each view with themselves, tile by tile, into `sums` from `place` on.
// `cross`: that two views' Gram matrices will be multiplied with each other.
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

// The Gram matrix of each view, (N, N). Small ones are summed up by every thread for itself, of its panels; large ones
// by all threads together, tile by tile.
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
    constexpr int64_t kSquare = 16;  // in squares of cache lines, for the sake of the mirrored ones
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

// The gradients of the views, times `factor`, into `out`. `product(v, p, panel, free, out)` makes what P of `finish` is,
// for panel p of view v; `done` is called by each thread that has made some.
template <typename Product, typename Done>
void derive(const Panels& panels, const Loss& loss, bool dual, const Tensor& diagonals, float factor,
            const std::vector<Tensor>& out, const Product& product, const Done& done) {
  const int views = panels.views.count(), threads = panels.threads;
  const int64_t elements = panels.elements();
  const int64_t terms_at = std::max(panels.rows.block * panels.width, panels.scratch());
  const Blocks scratch(threads, ((views + 1) * elements + terms_at + 2 * panels.width) * 4);
  run(threads, panels.count, [&](int64_t p) {
    float* const P = scratch.floats(slot(threads));
    float* const panel[2] = {P + elements, P + views * elements};
    float* const free = P + (views + 1) * elements;
    for (int v = 0; v < views; ++v) panels.standardise(v, p, panel[v], free);
    if (loss.cross()) panels.compare(p, panel, free);  // for the terms
    for (int v = 0; v < views; ++v) {
      product(v, p, panel, free, P);
      const int gram = loss.cross() ? 1 - v : v;
      panels.finish(p, v, P, panel, dual ? diagonals[gram].const_data_ptr<float>() : nullptr,
                    static_cast<float>(loss.alpha()), loss.terms(panels, p, v, dual, free + terms_at),
                    loss.projection(), static_cast<float>(loss.pull()), factor, free, out[v]);
    }
  }, done);
}

// The same from the views' Gram matrices.
void derive_dual(const Panels& panels, const Loss& loss, const std::vector<Tensor>& grams, float factor,
                 const std::vector<Tensor>& out) {
  const Engine& engine = panels.engine;
  const Cut& rows = panels.rows;
  const int views = panels.views.count(), threads = panels.threads;
  const int64_t count = panels.views.rows, elements = panels.elements();
  const bool products = loss.alpha() != 0;
  // Row block I of a Gram matrix, as the left operands (I, J), without the diagonal.
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

// The same from the products B (A^T B)^T and A (A^T B), (N, D) each.
void derive_primal(const Panels& panels, const Loss& loss, const std::vector<Tensor>& products, float factor,
                   const std::vector<Tensor>& out) {
  const int64_t rows = panels.views.rows, dim = panels.views.dim, width = panels.width;
  derive(panels, loss, false, Tensor(), factor, out, [&](int v, int64_t p, float* const*, float*, float* P) {
    const float* from = products[v].const_data_ptr<float>() + p * width;
    for (int64_t n = 0; n < rows; ++n, from += dim, P += width) std::copy_n(from, panels.columns(p), P);
  }, [] {});
}

// All panels of a view Z as operands: of Z^T Z' from the left (`columns`) and from the right, and of Z W from the left
// (`rows`). In float32 the last two are one.
struct Operands {
  Blocks rows, columns, pairs;
  bool half;

  Operands(const Panels& panels, bool from_left, bool from_right, bool derive)
      : rows(panels.count, bytes(panels, derive || (from_right && !panels.engine.half()))),
        columns(panels.count, bytes(panels, from_left)),
        pairs(panels.count, bytes(panels, from_right && panels.engine.half())),
        half(panels.engine.half()) {}

  static int64_t bytes(const Panels& panels, bool wanted) { return wanted ? panels.elements() * panels.engine.bytes() : 0; }
  // Panel p, to be written.
  Packed operator[](int64_t p) const {
    return half ? Packed{rows[p], nullptr, pairs[p], columns[p]} : Packed{rows[p], columns[p], nullptr, nullptr};
  }
  const void* from_right(int64_t p) const { return half ? pairs[p] : rows[p]; }
};

// The sum of squares of C = A^T B off its diagonal; and if gradients are wanted, A C into `db` and B C^T into `da`,
// (N, D) each. If a and b are one, so are da and db, which gets C^T's share but once.
//
// A square of C is made, tile by tile, which the third-level cache holds; then every block of rows is multiplied with
// it. So operands are read from memory once for each square, and nobody writes what another does.
double multiply_views(const Panels& panels, const Operands& a, const Operands& b, const Tensor& da, const Tensor& db) {
  constexpr int64_t kSquare = 1024;  // columns
  const Engine& engine = panels.engine;
  const int threads = panels.threads;
  const bool self = &a == &b, derive = db.defined(), half = engine.half();
  const int64_t width = panels.width, blocks = panels.rows.blocks, area = width * width;
  const int64_t side = std::clamp<int64_t>(kSquare / width, 1, panels.count);
  const Blocks forth(derive ? side * side : 0, area * engine.bytes()), back(derive ? side * side : 0, area * engine.bytes());
  const Blocks scratch(threads, (area + std::max(area, panels.rows.block * width)) * 4);
  const auto at = [&](const void* panel, int64_t r) { return panels.cell(const_cast<void*>(panel), r, engine.bytes()); };
  // cell (r, p) of a gradient [+]= sum_k z_k W_k
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
          add_products(a, p0, p1, forth, c, r, q0 + c, p0 > 0, db);
        } else {
          add_products(b, q0, q1, back, c - of_b, r, p0 + c - of_b, q0 > 0, da);
        }
      }, done);
    }
  return sum;
}

// The sums of squares off the diagonals, together; and if `products` are defined, B (A^T B)^T and A (A^T B) into them, or
// A (A^T A) and B (B^T B).
double primal(const Panels& panels, const Loss& loss, const std::vector<Tensor>& products) {
  const int views = panels.views.count(), threads = panels.threads;
  const int64_t elements = panels.elements();
  const bool derive = products[0].defined();
  const Blocks scratch(threads, (2 * elements + std::max(panels.rows.block * panels.width, panels.scratch())) * 4);
  // Panel p of view v, and its operands. In float32 it stays where its rows are.
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

struct Result {
  double loss, invariance, variance, off;
  std::vector<Tensor> kept;
};

// Panels of that many columns keep a view's rows in the second-level cache.
int64_t panel_columns(int64_t rows) { return std::clamp<int64_t>((1 << 19) / rows / kPadding * kPadding, 64, 256); }

// Tiles of that many columns are products worth their operands, and enough of them for all threads.
int64_t tile_columns(int64_t dim, int threads) {
  int64_t columns = 256;
  while (columns > 64 && pieces(dim, columns) * pieces(dim, columns) < 8 * threads) columns /= 2;
  return columns;
}

Result forward(const Loss& loss, bool dual, bool derive, c10::string_view precision) {
  const Views& views = loss.views;
  const Engine engine(precision);
  Result result{};
  if (dual) {
    const Panels panels(views, engine, threads_for(views.rows, views.rows, views.dim), panel_columns(views.rows));
    if (loss.off_param != 0) {
      result.kept = gram_matrices(panels, loss.cross());
      for (int v = 0; v < (loss.cross() ? 1 : views.count()); ++v)
        result.off += inner(panels, result.kept[v], result.kept[loss.cross() ? 1 : v]) - loss.diagonal(panels, v);
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
                             c10::string_view precision) {
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> barlow_twins(const Tensor& z_a, const Tensor& z_b,
                                                                double invariance_param, double lambda_param,
                                                                double eps, bool unbiased, bool dual, bool derive,
                                                                c10::string_view precision) {
  if (z_a.scalar_type() == at::kDouble)
    return portable<&barlow_twins>("fastssl::barlow_twins_portable", z_a, z_b, invariance_param, lambda_param, eps,
                                   unbiased, dual, derive, precision);
  const Views views({z_a, z_b}, true, eps, unbiased);
  const Result r = forward({views, invariance_param, 0, lambda_param}, dual, derive, precision);
  return {scalar(r.loss), scalar(r.invariance), scalar(r.off), r.kept[0], r.kept[1]};
}

std::tuple<Tensor, Tensor> barlow_twins_backward(const Tensor& grad_loss, const Tensor& z_a, const Tensor& z_b,
                                                 const Tensor& kept_a, const Tensor& kept_b, double invariance_param,
                                                 double lambda_param, double eps, bool unbiased, bool dual,
                                                 c10::string_view precision) {
  if (z_a.scalar_type() == at::kDouble)
    return portable<&barlow_twins_backward>("fastssl::barlow_twins_backward_portable", grad_loss, z_a, z_b, kept_a,
                                            kept_b, invariance_param, lambda_param, eps, unbiased, dual, precision);
  const Views views({z_a, z_b}, true, eps, unbiased);
  const auto dz = backward({views, invariance_param, 0, lambda_param}, grad_loss, {kept_a, kept_b}, dual, precision);
  return {dz[0], dz[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vicreg(const Tensor& z_a, const Tensor& z_b,
                                                                  double lambda_param, double mu_param,
                                                                  double nu_param, double eps, bool unbiased, bool dual,
                                                                  bool derive, c10::string_view precision) {
  if (z_a.scalar_type() == at::kDouble)
    return portable<&vicreg>("fastssl::vicreg_portable", z_a, z_b, lambda_param, mu_param, nu_param, eps, unbiased,
                             dual, derive, precision);
  const Views views({z_a, z_b}, false, eps, unbiased);
  const Result r = forward({views, lambda_param, mu_param, nu_param}, dual, derive, precision);
  return {scalar(r.loss), scalar(r.invariance), scalar(r.variance), scalar(r.off), r.kept[0], r.kept[1]};
}

std::tuple<Tensor, Tensor> vicreg_backward(const Tensor& grad_loss, const Tensor& z_a, const Tensor& z_b,
                                           const Tensor& kept_a, const Tensor& kept_b, double lambda_param,
                                           double mu_param, double nu_param, double eps, bool unbiased, bool dual,
                                           c10::string_view precision) {
  if (z_a.scalar_type() == at::kDouble)
    return portable<&vicreg_backward>("fastssl::vicreg_backward_portable", grad_loss, z_a, z_b, kept_a, kept_b,
                                      lambda_param, mu_param, nu_param, eps, unbiased, dual, precision);
  const Views views({z_a, z_b}, false, eps, unbiased);
  const auto dz = backward({views, lambda_param, mu_param, nu_param}, grad_loss, {kept_a, kept_b}, dual, precision);
  return {dz[0], dz[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> variance_covariance(const Tensor& z, double mu_param, double nu_param,
                                                               double eps, bool unbiased, bool dual, bool derive,
                                                               c10::string_view precision) {
  if (z.scalar_type() == at::kDouble)
    return portable<&variance_covariance>("fastssl::variance_covariance_portable", z, mu_param, nu_param, eps, unbiased,
                                          dual, derive, precision);
  const Views views({z}, false, eps, unbiased);
  const Result r = forward({views, 0, mu_param, nu_param}, dual, derive, precision);
  return {scalar(r.loss), scalar(r.variance), scalar(r.off), r.kept[0]};
}

Tensor variance_covariance_backward(const Tensor& grad_loss, const Tensor& z, const Tensor& kept, double mu_param,
                                    double nu_param, double eps, bool unbiased, bool dual,
                                    c10::string_view precision) {
  if (z.scalar_type() == at::kDouble)
    return portable<&variance_covariance_backward>("fastssl::variance_covariance_backward_portable", grad_loss, z, kept,
                                                   mu_param, nu_param, eps, unbiased, dual, precision);
  const Views views({z}, false, eps, unbiased);
  return backward({views, 0, mu_param, nu_param}, grad_loss, {kept}, dual, precision)[0];
}

TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("barlow_twins", &barlow_twins);
  m.impl("barlow_twins_backward", &barlow_twins_backward);
  m.impl("vicreg", &vicreg);
  m.impl("vicreg_backward", &vicreg_backward);
  m.impl("variance_covariance", &variance_covariance);
  m.impl("variance_covariance_backward", &variance_covariance_backward);
}

}  // namespace
}  // namespace fastssl
