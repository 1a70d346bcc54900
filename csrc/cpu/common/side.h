// The two sides of a product X Y^T: their rows, packed as operands, and the sums that become their gradients.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>
#include <vector>

#include "common/engine.h"
#include "common/schedule.h"
#include "common/tensors.h"

namespace fastssl {

// The operands that a block of rows Z is packed as.
enum Role : int {
  kNothing = 0,
  kRows = 1,      // Z in S = Z Y^T
  kColumns = 2,   // Z in S = X Z^T
  kWeighed = 4,   // Z in W Z
  kWeighing = 8,  // Z in W^T Z; see `Gathered`
};

// One side of S: the rows of one tensor, or of two, the second below the first, which are (normalised and) packed in
// blocks. A lazy side is not packed as a whole: a thread calls prepare(b) before it uses block b, and keeps one block
// at a time. What is cut as given has no largest square.
class Side {
 public:
  Tensor first_part, second_part;
  Rows rows;
  int64_t count;
  int64_t dim;  // padded
  const Engine& engine;
  int threads;
  Cut cut;
  bool normalize, lazy, cut_as_given;
  bool turned;  // whether W^T Z is computed from W transposed, or else transposed, as Z^T W
  int roles;
  Blocks left, right, right_pairs, left_columns, scratch;
  Numbers<float> inverse_norm;
  float largest_square = 0;  // max |z_i|^2, 1 for normalised rows; any number if a row is NaN, as its tiles are then

  // One side of a pair. `known`, unless null, is the largest square, which then need not be computed.
  Side(const Tensor& x, bool normalize, int wanted, const Engine& engine, int threads, bool lazy = false,
       const float* known = nullptr)
      : Side(x, nullptr, normalize, false, wanted, engine, threads, lazy, known) {
    prepare_all({this});
  }

  // Both sides of a symmetric S: the rows of x1 and, unless null, x2.
  Side(const Tensor& x1, const Tensor* x2, bool normalize, int wanted, const Engine& engine, int threads,
       const float* known = nullptr)
      : Side(x1, x2, normalize, true, wanted, engine, threads, false, known) {
    prepare_all({this});
  }

  // One side of a product that is cut as given, whose tiles are not turned, and whose right operands lie in strips.
  Side(const Tensor& x, bool normalize, int wanted, const Engine& engine, int threads, const Cut& cut,
       bool lazy = false)
      : Side(x, nullptr, normalize, false, wanted, engine, threads, lazy, nullptr, &cut) {
    prepare_all({this});
  }

 private:
  friend struct Sides;

  // Not prepared yet.
  Side(const Tensor& x1, const Tensor* x2, bool normalize, bool symmetric, int wanted, const Engine& engine,
       int threads, bool lazy, const float* known, const Cut* given = nullptr)
      : first_part(x1.stride(1) == 1 ? x1 : x1.contiguous()),
        second_part(!x2 ? first_part : x2->stride(1) == 1 ? *x2 : x2->contiguous()),
        rows{{first_part.const_data_ptr(), second_part.const_data_ptr()},
             {first_part.stride(0), second_part.stride(0)},
             x1.size(0),
             x1.size(1),
             element_of(x1)},
        count(x1.size(0) + (x2 ? x2->size(0) : 0)),
        dim(round_up(x1.size(1), kPadding)),
        engine(engine),
        threads(threads),
        cut(given ? *given : Cut(count, x1.size(1), threads, symmetric)),
        normalize(normalize),
        lazy(lazy),
        cut_as_given(given),
        turned(!given && count <= 2 * dim),
        roles(turned && (wanted & kWeighing) ? (wanted & ~kWeighing) | kWeighed : wanted),
        left(places(), roles & (kRows | (engine.half() || given ? 0 : kWeighed)) ? block_bytes() : 0),
        right(places(), roles & (kColumns | (engine.half() ? 0 : kWeighing)) ? block_bytes() : 0),
        right_pairs(places(), (engine.half() || given) && (roles & kWeighed) ? block_bytes() : 0),
        left_columns(places(), engine.half() && (roles & kWeighing) ? block_bytes() : 0),
        scratch(threads, 2 * cut.block * dim * 4),
        inverse_norm(count) {
    const bool all_known = known && (lazy || as_they_lie());
    if (cut_as_given || all_known) std::fill_n(inverse_norm.data, count, 1.f);
    if (all_known) largest_square = *known;
    unprepared = all_known || (lazy && cut_as_given) ? 0 : cut.blocks;
  }

  // Packs, or where a side is lazy measures, all blocks of all sides.
  static void prepare_all(std::initializer_list<Side*> sides) {
    int64_t most = 0;
    for (const Side* side : sides) most = std::max(most, side->unprepared);
    const int threads = (*sides.begin())->threads;
    const Numbers<float> squares(most * sides.size());
    run(threads, most, [&](int64_t b) {
      float* square = &squares[b * sides.size()];
      for (const Side* side : sides) *square++ = b < side->unprepared ? side->measured(b) : 0;
    });
    for (int64_t b = 0; b < most; ++b) {
      const float* square = &squares[b * sides.size()];
      for (Side* side : sides) {
        if (b < side->unprepared)
          side->largest_square = *square <= side->largest_square ? side->largest_square : *square;
        ++square;
      }
    }
  }
  float measured(int64_t b) const {
    return lazy ? engine.tile.largest_square(rows, first(b), size(b), scratch.floats(slot(threads))) : prepare(b);
  }

  int64_t unprepared;  // blocks

 public:
  // Packs block b, as the operands of `only` these roles, and returns its largest |z|^2.
  float prepare(int64_t b, int only = ~0) const {
    const int64_t at = place(b);
    const bool lie = as_they_lie(b), half = engine.half();
    const auto operand = [&](const Blocks& blocks, int role) { return only & role ? blocks[at] : nullptr; };
    const Packed out{lie ? nullptr : operand(left, half || cut_as_given ? kRows : kRows | kWeighed),
                     operand(right, half ? kColumns : kColumns | kWeighing), operand(right_pairs, kWeighed),
                     operand(left_columns, kWeighing),
                     lie ? rows[first(b)] : nullptr, cut_as_given ? strip_columns(half) : 0};
    return engine.tile.pack(rows, first(b), size(b), padded(b), dim, normalize, engine.operand,
                            cut_as_given && !normalize ? nullptr : inverse_norm.data + first(b),
                            scratch.floats(slot(threads)), out);
  }

  // Whether block b, as it lies in memory, is the operand that packing would make of it.
  bool as_they_lie(int64_t b) const {
    const bool floats = engine.operand == Operand::Float32 && rows.element == Element::Float32;
    const bool halves = cut_as_given && engine.half() && rows.element == Element::BFloat16;
    return (floats || halves) && !normalize && rows.dim == dim && rows.stride[0] == dim && size(b) == padded(b) &&
        rows.batch == count;
  }

  // Whether that holds for every block and every operand that is wanted.
  bool as_they_lie() const {
    bool lie = !right.bytes_per_block && !right_pairs.bytes_per_block && !left_columns.bytes_per_block;
    for (int64_t b = 0; lie && left.bytes_per_block && b < cut.blocks; ++b) lie = as_they_lie(b);
    return lie && !normalize;
  }

  // Where block b is packed.
  int64_t places() const { return lazy ? threads : cut.blocks; }
  int64_t place(int64_t b) const { return lazy ? slot(threads) : b; }

  int64_t block_bytes() const { return cut.block * dim * engine.bytes(); }
  int64_t first(int64_t b) const { return b * cut.block; }
  int64_t size(int64_t b) const { return std::min(cut.block, count - first(b)); }
  int64_t padded(int64_t b) const { return cut.padded(b, count); }
  int64_t padded_count() const { return cut.blocks * cut.block; }

  // The row that is paired with row i of another side; where a side has two tensors, with its own row i.
  int64_t partner(int64_t i) const { return (i + rows.batch) % count; }

  // Block b as each operand.
  const void* as_rows(int64_t b) const { return as_they_lie(b) ? rows[first(b)] : left[place(b)]; }
  const void* as_columns(int64_t b) const { return right[place(b)]; }
  const void* weighed(int64_t b) const {
    return engine.half() || cut_as_given ? right_pairs[place(b)] : as_rows(b);
  }
  const void* weighing(int64_t b) const { return engine.half() ? left_columns[place(b)] : right[place(b)]; }
};

// The two sides of a pair, prepared together: a small batch notices how often threads start.
struct Sides {
  Side x, y;

  Sides(const Tensor& x, const Tensor& y, bool normalize, int wanted_of_x, int wanted_of_y, const Engine& engine,
        int threads, const float* known_of_x = nullptr, const float* known_of_y = nullptr)
      : x(x, nullptr, normalize, false, wanted_of_x, engine, threads, false, known_of_x),
        y(y, nullptr, normalize, false, wanted_of_y, engine, threads, false, known_of_y) {
    Side::prepare_all({&this->x, &this->y});
  }
};

// The sums that become a side's gradient, one for each block of its rows: of W Y if the side is X, the rows of S, and
// of W^T X if it is Y, the columns. W are the weights of a tile of S.
//
// W^T X is summed transposed, as X^T W: W is then a right operand as it lies, and X is packed transposed once. If X has
// few rows, at most twice as many as features, it is less work to transpose the tiles.
//
// Where a gradient has the layout of the sums, they are gathered in it: a small batch then stays in the cache.
struct Gathered {
  const Side& side;
  float* in_place;          // the gradient whose rows are the sums, or null
  Blocks sums, transposed;  // (rows, dim) and (dim, rows) floats each
  Blocks turned;
  std::vector<char> has_sums, has_transposed;  // a sum's first term is stored, not added

  // `of_rows`: for sums of W Y. `x`, unless null: for sums of W^T X as well. `grad`: what `finish_side` will write.
  Gathered(const Side& side, bool of_rows, const Side* x, const Tensor* grad = nullptr)
      : side(side),
        in_place(grad && grad->scalar_type() == at::kFloat && grad->size(1) == side.dim && side.count % kPadding == 0
                     ? grad->mutable_data_ptr<float>()
                     : nullptr),
        sums(side.cut.blocks, !in_place && (of_rows || (x && x->turned)) ? side.cut.block * side.dim * 4 : 0),
        transposed(side.cut.blocks, x && !x->turned ? side.cut.block * side.dim * 4 : 0),
        turned(side.threads, x && x->turned ? x->cut.block * side.cut.block * side.engine.bytes() : 0),
        has_sums(side.cut.blocks),
        has_transposed(side.cut.blocks) {}

  // Adds W Y_J to the sum of block I. W is (rows, columns) of float32 or bfloat16.
  void add(int64_t I, const void* W, const Side& y, int64_t J) {
    side.engine.multiply(side.padded(I), side.dim, y.padded(J), std::exchange(has_sums[I], 1), W, y.weighed(J),
                         sum_of(I));
  }

  // Adds W^T X_I to the sum of block J. W is float32, or bfloat16 in pairs.
  void add_columns(int64_t J, const void* W, const Side& x, int64_t I) {
    const int64_t m = x.padded(I), n = side.padded(J);
    if (!x.turned) {
      side.engine.multiply(side.dim, n, m, std::exchange(has_transposed[J], 1), x.weighing(I), W, transposed.floats(J));
      return;
    }
    float* const turn = turned.floats(slot(side.threads));
    side.engine.tile.transposed(static_cast<const float*>(W), n, side.engine.half() ? m / 2 : m, turn);
    side.engine.multiply(n, side.dim, m, std::exchange(has_sums[J], 1), turn, x.weighed(I), sum_of(J));
  }

  // Whether the gradient's rows of block b are the sum.
  bool is_whole(int64_t b) const { return in_place && has_sums[b] && !has_transposed[b]; }

  // The sum of block b, (rows, dim). `spare` has room for it.
  float* operator()(int64_t b, float* spare) const {
    const int64_t elements = side.padded(b) * side.dim;
    if (has_transposed[b]) side.engine.tile.transposed(transposed.floats(b), side.padded(b), side.dim, spare);
    if (!has_sums[b]) {
      if (!has_transposed[b]) std::fill_n(spare, elements, 0.f);
      return spare;
    }
    float* const sum = sum_of(b);
    if (has_transposed[b])
      for (int64_t i = 0; i < elements; ++i) sum[i] += spare[i];
    return sum;
  }

 private:
  float* sum_of(int64_t b) const { return in_place ? in_place + side.first(b) * side.dim : sums.floats(b); }
};

// The product of row i of x with its partner in y, both (normalised but) unrounded. `spare`: 2 x.dim floats.
inline double dot_row(const Side& x, const Side& y, int64_t i, float* spare) {
  const int64_t j = y.partner(i);
  const double dot = x.engine.tile.dot(x.rows[i], x.rows.element, y.rows[j], y.rows.element, x.rows.dim, spare);
  return dot * std::abs(x.inverse_norm[i]) * std::abs(y.inverse_norm[j]);
}

// The same of all rows.
inline void dot_rows(const Side& x, const Side& y, float* dots) {
  const Blocks scratch(x.threads, 2 * x.dim * 4);
  run(x.threads, x.cut.blocks, [&](int64_t b) {
    for (int64_t i = x.first(b); i < x.first(b) + x.size(b); ++i)
      dots[i] = static_cast<float>(dot_row(x, y, i, scratch.floats(slot(x.threads))));
  });
}

// The positives of a side's rows: their partners in `other`, and the weight of each.
struct Positives {
  const Side& other;
  const float* weight;
};

// The sum of a side's (normalised) rows, weight(i) times row i; padded. Its bits depend on the cut alone.
template <typename Weight>
Numbers<float> sum_rows(const Side& z, const Weight& weight) {
  Numbers<float> total(z.dim, 0.f);
  const Blocks sums(z.cut.blocks, z.dim * 4), scratch(z.threads, z.dim * 4);
  run(z.threads, z.cut.blocks, [&](int64_t b) {
    float* const sum = sums.floats(b);
    std::fill_n(sum, z.dim, 0.f);
    for (int64_t i = z.first(b); i < z.first(b) + z.size(b); ++i)
      z.engine.tile.add_row(z.rows[i], z.inverse_norm[i], weight(i), z.rows.element, z.rows.dim, sum,
                            scratch.floats(slot(z.threads)));
  });
  for (int64_t b = 0; b < z.cut.blocks; ++b)
    for (int64_t d = 0; d < z.dim; ++d) total[d] += sums.floats(b)[d];
  return total;
}

// Weights u_i + v_j that have no tiles: to the sum of row i they add u_i sum_j z_j + sum_j v_j z_j, z being the rows of
// the other side.
struct EvenWeights {
  const float* u;  // null: only the v_j
  const float* sum;
  const float* weighted;  // sum_j v_j z_j
};

// Writes the gradient of a side's tensor, or tensors, block by block: scale G, where G is a block's sums plus, unless
// they are null, weighted positives and even weights' terms; for normalised rows, the gradient of the rows before they
// were normalised. Where `along_wanted`, it adds up sum_i <G_i, z_i>, z being the rows as they were multiplied.
class Finish {
 public:
  Finish(const Gathered& gathered, const Positives* positives, float scale, const Tensor& grad,
         const Tensor* grad_of_second = nullptr, const EvenWeights* even = nullptr, bool along_wanted = true)
      : gathered(gathered),
        side(gathered.side),
        positives(positives),
        scale(scale),
        even(even),
        along_wanted(along_wanted),
        out{{grad.mutable_data_ptr(), (grad_of_second ? *grad_of_second : grad).mutable_data_ptr()},
            {side.rows.dim, side.rows.dim}, side.rows.batch, side.rows.dim, element_of(grad)},
        scratch(side.threads, (side.dim + side.cut.block * side.dim) * 4),
        along(side.cut.blocks, 0) {}

  void operator()(int64_t b) const {
    if (gathered.is_whole(b) && scale == 1 && !positives && !even && !along_wanted && !side.normalize) return;
    const float* const inverse_norm = side.inverse_norm.data;
    float* const row = scratch.floats(slot(side.threads));
    float* const sums = gathered(b, row + side.dim);
    const auto add = [&](const float* x, float weight, float* sum) {
      side.engine.tile.add_row(x, 1, weight, Element::Float32, side.dim, sum, nullptr);
    };
    for (int64_t r = 0; r < side.size(b); ++r) {
      if (even && even->u) add(even->sum, even->u[side.first(b) + r], sums + r * side.dim);
      if (even) add(even->weighted, 1, sums + r * side.dim);
      const int64_t i = side.first(b) + r, j = positives ? positives->other.partner(i) : 0;
      along[b] += side.engine.tile.finish(side.rows[i], inverse_norm[i],
                                          positives ? positives->other.rows[j] : nullptr,
                                          positives ? positives->other.inverse_norm[j] : 1,
                                          positives ? positives->weight[i] : 0, scale, side.normalize,
                                          side.rows.element, side.rows.dim, sums + r * side.dim, row,
                                          out.element, const_cast<void*>(out[i]), along_wanted);
    }
  }

  // Once all blocks are finished: sum_i <G_i, z_i>.
  double total() const {
    double sum = 0;
    for (int64_t b = 0; b < side.cut.blocks; ++b) sum += along[b];  // in this order: deterministic
    return sum;
  }

 private:
  const Gathered& gathered;
  const Side& side;
  const Positives* positives;
  float scale;
  const EvenWeights* even;
  bool along_wanted;
  Rows out;
  Blocks scratch;
  Numbers<double> along;
};

// All blocks of a side, finished once they are gathered.
inline double finish_side(const Gathered& gathered, const Positives* positives, float scale, const Tensor& grad,
                          const Tensor* grad_of_second = nullptr) {
  const Finish finish(gathered, positives, scale, grad, grad_of_second);
  run(gathered.side.threads, gathered.side.cut.blocks, finish);
  return finish.total();
}

}  // namespace fastssl
