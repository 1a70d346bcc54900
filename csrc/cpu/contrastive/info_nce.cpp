// InfoNCE within a batch on the CPU (CPC, arXiv:1807.03748): with S = scale Q K^T of (normalised) queries and keys,
//
//     loss_i = log sum_j exp(S_ij) - S_ii,
//
// and with label smoothing what smoothing.h adds.
//
// Algorithm. Like flash attention, the forward pass accumulates sum_j E_ij k_j along with sum_j E_ij, where E_ij is
// exp(S_ij) up to a factor for each row. It ends with the derivatives of loss_i with respect to q_i and to scale, so
// that the backward pass only scales them to get the gradient of the queries. The gradient of the keys, if it is
// wanted, is the product of columns.h.
//
// Cost. In units U = 2 N N D of floating-point operations (one product): 2 U forward; for the keys' gradient 1 U of
// tiles that were kept (common/kept_tiles.h), 2 U of tiles that are computed again.
//
// The positive's weight does not average out, so it does not go through rounded products: the positive is left out of
// the tiles, and its terms are computed from unrounded rows. In float32 the tiles have its entry of S, as they have its
// weight in the keys' gradient. Each thread owns some rows (some columns in the backward pass); the bits do not depend
// on which.
#include <torch/library.h>

#include "common/checks.h"
#include "common/portable.h"
#include "contrastive/columns.h"
#include "contrastive/cross_entropy.h"
#include "contrastive/reduction.h"
#include "contrastive/smoothing.h"

namespace fastssl {
namespace {

constexpr char kNames[] = "query and positive_key";
constexpr int64_t kGrain = 1 << 15;  // fewer numbers are not worth another thread

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce(const Tensor& query, const Tensor& key,
                                                                            const Tensor& scale,
                                                                            double label_smoothing,
                                                                            c10::string_view reduction_name,
                                                                            bool normalize, bool weigh, int64_t keep,
                                                                            c10::string_view precision) {
  check_pairs(kNames, query, key, scale);
  const Reduction reduction = reduction_of(reduction_name);
  const Engine engine(precision);
  const int threads = threads_for(query.size(0), key.size(0), query.size(1));
  const Sides sides(query, key, normalize, kRows, kColumns | (weigh ? kWeighed : 0), engine, threads);
  const Side &x = sides.x, &y = sides.y;
  const Exponent e(scale, x, y);
  const Similarities S{x, y, e.factor, e.excluded, nullptr, true};
  const SoftmaxTiles& f = FASTSSL_TABLE_IN_USE(softmax_tiles);
  Tensor kept = at::empty({keep}, at::kByte);
  const KeptTiles keeping(kept, {x.count, y.count, x.rows.dim, threads, false}, engine, e.shared && weigh,
                          x.largest_square, y.largest_square);
  const int64_t count = x.count, dim = x.rows.dim, tile = x.cut.block * y.cut.block;
  const Sums sums(x.padded_count(), e);
  const Blocks tiles(threads, tile * 4), narrow(threads, weigh && engine.half() ? tile * 2 : 0);
  const Blocks weighted(threads * x.cut.group, weigh ? x.cut.block * x.dim * 4 : 0), scratch(threads, 2 * x.dim * 4);

  const Tensor loss = at::empty({count}, at::kFloat), positive = at::empty({count}, at::kFloat);
  const Tensor total = at::empty({count}, at::kFloat), shift = at::empty({count}, at::kFloat);
  const Tensor query_slope = at::empty({weigh ? count : 0, dim}, at::kFloat);
  const Tensor scale_slope = at::empty({weigh ? count : 0}, at::kFloat);
  float *const out_loss = loss.mutable_data_ptr<float>(), *const out_positive = positive.mutable_data_ptr<float>();
  float *const out_total = total.mutable_data_ptr<float>(), *const out_shift = shift.mutable_data_ptr<float>();
  float* const out_query_slope = query_slope.mutable_data_ptr<float>();
  float* const out_scale_slope = scale_slope.mutable_data_ptr<float>();

  const bool exact = engine.operand == Operand::Float32;
  const float share = share_of(label_smoothing, count);
  const Numbers<float> mean_key = share ? mean_row(y) : Numbers<float>(0);

  // Finishes row i. `sum` is sum_j E_ij k_j, about the same origin as the row's total.
  const auto finish = [&](int64_t i, float* sum, float* spare) {
    if (!exact) out_positive[i] = static_cast<float>(dot_row(x, y, i, spare)) * e.scale;
    out_shift[i] = shift_of(sums.extreme[i], e);
    out_total[i] = static_cast<float>(sums.about(i, e, origin_of(out_shift[i], e)));
    const CrossEntropy found(out_total[i], out_shift[i], out_positive[i]);
    out_loss[i] = static_cast<float>(found.value());
    if (!weigh) return;
    const float mean = sums.total[i] == 0 ? 0 : static_cast<float>(found.slope() / sums.total[i]);
    if (mean) engine.tile.store(sum, mean, Element::Float32, x.dim, sum);
    else std::fill_n(sum, x.dim, 0.f);
    if (share) engine.tile.add_row(mean_key.data, 1, -share, Element::Float32, x.dim, sum, nullptr);
    const double along = engine.tile.finish(x.rows[i], x.inverse_norm[i], y.rows[i], y.inverse_norm[i],
                                            static_cast<float>(share - found.slope()), 1, normalize, x.rows.element, dim,
                                            sum, spare, Element::Float32, out_query_slope + i * dim, true);
    out_scale_slope[i] = static_cast<float>(along);
  };

  run(threads, x.cut.groups(), [&](int64_t g) {
    const int at = slot(threads);
    const auto weighted_of = [&](int64_t I) { return weighted.floats(at * x.cut.group + I % x.cut.group); };
    for (int64_t J = 0; J < y.cut.blocks; ++J)
      x.cut.each(g, [&](int64_t I) {
        const int64_t m = x.padded(I), n = y.padded(J);
        void* const exponentials = keeping(I, J);
        void* const half = engine.half() && exponentials ? exponentials : narrow[at];
        float* const s = exponentials && !half ? static_cast<float*>(exponentials) : tiles.floats(at);
        S.compute(I, J, s);
        if (exact && I == J)
          for (int64_t r = 0; r < x.size(I); ++r) out_positive[x.first(I) + r] = e.rest * s[r * n + r];
        S.exclude_from(I, J, s);
        f.exponentials(s, n, m, n, e.c, e.shared ? &e.origin : nullptr, &sums.total[x.first(I)],
                       &sums.extreme[x.first(I)], weighted_of(I), weigh && J ? x.dim : 0, half);
        if (weigh) engine.multiply(m, x.dim, n, J > 0, half ? half : s, y.weighed(J), weighted_of(I));
      });
    x.cut.each(g, [&](int64_t I) {
      for (int64_t r = 0; r < x.size(I); ++r)
        finish(x.first(I) + r, weigh ? weighted_of(I) + r * x.dim : nullptr, scratch.floats(at));
    });
  }, [&] { engine.release(); });
  if (share) smooth(x, mean_key.data, share, e.scale, out_positive, out_loss);
  return {reduce(loss, reduction), positive, total, shift, query_slope, scale_slope, kept};
}

// factor_i scale row_i, with other options.
Tensor scaled_rows(const Tensor& rows_, const float* factor, float scale, const at::TensorOptions& options,
                   const Engine& engine) {
  const Tensor rows = rows_.contiguous(), out = at::empty(rows.sizes(), options);
  const int64_t dim = rows.size(1);
  const float* const from = rows.const_data_ptr<float>();
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, rows.size(0), std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      engine.tile.store(from + i * dim, factor[i] * scale, element_of(out), dim, to + i * dim * out.element_size());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> info_nce_backward(const Tensor& grad_loss, const Tensor& query, const Tensor& key,
                                                     const Tensor& scale, const Tensor& positive_,
                                                     const Tensor& total_, const Tensor& shift_,
                                                     const Tensor& query_slope, const Tensor& scale_slope_,
                                                     const Tensor& kept, double label_smoothing,
                                                     c10::string_view reduction, bool needs_key, bool normalize,
                                                     c10::string_view precision) {
  check_pairs(kNames, query, key, scale);
  const int64_t count = query.size(0);
  check_vectors("positive, total, shift and scale_slope", count, {positive_, total_, shift_, scale_slope_});
  check_kept(kept);
  TORCH_CHECK_VALUE(query_slope.scalar_type() == at::kFloat && query_slope.sizes() == query.sizes(),
                    "query_slope must be float32 of shape ", query.sizes(), ", got ", query_slope.scalar_type(),
                    " of shape ", query_slope.sizes());
  const Numbers<float> g = gradient_of_rows(grad_loss, reduction_of(reduction), count);
  const Tensor scale_slope = scale_slope_.contiguous();
  const float* const by_scale = scale_slope.const_data_ptr<float>();
  double grad_scale = 0;
  for (int64_t i = 0; i < count; ++i) grad_scale += double(g[i]) * by_scale[i];
  const Engine engine(precision);
  const Tensor grad_query = scaled_rows(query_slope, g.data, number<float>(scale), query.options(), engine);
  const Tensor grad_key = at::empty({needs_key ? count : 0, key.size(1)}, key.options());
  if (!needs_key || count == 0) return {grad_query, grad_key, scalar(grad_scale, scale.options())};

  const int threads = threads_for(count, count, query.size(1));
  const KeptTiles tiles(kept, {count, count, query.size(1), threads, false}, engine);
  const bool all = tiles.all();
  const Sides sides(query, key, normalize, kWeighing | (all ? kNothing : kRows), all ? kNothing : kColumns, engine,
                    threads, tiles.largest_square(0), tiles.largest_square(1));
  const Side &x = sides.x, &y = sides.y;
  const Exponent e(scale, x, y);
  tiles.check(e.shared);
  const Tensor positive = positive_.contiguous(), total = total_.contiguous(), shift = shift_.contiguous();
  const float *const p = positive.const_data_ptr<float>(), *const t = total.const_data_ptr<float>(),
              *const s = shift.const_data_ptr<float>();
  const float share = share_of(label_smoothing, count);
  const Numbers<float> positive_weight(count);
  const Coefficients rows([&](int64_t i) {
    const CrossEntropy found(t[i], s[i], p[i]);
    positive_weight[i] = static_cast<float>((share ? share * g[i] : 0) - found.slope() * g[i]);
    return static_cast<float>(found.slope_of_total() * g[i]);
  }, shift, x, e);
  Gathered gathered(y, false, &x, &grad_key);
  const bool exact = engine.operand == Operand::Float32;
  const Positives queries{x, positive_weight.data};
  const Numbers<float> weighted =
      share ? sum_rows(x, [&](int64_t i) { return -share * g[i] / static_cast<float>(count); }) : Numbers<float>(0);
  const EvenWeights even{nullptr, nullptr, weighted.data};
  const Finish finish(gathered, exact ? nullptr : &queries, e.scale, grad_key, nullptr, share ? &even : nullptr, false);
  gather_columns({x, y, e.factor, e.excluded, nullptr, true}, e, rows, tiles, gathered, finish,
                 exact ? positive_weight.data : nullptr);
  return {grad_query, grad_key, scalar(grad_scale, scale.options())};
}

FASTSSL_KERNELS(CPU, m) {
  implement<&info_nce>(m, "info_nce");
  implement<&info_nce_backward>(m, "info_nce_backward");
}

}  // namespace
}  // namespace fastssl
