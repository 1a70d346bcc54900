// Drawing a class of each row from the softmax of a linear layer's logits on the CPU.
//
//     s_i = scale (W x_i + b),    id_i = argmax_k s_ik + g_ik,    g_ik = -log(-log(1 - u_ik))
//
// u_ik is uniform and follows from a seed and the position i V + k, as everywhere (fastssl/ops/linear_categorical.py).
//
// Algorithm. Blocks of classes are shared out to threads; each visits its own in ascending order, for the rows of a
// panel, with tiles of logits as in common/logits.h, which only live until they are drawn from. A thread has the best of
// each row so far: the further it comes, the fewer logits are worth their noise. It costs one product, and O(V + N)
// memory.
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "common/checks.h"
#include "common/logits.h"
#include "common/portable.h"
#include "linear_categorical_tiles.h"

namespace fastssl {
namespace {

constexpr int64_t kPanel = 1024;           // rows for which a block of W is read once
constexpr int64_t kPacked = 1 << 24;       // bytes of W, if it is packed as a whole

Tensor linear_categorical(const Tensor& seed, const Tensor& input, const Tensor& linear_weight,
                          const Tensor& linear_bias, const Tensor& scale_, c10::string_view precision) {
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.numel() == 1, "seed must be one int64, got ",
                    seed.scalar_type(), " of shape ", seed.sizes());
  check_layer(input, linear_weight, linear_bias, scale_);
  const int64_t rows = input.size(0), classes = linear_weight.size(0);
  TORCH_CHECK_VALUE(classes <= std::numeric_limits<int32_t>::max(),
                    "linear_weight must have from 1 to 2^31 - 1 rows, got ", classes);
  const Engine engine(precision);
  const int threads = threads_for(rows, classes, input.size(1));
  const Cut cut(rows, input.size(1), 1), class_cut(classes, input.size(1), threads);
  const Side w(linear_weight, false, kRows, engine, threads, class_cut,
               linear_weight.numel() * engine.bytes() > kPacked);
  const Side x(input, false, kColumns, engine, threads, cut);
  const Tensor wide = linear_bias.to(at::kFloat).contiguous();
  const float* const bias = linear_bias.numel() ? wide.const_data_ptr<float>() : nullptr;
  const float scale = scale_.to(at::kFloat).item<float>();
  const auto start = static_cast<uint64_t>(seed.item<int64_t>());

  const int64_t splits = std::min<int64_t>(threads, class_cut.blocks), padded = cut.blocks * cut.block;
  const int64_t panel = std::max<int64_t>(kPanel / cut.block, 1);
  const Numbers<float> best(splits * padded, -INFINITY);
  const Numbers<int32_t> id(splits * padded, -1);
  const Blocks tiles(threads, class_cut.block * cut.block * 4);
  const Layer layer{w};
  const CategoricalTiles& f = FASTSSL_TABLE_IN_USE(categorical_tiles);
  for (int64_t J0 = 0; J0 < cut.blocks; J0 += panel)
    run(threads, splits, [&](int64_t split) {
      float* const L = tiles.floats(slot(threads));
      for (int64_t I = class_cut.blocks * split / splits; I < class_cut.blocks * (split + 1) / splits; ++I) {
        if (w.lazy) w.prepare(I, kRows);
        for (int64_t J = J0; J < std::min(J0 + panel, cut.blocks); ++J) {
          layer.compute(x, I, J, L);
          const int64_t at = split * padded + x.first(J);
          f.draw(L, layer.shape(x, I, J), bias ? bias + w.first(I) : nullptr, scale,
                 {start, x.first(J), w.first(I), classes}, best.data + at, id.data + at);
        }
      }
    }, [&] { engine.release(); });

  const Tensor ids = at::empty({rows}, at::kLong);
  int64_t* const out = ids.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i) {
    float top = -INFINITY;
    out[i] = -1;
    for (int64_t split = 0; split < splits && top == top; ++split)
      if (const float v = best[split * padded + i]; v > top || v != v) top = v, out[i] = id[split * padded + i];
    if (top != top) out[i] = -1;
  }
  return ids;
}

FASTSSL_KERNELS(CPU, m) { implement<&linear_categorical, 2>(m, "linear_categorical"); }

}  // namespace
}  // namespace fastssl
