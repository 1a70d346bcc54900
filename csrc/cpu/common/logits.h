// Losses of a linear layer's logits L = X W^T, W (K, D), for a block of rows of features X (N, D) at a time.
//
// L is never stored as a whole: for all classes and a block of rows its tiles, (classes, rows) each, are computed,
// turned into exponentials, and kept, as bfloat16 where products are; once a row's sums over all classes are known,
// they become weights G, which are multiplied twice, dX = G W and dW += G^T X. With U = 2 N K D floating-point
// operations, one product, that is 3 U. Tiles lie transposed, so that W is a left operand as it lies, and a row's sums
// are lanes.
//
// Blocks of classes are shared out to threads: each has the sums of dX of its own, which are added up in one order.
#pragma once

#include <algorithm>
#include <vector>

#include "common/arena.h"
#include "common/logits_tiles.h"
#include "common/side.h"

namespace fastssl {

constexpr int64_t kKeptBytes = 1 << 27;  // of all tiles of a block of rows

// How N rows of D features are cut where tiles of `views` matrices of logits are kept.
inline Cut cut_rows(int64_t N, int64_t D, int64_t K, int64_t views, int64_t bytes) {
  Cut cut(N, D, 1);
  while (cut.block > kPadding && cut.block * round_up(K, kPadding) * views * bytes > kKeptBytes) cut.block /= 2;
  cut.block = round_up(cut.block, kPadding);
  cut.blocks = pieces(N, cut.block);
  return cut;
}

// The logits of one layer, whose blocks of features are cut alike.
struct Layer {
  const Side& weight;  // W, as kRows [and kWeighing]

  LogitShape shape(const Side& x, int64_t I, int64_t J) const {
    return {weight.padded(I), x.padded(J), weight.size(I), x.size(J)};
  }

  // Tile (I, J): classes I of rows J.
  void compute(const Side& x, int64_t I, int64_t J, float* out) const {
    weight.engine.multiply(weight.padded(I), x.padded(J), x.dim, false, weight.as_rows(I), x.as_columns(J), out);
  }
};

// The sums of exponentials of a block of rows: of each tile, and of all.
struct LogitSums {
  int64_t tiles, rows;
  Numbers<float> memory;
  float *largest, *total;  // (tiles, rows)
  float *top, *sum;        // (rows)

  LogitSums(int64_t tiles, int64_t rows) : tiles(tiles), rows(rows), memory(2 * (tiles + 1) * rows) {
    largest = memory.data;
    total = largest + tiles * rows;
    top = total + tiles * rows;
    sum = top + rows;
  }

  void combine(const LogitsTiles& f, float c) const { f.combine(largest, total, tiles, rows, rows, c, top, sum); }
};

// Gradients of features and of the weight, from tiles of G.
struct LayerGradients {
  const Side& weight;
  Gathered of_weight;
  int64_t splits;
  Blocks partial, scratch;  // (dim, rows) of dX for each split and view; room to finish rows

  LayerGradients(const Side& weight, int64_t views, int64_t block)
      : weight(weight),
        of_weight(weight, true, nullptr),
        splits(std::min<int64_t>(weight.threads, weight.cut.blocks)),
        partial(splits * views, weight.dim * block * 4),
        scratch(1, (weight.dim * block + weight.dim) * 4) {}

  // Calls visit(split, I) for all blocks of classes, each split's in order.
  template <typename Visit>
  void each(const Visit& visit) const {
    run(weight.threads, splits, [&](int64_t split) {
      const int64_t blocks = weight.cut.blocks;
      for (int64_t I = blocks * split / splits; I < blocks * (split + 1) / splits; ++I) visit(split, I);
    }, [&] { weight.engine.release(); });
  }

  // Tile (I, J) of G of view v: as left operand (classes, rows), and as right operand, which in bfloat16 is in pairs.
  void add(int64_t split, int64_t I, const Side& x, int64_t v, int64_t J, const void* left, const void* right) {
    of_weight.add(I, left, x, J);
    const int64_t blocks = weight.cut.blocks;
    weight.engine.multiply(weight.dim, x.padded(J), weight.padded(I), I > blocks * split / splits, weight.weighing(I),
                           right, partial.floats(v * splits + split));
  }

  // Writes dX of rows J of view v, contiguous, times `scale`, row i of x to row at[i] unless that is null. Returns
  // sum_i <G_i W, x_i>, x_i as it was multiplied.
  double finish_rows(const Side& x, int64_t v, int64_t J, float scale, const Tensor& dx,
                     const int64_t* at = nullptr) const {
    const int64_t rows = x.padded(J), elements = rows * x.dim;
    float* const sum = partial.floats(v * splits);
    for (int64_t split = 1; split < splits; ++split) {
      const float* const other = partial.floats(v * splits + split);
      for (int64_t i = 0; i < elements; ++i) sum[i] += other[i];
    }
    float* const turned = scratch.floats(0);
    weight.engine.tile.transposed(sum, rows, x.dim, turned);
    char* const out = static_cast<char*>(dx.mutable_data_ptr());
    double along = 0;
    for (int64_t r = 0; r < x.size(J); ++r) {
      const int64_t i = x.first(J) + r;
      along += weight.engine.tile.finish(x.rows[i], x.inverse_norm[i], nullptr, 1, 0, scale, x.normalize,
                                         x.rows.element, x.rows.dim, turned + r * x.dim, turned + elements,
                                         element_of(dx), out + (at ? at[i] : i) * x.rows.dim * dx.element_size());
    }
    return along;
  }

  void finish_weight(float scale, const Tensor& dw) const { finish_side(of_weight, nullptr, scale, dw); }
};

}  // namespace fastssl
