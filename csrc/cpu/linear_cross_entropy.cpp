// The cross-entropy of a linear layer's logits on the CPU.
//
//     s_i = scale W x_i + b,    lse_i = log sum_k exp(s_ik),    Q = softmax(s)
//     loss_i = p_i (lse_i - s_iy) + sum_k c_k (lse_i - s_ik),    p_i = (1 - smoothing) w_y,    c_k = smoothing w_k / V
//     G_ik = dloss_i/ds_ik = (p_i + sum c) Q_ik - c_k - [k = y] p_i
//     dX = scale G W,    dW = scale G^T X,    db = sum_i G_i,    dscale = <X, G W>
//
// y being the row's label, w class weights, and X and W as they are or normalised. A row without a label has loss 0;
// where no labels are given, the loss is lse. Where distributions T are given, with a_k = (1 - smoothing) w_k,
//
//     loss_i = sum_k R_ik (lse_i - s_ik),    R_ik = a_k T_ik + c_k
//     G_ik = (sum R_i) Q_ik - R_ik,    dT_ik = a_k (lse_i - s_ik)
//
// Algorithm. The rows that have a label, a block at a time, as common/logits.h says: W and dW travel through the caches
// once for each block. What a tile holds is L = W x^T, and L + b / scale its logits over the scale. The label's element
// of G, p_i (Q_iy - 1) and what smoothing adds, comes from the row's loss, not from Q, which bfloat16 rounds: it is what
// a confident row still has to learn. With U = 2 N V D operations, N the rows that have a label, that is 3 U, 2 U with
// one of dX and dW, and U without gradients, in O(block V) memory. A large W is packed block by block, where it has to
// be. Tiles of T are read where tiles of L are, in each pass.
//
// Where dW must be summed beside where it is returned, as in bfloat16, and those sums would take more than kSumBytes,
// logits are computed twice: first all rows' losses, then for some classes at a time all rows' G, whose dW is then
// complete, while the sums of dX go on. That is 4 U, in O(block D + N D) memory.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "common/arena.h"
#include "common/checks.h"
#include "common/exponents.h"
#include "common/logits.h"
#include "common/portable.h"
#include "common/token_rows.h"

namespace fastssl {
namespace {

constexpr int64_t kBlockRows = 512;
constexpr int64_t kWeightBytes = 1 << 20;  // of a block of W, as bfloat16
constexpr int64_t kPackedBytes = 1 << 24;  // of W, if it is packed as a whole
constexpr int64_t kSumBytes = 1 << 28;     // of dW, if it is summed as a whole beside where it is returned
constexpr int64_t kPanelBytes = 1 << 23;   // of it, if it is not

// The rows of `target` that have a label, or undefined where all have.
Tensor labelled_rows(const Tensor& target, int64_t classes, int64_t ignore_index) {
  const Tensor labels = target.contiguous();
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

// What gradients are taken of, beside the bias.
struct Wanted {
  bool input, weight, scale, target = false;

  bool of_rows() const { return input || scale; }
};

// Distributions (N, V), read and derived tile by tile.
struct Distributions {
  Tensor tensor;
  Numbers<float> factor;  // a_k

  Distributions(const Tensor& x, int64_t classes)
      : tensor(x.defined() ? with_unit_stride(x) : x), factor(x.defined() ? classes : 0) {}

  // out (classes, rows) = a T^T of the tile's rows from `first` and classes from `from`, zeros beside them; total_r
  // its sums over the classes. `spare` has room for it.
  void read(const Engine& engine, const LogitShape& shape, int64_t first, int64_t from, float* spare, float* total,
            float* out) const {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, tensor.scalar_type(), "read", [&] {
      for (int64_t r = 0; r < shape.rows; ++r) {
        float* const row = spare + r * shape.classes;
        const int64_t meant = r < shape.valid ? shape.count : 0;
        if (meant) {
          const scalar_t* const t = tensor.const_data_ptr<scalar_t>() + (first + r) * tensor.stride(0) + from;
          for (int64_t k = 0; k < meant; ++k) row[k] = factor[from + k] * static_cast<float>(t[k]);
        }
        std::fill(row + meant, row + shape.classes, 0.f);
        double sum = 0;
        for (int64_t k = 0; k < meant; ++k) sum += row[k];
        total[r] = static_cast<float>(sum);
      }
    });
    engine.tile.transposed(spare, shape.classes, shape.rows, out);
  }

  // grad_rk = upstream g_r a_k (base_r - scale far_kr) of the same tile.
  void derive(const Engine& engine, const LogitShape& shape, int64_t first, int64_t from, const float* far,
              const float* g, const double* base, double scale, double upstream, float* spare,
              const Tensor& grad) const {
    engine.tile.transposed(far, shape.rows, shape.classes, spare);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, grad.scalar_type(), "derive", [&] {
      for (int64_t r = 0; r < shape.valid; ++r) {
        scalar_t* const to = grad.mutable_data_ptr<scalar_t>() + (first + r) * grad.size(1) + from;
        const float* const row = spare + r * shape.classes;
        for (int64_t k = 0; k < shape.count; ++k)
          to[k] = static_cast<scalar_t>(static_cast<float>(upstream * g[r] * factor[from + k] * (base[r] - scale * row[k])));
      }
    });
  }
};

Tensor chosen(const Tensor& x, const Tensor& rows) { return rows.defined() ? x.index_select(0, rows) : x.contiguous(); }

// How `count` rows are cut where `bytes` are kept of each of their logits.
Cut cut_labelled(int64_t count, int64_t dim, int64_t classes, int64_t bytes) {
  Cut cut(count, dim, 1);
  int64_t most = kBlockRows;
  while (most > kPadding && most * round_up(classes, kPadding) * bytes > kKeptBytes) most /= 2;
  cut.block = round_up(pieces(count, std::max<int64_t>(pieces(count, most), 1)), kPadding);
  cut.block = std::max(cut.block, kPadding);
  cut.blocks = pieces(count, cut.block);
  return cut;
}

// How classes are cut. Bfloat16 products, much faster than float32's, gain more by longer sums and fewer passes over dX
// than they lose where a tile leaves the second-level cache, as long as the packed block of W has half of it.
Cut cut_classes(int64_t classes, int64_t dim, int threads, bool half) {
  Cut cut(classes, dim <= 2048 ? std::min<int64_t>(dim, 768) : dim, threads);
  while (half && cut.block < 512 && cut.block * dim * 4 <= kWeightBytes && classes >= 8 * threads * cut.block)
    cut.block *= 2;
  cut.blocks = pieces(classes, cut.block);
  return cut;
}

struct LinearCrossEntropy {
  const Engine engine;
  const int64_t classes;
  const float scale, c;
  const Wanted wanted;
  const bool derive;
  const Tensor chosen_rows, labels;
  const int64_t count;  // of the rows that have a label
  const int threads;
  const bool again;  // logits are computed twice
  const Cut cut, class_cut;
  const Side w, x;
  const Distributions soft;
  double uniform_sum = 0;
  Numbers<float> shift, uniform, label_weight;  // -b / scale and c, with room beside the classes; p
  const bool has_bias, has_uniform, is_soft;
  const LogitsTiles& f = FASTSSL_TABLE_IN_USE(logits_tiles);

  LinearCrossEntropy(const Tensor& input, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& target,
                     const Tensor& scale_, const std::optional<Tensor>& class_weight, double smoothing,
                     int64_t ignore_index, bool normalize, bool derive, const Wanted& wanted,
                     c10::string_view precision)
      : engine(precision),
        classes(weight.size(0)),
        scale(scale_.item<float>()),
        c(exponent_scale(scale)),
        wanted(wanted),
        derive(derive),
        chosen_rows(is_labels(target) ? labelled_rows(*target, classes, ignore_index) : Tensor()),
        labels(is_labels(target) ? chosen(*target, chosen_rows) : Tensor()),
        count(chosen_rows.defined() ? chosen_rows.size(0) : input.size(0)),
        threads(threads_for(count, classes, weight.size(1))),
        again(derive && wanted.weight && !(target && !is_labels(target)) &&
              (weight.scalar_type() != at::kFloat || weight.size(1) % kPadding || normalize) &&
              classes * round_up(weight.size(1), kPadding) * 4 > kSumBytes),
        cut(cut_labelled(count, weight.size(1), classes, again ? 0 : kept_bytes())),
        class_cut(cut_classes(classes, weight.size(1), threads, engine.half())),
        w(weight, normalize, kRows | (wanted.of_rows() ? LayerGradients::roles(engine) : 0), engine, threads, class_cut,
          weight.numel() * engine.bytes() > kPackedBytes),
        x(chosen_rows.defined() ? input.index_select(0, chosen_rows) : input, normalize,
          kColumns | (wanted.weight ? kWeighed : 0), engine, threads, cut),
        soft(target && !is_labels(target) ? *target : Tensor(), classes),
        shift(bias.numel() ? w.padded_count() : 0),
        uniform(target && smoothing != 0 ? w.padded_count() : 0, 0.f),
        label_weight(count, target ? static_cast<float>(1 - smoothing) : 1.f),
        has_bias(bias.numel()),
        has_uniform(target && smoothing != 0),
        is_soft(soft.tensor.defined()) {
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
    for (int64_t k = 0; is_soft && k < classes; ++k)
      soft.factor[k] = static_cast<float>((1 - smoothing) * (of_class ? of_class[k] : 1));
    if (labels.defined() && of_class)
      for (int64_t i = 0; i < count; ++i) label_weight[i] *= of_class[labels.const_data_ptr<int64_t>()[i]];
  }

  static bool is_labels(const std::optional<Tensor>& target) { return target && target->scalar_type() == at::kLong; }

  // Of what is kept of a logit.
  int64_t kept_bytes() const { return (derive ? engine.bytes() : 0) + (wanted.target ? 4 : 0); }

  // The row of `input` that row i of x is.
  int64_t place(int64_t i) const { return chosen_rows.defined() ? chosen_rows.const_data_ptr<int64_t>()[i] : i; }

  // Each row's loss, unless null; and with `derive` the gradients of sum_i factor[i] loss[i], times `upstream`.
  // `loss` and `factor` have an element for each row of `input`. Returns the gradient of the scale.
  double run(float* loss, const float* factor, float upstream, const Tensor& dx, const Tensor& dw, float* db,
             const Tensor& dtarget) const {
    const int64_t block = cut.block, tile = class_cut.block * block, all = again ? cut.blocks * block : block;
    const bool half = engine.half();
    const int64_t* const y = labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr;
    const int64_t* const to_row = chosen_rows.defined() ? chosen_rows.const_data_ptr<int64_t>() : nullptr;
    const LogitSums sums(class_cut.blocks, block);
    const LargeBlocks kept(derive && !again ? class_cut.blocks : 0, tile * engine.bytes());
    const Blocks tiles(threads, tile * 4), narrow(threads, derive && half ? 2 * tile * 2 : 0);
    const Blocks kept_again(threads, again ? tile * engine.bytes() : 0), sums_again(threads, again ? 2 * block * 4 : 0);
    const Blocks scaled(threads, block * 4);
    const Blocks target_tiles(threads, is_soft ? 2 * tile * 4 : 0), row_sums(threads, is_soft ? block * 4 : 0);
    const LargeBlocks far_tiles(wanted.target ? class_cut.blocks : 0, tile * 4);
    const Numbers<float> target_distance(is_soft ? class_cut.blocks * block : 0);
    const Numbers<float> target_sum(is_soft ? class_cut.blocks * block : 0);
    const Numbers<double> base(wanted.target ? block : 0);
    const Numbers<float> label(block), distance(has_uniform ? class_cut.blocks * block : 0);
    const Numbers<float> top(all), coefficient(all), spread(all), of_label(all);  // of a block's rows, or of all
    const Numbers<float> bias_sums(derive && has_bias ? w.padded_count() : 0, 0.f);
    const int64_t panel =
        again ? std::max<int64_t>(kPanelBytes / (class_cut.block * w.dim * 4), threads) : class_cut.blocks;
    const LargeBlocks totals(again && wanted.of_rows() ? cut.blocks : 0, block * w.dim * 4);
    std::optional<LayerGradients> gradients;
    if (derive) gradients.emplace(w, 1, block, dw, wanted.of_rows(), wanted.weight, panel);
    const Layer layer{w};
    double along = 0;

    // Where what is known of the rows of block J is.
    const auto place_of = [&](int64_t J) { return again ? x.first(J) : 0; };
    // Calls visit(r, k) for rows of block J whose label is class k of block I.
    const auto each_label = [&](int64_t I, int64_t J, const auto& visit) {
      if (!y) return;
      const int64_t from = w.first(I), size = w.size(I);
      const int64_t* const of_block = y + x.first(J);
      for (int64_t r = 0; r < x.size(J); ++r)
        if (const int64_t k = of_block[r] - from; k >= 0 && k < size) visit(r, k);
    };
    const auto offset_of = [&](int64_t I) { return has_bias ? shift.data + w.first(I) : nullptr; };
    const auto exponentials = [&](int64_t I, int64_t J, const float* L, void* to, float* largest, float* total,
                                  const float* R) {
      f.exponentials(L, layer.shape(x, I, J), offset_of(I), c, half || !to ? nullptr : static_cast<float*>(to),
                     half ? to : nullptr, largest, total, &R, is_soft, target_distance.data + I * block);
    };

    // The losses of block J, and what its weights are made from.
    const auto forward = [&](int64_t J) {
      fastssl::run(threads, class_cut.blocks, [&](int64_t I) {
        if (w.lazy) w.prepare(I, kRows);
        float *const L = tiles.floats(slot(threads)), *const largest = sums.largest + I * block;
        const float* const offset = offset_of(I);
        const LogitShape shape = layer.shape(x, I, J);
        layer.compute(x, I, J, L);
        each_label(I, J, [&](int64_t r, int64_t k) { label[r] = L[k * shape.rows + r] - (offset ? offset[k] : 0); });
        const float* R = nullptr;
        if (is_soft) {
          float* const spare = target_tiles.floats(slot(threads));
          soft.read(engine, shape, x.first(J), w.first(I), spare, target_sum.data + I * block, spare + tile);
          R = spare + tile;
        }
        exponentials(I, J, L, derive && !again ? kept[I] : nullptr, largest, sums.total + I * block, R);
        if (wanted.target) {
          float* const far = far_tiles.floats(I);
          for (int64_t k = 0; k < shape.classes; ++k)
            for (int64_t r = 0; r < shape.rows; ++r)
              far[k * shape.rows + r] = L[k * shape.rows + r] - (offset ? offset[k] : 0);
        }
        if (has_uniform) f.distances(L, shape, offset, largest, uniform.data + w.first(I), distance.data + I * block);
      }, [&] { engine.release(); });
      const int64_t first = x.first(J), at = place_of(J);
      f.combine(sums.largest, sums.total, class_cut.blocks, block, x.padded(J), c, sums.top, sums.sum);

      for (int64_t r = 0; r < x.padded(J); ++r) top[at + r] = sums.top[r], coefficient[at + r] = spread[at + r] = 0;
      for (int64_t r = 0; r < x.size(J); ++r) {
        const double log_sum = std::log(double(sums.sum[r])), peak = sums.top[r];
        const double p = is_soft ? total_of(target_sum, sums, r) : label_weight[first + r];
        const double nll = y ? log_sum + scale * (peak - label[r]) : log_sum + scale * peak;
        if (loss) {
          double total = is_soft ? p * log_sum + scale * distance_of(target_distance, target_sum, sums, r) : p * nll;
          if (has_uniform) total += uniform_sum * log_sum + scale * far(distance, sums, r);
          loss[place(first + r)] = static_cast<float>(total);
        }
        if (!derive) continue;
        const double g = factor[place(first + r)];
        coefficient[at + r] = static_cast<float>(g * (p + uniform_sum) / sums.sum[r]);
        spread[at + r] = static_cast<float>(g);
        if (wanted.target) base[r] = log_sum + scale * peak;
        if (y) of_label[at + r] = static_cast<float>(
            g * (p * std::expm1(-nll) + (has_uniform ? uniform_sum * std::exp(-nll) - uniform[y[first + r]] : 0)));
      }
    };

    // The gradients that block J has part in, of the classes that are being visited.
    const auto backward = [&](int64_t J) {
      const int64_t at = place_of(J);
      gradients->each([&](int64_t split, int64_t I) {
        float* const factors = scaled.floats(slot(threads));
        auto* const left = half ? static_cast<at::BFloat16*>(narrow[slot(threads)]) : nullptr;
        auto* const right = half ? left + tile : nullptr;
        auto* const E = static_cast<float*>(again ? kept_again[slot(threads)] : kept[I]);
        const float* largest = sums.largest + I * block;
        if (again) {
          float *const L = tiles.floats(slot(threads)), *const found = sums_again.floats(slot(threads));
          if (w.lazy) w.prepare(I, kRows);
          layer.compute(x, I, J, L);
          exponentials(I, J, L, E, found, found + block, nullptr);
          largest = found;
        }
        const LogitShape shape = layer.shape(x, I, J);
        f.factors(coefficient.data + at, largest, top.data + at, shape.rows, shape.valid, c, factors);
        const float* const of_rows = spread.data + at;
        const void* R = nullptr;
        if (is_soft) {
          float* const spare = target_tiles.floats(slot(threads));
          soft.read(engine, shape, x.first(J), w.first(I), spare, row_sums.floats(slot(threads)), spare + tile);
          R = half ? narrowed(spare + tile, shape, spare) : spare + tile;
        }
        f.weights(E, shape, factors, &R, &of_rows, is_soft, has_uniform ? uniform.data + w.first(I) : nullptr, of_rows,
                  left, right);
        each_label(I, J, [&](int64_t r, int64_t k) {
          if (half)
            left[k * shape.rows + r] = right[pair_at(shape, k, r)] = of_label[at + r];
          else
            E[k * shape.rows + r] = of_label[at + r];
        });
        const void* const G = half ? static_cast<void*>(left) : E;
        if (has_bias) f.class_sums(G, shape, half, bias_sums.data + w.first(I));
        gradients->add(split, I, x, 0, J, G, right);
        if (wanted.target)
          soft.derive(engine, shape, x.first(J), w.first(I), far_tiles.floats(I), of_rows, base.data, scale, upstream,
                      target_tiles.floats(slot(threads)), dtarget);
      });
      if (wanted.of_rows())
        along += gradients->finish_rows(x, 0, J, scale * upstream, dx, to_row, again ? totals.floats(J) : nullptr);
    };

    for (int64_t J = 0; J < cut.blocks; ++J) {
      forward(J);
      if (derive && !again) backward(J);
    }
    if (!derive) return 0;
    for (int64_t I = 0; I < class_cut.blocks; I += panel) {
      gradients->from = I;
      gradients->to = std::min(I + panel, class_cut.blocks);
      for (int64_t J = 0; again && J < cut.blocks; ++J) backward(J);
      if (wanted.weight) gradients->finish_weight(scale * upstream);
    }
    for (int64_t k = 0; has_bias && k < classes; ++k) db[k] = bias_sums[k] * upstream;
    return along * upstream;
  }

 private:
  // As bfloat16, into `out`.
  static const void* narrowed(const float* R, const LogitShape& shape, void* out) {
    for (int64_t i = 0; i < shape.classes * shape.rows; ++i) static_cast<at::BFloat16*>(out)[i] = R[i];
    return out;
  }

  double total_of(const Numbers<float>& parts, const LogitSums& sums, int64_t r) const {
    double total = 0;
    for (int64_t I = 0; I < class_cut.blocks; ++I) total += parts[I * sums.rows + r];
    return total;
  }

  // sum_k a_k T_rk (top - (L_kr - shift_k)).
  double distance_of(const Numbers<float>& distance, const Numbers<float>& sum, const LogitSums& sums,
                     int64_t r) const {
    double total = 0;
    for (int64_t I = 0; I < class_cut.blocks; ++I) {
      const int64_t at = I * sums.rows + r;
      const float largest = sums.largest[at] == -INFINITY ? 0 : sums.largest[at];
      total += distance[at] + sum[at] * (double(sums.top[r]) - largest);
    }
    return total;
  }

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
           const Tensor& scale, const std::optional<Tensor>& class_weight, const std::optional<Tensor>& row_weight,
           bool soft = false) {
  check_layer(input, weight, bias, scale);
  if (target && soft) {
    TORCH_CHECK_VALUE(has_element(*target) && target->dim() == 2 && target->size(0) == input.size(0) &&
                          target->size(1) == weight.size(0),
                      "target must be float32, bfloat16 or float16 of shape (", input.size(0), ", ", weight.size(0),
                      "), got ", target->scalar_type(), " of shape ", target->sizes());
  } else if (target) {
    TORCH_CHECK_VALUE(target->scalar_type() == at::kLong && target->dim() == 1 && target->size(0) == input.size(0),
                      "target must be int64 of shape (", input.size(0), "), got ", target->scalar_type(), " of shape ",
                      target->sizes());
  }
  if (class_weight) check_vectors("class_weight", weight.size(0), {*class_weight});
  if (row_weight) check_vectors("row_weight", input.size(0), {*row_weight});
}

// Whether b / scale, with which tiles are shifted, may be more than float32 holds.
bool is_tiny(const Tensor& scale) { return scale.item<float>() >= 0 && scale.item<float>() < 1e-30f; }

// Of which inputs there are gradients, and these: of no rows where they are not wanted.
struct Gradients {
  Tensor input, weight, bias, target, scale;

  Gradients(const LinearCrossEntropy& task, const Tensor& input, const Tensor& weight, const Tensor& bias,
            const std::optional<Tensor>& target, const Tensor& scale)
      : input(of(input, task.wanted.input)),
        weight(of(weight, task.wanted.weight)),
        bias(of(bias, task.derive)),
        target(target ? of(*target, task.wanted.target) : Tensor()),
        scale(of(scale, task.wanted.scale)) {
    if (task.chosen_rows.defined()) this->input.zero_();
  }

  static Tensor of(const Tensor& z, bool wanted) {
    std::vector<int64_t> sizes = z.sizes().vec();
    if (!wanted) sizes[0] = 0;
    return empty_in_large_pages(sizes, z.options());
  }

  void take(const LinearCrossEntropy& task, float* loss, const float* factor, float upstream, const Tensor& rows) {
    const Numbers<float> wide(bias.numel());
    const Tensor dx = task.wanted.scale && !task.wanted.input ? at::empty(rows.sizes(), rows.options()) : input;
    const double along = task.run(loss, factor, upstream, dx, weight, wide.data, target);
    if (bias.numel()) bias.copy_(at::from_blob(wide.data, bias.sizes(), at::kFloat));
    scale.fill_(static_cast<float>(along));  // infinite where it is too large
  }
};

struct Forward {
  Tensor loss;
  Gradients gradients;

  Forward(const LinearCrossEntropy& task, const Tensor& input, const Tensor& linear_weight, const Tensor& linear_bias,
          const std::optional<Tensor>& target, const Tensor& scale, const std::optional<Tensor>& row_weight)
      : loss(at::zeros({input.size(0)}, at::kFloat)),
        gradients(task, input, linear_weight, linear_bias, target, scale) {
    const Tensor weights = row_weight ? row_weight->contiguous() : Tensor();
    const float* const factor = row_weight ? weights.const_data_ptr<float>() : nullptr;
    float* const losses = loss.mutable_data_ptr<float>();
    gradients.take(task, losses, factor, 1, input);
    if (!row_weight) return;
    double total = 0;
    for (int64_t i = 0; i < input.size(0); ++i) total += static_cast<double>(factor[i]) * losses[i];
    loss = scalar(total);
  }
};

// That of sum_i factor[i] loss[i], times a number: the bits of what the forward pass takes, scaled.
Gradients backward(const LinearCrossEntropy& task, const Tensor& grad_loss, const Tensor& input,
                   const Tensor& linear_weight, const Tensor& linear_bias, const std::optional<Tensor>& target,
                   const Tensor& scale, const std::optional<Tensor>& row_weight) {
  const Tensor factor = (row_weight ? *row_weight : grad_loss).contiguous();
  check_vectors("grad_loss", input.size(0), {factor});
  Gradients gradients(task, input, linear_weight, linear_bias, target, scale);
  gradients.take(task, nullptr, factor.const_data_ptr<float>(), row_weight ? grad_loss.item<float>() : 1, input);
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& linear_bias, const std::optional<Tensor>& target,
    const Tensor& scale, const std::optional<Tensor>& class_weight, const std::optional<Tensor>& row_weight,
    double label_smoothing, int64_t ignore_index, bool normalize, bool derive, bool derive_input, bool derive_weight,
    c10::string_view precision) {
  check(input, linear_weight, linear_bias, target, scale, class_weight, row_weight);
  TORCH_CHECK_VALUE(row_weight || !derive, "row_weight must be given where gradients are taken");
  if (is_tiny(scale))
    return portable<&linear_cross_entropy>(input, linear_weight, linear_bias, target, scale, class_weight, row_weight,
                                           label_smoothing, ignore_index, normalize, derive, derive_input,
                                           derive_weight, precision);
  const LinearCrossEntropy task(input, linear_weight, linear_bias, target, scale, class_weight, label_smoothing,
                                ignore_index, normalize, derive, {derive_input, derive_weight, derive_input}, precision);
  const Forward found(task, input, linear_weight, linear_bias, {}, scale, row_weight);
  const Gradients& g = found.gradients;
  return {found.loss, g.input, g.weight, g.bias, g.scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& grad_loss, const Tensor& input, const Tensor& linear_weight, const Tensor& linear_bias,
    const std::optional<Tensor>& target, const Tensor& scale, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& row_weight, double label_smoothing, int64_t ignore_index, bool normalize,
    bool wants_input, bool wants_linear_weight, bool wants_scale, c10::string_view precision) {
  check(input, linear_weight, linear_bias, target, scale, class_weight, row_weight);
  if (is_tiny(scale))
    return portable<&linear_cross_entropy_backward>(grad_loss, input, linear_weight, linear_bias, target, scale,
                                                    class_weight, row_weight, label_smoothing, ignore_index, normalize,
                                                    wants_input, wants_linear_weight, wants_scale, precision);
  const LinearCrossEntropy task(input, linear_weight, linear_bias, target, scale, class_weight, label_smoothing,
                                ignore_index, normalize, true, {wants_input, wants_linear_weight, wants_scale},
                                precision);
  const Gradients g = backward(task, grad_loss, input, linear_weight, linear_bias, {}, scale, row_weight);
  return {g.input, g.weight, g.bias, g.scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_soft_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& linear_bias, const Tensor& target,
    const Tensor& scale, const std::optional<Tensor>& class_weight, const std::optional<Tensor>& row_weight,
    double label_smoothing, bool normalize, bool derive, bool derive_input, bool derive_weight, bool derive_target,
    c10::string_view precision) {
  check(input, linear_weight, linear_bias, target, scale, class_weight, row_weight, true);
  TORCH_CHECK_VALUE(row_weight || !derive, "row_weight must be given where gradients are taken");
  if (is_tiny(scale))
    return portable<&linear_soft_cross_entropy>(input, linear_weight, linear_bias, target, scale, class_weight,
                                                row_weight, label_smoothing, normalize, derive, derive_input,
                                                derive_weight, derive_target, precision);
  const LinearCrossEntropy task(input, linear_weight, linear_bias, target, scale, class_weight, label_smoothing, 0,
                                normalize, derive, {derive_input, derive_weight, derive_input, derive_target},
                                precision);
  const Forward found(task, input, linear_weight, linear_bias, target, scale, row_weight);
  const Gradients& g = found.gradients;
  return {found.loss, g.input, g.weight, g.bias, g.target, g.scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_soft_cross_entropy_backward(
    const Tensor& grad_loss, const Tensor& input, const Tensor& linear_weight, const Tensor& linear_bias,
    const Tensor& target, const Tensor& scale, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& row_weight, double label_smoothing, bool normalize, bool wants_input,
    bool wants_linear_weight, bool wants_target, bool wants_scale, c10::string_view precision) {
  check(input, linear_weight, linear_bias, target, scale, class_weight, row_weight, true);
  if (is_tiny(scale))
    return portable<&linear_soft_cross_entropy_backward>(grad_loss, input, linear_weight, linear_bias, target, scale,
                                                         class_weight, row_weight, label_smoothing, normalize,
                                                         wants_input, wants_linear_weight, wants_target, wants_scale,
                                                         precision);
  const LinearCrossEntropy task(input, linear_weight, linear_bias, target, scale, class_weight, label_smoothing, 0,
                                normalize, true, {wants_input, wants_linear_weight, wants_scale, wants_target},
                                precision);
  const Gradients g = backward(task, grad_loss, input, linear_weight, linear_bias, target, scale, row_weight);
  return {g.input, g.weight, g.bias, g.target, g.scale};
}

FASTSSL_KERNELS(CPU, m) {
  implement<&linear_cross_entropy, 2>(m, "linear_cross_entropy");
  implement<&linear_cross_entropy_backward, 3>(m, "linear_cross_entropy_backward");
  implement<&linear_soft_cross_entropy, 4>(m, "linear_soft_cross_entropy");
  implement<&linear_soft_cross_entropy_backward, 5>(m, "linear_soft_cross_entropy_backward");
}

}  // namespace
}  // namespace fastssl
