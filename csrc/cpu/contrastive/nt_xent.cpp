// NT-Xent on the CPU (SimCLR, arXiv:2002.05709): with Z the N = 2B (normalised) rows of [z1; z2], S = scale Z Z^T and
// pos(i) = (i + B) mod N,
//
//     loss_i = log sum_{j != i} exp(S_ij) - S_{i, pos(i)}.
//
// Algorithm and cost are those of symmetric.h. In units U = 2 N N D of floating-point operations (one product) the
// forward pass takes U / 2, the backward pass U from tiles that were kept, 3 U / 2 from tiles that are computed again.
//
// The positive's weight does not average out, so it does not go through rounded products: it multiplies unrounded rows.
#include <torch/library.h>

#include <vector>

#include "common/checks.h"
#include "common/portable.h"
#include "contrastive/symmetric.h"

namespace fastssl {
namespace {

// Calls f(r, c, i, j) for every positive pair in tile (I, J) of S: its place (r, c) in the tile and its rows (i, j).
template <typename F>
void each_positive(const Side& z, int64_t I, int64_t J, const F& f) {
  // The positive of row i is column i + B in the first half, and i - B in the second: two diagonals of the matrix.
  const int64_t batch = z.rows.batch;
  for (const int64_t offset : {batch, -batch}) {
    const int64_t low = std::max({z.first(I), z.first(J) - offset, offset > 0 ? 0 : batch});
    const int64_t high =
        std::min({z.first(I) + z.size(I), z.first(J) + z.size(J) - offset, offset > 0 ? batch : 2 * batch});
    for (int64_t i = low; i < high; ++i) f(i - z.first(I), i + offset - z.first(J), i, i + offset);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nt_xent(const Tensor& z1, const Tensor& z2, const Tensor& scale,
                                                   bool normalize, int64_t keep, c10::string_view precision) {
  check_pairs("z1 and z2", z1, z2, scale);
  const int64_t count = 2 * z1.size(0);
  const SummedSelf self(z1, &z2, scale, normalize, keep, precision, count);
  const Side& z = self.z;
  const Exponent& e = self.e;
  const KeptTiles& tiles = self.tiles;
  const Numbers<float> aligned(tiles.any() ? 0 : count);
  // <z_i, z_pos(i)>, from the same tile that is summed. In kept tiles the positive's exponential is set to 0.
  float* const alignment = tiles.any() ? tiles.numbers() : aligned.data;
  const Sums sums = self.sum(
      nullptr,
      [&](int64_t I, int64_t J, const float* s) {
        each_positive(z, I, J, [&](int64_t r, int64_t c, int64_t i, int64_t j) {
          alignment[i] = alignment[j] = s[r * z.padded(J) + c];
        });
      },
      [&](int64_t I, int64_t J, void* exponentials) {
        each_positive(z, I, J, [&](int64_t r, int64_t c, int64_t, int64_t) {
          const int64_t at = r * z.padded(J) + c;
          if (tiles.narrow) static_cast<uint16_t*>(exponentials)[at] = 0;
          else static_cast<float*>(exponentials)[at] = 0;
        });
      });

  const Tensor loss = at::empty({count}, at::kFloat), total = at::empty({count}, at::kFloat);
  const Tensor shift = at::empty({count}, at::kFloat);
  float* const out = loss.mutable_data_ptr<float>();
  float* const out_total = total.mutable_data_ptr<float>();
  float* const out_shift = shift.mutable_data_ptr<float>();
  at::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float origin = sums.extreme[i];
      const double value = std::log(sums.total[i]) + e.step * (origin - alignment[i]);
      // No loss is negative, and that of a single pair is 0: anything else is rounding. value - value, not 0, so that
      // NaN stays NaN.
      out[i] = static_cast<float>(value < 0 || count == 2 ? value - value : value);
      out_shift[i] = e.rest * origin;
      // The backward pass recovers the origin from the rounded shift, so the total is moved to that origin.
      out_total[i] = static_cast<float>(sums.about(i, e, origin_of(out_shift[i], e)));
    }
  });
  return {loss, shift, total, self.kept};
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(const Tensor& grad_loss, const Tensor& z1, const Tensor& z2,
                                                    const Tensor& scale, const Tensor& shift, const Tensor& total,
                                                    const Tensor& kept, bool normalize, c10::string_view precision) {
  check_pairs("z1 and z2", z1, z2, scale);
  const int64_t count = 2 * z1.size(0);
  check_vectors("grad_loss, shift and total", count, {grad_loss, shift, total});
  check_kept(kept);
  const DerivedSelf self(z1, &z2, scale, normalize, kept, precision, count);
  const Side& z = self.z;
  const Exponent& e = self.e;
  const KeptTiles& tiles = self.tiles;
  const Tensor gradient = grad_loss.contiguous(), totals = total.contiguous();
  const float *const g = gradient.const_data_ptr<float>(), *const t = totals.const_data_ptr<float>();
  const Coefficients p([&](int64_t i) { return g[i] / t[i]; }, shift, z, e);
  const Numbers<float> positive_weight(count);
  const float* const alignment = tiles.numbers();
  const Similarities S{z, z, e.factor, e.excluded, nullptr, true};
  const Weights weights(S, e, &p, &p);
  Gathered gathered(z, true, &z);
  tournament(z.threads, z.cut, [&](int64_t I, int64_t J) {
    const void* const exponentials = tiles(I, J);
    float* const s = weights.tile_of();
    if (!exponentials) S.compute(I, J, s);
    each_positive(z, I, J, [&](int64_t r, int64_t c, int64_t i, int64_t j) {
      const int64_t at = r * z.padded(J) + c;
      const float entry = exponentials ? alignment[i] : s[at];
      const auto weight = [&](int64_t k) {
        return p.a[k] * std::exp2((entry - (e.shared ? e.origin : p.origin[k])) * e.c);
      };
      positive_weight[i] = positive_weight[j] = weight(i) + weight(j) - (g[i] + g[j]);
      if (!exponentials) s[at] = e.excluded;
    });
    if (!exponentials) S.exclude_from(I, J, s);
    weights.multiply(I, J, exponentials, &gathered, I == J ? nullptr : &gathered);
  }, [&] { self.engine.release(); });
  return finish_views(gathered, positive_weight.data, e, z1, z2, scale);
}

FASTSSL_KERNELS(CPU, m) {
  implement<&nt_xent>(m, "nt_xent");
  implement<&nt_xent_backward>(m, "nt_xent_backward");
}

}  // namespace
}  // namespace fastssl
