// The sigmoid contrastive loss on the CPU (SigLIP, arXiv:2303.15343).
//
//     S = scale X Y^T + bias,     total = sum_ij softplus(S_ij),     W_ij = sigmoid(S_ij)
//     grad_x = scale W Y,   grad_y = scale W^T X,   grad_scale = <X, W Y>,   grad_bias = sum_ij W_ij
//
// In siglip_loss the diagonal holds the positive pairs, with loss softplus(-S_ij) and weight -sigmoid(-S_ij), which are
// computed from unrounded rows: in float32 those of the tiles. similarity_softplus leaves out the entries of `exclude`;
// they are up to its caller.
//
// Algorithm. There is no normaliser, so the weights of a tile are known as soon as the tile is. Each tile of S is
// computed once, turned into weights, and multiplied twice, W Y_J for its rows of grad_x and W^T X_I for those
// of grad_y, as in contrastive/pairs.h.
//
// Cost. In units U = 2 M N D of floating-point operations (one product): 3 U in all, without a second pass, in
// O((M + N) D) memory, where eager PyTorch takes 3 U and keeps several M x N matrices. Without gradients it is 1 U.
#include <torch/library.h>

#include "common/checks.h"
#include "common/portable.h"
#include "common/similarities.h"
#include "common/softplus.h"
#include "sigmoid_tiles.h"

namespace fastssl {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The loss and all gradients. Entries of `exclude` are left out; with `diagonal`, so is the diagonal, whose entries are
// then added as positive pairs.
Results run_softplus(const Tensor& x_, const Tensor& y_, const Tensor& scale_, const Tensor& bias_,
                     const int64_t* exclude, bool diagonal, bool derive, c10::string_view precision) {
  TORCH_CHECK_VALUE(bias_.numel() == 1, "bias must have one element, got shape ", bias_.sizes());
  const float scale = number<float>(scale_), bias = number<float>(bias_);
  const float factor = scale ? scale : std::numeric_limits<float>::min();  // 0 times an excluded -inf would be NaN
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const float any = 1;  // the rows' largest square, which nothing here depends on
  const Sides sides(x_, y_, false, kRows | (derive ? kWeighing : 0), kColumns | (derive ? kWeighed : 0), engine, threads,
                    &any, &any);
  const Side &x = sides.x, &y = sides.y;
  const Similarities S{x, y, 1, -std::copysign(std::numeric_limits<float>::infinity(), factor), exclude, diagonal};
  const SigmoidTiles& f = FASTSSL_TABLE_IN_USE(sigmoid_tiles);
  const Numbers<double> total(x.cut.blocks, 0), weight(x.cut.blocks, 0);  // of each block of rows
  const Blocks tile(threads, x.cut.block * y.cut.block * 4);
  const Blocks narrow(threads, derive && engine.half() ? 2 * x.cut.block * y.cut.block * 2 : 0);
  double all = 0, grad_scale = 0, grad_bias = 0;
  const bool exact = engine.operand == Operand::Float32;
  const Numbers<float> positive_weight(diagonal ? x.count : 0);  // first <x_i, y_i>
  const auto take_positives = [&](int64_t I) {
    for (int64_t i = x.first(I); i < x.first(I) + x.size(I); ++i) {
      const Softplus positive(-(double(scale) * positive_weight[i] + bias));
      positive_weight[i] = static_cast<float>(-positive.slope);
      total[I] += positive.value;
      weight[I] -= positive.slope;
    }
  };
  if (diagonal && !exact) {
    dot_rows(x, y, positive_weight.data);
    for (int64_t I = 0; I < x.cut.blocks; ++I) take_positives(I);
  }
  const auto sum_up = [&](Gathered* of_x, Gathered* of_y, const auto& finish_x, const auto& finish_y) {
    match(threads, x.cut, y.cut, [&](int64_t I, int64_t J) {
      float* const s = tile.floats(slot(threads));
      const int64_t m = x.padded(I), n = y.padded(J);
      S.compute(I, J, s);
      if (diagonal && exact && I == J) {
        for (int64_t r = 0; r < x.size(I); ++r) positive_weight[x.first(I) + r] = s[r * n + r];
        take_positives(I);
      }
      S.exclude_from(I, J, s);
      if (!derive) {
        total[I] += f.softplus(s, n, m, n, factor, bias);
        return;
      }
      auto* half = static_cast<at::BFloat16*>(narrow[slot(threads)]);
      auto* pairs = half ? half + m * n : nullptr;
      total[I] += f.softplus_and_weights(s, n, m, n, factor, bias, &weight[I], half, pairs);
      if (diagonal && exact && I == J)
        for (int64_t r = 0; r < x.size(I); ++r) s[r * n + r] = positive_weight[x.first(I) + r];
      of_x->add(I, half ? static_cast<void*>(half) : s, y, J);
      of_y->add_columns(J, half ? static_cast<void*>(pairs) : s, x, I);
    }, finish_x, finish_y, [&] { engine.release(); });
  };

  const int64_t dim = x.rows.dim;
  const Tensor grad_x = at::empty({derive ? x.count : 0, dim}, at::kFloat);
  const Tensor grad_y = at::empty({derive ? y.count : 0, dim}, at::kFloat);
  if (derive) {
    Gathered of_x(x, true, nullptr, &grad_x), of_y(y, false, &x, &grad_y);
    const Positives texts{y, positive_weight.data}, images{x, positive_weight.data};
    const Finish finish_x(of_x, diagonal && !exact ? &texts : nullptr, scale, grad_x);
    const Finish finish_y(of_y, diagonal && !exact ? &images : nullptr, scale, grad_y, nullptr, nullptr, false);
    sum_up(&of_x, &of_y, finish_x, finish_y);
    grad_scale = finish_x.total();
  } else {
    const auto nothing = [](int64_t) {};
    sum_up(nullptr, nullptr, nothing, nothing);
  }
  for (int64_t b = 0; b < x.cut.blocks; ++b) {
    all += total[b];
    if (derive) grad_bias += weight[b];
  }
  return {scalar(all), grad_x, grad_y, scalar(grad_scale, scale_.options()), scalar(grad_bias, bias_.options())};
}

Results similarity_softplus(const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& bias,
                            const std::optional<Tensor>& exclude_, bool derive, c10::string_view precision) {
  check_sides("x and y", x, y, scale);
  const Tensor exclude = checked_exclude(exclude_, x);
  return run_softplus(x, y, scale, bias, data_of(exclude), false, derive, precision);
}

Results siglip_loss(const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& bias, bool derive,
                    c10::string_view precision) {
  check_pairs("image_features and text_features", x, y, scale);
  return run_softplus(x, y, scale, bias, nullptr, true, derive, precision);
}

// kept * factor in the dtype of `like`: one pass, where PyTorch would take two for 16 bits, and one more allocation.
Tensor scaled(const Tensor& kept_, const Tensor& factor, const Tensor& like) {
  if (kept_.scalar_type() != at::kFloat || factor.scalar_type() != at::kFloat || !has_element(like))
    return kept_.mul(factor).to(like.scalar_type());
  const Tensor kept = kept_.contiguous(), out = at::empty(kept.sizes(), like.options());
  const float* const from = kept.const_data_ptr<float>();
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const float by = number<float>(factor);
  at::parallel_for(0, kept.numel(), at::internal::GRAIN_SIZE, [&](int64_t begin, int64_t end) {
    FASTSSL_TABLE_IN_USE(sigmoid_tiles).scaled(from + begin, end - begin, by, element_of(like),
                                               to + begin * out.element_size());
  });
  return out;
}

// The backward pass of both operations, for all dtypes: the forward pass has already computed the gradients.
std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_loss_backward(
    const Tensor& grad_total, const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& bias,
    const Tensor& kept_x, const Tensor& kept_y, const Tensor& kept_scale, const Tensor& kept_bias) {
  return {scaled(kept_x, grad_total, x), scaled(kept_y, grad_total, y), scaled(kept_scale, grad_total, scale),
          scaled(kept_bias, grad_total, bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_softplus_backward(
    const Tensor& grad_total, const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& bias,
    const Tensor& kept_x, const Tensor& kept_y, const Tensor& kept_scale, const Tensor& kept_bias,
    const std::optional<Tensor>&) {
  return siglip_loss_backward(grad_total, x, y, scale, bias, kept_x, kept_y, kept_scale, kept_bias);
}

FASTSSL_KERNELS(CPU, m) {
  implement<&similarity_softplus>(m, "similarity_softplus");
  m.impl("similarity_softplus_backward", &similarity_softplus_backward);
  implement<&siglip_loss>(m, "siglip_loss");
  m.impl("siglip_loss_backward", &siglip_loss_backward);
}

}  // namespace
}  // namespace fastssl
