// Softmax contrastive losses on the CPU: NT-Xent (arXiv:2002.05709), and the log-sum-exps that all others are made of.
//
// S = scale X Y^T is never stored: its tiles are computed (common/tiled.h), used, and forgotten. What varies is which
// sums are kept, which entries are left out, and which side gets gradients.
//
//     similarity_logsumexp   log sum_j exp(S_ij)                              of rows
//     pair_logsumexp         the same, and log sum_i exp(S_ij)                of rows and columns
//     clip_loss              the cross-entropy of rows and of columns, the diagonal being positive
//     self_logsumexp         log sum_{j != i} exp(S_ij), X = Y = Z            S is symmetric
//     sup_con                the same less the mean S_ij of the other rows j of row i's label
//     nt_xent                the same less S_{i, pos(i)}, pos(i) = (i + B) mod N, Z the N = 2B rows of [z1; z2]
//
// Backward, given the gradients g of the rows' sums and h of the columns', of exponentials about shifts r and c,
//
//     W_ij = g_i exp(S_ij - r_i) + h_j exp(S_ij - c_j),     dL/dX = scale W Y,     dL/dY = scale W^T X.
//
// Algorithms and costs, in units U = 2 M N D of floating-point operations (one product):
//
// Rows. As flash attention does, the forward pass takes sum_j E_ij y_j beside sum_j E_ij: dL/dX is then a scaling. 2 U,
// and nothing of Y is read again, which suits a queue. A thread owns a range of columns, packs one block of them at a
// time, and meets all rows with it: no copy of the queue is made. The threads' sums are united at the end. Y's own
// gradient, where wanted, is another 2 U, by threads that own columns.
//
// Rows and columns. Forward, a tile's exponentials go into the sums of its rows and of its columns: 1 U. Backward, the
// tile is computed again, turned into weights, and multiplied twice, for its rows' gradients, W Y_J, and for its
// columns', W^T X_I. 4 U in all.
//
// Symmetric. Only tiles (I, J) with I <= J are visited, each for its rows and for its columns: the forward pass costs
// U / 2 and the backward pass 3 U / 2. 2 U in all, where eager PyTorch takes 3 U and keeps several N x N matrices.
//
// Memory is O((M + N) D): packed operands, gradients, and one tile per thread.
//
// Threads. Where tiles add to both their rows and their columns, no two tiles that share a block run at once, and a
// block's tiles come in one order (`match`, `tournament`): the bits are the same in every run, and depend on the number
// of threads only where that changes the cut.
//
// Shifts. Tiles hold X Y^T, unscaled, where a shift is an "origin": shift = scale origin. No entry is further from 0
// than M = max |x_i| max |y_j|, which is 1 for unit rows. If |scale| M <= kShared, the largest conceivable entry serves
// all as the origin: every exponential lies between exp(-2 kShared) and 1, and one of them serves both its row and its
// column. That covers unit rows at temperatures from 1/32 up. Else each row has its own maximum.
//
// Rounding. The positive's weight, the one that does not average out, does not go through rounded products: NT-Xent
// applies it to unrounded rows, the others leave the positive out (`exclude`) and to their callers.
#include "contrastive.h"

#include <torch/library.h>

#include <vector>

#include "common/tiled.h"
#include "contrastive_tiles.h"

namespace fastssl {
namespace {

constexpr float kShared = 32;  // float32 holds exp(-2 kShared) and, with room for gradients, its inverse

// How exponentials of scale S are taken.
struct Exponent {
  float scale;
  float c;         // 2^(c S) = exp(scale S)
  double step;     // scale, as the exponentials have it
  float excluded;  // S of what is left out
  bool shared;     // all have one origin
  float origin;    // that one

  Exponent(const Tensor& scale_tensor, const Side& x, const Side& y)
      : scale(scale_tensor.item<float>()),
        c(exponent_factor(scale)),
        step(c * kLn2),
        excluded(-std::copysign(std::numeric_limits<float>::infinity(), c)) {
    const float largest = std::abs(scale) * std::sqrt(x.largest_square) * std::sqrt(y.largest_square);
    shared = largest <= kShared;
    origin = scale ? largest / scale : 0;
  }
};

// Sums of exponentials, one for each row of a side (or of several, `splits`, to be added up), padded.
struct Sums {
  Tensor totals, extremes;
  double* total;
  float* extreme;  // the entry with the largest scale S_ij, infinite with c's sign reversed if there is none

  Sums(int64_t count, const Exponent& e)
      : totals(at::zeros({count}, at::kDouble)),
        extremes(at::full({count}, e.excluded, at::kFloat)),
        total(totals.mutable_data_ptr<double>()),
        extreme(extremes.mutable_data_ptr<float>()) {}

  // total[i], which is about the shared origin or about the extreme, as it is about scale `origin`.
  double about(int64_t i, const Exponent& e, float origin) const {
    return total[i] == 0 ? 0 : total[i] * std::exp(e.step * ((e.shared ? e.origin : extreme[i]) - origin));
  }
};

// The shift of an extreme entry; and the origin that backward passes find again from the (rounded) shift.
float shift_of(float extreme, const Exponent& e) { return extreme == e.excluded ? 0 : e.scale * extreme; }
float origin_of(float shift, float scale) { return scale ? shift / scale : 0; }

// (total, shift) from sums about any origin: the shift is the extreme's.
std::tuple<Tensor, Tensor> finish_sums(const Sums& sums, int64_t count, const Exponent& e) {
  const Tensor total = at::empty({count}, at::kFloat), shift = at::empty({count}, at::kFloat);
  float* const out_total = total.mutable_data_ptr<float>();
  float* const out_shift = shift.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    out_shift[i] = shift_of(sums.extreme[i], e);
    out_total[i] = static_cast<float>(sums.about(i, e, origin_of(out_shift[i], e.scale)));
  }
  return {total, shift};
}

// What a backward pass needs for each row of a side, padded: W's coefficient a_i, and the origin of its exponentials.
struct Coefficients {
  Tensor coefficients, origins;
  const float* a;
  const float* origin;

  // a_i = gradient_i, moved to the shared origin if there is one.
  Coefficients(const Tensor& gradient, const Tensor& shift, const Side& side, const Exponent& e)
      : coefficients(at::zeros({side.padded_count()}, at::kFloat)), origins(at::zeros_like(coefficients)) {
    const Tensor g = gradient.contiguous(), s = shift.contiguous();
    const float* const from = g.const_data_ptr<float>();
    const float* const shifts = s.const_data_ptr<float>();
    float* const to = coefficients.mutable_data_ptr<float>();
    float* const to_origin = origins.mutable_data_ptr<float>();
    for (int64_t i = 0; i < side.count; ++i) {
      to_origin[i] = origin_of(shifts[i], e.scale);
      to[i] = e.shared ? static_cast<float>(from[i] * std::exp(e.step * (e.origin - to_origin[i]))) : from[i];
    }
    a = to;
    origin = to_origin;
  }
};

// The weights of tiles, and their products: W Y, which x's rows gather, and W^T X, which y's do.
struct Weights {
  const Similarities& S;
  const Exponent& e;
  const Coefficients* rows;     // null: no term of rows
  const Coefficients* columns;  // null: no term of columns
  const ContrastiveTiles& tile = FASTSSL_TABLE_IN_USE(contrastive_tiles);
  Blocks tiles, narrow;

  Weights(const Similarities& S, const Exponent& e, const Coefficients* rows, const Coefficients* columns)
      : S(S),
        e(e),
        rows(rows),
        columns(columns),
        tiles(S.x.threads, S.x.cut.block * S.y.cut.block * 4),
        narrow(S.x.threads, S.x.engine.half() ? 2 * S.x.cut.block * S.y.cut.block * 2 : 0) {}

  // Tile (I, J) of S is `tile_of()`, excluded entries and all; it is overwritten.
  float* tile_of() const { return tiles.floats(slot(S.x.threads)); }

  void multiply(int64_t I, int64_t J, Gathered* of_x, Gathered* of_y) const {
    float* const s = tile_of();
    const Engine& engine = S.x.engine;
    const int64_t m = S.x.padded(I), n = S.y.padded(J);
    auto* half = engine.half() ? static_cast<at::BFloat16*>(narrow[slot(S.x.threads)]) : nullptr;
    auto* pairs = engine.half() ? half + m * n : nullptr;
    const float* const a = rows->a + S.x.first(I);
    const float* const b = columns ? columns->a + S.y.first(J) : nullptr;
    if (e.shared) {
      tile.weights(s, n, m, n, e.c, e.origin, a, b, half, pairs);
    } else {
      tile.weights_online(s, n, m, n, e.c, a, rows->origin + S.x.first(I), b,
                          columns ? columns->origin + S.y.first(J) : nullptr, half, pairs);
    }
    if (of_x) of_x->add(I, half ? static_cast<void*>(half) : s, S.y, J);
    if (of_y) of_y->add_columns(J, half ? static_cast<void*>(pairs) : s, S.x, I);
  }
};

// As `check_sides`.
void check_vectors(const char* names, int64_t count, at::TensorList vectors) {
  for (const Tensor& t : vectors)
    TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.dim() == 1 && t.size(0) == count, names,
                      " must be float32 of shape (", count, "), got ", t.scalar_type(), " of shape ", t.sizes());
}

// Row and column sums of all tiles I <= J of a symmetric S, by `visit(I, J, tile)` before entries are left out.
template <typename Visit>
Sums sum_symmetric(const Similarities& S, const Exponent& e, const Visit& visit) {
  const Side& z = S.x;
  const Sums sums(z.padded_count(), e);
  const Blocks tile(z.threads, z.cut.block * z.cut.block * 4);
  const ContrastiveTiles& f = FASTSSL_TABLE_IN_USE(contrastive_tiles);
  tournament(z.threads, z.cut, [&](int64_t I, int64_t J) {
    float* s = tile.floats(slot(z.threads));
    const int64_t ld = z.padded(J);
    S.compute(I, J, s);
    visit(I, J, s);
    S.exclude_from(I, J, s);
    double* const row_total = sums.total + z.first(I);
    double* const column_total = I == J ? nullptr : sums.total + z.first(J);
    if (e.shared) {
      f.sum_exponentials(s, ld, z.size(I), ld, e.c, e.origin, row_total, nullptr, column_total, nullptr);
    } else {
      f.sum_exponentials_online(s, ld, z.size(I), ld, e.c, row_total, sums.extreme + z.first(I), column_total,
                                sums.extreme + z.first(J));
    }
  }, [&] { z.engine.release(); });
  return sums;
}

// f(r, c, i, j) for every positive pair in tile (I, J) of NT-Xent's S: its place (r, c) in the tile and its rows (i, j).
template <typename F>
void each_positive(const Side& z, int64_t I, int64_t J, const F& f) {
  // Row i of the first half meets column i + B, row i of the second column i - B: two diagonals of the matrix.
  const int64_t batch = z.rows.batch;
  for (const int64_t offset : {batch, -batch}) {
    const int64_t low = std::max({z.first(I), z.first(J) - offset, offset > 0 ? 0 : batch});
    const int64_t high =
        std::min({z.first(I) + z.size(I), z.first(J) + z.size(J) - offset, offset > 0 ? batch : 2 * batch});
    for (int64_t i = low; i < high; ++i) f(i - z.first(I), i + offset - z.first(J), i, i + offset);
  }
}

std::tuple<Tensor, Tensor, Tensor> nt_xent(const Tensor& z1, const Tensor& z2, const Tensor& scale, bool normalize,
                                           c10::string_view precision) {
  if (z1.scalar_type() == at::kDouble)
    return portable<&nt_xent>("fastssl::nt_xent_portable", z1, z2, scale, normalize, precision);
  check_pairs("z1 and z2", z1, z2, scale);
  const int64_t count = 2 * z1.size(0);
  const Engine engine(precision);
  const Side z(z1, z2, normalize, kRows | kColumns, engine, threads_for(count, count, z1.size(1)));
  const Exponent e(scale, z, z);
  const Tensor aligned = at::empty({count}, at::kFloat);  // <z_i, z_pos(i)>, from the very tile that is summed
  float* const alignment = aligned.mutable_data_ptr<float>();
  const Sums sums = sum_symmetric({z, z, e.excluded, nullptr, true}, e, [&](int64_t I, int64_t J, float* s) {
    each_positive(z, I, J, [&](int64_t r, int64_t c, int64_t i, int64_t j) {
      alignment[i] = alignment[j] = s[r * z.padded(J) + c];
    });
  });

  const Tensor loss = at::empty({count}, at::kFloat), total = at::empty({count}, at::kFloat);
  const Tensor shift = at::empty({count}, at::kFloat);
  float* const out = loss.mutable_data_ptr<float>();
  float* const out_total = total.mutable_data_ptr<float>();
  float* const out_shift = shift.mutable_data_ptr<float>();
  at::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float origin = e.shared ? e.origin : sums.extreme[i];
      const double value = std::log(sums.total[i]) + e.step * (origin - alignment[i]);
      // No loss is below 0, and a pair alone has none: what is left of it is rounding. Not 0, so that NaN stays NaN.
      out[i] = static_cast<float>(value < 0 || count == 2 ? value - value : value);
      out_shift[i] = e.scale * origin;
      // The backward pass will find the origin from the rounded shift: the total moves there.
      out_total[i] = static_cast<float>(sums.about(i, e, origin_of(out_shift[i], e.scale)));
    }
  });
  return {loss, shift, total};
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(const Tensor& grad_loss, const Tensor& z1, const Tensor& z2,
                                                    const Tensor& scale, const Tensor& shift, const Tensor& total,
                                                    bool normalize, c10::string_view precision) {
  if (z1.scalar_type() == at::kDouble)
    return portable<&nt_xent_backward>("fastssl::nt_xent_backward_portable", grad_loss, z1, z2, scale, shift, total,
                    normalize, precision);
  check_pairs("z1 and z2", z1, z2, scale);
  const int64_t count = 2 * z1.size(0);
  check_vectors("grad_loss, shift and total", count, {grad_loss, shift, total});
  const Engine engine(precision);
  const Side z(z1, z2, normalize, kRows | kColumns | kWeighed | kWeighing, engine,
               threads_for(count, count, z1.size(1)));
  const Exponent e(scale, z, z);
  const Tensor gradient = grad_loss.contiguous();
  const float* const g = gradient.const_data_ptr<float>();
  const Coefficients p(gradient.div(total), shift, z, e);
  const Tensor positive_weights = at::empty({count}, at::kFloat);
  float* const positive_weight = positive_weights.mutable_data_ptr<float>();
  const Similarities S{z, z, e.excluded, nullptr, true};
  const Weights weights(S, e, &p, &p);
  Gathered gathered(z, true, &z);
  tournament(z.threads, z.cut, [&](int64_t I, int64_t J) {
    float* s = weights.tile_of();
    S.compute(I, J, s);
    each_positive(z, I, J, [&](int64_t r, int64_t c, int64_t i, int64_t j) {
      float& entry = s[r * z.padded(J) + c];
      const auto weight = [&](int64_t k) {
        return p.a[k] * std::exp2((entry - (e.shared ? e.origin : p.origin[k])) * e.c);
      };
      positive_weight[i] = positive_weight[j] = weight(i) + weight(j) - (g[i] + g[j]);
      entry = e.excluded;
    });
    S.exclude_from(I, J, s);
    weights.multiply(I, J, &gathered, I == J ? nullptr : &gathered);
  }, [&] { engine.release(); });

  const Tensor dz1 = at::empty(z1.sizes(), z1.options()), dz2 = at::empty(z2.sizes(), z2.options());
  const Rows out{{dz1.mutable_data_ptr(), dz2.mutable_data_ptr()}, {z.rows.dim, z.rows.dim}, z.rows.batch, z.rows.dim,
                 z.rows.element};
  const Tensor alongs = at::zeros({z.cut.blocks}, at::kDouble);
  double* const along = alongs.mutable_data_ptr<double>();
  const float* const inverse_norm = z.inverse_norm.const_data_ptr<float>();
  const Blocks scratches(z.threads, (z.dim + z.cut.block * z.dim) * 4);
  run(z.threads, z.cut.blocks, [&](int64_t b) {
    float* const scratch = scratches.floats(slot(z.threads));
    float* const sums = gathered(b, scratch + z.dim);
    for (int64_t r = 0; r < z.size(b); ++r) {
      const int64_t i = z.first(b) + r, partner = i < z.rows.batch ? i + z.rows.batch : i - z.rows.batch;
      along[b] += engine.tile.finish(z.rows[i], inverse_norm[i], z.rows[partner], inverse_norm[partner],
                                     positive_weight[i], e.scale, normalize, z.rows.element, z.rows.dim,
                                     sums + r * z.dim, scratch, z.rows.element, const_cast<void*>(out[i]));
    }
  });
  double dscale = 0;
  for (int64_t b = 0; b < z.cut.blocks; ++b) dscale += along[b] / 2;  // in this order: deterministic
  return {dz1, dz2, scalar(dscale, scale.options())};
}

std::tuple<Tensor, Tensor> self_logsumexp(const Tensor& z_, const Tensor& scale, c10::string_view precision) {
  if (z_.scalar_type() == at::kDouble)
    return portable<&self_logsumexp>("fastssl::self_logsumexp_portable", z_, scale, precision);
  check_sides("z and z", z_, z_, scale);
  const Engine engine(precision);
  const Side z(z_, kRows | kColumns, engine, threads_for(z_.size(0), z_.size(0), z_.size(1)));
  const Exponent e(scale, z, z);
  const Sums sums = sum_symmetric({z, z, e.excluded, nullptr, true}, e, [](int64_t, int64_t, float*) {});
  if (e.shared) sums.extremes.fill_(e.origin);
  return finish_sums(sums, z.count, e);
}

// The gradients (dz, dscale) of a symmetric S, given those of its sums; they are added to what has been gathered.
std::tuple<Tensor, Tensor> differentiate_self(const Side& z, const Exponent& e, const Tensor& grad_total,
                                              const Tensor& shift, Gathered& gathered, const Tensor& z_,
                                              const Tensor& scale) {
  const Coefficients p(grad_total, shift, z, e);
  const Similarities S{z, z, e.excluded, nullptr, true};
  const Weights weights(S, e, &p, &p);
  tournament(z.threads, z.cut, [&](int64_t I, int64_t J) {
    S(I, J, weights.tile_of());
    weights.multiply(I, J, &gathered, I == J ? nullptr : &gathered);
  }, [&] { z.engine.release(); });
  const Tensor dz = at::empty(z_.sizes(), z_.options());
  const double along = finish_side(gathered, nullptr, e.scale, dz);
  return {dz, scalar(along / 2, scale.options())};
}

std::tuple<Tensor, Tensor> self_logsumexp_backward(const Tensor& grad_total, const Tensor& z_, const Tensor& scale,
                                                   const Tensor& shift, c10::string_view precision) {
  if (z_.scalar_type() == at::kDouble)
    return portable<&self_logsumexp_backward>("fastssl::self_logsumexp_backward_portable", grad_total, z_, scale, shift,
                    precision);
  check_sides("z and z", z_, z_, scale);
  check_vectors("grad_total and shift", z_.size(0), {grad_total, shift});
  const Engine engine(precision);
  const Side z(z_, kRows | kColumns | kWeighed | kWeighing, engine, threads_for(z_.size(0), z_.size(0), z_.size(1)));
  Gathered gathered(z, true, &z);
  return differentiate_self(z, Exponent(scale, z, z), grad_total, shift, gathered, z_, scale);
}

// Which rows have the same label.
struct Classes {
  Tensor rows;  // (N, D), (normalised) float32, unrounded
  std::vector<int64_t> key;    // the same for rows of one label, in [0, N)
  std::vector<double> others;  // how many other rows have the label

  Classes(const Side& z, const Tensor& z_, const Tensor& labels_) : key(z.count), others(z.count) {
    rows = z_.to(at::kFloat).contiguous();
    if (z.normalize) rows = rows * z.inverse_norm.abs().unsqueeze(1);
    const Tensor contiguous = labels_.contiguous();
    const int64_t* const labels = contiguous.const_data_ptr<int64_t>();
    std::vector<int64_t> order(labels, labels + z.count);
    std::sort(order.begin(), order.end());
    for (int64_t i = 0; i < z.count; ++i) {
      const auto [first, last] = std::equal_range(order.begin(), order.end(), labels[i]);
      key[i] = first - order.begin();
      others[i] = static_cast<double>(last - first - 1);
    }
  }

  // (N, D): for each key the sum of its rows, row i times weight(i).
  template <typename Weight>
  Tensor sum(const Weight& weight) const {
    const Tensor sums = at::zeros_like(rows);
    const float* const from = rows.const_data_ptr<float>();
    float* const to = sums.mutable_data_ptr<float>();
    const int64_t dim = rows.size(1);
    for (size_t i = 0; i < key.size(); ++i) {
      const float w = weight(i);
      for (int64_t d = 0; d < dim; ++d) to[key[i] * dim + d] += w * from[i * dim + d];
    }
    return sums;
  }
};

void check_labels(const Tensor& labels, const Tensor& z) {
  TORCH_CHECK_VALUE(labels.scalar_type() == at::kLong && labels.dim() == 1 && labels.size(0) == z.size(0),
                    "labels must be int64 of shape (", z.size(0), "), got ", labels.scalar_type(), " of shape ",
                    labels.sizes());
}

std::tuple<Tensor, Tensor, Tensor> sup_con(const Tensor& z_, const Tensor& labels, const Tensor& scale, bool normalize,
                                           c10::string_view precision) {
  if (z_.scalar_type() == at::kDouble)
    return portable<&sup_con>("fastssl::sup_con_portable", z_, labels, scale, normalize, precision);
  check_sides("features and features", z_, z_, scale);
  check_labels(labels, z_);
  const Engine engine(precision);
  const Side z(z_, z_.narrow(0, 0, 0), normalize, kRows | kColumns, engine,
               threads_for(z_.size(0), z_.size(0), z_.size(1)));
  const Exponent e(scale, z, z);
  const Sums sums = sum_symmetric({z, z, e.excluded, nullptr, true}, e, [](int64_t, int64_t, float*) {});
  if (e.shared) sums.extremes.fill_(e.origin);
  const auto [total, shift] = finish_sums(sums, z.count, e);
  const Classes classes(z, z_, labels);
  const Tensor class_sums = classes.sum([](int64_t) { return 1.f; }), loss = at::empty({z.count}, at::kFloat);
  const float* const rows = classes.rows.const_data_ptr<float>();
  const float* const of_class = class_sums.const_data_ptr<float>();
  float* const out = loss.mutable_data_ptr<float>();
  const int64_t dim = z.rows.dim;
  at::parallel_for(0, z.count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double aligned = 0;
      for (int64_t d = 0; d < dim; ++d)
        aligned += double(rows[i * dim + d]) * (of_class[classes.key[i] * dim + d] - rows[i * dim + d]);
      const double value = std::log(sums.total[i]) + e.step * (sums.extreme[i] - aligned / classes.others[i]);
      out[i] = classes.others[i] ? static_cast<float>(value) : 0;
    }
  });
  return {loss, shift, total};
}

// Of the positives, with p_i = g_i / (number of others) and sums over row i's label:
// G_i -= p_i (sum_j z_j - z_i) + sum_j p_j z_j - p_i z_i
std::tuple<Tensor, Tensor> sup_con_backward(const Tensor& grad_loss, const Tensor& z_, const Tensor& labels,
                                            const Tensor& scale, const Tensor& shift, const Tensor& total,
                                            bool normalize, c10::string_view precision) {
  if (z_.scalar_type() == at::kDouble)
    return portable<&sup_con_backward>("fastssl::sup_con_backward_portable", grad_loss, z_, labels, scale, shift,
                                       total, normalize, precision);
  check_sides("features and features", z_, z_, scale);
  check_labels(labels, z_);
  check_vectors("grad_loss, shift and total", z_.size(0), {grad_loss, shift, total});
  const Engine engine(precision);
  const Side z(z_, z_.narrow(0, 0, 0), normalize, kRows | kColumns | kWeighed | kWeighing, engine,
               threads_for(z_.size(0), z_.size(0), z_.size(1)));
  const Exponent e(scale, z, z);
  const Classes classes(z, z_, labels);
  const Tensor grad_total = grad_loss.div(total);
  const Tensor gradient = grad_loss.contiguous();
  const float* const g = gradient.const_data_ptr<float>();
  std::vector<float> p(z.count);
  for (int64_t i = 0; i < z.count; ++i) {
    if (classes.others[i]) {
      p[i] = static_cast<float>(g[i] / classes.others[i]);
    } else {
      grad_total.mutable_data_ptr<float>()[i] = 0;
    }
  }
  const Tensor class_sums = classes.sum([](int64_t) { return 1.f; });
  const Tensor class_gradients = classes.sum([&p](int64_t i) { return p[i]; });
  Gathered gathered(z, true, &z);
  const float* const rows = classes.rows.const_data_ptr<float>();
  const float* const of_class = class_sums.const_data_ptr<float>();
  const float* const gradient_of_class = class_gradients.const_data_ptr<float>();
  const int64_t dim = z.rows.dim;
  run(z.threads, z.cut.blocks, [&](int64_t b) {
    gathered.has_sums[b] = 1;
    float* const sums = gathered.sums.floats(b);
    std::fill_n(sums, z.padded(b) * z.dim, 0.f);
    for (int64_t r = 0; r < z.size(b); ++r) {
      const int64_t i = z.first(b) + r, k = classes.key[i];
      for (int64_t d = 0; d < dim; ++d)
        sums[r * z.dim + d] = -(p[i] * (of_class[k * dim + d] - 2 * rows[i * dim + d]) + gradient_of_class[k * dim + d]);
    }
  });
  return differentiate_self(z, e, grad_total, shift, gathered, z_, scale);
}

// Sums of rows and of columns of all tiles of S.
std::pair<Sums, Sums> sum_pair(const Similarities& S, const Exponent& e) {
  const Side &x = S.x, &y = S.y;
  Sums rows(x.padded_count(), e), columns(y.padded_count(), e);
  const Blocks tile(x.threads, x.cut.block * y.cut.block * 4);
  const ContrastiveTiles& f = FASTSSL_TABLE_IN_USE(contrastive_tiles);
  match(x.threads, x.cut, y.cut, [&](int64_t I, int64_t J) {
    float* s = tile.floats(slot(x.threads));
    S(I, J, s);
    const int64_t n = y.padded(J), i = x.first(I), j = y.first(J);
    if (e.shared) {
      f.sum_exponentials(s, n, x.size(I), n, e.c, e.origin, rows.total + i, rows.extreme + i, columns.total + j,
                         columns.extreme + j);
    } else {
      f.sum_exponentials_online(s, n, x.size(I), n, e.c, rows.total + i, rows.extreme + i, columns.total + j,
                                columns.extreme + j);
    }
  }, [&] { x.engine.release(); });
  return {std::move(rows), std::move(columns)};
}

// (dx, dy, dscale) from the weights of all tiles, and of a positive for each row and column unless null: the pair of
// x's and y's rows of one number.
std::tuple<Tensor, Tensor, Tensor> differentiate_pair(const Similarities& S, const Exponent& e,
                                                      const Coefficients& rows, const Coefficients& columns,
                                                      const float* positive_weight, const Tensor& x_, const Tensor& y_,
                                                      const Tensor& scale) {
  const Side &x = S.x, &y = S.y;
  const Weights weights(S, e, &rows, &columns);
  Gathered of_x(x, true, nullptr), of_y(y, false, &x);
  match(x.threads, x.cut, y.cut, [&](int64_t I, int64_t J) {
    S(I, J, weights.tile_of());
    weights.multiply(I, J, &of_x, &of_y);
  }, [&] { x.engine.release(); });
  const Tensor dx = at::empty(x_.sizes(), x_.options()), dy = at::empty(y_.sizes(), y_.options());
  const Positives columns_of{y, positive_weight}, rows_of{x, positive_weight};
  const double dscale = finish_side(of_x, positive_weight ? &columns_of : nullptr, e.scale, dx);
  finish_side(of_y, positive_weight ? &rows_of : nullptr, e.scale, dy);
  return {dx, dy, scalar(dscale, scale.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_logsumexp(const Tensor& x_, const Tensor& y_, const Tensor& scale,
                                                          const std::optional<Tensor>& exclude_,
                                                          c10::string_view precision) {
  if (x_.scalar_type() == at::kDouble)
    return portable<&pair_logsumexp>("fastssl::pair_logsumexp_portable", x_, y_, scale, exclude_, precision);
  check_sides("x and y", x_, y_, scale);
  const Tensor exclude = checked_exclude(exclude_, x_);
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const Side x(x_, kRows, engine, threads), y(y_, kColumns, engine, threads);
  const Exponent e(scale, x, y);
  const auto [rows, columns] = sum_pair({x, y, e.excluded, data_of(exclude), false}, e);
  return std::tuple_cat(finish_sums(rows, x.count, e), finish_sums(columns, y.count, e));
}

std::tuple<Tensor, Tensor, Tensor> pair_logsumexp_backward(const Tensor& grad_row_total,
                                                           const Tensor& grad_column_total, const Tensor& x_,
                                                           const Tensor& y_, const Tensor& scale,
                                                           const std::optional<Tensor>& exclude_,
                                                           const Tensor& row_shift, const Tensor& column_shift,
                                                           c10::string_view precision) {
  if (x_.scalar_type() == at::kDouble)
    return portable<&pair_logsumexp_backward>("fastssl::pair_logsumexp_backward_portable", grad_row_total,
                                              grad_column_total, x_, y_, scale, exclude_, row_shift, column_shift,
                                              precision);
  check_sides("x and y", x_, y_, scale);
  check_vectors("grad_row_total and row_shift", x_.size(0), {grad_row_total, row_shift});
  check_vectors("grad_column_total and column_shift", y_.size(0), {grad_column_total, column_shift});
  const Tensor exclude = checked_exclude(exclude_, x_);
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const Side x(x_, kRows | kWeighing, engine, threads), y(y_, kColumns | kWeighed, engine, threads);
  const Exponent e(scale, x, y);
  const Coefficients rows(grad_row_total, row_shift, x, e), columns(grad_column_total, column_shift, y, e);
  return differentiate_pair({x, y, e.excluded, data_of(exclude), false}, e, rows, columns, nullptr, x_, y_, scale);
}

// One row of CLIP's loss is the softplus of n - p, n = shift + log(total) being that of the negatives and p the
// positive's S. Its slope is the derivative by n, and minus that by p.
Softplus cross_entropy(float total, float shift, float p) {
  return Softplus(total == 0 ? -std::numeric_limits<double>::infinity() : std::log(double(total)) + shift - p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> clip_loss(const Tensor& x_, const Tensor& y_,
                                                                     const Tensor& scale, c10::string_view precision) {
  if (x_.scalar_type() == at::kDouble)
    return portable<&clip_loss>("fastssl::clip_loss_portable", x_, y_, scale, precision);
  check_pairs("image_features and text_features", x_, y_, scale);
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const Side x(x_, kRows, engine, threads), y(y_, kColumns, engine, threads);
  const Exponent e(scale, x, y);
  const auto [rows, columns] = sum_pair({x, y, e.excluded, nullptr, true}, e);
  const auto [row_total, row_shift] = finish_sums(rows, x.count, e);
  const auto [column_total, column_shift] = finish_sums(columns, y.count, e);
  const Tensor positive = dot_rows(x, y).mul_(e.scale), loss = at::empty({x.count}, at::kFloat);
  const float* const p = positive.const_data_ptr<float>();
  float* const out = loss.mutable_data_ptr<float>();
  const float *const r = row_total.const_data_ptr<float>(), *const c = column_total.const_data_ptr<float>();
  const float *const r_shift = row_shift.const_data_ptr<float>(), *const c_shift = column_shift.const_data_ptr<float>();
  for (int64_t i = 0; i < x.count; ++i) {
    const Softplus row = cross_entropy(r[i], r_shift[i], p[i]), column = cross_entropy(c[i], c_shift[i], p[i]);
    out[i] = static_cast<float>((row.value + column.value) / 2);
  }
  return {loss, positive, row_total, row_shift, column_total, column_shift};
}

std::tuple<Tensor, Tensor, Tensor> clip_loss_backward(const Tensor& grad_loss, const Tensor& x_, const Tensor& y_,
                                                      const Tensor& scale, const Tensor& positive,
                                                      const Tensor& row_total, const Tensor& row_shift,
                                                      const Tensor& column_total, const Tensor& column_shift,
                                                      c10::string_view precision) {
  if (x_.scalar_type() == at::kDouble)
    return portable<&clip_loss_backward>("fastssl::clip_loss_backward_portable", grad_loss, x_, y_, scale, positive,
                                         row_total, row_shift, column_total, column_shift, precision);
  check_pairs("image_features and text_features", x_, y_, scale);
  check_vectors("grad_loss, positive, totals and shifts", x_.size(0),
                {grad_loss, positive, row_total, row_shift, column_total, column_shift});
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const Side x(x_, kRows | kWeighing, engine, threads), y(y_, kColumns | kWeighed, engine, threads);
  const Exponent e(scale, x, y);
  const Tensor g = grad_loss.contiguous(), p = positive.contiguous();
  const float *const gradients = g.const_data_ptr<float>(), *const positives = p.const_data_ptr<float>();
  const Tensor weights = at::zeros({x.count}, at::kFloat);
  float* const weight = weights.mutable_data_ptr<float>();
  const auto gradient = [&](const Tensor& total_, const Tensor& shift_) {
    const Tensor total = total_.contiguous(), shift = shift_.contiguous(), grad_total = at::empty_like(total);
    const float *const t = total.const_data_ptr<float>(), *const s = shift.const_data_ptr<float>();
    float* const out = grad_total.mutable_data_ptr<float>();
    for (int64_t i = 0; i < x.count; ++i) {
      const double slope = cross_entropy(t[i], s[i], positives[i]).slope * gradients[i] / 2;
      out[i] = t[i] == 0 ? 0 : static_cast<float>(slope / t[i]);
      weight[i] -= static_cast<float>(slope);
    }
    return grad_total;
  };
  const Coefficients rows(gradient(row_total, row_shift), row_shift, x, e);
  const Coefficients columns(gradient(column_total, column_shift), column_shift, y, e);
  return differentiate_pair({x, y, e.excluded, nullptr, true}, e, rows, columns, weight, x_, y_, scale);
}

std::tuple<Tensor, Tensor, Tensor> similarity_logsumexp(const Tensor& x_, const Tensor& y_, const Tensor& scale,
                                                        const std::optional<Tensor>& exclude_, bool weigh,
                                                        c10::string_view precision) {
  if (x_.scalar_type() == at::kDouble)
    return portable<&similarity_logsumexp>("fastssl::similarity_logsumexp_portable", x_, y_, scale, exclude_, weigh,
                    precision);
  check_sides("x and y", x_, y_, scale);
  const Tensor exclude = checked_exclude(exclude_, x_);
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const Side x(x_, kRows, engine, threads), y(y_, kColumns | (weigh ? kWeighed : 0), engine, threads, true);
  const Exponent e(scale, x, y);
  const Similarities S{x, y, e.excluded, data_of(exclude), false};
  // The columns are split between threads, each with sums of its own; and where there are too few columns, the rows.
  const int64_t splits = std::max<int64_t>(std::min<int64_t>(threads, y.cut.blocks), 1), padded = x.padded_count();
  const int64_t shares = pieces(threads, splits);
  const Sums parts(splits * padded, e);
  const Blocks tile(threads, x.cut.block * y.cut.block * 4);
  const Blocks narrow(threads, weigh && engine.half() ? x.cut.block * y.cut.block * 2 : 0);
  const Blocks weighted_parts(splits * x.cut.blocks, weigh ? x.cut.block * x.dim * 4 : 0);
  const ContrastiveTiles& f = FASTSSL_TABLE_IN_USE(contrastive_tiles);
  run(threads, splits * shares, [&](int64_t task) {
    const int64_t split = task / shares, share = task % shares;
    const int64_t begin = x.cut.blocks * share / shares, end = x.cut.blocks * (share + 1) / shares;
    float* const s = tile.floats(slot(threads));
    void* const half = narrow[slot(threads)];
    const auto weighted = [&](int64_t I) { return weighted_parts.floats(split * x.cut.blocks + I); };
    for (int64_t I = begin; weigh && I < end; ++I) std::fill_n(weighted(I), x.padded(I) * x.dim, 0.f);
    for (int64_t J = y.cut.blocks * split / splits; J < y.cut.blocks * (split + 1) / splits; ++J) {
      y.prepare(J);
      for (int64_t I = begin; I < end; ++I) {
        const int64_t m = x.padded(I), n = y.padded(J), at = split * padded + x.first(I);
        S(I, J, s);
        f.exponentials(s, n, m, n, e.c, e.shared ? &e.origin : nullptr, parts.total + at, parts.extreme + at,
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
      const float origin = origin_of(out_shift[i], e.scale);
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
  return {total, shift, weighted};
}

std::tuple<Tensor, Tensor, Tensor> similarity_logsumexp_backward(
    const Tensor& grad_total, const Tensor& x_, const Tensor& y_, const Tensor& scale,
    const std::optional<Tensor>& exclude_, const Tensor& shift, const Tensor& weighted_, bool needs_y,
    c10::string_view precision) {
  if (x_.scalar_type() == at::kDouble)
    return portable<&similarity_logsumexp_backward>("fastssl::similarity_logsumexp_backward_portable", grad_total, x_,
                    y_, scale, exclude_, shift, weighted_, needs_y, precision);
  check_sides("x and y", x_, y_, scale);
  check_vectors("grad_total and shift", x_.size(0), {grad_total, shift});
  TORCH_CHECK_VALUE(weighted_.scalar_type() == at::kFloat && weighted_.sizes() == x_.sizes(),
                    "weighted must be float32 of shape ", x_.sizes(), ", got ", weighted_.scalar_type(), " of shape ",
                    weighted_.sizes());
  const Tensor gradient = grad_total.contiguous(), weighted = weighted_.contiguous();
  const Tensor dx = (gradient * scale).unsqueeze(1).mul(weighted).to(x_.scalar_type());
  const Tensor along = at::linalg_vecdot(weighted, x_.to(at::kFloat)).to(at::kDouble);
  const Tensor dscale = gradient.to(at::kDouble).dot(along).to(scale.scalar_type());
  const Tensor dy = at::zeros({needs_y ? y_.size(0) : 0, y_.size(1)}, y_.options());
  if (!needs_y || x_.size(0) == 0) return {dx, dy, dscale};

  const Tensor exclude = checked_exclude(exclude_, x_);
  const Engine engine(precision);
  const int threads = threads_for(x_.size(0), y_.size(0), x_.size(1));
  const Side x(x_, kRows | kWeighing, engine, threads), y(y_, kColumns, engine, threads, true);
  const Exponent e(scale, x, y);
  const Coefficients rows(gradient, shift, x, e);
  const Similarities S{x, y, e.excluded, data_of(exclude), false};
  const Weights weights(S, e, &rows, nullptr);
  Gathered gathered(y, false, &x);
  run(threads, y.cut.blocks, [&](int64_t J) {
    y.prepare(J);
    for (int64_t I = 0; I < x.cut.blocks; ++I) {
      S(I, J, weights.tile_of());
      weights.multiply(I, J, nullptr, &gathered);
    }
  }, [&] { engine.release(); });
  finish_side(gathered, nullptr, e.scale, dy);
  return {dx, dy, dscale};
}

TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("nt_xent", &nt_xent);
  m.impl("nt_xent_backward", &nt_xent_backward);
  m.impl("self_logsumexp", &self_logsumexp);
  m.impl("self_logsumexp_backward", &self_logsumexp_backward);
  m.impl("sup_con", &sup_con);
  m.impl("sup_con_backward", &sup_con_backward);
  m.impl("pair_logsumexp", &pair_logsumexp);
  m.impl("pair_logsumexp_backward", &pair_logsumexp_backward);
  m.impl("clip_loss", &clip_loss);
  m.impl("clip_loss_backward", &clip_loss_backward);
  m.impl("similarity_logsumexp", &similarity_logsumexp);
  m.impl("similarity_logsumexp_backward", &similarity_logsumexp_backward);
}

}  // namespace

TilePlan tile_plan(int64_t rows, int64_t dim, int threads) {
  threads = threads_for(rows, rows, dim, threads);
  const Cut cut(rows, dim, threads);
  return {threads, cut.block, cut.blocks, cut.group};
}

}  // namespace fastssl
