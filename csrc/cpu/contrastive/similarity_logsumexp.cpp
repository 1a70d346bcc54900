// The log-sum-exps of rows on the CPU: with S = scale X Y^T, M x N, and column exclude[i] of row i left out,
//
//     rows_i = log sum_j exp(S_ij).
//
// Algorithm. Like flash attention, the forward pass accumulates sum_j E_ij y_j along with sum_j E_ij, where E_ij is
// exp(S_ij) up to a factor for each row: the backward pass only scales it to get the gradient of X, and does not read
// Y again, which suits a queue. A thread owns a range of columns, packs one block of them at a time, and multiplies all
// rows with it, so no copy of the queue is made. The threads' sums are combined at the end. The gradient of Y, if it is
// wanted, is the product of columns.h.
//
// Cost. In units U = 2 M N D of floating-point operations (one product): 2 U forward; for Y's gradient 1 U of tiles
// that were kept (common/kept_tiles.h), 2 U of tiles that are computed again.
#include <torch/library.h>

#include "common/checks.h"
#include "common/portable.h"
#include "common/exponents.h"
#include "common/kept_tiles.h"
#include "common/similarities.h"
#include "common/softmax_tiles.h"
#include "contrastive/columns.h"

namespace fastssl {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_logsumexp(const Tensor& x_, const Tensor& y_,
                                                                const Tensor& scale,
                                                                const std::optional<Tensor>& exclude_, bool weigh,
                                                                int64_t keep, c10::string_view precision) {
  check_sides("x and y", x_, y_, scale);
  const Tensor exclude = checked_exclude(exclude_, x_);
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const Side x(x_, false, kRows, engine, threads);
  const Side y(y_, false, kColumns | (weigh ? kWeighed : 0), engine, threads, true);
  const Exponent e(scale, x, y);
  const Similarities S{x, y, e.factor, e.excluded, data_of(exclude), false};
  Tensor kept = at::empty({keep}, at::kByte);
  const KeptTiles tiles(kept, {x.count, y.count, x.rows.dim, threads, false}, engine, e.shared && weigh,
                        x.largest_square, y.largest_square);
  // The columns are split between threads, each with sums of its own; where there are too few columns, so are the rows.
  const int64_t splits = std::max<int64_t>(std::min<int64_t>(threads, y.cut.blocks), 1), padded = x.padded_count();
  const int64_t shares = pieces(threads, splits);
  const Sums parts(splits * padded, e);
  const Blocks tile(threads, x.cut.block * y.cut.block * 4);
  const Blocks narrow(threads, weigh && engine.half() ? x.cut.block * y.cut.block * 2 : 0);
  const Blocks weighted_parts(splits * x.cut.blocks, weigh ? x.cut.block * x.dim * 4 : 0);
  const SoftmaxTiles& f = FASTSSL_TABLE_IN_USE(softmax_tiles);
  run(threads, splits * shares, [&](int64_t task) {
    const int64_t split = task / shares, share = task % shares;
    const int64_t begin = x.cut.blocks * share / shares, end = x.cut.blocks * (share + 1) / shares;
    const auto weighted = [&](int64_t I) { return weighted_parts.floats(split * x.cut.blocks + I); };
    for (int64_t I = begin; weigh && I < end; ++I) std::fill_n(weighted(I), x.padded(I) * x.dim, 0.f);
    for (int64_t J = y.cut.blocks * split / splits; J < y.cut.blocks * (split + 1) / splits; ++J) {
      y.prepare(J);
      for (int64_t I = begin; I < end; ++I) {
        const int64_t m = x.padded(I), n = y.padded(J), at = split * padded + x.first(I);
        void* const exponentials = tiles(I, J);
        void* const half = engine.half() && exponentials ? exponentials : narrow[slot(threads)];
        float* const s = exponentials && !half ? static_cast<float*>(exponentials) : tile.floats(slot(threads));
        S(I, J, s);
        f.exponentials(s, n, m, n, e.c, e.shared ? &e.origin : nullptr, &parts.total[at], &parts.extreme[at],
                       weighted(I), weigh ? x.dim : 0, half);
        if (weigh) engine.multiply(m, x.dim, n, true, half ? half : s, y.weighed(J), weighted(I));
      }
    }
  }, [&] { engine.release(); });

  // The splits' sums, moved to one origin and added up.
  const Tensor total = at::zeros({x.count}, at::kFloat), shift = at::zeros({x.count}, at::kFloat);
  const int64_t dim = x.rows.dim;
  const Tensor weighted = at::zeros({weigh ? x.count : 0, dim}, at::kFloat);
  float* const out_total = total.mutable_data_ptr<float>();
  float* const out_shift = shift.mutable_data_ptr<float>();
  float* const out_weighted = weighted.mutable_data_ptr<float>();
  at::parallel_for(0, x.count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float extreme = e.excluded;
      for (int64_t split = 0; split < splits; ++split) {
        const float found = parts.extreme[split * padded + i];
        if (found * e.c > extreme * e.c) extreme = found;
      }
      out_shift[i] = shift_of(extreme, e);
      const float origin = origin_of(out_shift[i], e);
      const int64_t I = i / x.cut.block, r = i % x.cut.block;
      double sum = 0;
      for (int64_t split = 0; split < splits; ++split) {
        const int64_t at = split * padded + i;
        const double moved = parts.about(at, e, origin);
        sum += moved;
        if (!weigh || parts.total[at] == 0) continue;
        const float factor = static_cast<float>(moved / parts.total[at]);
        const float* part = weighted_parts.floats(split * x.cut.blocks + I) + r * x.dim;
        for (int64_t d = 0; d < dim; ++d) out_weighted[i * dim + d] += factor * part[d];
      }
      out_total[i] = static_cast<float>(sum);
    }
  });
  return {total, shift, weighted, kept};
}

std::tuple<Tensor, Tensor, Tensor> similarity_logsumexp_backward(
    const Tensor& grad_total, const Tensor& x_, const Tensor& y_, const Tensor& scale,
    const std::optional<Tensor>& exclude_, const Tensor& shift, const Tensor& weighted_, const Tensor& kept,
    bool needs_y, c10::string_view precision) {
  check_sides("x and y", x_, y_, scale);
  check_vectors("grad_total and shift", x_.size(0), {grad_total, shift});
  check_kept(kept);
  TORCH_CHECK_VALUE(weighted_.scalar_type() == at::kFloat && weighted_.sizes() == x_.sizes(),
                    "weighted must be float32 of shape ", x_.sizes(), ", got ", weighted_.scalar_type(), " of shape ",
                    weighted_.sizes());
  const Tensor gradient = grad_total.contiguous(), weighted = weighted_.contiguous();
  const Tensor grad_x = weighted.mul(gradient.unsqueeze(1)).mul_(scale).to(x_.scalar_type());
  const Tensor along = at::linalg_vecdot(weighted, x_.to(at::kFloat)).to(at::kDouble);
  const Tensor grad_scale = gradient.to(at::kDouble).dot(along).to(scale.scalar_type());
  const Tensor grad_y = at::zeros({needs_y ? y_.size(0) : 0, y_.size(1)}, y_.options());
  if (!needs_y || x_.size(0) == 0) return {grad_x, grad_y, grad_scale};

  const Tensor exclude = checked_exclude(exclude_, x_);
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const KeptTiles tiles(kept, {x_.size(0), y_.size(0), x_.size(1), threads, false}, engine);
  const Side x(x_, false, kWeighing | (tiles.all() ? kNothing : kRows), engine, threads, false,
               tiles.largest_square(0));
  const Side y(y_, false, kColumns, engine, threads, true, tiles.largest_square(1));
  const Exponent e(scale, x, y);
  tiles.check(e.shared);
  const Coefficients rows(gradient, shift, x, e);
  Gathered gathered(y, false, &x, &grad_y);
  const Finish finish(gathered, nullptr, e.scale, grad_y, nullptr, nullptr, false);
  gather_columns({x, y, e.factor, e.excluded, data_of(exclude), false}, e, rows, tiles, gathered, finish);
  return {grad_x, grad_y, grad_scale};
}

FASTSSL_KERNELS(CPU, m) {
  implement<&similarity_logsumexp>(m, "similarity_logsumexp");
  implement<&similarity_logsumexp_backward>(m, "similarity_logsumexp_backward");
}

}  // namespace
}  // namespace fastssl
