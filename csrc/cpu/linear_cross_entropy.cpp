// The cross-entropy of a linear layer's logits on the CPU.
//
//     s_i = scale W x_i + b,    lse_i = log sum_k exp(s_ik),    Q = softmax(s)
//     loss_i = p_i (lse_i - s_iy) + sum_k c_k (lse_i - s_ik),    p_i = (1 - smoothing) w_y,    c_k = smoothing w_k / V
//     G_ik = dloss_i/ds_ik = (p_i + sum c) Q_ik - c_k - [k = y] p_i
//     dX = scale G W,    dW = scale G^T X,    db = sum_i G_i,    dscale = <X, G W>
//
// y being the row's label, w class weights, and X and W as they are or normalised. A row without a label has loss 0;
// where no labels are given, the loss is lse.
//
// Algorithm. The rows that have a label, a panel of several blocks at a time, as common/logits.h says: W and dW travel
// through the caches once for a panel. What a tile holds is L = W x^T, and L + b / scale its logits over the scale.
// The label's element of G, p_i (Q_iy - 1) and what smoothing adds, comes from the row's loss, not from Q, which
// bfloat16 rounds: it is what a confident row still has to learn. With U = 2 N V D operations, N the rows that have a
// label, that is 3 U, and U without gradients, in O(panel V) memory.
#include <torch/library.h>

#include <cfloat>
#include <cmath>
#include <optional>
#include <tuple>

#include "common/arena.h"
#include "common/checks.h"
#include "common/logits.h"
#include "common/portable.h"

namespace fastssl {
namespace {

constexpr int64_t kPanelRows = 1024;

// The rows of `target` that have a label, or undefined where all have, or there are no labels.
Tensor labelled_rows(const std::optional<Tensor>& target, int64_t classes, int64_t ignore_index) {
  if (!target) return Tensor();
  const Tensor labels = target->contiguous();
  const int64_t* const y = labels.const_data_ptr<int64_t>();
  const int64_t count = labels.numel();
  int64_t labelled = 0;
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(y[i] == ignore_index || (y[i] >= 0 && y[i] < classes), "target must be from 0 to below ", classes,
                      ", or ignore_index, ", ignore_index, ", got ", y[i]);
    labelled += y[i] != ignore_index;
  }
  if (labelled == count) return Tensor();
  const Tensor rows = at::empty({labelled}, at::kLong);
  int64_t* out = rows.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i)
    if (y[i] != ignore_index) *out++ = i;
  return rows;
}

Tensor chosen(const Tensor& x, const Tensor& rows) { return rows.defined() ? x.index_select(0, rows) : x.contiguous(); }

struct LinearCrossEntropy {
  const Engine engine;
  const int64_t classes;
  const float scale, c;
  const Tensor chosen_rows, labels;
  const int64_t count;  // of the rows that have a label
  const int threads;
  const Cut cut, class_cut;
  const int64_t panel;  // blocks of rows
  const Side w, x;
  double uniform_sum = 0;
  Numbers<float> shift, uniform, label_weight;  // -b / scale and c, with room beside the classes; p
  const bool has_bias, has_uniform;
  const LogitsTiles& f = FASTSSL_TABLE_IN_USE(logits_tiles);

  LinearCrossEntropy(const Tensor& input, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& target,
                     const Tensor& scale_, const std::optional<Tensor>& class_weight, double smoothing,
                     int64_t ignore_index, bool normalize, bool derive, c10::string_view precision)
      : engine(precision),
        classes(weight.size(0)),
        scale(scale_.item<float>()),
        c(scale > 0 ? static_cast<float>(std::min(M_LOG2E * double(scale), double(FLT_MAX))) : NAN),
        chosen_rows(labelled_rows(target, classes, ignore_index)),
        labels(target ? chosen(*target, chosen_rows) : Tensor()),
        count(chosen_rows.defined() ? chosen_rows.size(0) : input.size(0)),
        threads(threads_for(count, classes, weight.size(1))),
        cut(cut_rows(count, weight.size(1), classes, derive, engine.bytes())),
        class_cut(classes, weight.size(1), threads),
        panel(std::clamp<int64_t>(kKeptBytes / (cut.block * round_up(classes, kPadding) * engine.bytes()), 1,
                                  std::min(cut.blocks + !cut.blocks, std::max<int64_t>(kPanelRows / cut.block, 1)))),
        w(weight, normalize, kRows | (derive ? LayerGradients::roles(engine) : 0), engine, threads, class_cut),
        x(chosen_rows.defined() ? input.index_select(0, chosen_rows) : input, normalize,
          kColumns | (derive ? kWeighed : 0), engine, threads, cut),
        shift(bias.numel() ? w.padded_count() : 0),
        uniform(target && smoothing != 0 ? w.padded_count() : 0, 0.f),
        label_weight(count, target ? static_cast<float>(1 - smoothing) : 1.f),
        has_bias(bias.numel()),
        has_uniform(target && smoothing != 0) {
    if (has_bias) {
      const Tensor wide = bias.to(at::kFloat).contiguous();
      for (int64_t k = 0; k < classes; ++k) shift[k] = -wide.const_data_ptr<float>()[k] / scale;
    }
    const Tensor weights = class_weight ? class_weight->contiguous() : Tensor();
    const float* const of_class = class_weight ? weights.const_data_ptr<float>() : nullptr;
    if (has_uniform)
      for (int64_t k = 0; k < classes; ++k) {
        uniform[k] = static_cast<float>(smoothing / classes * (of_class ? of_class[k] : 1));
        uniform_sum += uniform[k];
      }
    if (target && of_class)
      for (int64_t i = 0; i < count; ++i) label_weight[i] *= of_class[labels.const_data_ptr<int64_t>()[i]];
  }

  // The row of `input` that row i of x is.
  int64_t place(int64_t i) const { return chosen_rows.defined() ? chosen_rows.const_data_ptr<int64_t>()[i] : i; }

  // Each row's loss, unless null; and with `derive` the gradients of sum_i factor[i] loss[i], times `upstream`.
  // `loss` and `factor` have an element for each row of `input`. Returns the gradient of the scale.
  double run(float* loss, bool derive, const float* factor, float upstream, const Tensor& dx, const Tensor& dw,
             float* db) const {
    const int64_t tile = class_cut.block * cut.block, most = panel * cut.block;
    const bool half = engine.half();
    const int64_t* const y = labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr;
    const LogitSums sums(class_cut.blocks, most);
    const Blocks kept(derive ? class_cut.blocks * panel : 0, tile * engine.bytes());
    const Blocks tiles(threads, tile * 4), narrow(threads, derive && half ? 2 * tile * 2 : 0);
    const Blocks scaled(threads, cut.block * 4);
    const Numbers<float> label(most), coefficient(most), spread(most), of_label(most);
    const Numbers<float> distance(has_uniform ? class_cut.blocks * most : 0);
    const Numbers<float> bias_sums(derive && has_bias ? w.padded_count() : 0, 0.f);
    std::optional<LayerGradients> gradients;
    if (derive) gradients.emplace(w, panel, cut.block, dw);
    const Layer layer{w};
    double along = 0;

    for (int64_t J0 = 0; J0 < cut.blocks; J0 += panel) {
      const int64_t J1 = std::min(J0 + panel, cut.blocks), first = x.first(J0);
      const int64_t rows = x.first(J1 - 1) + x.size(J1 - 1) - first;
      // Calls visit(r, k) for rows of block J whose label is class k of block I.
      const auto each_label = [&](int64_t I, int64_t J, const auto& visit) {
        if (!y) return;
        const int64_t from = w.first(I), size = w.size(I);
        const int64_t* const of_block = y + x.first(J);
        for (int64_t r = 0; r < x.size(J); ++r)
          if (const int64_t k = of_block[r] - from; k >= 0 && k < size) visit(r, k);
      };
      fastssl::run(threads, class_cut.blocks, [&](int64_t I) {
        float* const L = tiles.floats(slot(threads));
        const float* const offset = has_bias ? shift.data + w.first(I) : nullptr;
        for (int64_t J = J0; J < J1; ++J) {
          const int64_t at = x.first(J) - first;
          float* const largest = sums.largest + I * most + at;
          const LogitShape shape = layer.shape(x, I, J);
          layer.compute(x, I, J, L);
          each_label(I, J, [&](int64_t r, int64_t k) {
            label[at + r] = L[k * shape.rows + r] - (offset ? offset[k] : 0);
          });
          void* const to = derive ? kept[I * panel + J - J0] : nullptr;
          f.exponentials(L, shape, offset, c, half || !to ? nullptr : static_cast<float*>(to), half ? to : nullptr,
                         largest, sums.total + I * most + at, nullptr, 0, nullptr);
          if (has_uniform)
            f.distances(L, shape, offset, largest, uniform.data + w.first(I), distance.data + I * most + at);
        }
      }, [&] { engine.release(); });
      const int64_t last = J1 - 1, padded = x.first(last) + x.padded(last) - first;
      f.combine(sums.largest, sums.total, class_cut.blocks, most, padded, c, sums.top, sums.sum);

      for (int64_t r = 0; r < padded; ++r) coefficient[r] = spread[r] = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const double log_sum = std::log(double(sums.sum[r])), p = label_weight[first + r];
        const double nll = y ? log_sum + scale * (double(sums.top[r]) - label[r]) : log_sum + scale * sums.top[r];
        if (loss) {
          double total = p * nll;
          if (has_uniform) total += uniform_sum * log_sum + scale * far(distance, sums, r);
          loss[place(first + r)] = static_cast<float>(total);
        }
        if (!derive) continue;
        const double g = factor[place(first + r)];
        coefficient[r] = static_cast<float>(g * (p + uniform_sum) / sums.sum[r]);
        spread[r] = static_cast<float>(g);
        if (y) of_label[r] = static_cast<float>(
            g * (p * std::expm1(-nll) + (has_uniform ? uniform_sum * std::exp(-nll) - uniform[y[first + r]] : 0)));
      }
      if (!derive) continue;

      gradients->each([&](int64_t split, int64_t I) {
        float* const factors = scaled.floats(slot(threads));
        auto* const left = half ? static_cast<at::BFloat16*>(narrow[slot(threads)]) : nullptr;
        auto* const right = half ? left + tile : nullptr;
        for (int64_t J = J0; J < J1; ++J) {
          const int64_t at = x.first(J) - first;
          auto* const E = static_cast<float*>(kept[I * panel + J - J0]);
          const LogitShape shape = layer.shape(x, I, J);
          f.factors(coefficient.data + at, sums.largest + I * most + at, sums.top + at, shape.rows, shape.valid, c,
                    factors);
          f.weights(E, shape, factors, nullptr, nullptr, 0, has_uniform ? uniform.data + w.first(I) : nullptr,
                    spread.data + at, left, right);
          each_label(I, J, [&](int64_t r, int64_t k) {
            if (half)
              left[k * shape.rows + r] = right[k / 2 * 2 * shape.rows + 2 * r + k % 2] = of_label[at + r];
            else
              E[k * shape.rows + r] = of_label[at + r];
          });
          const void* const G = half ? static_cast<void*>(left) : E;
          if (has_bias) f.class_sums(G, shape, half, bias_sums.data + w.first(I));
          gradients->add(split, I, x, J - J0, J, G, right);
        }
      });
      const int64_t* const to = chosen_rows.defined() ? chosen_rows.const_data_ptr<int64_t>() : nullptr;
      const Numbers<double> of_block(J1 - J0);
      fastssl::run(threads, J1 - J0, [&](int64_t v) {
        of_block[v] = gradients->finish_rows(x, v, J0 + v, scale * upstream, dx, to);
      });
      for (int64_t v = 0; v < J1 - J0; ++v) along += of_block[v];  // in this order: deterministic
    }
    if (!derive) return 0;
    gradients->finish_weight(scale * upstream);
    for (int64_t k = 0; has_bias && k < classes; ++k) db[k] = bias_sums[k] * upstream;
    return along * upstream;
  }

 private:
  // sum_k c_k (top - (L_kr - shift_k)).
  double far(const Numbers<float>& distance, const LogitSums& sums, int64_t r) const {
    double total = 0;
    for (int64_t I = 0; I < class_cut.blocks; ++I) {
      const int64_t at = I * sums.rows + r;
      double part = 0;
      for (int64_t k = w.first(I); k < w.first(I) + w.size(I); ++k) part += uniform[k];
      const float largest = sums.largest[at] == -INFINITY ? 0 : sums.largest[at];
      total += distance[at] + part * (double(sums.top[r]) - largest);
    }
    return total;
  }
};

void check(const Tensor& input, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& target,
           const Tensor& scale, const std::optional<Tensor>& class_weight, const std::optional<Tensor>& row_weight) {
  TORCH_CHECK_VALUE(input.dim() == 2 && weight.dim() == 2 && input.size(1) == weight.size(1) && weight.numel() > 0,
                    "input and linear_weight must have shapes (N, D) and (V, D), V > 0, D > 0, got ", input.sizes(),
                    " and ", weight.sizes());
  TORCH_CHECK_VALUE(has_element(input) && has_element(weight),
                    "input and linear_weight must be float32, bfloat16 or float16, got ", input.scalar_type(), " and ",
                    weight.scalar_type());
  TORCH_CHECK_VALUE(bias.dim() == 1 && (bias.size(0) == 0 || bias.size(0) == weight.size(0)),
                    "linear_bias must have shape (", weight.size(0), ") or (0), got ", bias.sizes());
  if (target)
    TORCH_CHECK_VALUE(target->scalar_type() == at::kLong && target->dim() == 1 && target->size(0) == input.size(0),
                      "target must be int64 of shape (", input.size(0), "), got ", target->scalar_type(), " of shape ",
                      target->sizes());
  TORCH_CHECK_VALUE(scale.numel() == 1, "scale must have one element, got shape ", scale.sizes());
  if (class_weight) check_vectors("class_weight", weight.size(0), {*class_weight});
  if (row_weight) check_vectors("row_weight", input.size(0), {*row_weight});
}

// Whether b / scale, with which tiles are shifted, may be more than float32 holds.
bool is_tiny(const Tensor& scale) { return scale.item<float>() >= 0 && scale.item<float>() < 1e-30f; }

struct Gradients {
  Tensor input, weight, bias, scale;

  Gradients(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& scale, bool derive,
            bool all_rows)
      : input(of(input, derive)), weight(of(weight, derive)), bias(of(bias, derive)), scale(of(scale, derive)) {
    if (derive && !all_rows) this->input.zero_();
  }

  static Tensor of(const Tensor& z, bool derive) {
    std::vector<int64_t> sizes = z.sizes().vec();
    if (!derive) sizes[0] = 0;
    return at::empty(sizes, z.options());
  }

  void take(const LinearCrossEntropy& task, float* loss, const float* factor, float upstream) {
    const Numbers<float> wide(bias.numel());
    const double along = task.run(loss, true, factor, upstream, input, weight, wide.data);
    if (bias.numel()) bias.copy_(at::from_blob(wide.data, bias.sizes(), at::kFloat));
    scale.fill_(static_cast<float>(along));  // infinite where it is too large
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& linear_bias, const std::optional<Tensor>& target,
    const Tensor& scale, const std::optional<Tensor>& class_weight, const std::optional<Tensor>& row_weight,
    double label_smoothing, int64_t ignore_index, bool normalize, bool derive, c10::string_view precision) {
  check(input, linear_weight, linear_bias, target, scale, class_weight, row_weight);
  TORCH_CHECK_VALUE(row_weight || !derive, "row_weight must be given where gradients are taken");
  if (is_tiny(scale))
    return portable<&linear_cross_entropy>(input, linear_weight, linear_bias, target, scale, class_weight, row_weight,
                                           label_smoothing, ignore_index, normalize, derive, precision);
  const LinearCrossEntropy task(input, linear_weight, linear_bias, target, scale, class_weight, label_smoothing,
                                ignore_index, normalize, derive, precision);
  const int64_t rows = input.size(0);
  const bool all_rows = !task.chosen_rows.defined();
  const Tensor loss = all_rows ? at::empty({rows}, at::kFloat) : at::zeros({rows}, at::kFloat);
  const Tensor weights = row_weight ? row_weight->contiguous() : Tensor();
  float* const losses = loss.mutable_data_ptr<float>();
  Gradients gradients(input, linear_weight, linear_bias, scale, derive, all_rows);
  if (derive)
    gradients.take(task, losses, weights.const_data_ptr<float>(), 1);
  else
    task.run(losses, false, nullptr, 1, {}, {}, nullptr);
  Tensor result = loss;
  if (row_weight) {
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) total += static_cast<double>(weights.const_data_ptr<float>()[i]) * losses[i];
    result = scalar(total);
  }
  return {result, gradients.input, gradients.weight, gradients.bias, gradients.scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& grad_loss, const Tensor& input, const Tensor& linear_weight, const Tensor& linear_bias,
    const std::optional<Tensor>& target, const Tensor& scale, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& row_weight, double label_smoothing, int64_t ignore_index, bool normalize,
    c10::string_view precision) {
  check(input, linear_weight, linear_bias, target, scale, class_weight, row_weight);
  if (is_tiny(scale))
    return portable<&linear_cross_entropy_backward>(grad_loss, input, linear_weight, linear_bias, target, scale,
                                                    class_weight, row_weight, label_smoothing, ignore_index, normalize,
                                                    precision);
  const LinearCrossEntropy task(input, linear_weight, linear_bias, target, scale, class_weight, label_smoothing,
                                ignore_index, normalize, true, precision);
  const Tensor factor = (row_weight ? *row_weight : grad_loss).contiguous();
  check_vectors("grad_loss", input.size(0), {factor});
  const float upstream = row_weight ? grad_loss.item<float>() : 1;  // the bits of what the forward pass takes, scaled
  Gradients gradients(input, linear_weight, linear_bias, scale, true, !task.chosen_rows.defined());
  gradients.take(task, nullptr, factor.const_data_ptr<float>(), upstream);
  return {gradients.input, gradients.weight, gradients.bias, gradients.scale};
}

FASTSSL_KERNELS(CPU, m) {
  implement<&linear_cross_entropy, 2>(m, "linear_cross_entropy");
  implement<&linear_cross_entropy_backward, 3>(m, "linear_cross_entropy_backward");
}

}  // namespace
}  // namespace fastssl
