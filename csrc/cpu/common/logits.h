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
#include "common/pages.h"
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

// Blocks that take much memory together, in large pages: to find and clear small ones takes as long as the products.
struct LargeBlocks {
  int64_t bytes_per_block;
  Blocks few;
  Tensor many;

  LargeBlocks(int64_t blocks, int64_t bytes)
      : bytes_per_block(round_up(bytes, kLine)),
        few(is_large(blocks) ? 0 : blocks, bytes),
        many(is_large(blocks) ? empty_in_large_pages({blocks * bytes_per_block}, at::kByte) : Tensor()) {}

  void* operator[](int64_t block) const {
    return many.defined() ? static_cast<char*>(many.mutable_data_ptr()) + block * bytes_per_block : few[block];
  }
  float* floats(int64_t block) const { return static_cast<float*>((*this)[block]); }

 private:
  bool is_large(int64_t blocks) const { return blocks * bytes_per_block > (int64_t(1) << 22); }
};

// The logits of one layer, whose blocks of features are cut alike.
struct Layer {
  const Side& weight;  // W, as kRows [and LayerGradients::roles]

  LogitShape shape(const Side& x, int64_t I, int64_t J) const {
    return {weight.padded(I), x.padded(J), weight.size(I), x.size(J)};
  }

  // Tile (I, J): classes I of rows J.
  void compute(const Side& x, int64_t I, int64_t J, float* out) const {
    weight.engine.multiply_strips(weight.padded(I), x.padded(J), x.dim, false, weight.as_rows(I), x.as_columns(J), out);
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

// Gradients of features and of the weight, or of one of them, from tiles of G.
//
// dX_J = sum_I G_IJ^T W_I is a product of turned tiles in float32, so that W is an operand as it lies; in bfloat16, in
// which W must be packed anyway, it is gathered transposed. dW_I is summed where it is returned, if it can be; else for
// `panel` blocks of classes at a time.
struct LayerGradients {
  const Side& weight;
  const bool of_rows, of_weight;
  const Tensor& dw;
  const bool direct;  // dW is float32 as it is summed, but for rows that pad its last block
  int64_t splits;
  LargeBlocks sums;            // of dW_I
  Blocks partial;              // of dX for each split and view
  Blocks scratch, turned;      // room to finish rows, and to turn tiles
  std::vector<char> has_sums;  // the first term of a sum is stored, not added
  int64_t from, to;            // the blocks of classes that are being visited

  LayerGradients(const Side& weight, int64_t views, int64_t block, const Tensor& dw, bool of_rows = true,
                 bool of_weight = true, int64_t panel = 1 << 30)
      : weight(weight),
        of_rows(of_rows),
        of_weight(of_weight),
        dw(dw),
        direct(of_weight && is_direct(weight, dw)),
        splits(std::min<int64_t>(weight.threads, weight.cut.blocks)),
        sums(direct ? 1 : std::min(panel, weight.cut.blocks), of_weight ? weight.cut.block * weight.dim * 4 : 0),
        partial(splits * views, of_rows ? weight.dim * block * 4 : 0),
        scratch(weight.threads, (2 * kPadding + 1) * weight.dim * 4),
        turned(weight.engine.half() || !of_rows ? 0 : weight.threads, weight.cut.block * block * 4),
        has_sums(weight.cut.blocks),
        from(0),
        to(weight.cut.blocks) {}

  static bool is_direct(const Side& weight, const Tensor& dw) {
    return dw.scalar_type() == at::kFloat && dw.size(1) == weight.dim && !weight.normalize;
  }

  // What W needs to be packed as, for dX.
  static int roles(const Engine& engine) { return engine.half() ? kWeighing : kNothing; }

  // Calls visit(split, I) for all blocks of classes that are to be visited, each split's in order.
  template <typename Visit>
  void each(const Visit& visit) const {
    run(weight.threads, active(), [&](int64_t split) {
      for (int64_t I = first(split); I < first(split + 1); ++I) {
        if (weight.lazy && of_rows) weight.prepare(I, weight.engine.half() ? kWeighing : kRows);
        visit(split, I);
      }
    }, [&] { weight.engine.release(); });
  }

  // Tile (I, J) of G of view v: as left operand (classes, rows), and as right operand, which in bfloat16 is in pairs.
  void add(int64_t split, int64_t I, const Side& x, int64_t v, int64_t J, const void* left, const void* right) {
    const int64_t classes = weight.padded(I), rows = x.padded(J), dim = weight.dim;
    const Engine& engine = weight.engine;
    if (of_weight)
      engine.multiply_strips(classes, dim, rows, std::exchange(has_sums[I], 1), left, x.weighed(J), sum_of(I));
    if (!of_rows) return;
    float* const sum = partial.floats(v * splits + split);
    const bool add = I > first(split);
    if (engine.half()) {
      engine.multiply_strips(dim, rows, classes, add, weight.weighing(I), right, sum);
    } else {
      float* const turn = turned.floats(slot(weight.threads));
      engine.tile.transposed(static_cast<const float*>(left), rows, classes, turn);
      engine.multiply(rows, dim, classes, add, turn, weight.as_rows(I), sum);
    }
  }

  // Writes dX of rows J of view v, contiguous, times `scale`, row i of x to row at[i] unless that is null. Returns
  // sum_i <G_i W, x_i>, x_i as it was multiplied. Where classes are visited in several turns, `total` (rows, dim) is
  // what the earlier ones came to, and all but the last only add to it.
  double finish_rows(const Side& x, int64_t v, int64_t J, float scale, const Tensor& dx, const int64_t* at = nullptr,
                     float* total = nullptr) const {
    const int64_t rows = x.padded(J), dim = x.dim, chunks = rows / kPadding;
    const bool half = weight.engine.half();
    const Numbers<double> along(chunks, 0);
    run(weight.threads, chunks, [&](int64_t chunk) {
      const int64_t start = chunk * kPadding, elements = kPadding * dim;
      float *const sum = scratch.floats(slot(weight.threads)), *const spare = sum + elements;
      float* const gathered = half ? spare : sum;  // (dim, kPadding), or (kPadding, dim)
      for (int64_t split = 0; split < active(); ++split) {
        const float* const part = partial.floats(v * splits + split);
        const auto gather = [&](const float* from, int64_t count, float* to) {
          for (int64_t i = 0; i < count; ++i) to[i] = split ? to[i] + from[i] : from[i];
        };
        if (!half) gather(part + start * dim, elements, gathered);
        for (int64_t d = 0; half && d < dim; ++d) gather(part + d * rows + start, kPadding, gathered + d * kPadding);
      }
      if (half) weight.engine.tile.transposed(gathered, kPadding, dim, sum);
      if (total) {
        float* const all = total + start * dim;
        for (int64_t i = 0; i < elements; ++i) sum[i] = all[i] = from ? all[i] + sum[i] : sum[i];
        if (to < weight.cut.blocks) return;
      }
      for (int64_t i = x.first(J) + start, r = 0; r < std::min(kPadding, x.size(J) - start); ++r, ++i)
        along[chunk] += finish(x, i, at ? at[i] : i, scale, sum + r * dim, spare, dx);
    });
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += along[chunk];  // in this order: deterministic
    return sum;
  }

  // Writes dW of the classes that were visited, times `scale`.
  void finish_weight(float scale) const {
    run(weight.threads, to - from, [&](int64_t i) {
      const int64_t I = from + i;
      const bool there = direct && sum_of(I) != sums.floats(0);
      if (there && scale == 1 && has_sums[I]) return;
      float* const sum = sum_of(I);
      if (!has_sums[I]) std::fill_n(sum, weight.size(I) * weight.dim, 0.f);
      for (int64_t r = 0; r < weight.size(I); ++r)
        finish(weight, weight.first(I) + r, weight.first(I) + r, scale, sum + r * weight.dim,
               scratch.floats(slot(weight.threads)), dw);
    });
  }

 private:
  int64_t active() const { return std::min(splits, to - from); }
  int64_t first(int64_t split) const { return from + (to - from) * split / active(); }

  float* sum_of(int64_t I) const {
    if (!direct) return sums.floats(I - from);
    if (weight.size(I) < weight.padded(I)) return sums.floats(0);
    return dw.mutable_data_ptr<float>() + weight.first(I) * weight.dim;
  }

  static double finish(const Side& side, int64_t i, int64_t to, float scale, float* sum, float* spare,
                       const Tensor& out) {
    return side.engine.tile.finish(side.rows[i], side.inverse_norm[i], nullptr, 1, 0, scale, side.normalize,
                                   side.rows.element, side.rows.dim, sum, spare, element_of(out),
                                   static_cast<char*>(out.mutable_data_ptr()) +
                                       to * side.rows.dim * out.element_size(), true);
  }
};

}  // namespace fastssl
