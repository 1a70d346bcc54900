// KoLeo on the CPU (arXiv:1806.03198; DINOv2, arXiv:2304.07193): with z_i = x_i / max(|x_i|, eps), the `own` rows i
// from `first` on, and of each the k nearest rows j != i of its group, those of the largest <z_i, z_j>,
//
//     loss = -mean_ij log(d_ij + eps),    d_ij = |u_ij|,    u_ij = z_i - z_j + eps
//     dloss/du_ij = c_ij u_ij / d_ij,    c_ij = -1 / (own k (d_ij + eps))
//
// Algorithm. Z Z^T is symmetric: tiles I <= J, each for its rows and for its columns. Where bfloat16 products are
// quicker a tile is of those: its error has a bound, and what lies within it of a row's k largest so far is multiplied
// again, in float32. So the neighbours are those of float32 products, at the cost of bfloat16's where few rows are that
// near; rows that many others equal are found by sorting, before. Features tend to be near to each other, all being near
// to their mean m, and so tiles are of y = z - m:
//
//     <z_i, z_j> = <y_i, y_j> + o_i + o_j,    o_i = <z_i, m> - |m|^2 / 2
//
// whose error is as much smaller as y is than z. The rest is done row by row: a row of the gradient gathers from its own
// neighbours, and from the rows whose neighbour it is, in their order.
//
// Cost: U / 2, with U = 2 N N D floating-point operations, and O(N k D). No two tiles that share a block run at once, and
// sums have a fixed order: the bits are the same in every run.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "common/checks.h"
#include "common/places.h"
#include "common/portable.h"
#include "common/similarities.h"
#include "koleo_tiles.h"

namespace fastssl {
namespace {

constexpr int64_t kTogether = 64;  // rows of a task, where work is done row by row
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int threads_for_rows(int64_t rows, int64_t dim) { return rows * dim < 1 << 16 ? 1 : at::get_num_threads(); }

// Calls task(first, last) for the rows of [0, count) in blocks.
template <typename Task>
void each_block(int threads, int64_t count, const Task& task) {
  run(threads, pieces(count, kTogether),
      [&](int64_t b) { task(b * kTogether, std::min((b + 1) * kTogether, count)); });
}

Tensor checked(const Tensor& features, int64_t first, int64_t own, int64_t k) {
  TORCH_CHECK_VALUE(features.dim() == 2 && features.size(1) > 0 && has_element(features),
                    "features must have shape (N, D), D > 0, and be float32, bfloat16 or float16, got ",
                    features.scalar_type(), " of shape ", features.sizes());
  TORCH_CHECK_VALUE(first >= 0 && own >= 0 && first + own <= features.size(0), "first and rows must be those of ",
                    features.size(0), " rows, got ", first, " and ", own);
  TORCH_CHECK_VALUE(k > 0, "topk must be positive, got ", k);
  return features.stride(1) == 1 ? features : features.contiguous();
}

Rows rows_of(const Tensor& x) {
  return {{x.const_data_ptr(), nullptr}, {x.stride(0), 0}, x.size(0), x.size(1), element_of(x)};
}

// The factors of all rows (see KoleoTiles), and z unless it is null.
void normalize(const Tensor& x, double eps, double* inverse, float* z) {
  const KoleoTiles& tile = FASTSSL_TABLE_IN_USE(koleo_tiles);
  const int threads = threads_for_rows(x.size(0), x.size(1));
  const Blocks scratch(threads, round_up(x.size(1), kPadding) * 4);
  each_block(threads, x.size(0), [&](int64_t first, int64_t last) {
    tile.normalize(rows_of(x), first, last - first, eps, inverse, scratch.floats(slot(threads)), z);
  });
}

// bfloat16 products, where there are such, else float32.
Engine engine_of_search() {
  Engine engine("bfloat16");
  if (!engine.half()) engine.operand = Operand::Float32;
  return engine;
}

// The mean of up to 64 of the rows: any vector near to most of them will do.
void find_middle(const float* z, int64_t count, int64_t dim, float* middle) {
  const int64_t step = pieces(count, 64);
  std::fill_n(middle, dim, 0.f);
  for (int64_t i = 0; i < count; i += step)
    for (int64_t d = 0; d < dim; ++d) middle[d] += z[i * dim + d];
  for (int64_t d = 0; d < dim; ++d) middle[d] /= static_cast<float>(pieces(count, step));
}

// Finds the neighbours of rows that many others equal, which a search would compare with all of those: k equal ones,
// since no row is nearer to one of length 1; and for zeros the first ones, since all are as near. Nothing reaches the
// thresholds that such rows get. More than k equal ones nobody needs: the others get offsets with which they reach no
// threshold. Where a row is not finite nothing is done, since it is the nearest of all.
void find_equal(const Nearest& n, const double* inverse, float* offset) {
  if (!std::all_of(inverse, inverse + n.count, [](double x) { return std::isnormal(x); })) return;
  const auto compare = [&](int64_t a, int64_t b) {
    if (a / n.size != b / n.size) return a < b ? -1 : 1;
    if (offset[a] != offset[b]) return offset[a] < offset[b] ? -1 : 1;
    return std::memcmp(n.z + a * n.dim, n.z + b * n.dim, n.dim * sizeof(float));
  };
  std::vector<int64_t> order(n.count);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const int sign = compare(a, b);
    return sign ? sign < 0 : a < b;
  });
  for (int64_t begin = 0, end = 1; begin < n.count; begin = end++) {
    while (end < n.count && compare(order[begin], order[end]) == 0) ++end;
    const float* const row = n.z + order[begin] * n.dim;
    const bool zeros = std::all_of(row, row + n.dim, [](float x) { return x == 0; });
    const bool shorter = inverse[order[begin]] < 0;
    if (!zeros && (shorter || end - begin <= n.k)) continue;
    for (int64_t e = begin; e < end; ++e) {
      const int64_t i = order[e];
      if (e - begin >= n.k) offset[i] = -kInfinity;
      if (i < n.first || i >= n.first + n.own) continue;
      n.threshold[i] = kInfinity;
      int64_t* const found = n.index + (i - n.first) * n.k;
      for (int64_t next = 0, place = 0; place < n.k; ++next) {
        const int64_t j = zeros ? i / n.size * n.size + next : order[begin + next];
        if (j != i) found[place++] = j;
      }
    }
  }
}

void find(const float* z, const double* inverse, int64_t count, int64_t dim, int64_t size, int64_t first, int64_t own,
          int64_t k, int64_t* index) {
  const KoleoTiles& tile = FASTSSL_TABLE_IN_USE(koleo_tiles);
  const Numbers<float> middle(dim), centered(count * dim), offset(round_up(count, kPadding), 0);
  find_middle(z, count, dim, middle.data);
  double square = 0;
  for (int64_t d = 0; d < dim; ++d) square += double(middle[d]) * middle[d];
  each_block(threads_for_rows(count, dim), count, [&](int64_t begin, int64_t end) {
    tile.center(z, begin, end - begin, dim, middle.data, static_cast<float>(square / 2), centered.data, offset.data);
  });
  const Tensor y = at::from_blob(centered.data, {count, dim}, at::kFloat);
  const Engine engine = engine_of_search();
  const Side side(y, nullptr, false, kRows | kColumns, engine, threads_for(count, count, dim));
  // Each operand is rounded by 2^-8 of its length at most, each of `dim` additions by 2^-24 of the product of lengths;
  // and numbers of about 1 by what float32 does.
  const double error = (engine.half() ? 0x1p-7 + 0x1p-16 : 0) + dim * 0x1p-23;
  const float margin = static_cast<float>(side.largest_square * error + 0x1p-20);
  const Numbers<float> value(own * k, -kInfinity), threshold(side.padded_count(), kInfinity);
  std::fill_n(threshold.data + first, own, -kInfinity);
  std::fill_n(index, own * k, 0);
  const Nearest nearest{z, count, dim, size, first, own, k, margin, offset.data, value.data, index, threshold.data};
  find_equal(nearest, inverse, offset.data);
  const auto has_own = [&](int64_t b) { return side.first(b) < first + own && side.first(b) + side.size(b) > first; };
  const Similarities products{side, side, 1, 0, nullptr, false};
  const Blocks tiles(side.threads, side.cut.block * side.cut.block * 4);
  tournament(side.threads, side.cut, [&](int64_t I, int64_t J) {
    const bool groups_meet = (side.first(I) + side.size(I) - 1) / size >= side.first(J) / size;
    if (!groups_meet || !(has_own(I) || has_own(J))) return;
    float* const s = tiles.floats(slot(side.threads));
    products.compute(I, J, s);
    tile.find(nearest, s, side.first(I), side.size(I), side.first(J), side.size(J), I != J);
  }, [&] { engine.release(); });
}

std::tuple<Tensor, Tensor> koleo_loss(const Tensor& features, int64_t first, int64_t rows, int64_t topk,
                                      int64_t group_size, double eps) {
  const Tensor x = checked(features, first, rows, topk);
  const int64_t count = x.size(0), dim = x.size(1);
  TORCH_CHECK_VALUE(rows == 0 || topk < group_size, "topk must be below the number of rows in a group, ", group_size,
                    ", got ", topk);
  const Tensor nearest = at::empty({rows, topk}, at::kLong);
  if (rows == 0) return {scalar(std::numeric_limits<double>::quiet_NaN()), nearest};
  const KoleoTiles& tile = FASTSSL_TABLE_IN_USE(koleo_tiles);
  const Numbers<double> inverse(count);
  const Numbers<float> unit(count * dim);
  normalize(x, eps, inverse.data, unit.data);
  int64_t* const index = nearest.mutable_data_ptr<int64_t>();
  find(unit.data, inverse.data, count, dim, group_size, first, rows, topk, index);
  const Numbers<double> sums(pieces(rows, kTogether), 0);
  each_block(threads_for_rows(rows * topk, dim), rows, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin * topk; p < end * topk; ++p)
      sums[begin / kTogether] += std::log(
          tile.distance(unit.data + (first + p / topk) * dim, unit.data + index[p] * dim, dim, static_cast<float>(eps)) +
          eps);
  });
  double total = 0;
  for (int64_t b = 0; b < pieces(rows, kTogether); ++b) total += sums[b];  // in this order: deterministic
  return {scalar(-total / static_cast<double>(rows * topk)), nearest};
}

Tensor koleo_loss_backward(const Tensor& grad_loss, const Tensor& features, const Tensor& nearest_, int64_t first,
                           double eps) {
  TORCH_CHECK_VALUE(grad_loss.numel() == 1, "grad_loss must have one element, got shape ", grad_loss.sizes());
  TORCH_CHECK_VALUE(nearest_.dim() == 2 && nearest_.size(1) > 0, "nearest must have shape (rows, topk), got shape ",
                    nearest_.sizes());
  const int64_t rows = nearest_.size(0), topk = nearest_.size(1);
  const Tensor x = checked(features, first, rows, topk);
  const int64_t count = x.size(0), dim = x.size(1), padded = round_up(dim, kPadding);
  const Tensor nearest = checked_ids("nearest", nearest_, count), grad = at::empty(features.sizes(), features.options());
  const int64_t* const index = nearest.const_data_ptr<int64_t>();
  const float offset = static_cast<float>(eps);
  const KoleoTiles& tile = FASTSSL_TABLE_IN_USE(koleo_tiles);
  const ProductTiles& products = FASTSSL_TABLE_IN_USE(product_tiles);
  const Numbers<double> inverse(count);
  const Numbers<float> unit(count * dim), factor(rows * topk), inverse_distance(rows * topk);
  normalize(x, eps, inverse.data, unit.data);
  const double scale = -grad_loss.item<double>() / static_cast<double>(rows * topk);
  each_block(threads_for_rows(rows * topk, dim), rows, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin * topk; p < end * topk; ++p) {
      const double d = tile.distance(unit.data + (first + p / topk) * dim, unit.data + index[p] * dim, dim, offset);
      factor[p] = static_cast<float>(d == 0 ? 0 : scale / (d + eps));  // 0 is a norm's gradient at 0
      inverse_distance[p] = static_cast<float>(d == 0 ? 0 : 1 / d);
    }
  });
  Places incoming(count, rows * topk);
  incoming.fill(index);
  const int threads = threads_for_rows(count + rows * topk, dim);
  const Blocks scratch(threads, padded * (8 + 4 + 4));
  const Rows from = rows_of(x);
  char* const out = static_cast<char*>(grad.mutable_data_ptr());
  each_block(threads, count, [&](int64_t begin, int64_t end) {
    double* const sums = static_cast<double*>(scratch[slot(threads)]);
    float *const row = reinterpret_cast<float*>(sums + padded), *const spare = row + padded;
    for (int64_t i = begin; i < end; ++i) {
      const float* const z = unit.data + i * dim;
      std::fill_n(sums, padded, 0.);
      if (i >= first && i < first + rows)
        for (int64_t p = (i - first) * topk; p < (i - first + 1) * topk; ++p)
          tile.add_difference(factor[p], inverse_distance[p], z, unit.data + index[p] * dim, dim, offset, sums);
      for (int64_t p = incoming.head[i]; p >= 0; p = incoming.next[p])
        tile.add_difference(factor[p], inverse_distance[p], z, unit.data + (first + p / topk) * dim, dim, -offset, sums);
      for (int64_t d = 0; d < padded; ++d) row[d] = static_cast<float>(sums[d]);
      products.finish(from[i], static_cast<float>(inverse[i]), nullptr, 1, 0, 1, true, from.element, dim, row, spare,
                      from.element, out + i * dim * bytes_of(from.element), false);
    }
  });
  return grad;
}

FASTSSL_KERNELS(CPU, m) {
  implement<&koleo_loss>(m, "koleo_loss");
  implement<&koleo_loss_backward, 2>(m, "koleo_loss_backward");
}

}  // namespace
}  // namespace fastssl
