// Softmax contrastive losses on the CPU: NT-Xent (arXiv:2002.05709), forward and backward.
//
// With z the N = 2B (normalised) rows of [z1; z2] and S = scale z z^T, diagonal excluded,
//
//     loss_i = log sum_{j != i} exp(S_ij) - S_{i, pos(i)},              pos(i) = (i + B) mod N
//     W_ij   = a_i exp(S_ij - shift_i) + a_j exp(S_ij - shift_j) - [j = pos(i)] (g_i + g_j),   a = g / total
//     dL/dz  = scale W z.
//
// Algorithm. S is symmetric, and so is W: rows are cut into blocks, and only tiles (I, J) with I <= J are
// visited. Forward, a tile's exponentials go into the sums of its rows and of its columns: half a product.
// Backward, the tile is computed again, turned into weights, and multiplied twice,
//
//     G_I += W Z_J   and   G_J^T += Z_I^T W,
//
// the second kept transposed so that W is a right operand as it lies: no tile is ever transposed. With
// U = 2 N^2 D operations the forward costs U / 2 and the backward 3 U / 2: 2 U, where eager PyTorch takes 3 U and
// keeps several N x N matrices. Memory is O(N D): packed operands, G and G^T, and one tile per thread.
//
// Threads. Blocks are players of a round-robin tournament (the circle method): in one round every block meets
// one other, so no two tiles of a round touch the same block, and rounds follow each other. Each block's sums
// therefore grow in one order, whatever thread runs which tile: the bits are the same in every run, and depend
// on the number of threads only where that changes the plan. To read memory less often, a player is a group
// of up to kMaxGroup blocks.
//
// Shifts. Tiles hold z z^T, unscaled, where a shift is an "origin": shift = scale origin. No entry is further
// from 0 than M = max |z_i|^2, which is 1 for unit rows. If |scale| M <= kShared, the largest conceivable entry
// serves all rows as the origin: every exponential lies between exp(-2 kShared) and 1, and one of them serves both
// its row and its column. That covers unit rows at temperatures from 1/32 up. Else each row has its own maximum.
//
// Products run in oneDNN's micro-kernels (AMX, AVX-512) through ATen, else in common/gemm.h. bfloat16
// products read rows rounded once after normalisation, and weights rounded once; the positive's weight, the one
// that does not average out, is applied to unrounded rows. "tf32" and "float16" multiply in float32.
#include "contrastive.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/isa.h"
#include "contrastive_tiles.h"

namespace fastssl {
namespace {

using at::Tensor;

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kShared = 32;       // float32 holds exp(-2 kShared) and, with room for grad_loss, its inverse
constexpr int64_t kPadding = 32;    // of rows and features: what AMX, and transposes of pairs, want
constexpr int64_t kMaxGroup = 4;
constexpr int64_t kSerialWork = int64_t{1} << 22;  // N^2 D below which threads cost more than they bring

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
int64_t cut(int64_t x, int64_t pieces) { return (x + pieces - 1) / pieces; }

const ContrastiveTiles& tiles(Isa isa) {
  switch (isa) {
#if defined(FASTSSL_HAVE_AVX512_BF16)
    case Isa::Amx:
    case Isa::Avx512Bf16:
      return avx512_bf16::contrastive_tiles;
#endif
#if defined(FASTSSL_HAVE_AVX512)
    case Isa::Avx512:
      return avx512::contrastive_tiles;
#endif
#if defined(FASTSSL_HAVE_AVX2)
    case Isa::Avx2:
      return avx2::contrastive_tiles;
#endif
    default:
      return baseline::contrastive_tiles;
  }
}

// How this process multiplies: the instruction set's functions, oneDNN or not, and in what precision.
struct Engine {
  const ContrastiveTiles& tile;
  bool onednn;
  Operand operand;

  explicit Engine(std::string_view precision)
      : tile(tiles(current())), onednn(current() >= Isa::Avx512 && at::globalContext().userEnabledMkldnn()) {
    const bool bfloat16 = precision == "bfloat16";
    const bool pairs = onednn && current() >= Isa::Avx512Bf16;
    operand = !bfloat16 ? Operand::Float32 : pairs ? Operand::BFloat16 : Operand::RoundedToBFloat16;
  }

  bool half() const { return operand == Operand::BFloat16; }
  int64_t bytes() const { return half() ? 2 : 4; }

  // C (M x N) = [C +] A (M x K) B (K x N); leading dimensions are K, N, N.
  void multiply(int64_t M, int64_t N, int64_t K, bool add, const void* A, const void* B, float* C) const {
    if (half()) {
      at::native::cpublas::brgemm(M, N, K, K, N, N, add, static_cast<const at::BFloat16*>(A),
                                  static_cast<const at::BFloat16*>(B), C);
    } else if (onednn) {
      at::native::cpublas::brgemm(M, N, K, K, N, N, add, static_cast<const float*>(A), static_cast<const float*>(B), C);
    } else {
      tile.gemm(M, N, K, K, N, N, add, static_cast<const float*>(A), static_cast<const float*>(B), C);
    }
  }

  // To be called by a thread that has multiplied: AMX's tile registers are a state of the thread.
  void release() const {
    if (onednn) at::native::cpublas::brgemm_release(half());
  }
};

// `task(i)` for i in [0, count), on the plan's threads; `done()` by each thread when it has no more.
template <typename Task, typename Done>
void run(const TilePlan& plan, int64_t count, const Task& task, const Done& done) {
  const auto tasks = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
    done();
  };
  if (plan.threads == 1) {
    if (count) tasks(0, count);
  } else {
    at::parallel_for(0, count, 1, tasks);
  }
}

// The calling thread's number among the plan's threads.
int slot(const TilePlan& plan) { return plan.threads == 1 ? 0 : at::get_thread_num(); }

// Calls visit(I, J) for every pair of blocks I <= J. Two calls that share a block never run at once, and come in
// the same order in every run.
template <typename Visit, typename Done>
void tournament(const TilePlan& plan, const Visit& visit, const Done& done) {
  const int64_t players = cut(plan.blocks, plan.group);
  const auto first = [&](int64_t player) { return player * plan.group; };
  const auto last = [&](int64_t player) { return std::min((player + 1) * plan.group, plan.blocks); };
  // Round 0: every player against itself.
  run(plan, players, [&](int64_t p) {
    for (int64_t i = first(p); i < last(p); ++i)
      for (int64_t j = i; j < last(p); ++j) visit(i, j);
  }, done);
  // The circle method: the last player stays, the others turn; with an odd number one of them rests.
  const int64_t seats = players + players % 2, turning = seats - 1;
  for (int64_t round = 0; round < (players > 1 ? turning : 0); ++round) {
    run(plan, seats / 2, [&](int64_t table) {
      int64_t p = table == 0 ? turning : (round + table) % turning;
      int64_t q = table == 0 ? round : (round - table + turning) % turning;
      if (p > q) std::swap(p, q);
      if (q >= players) return;
      for (int64_t i = first(p); i < last(p); ++i)
        for (int64_t j = first(q); j < last(q); ++j) visit(i, j);
    }, done);
  }
}

void nothing() {}

// One array per block, all in one allocation, each block's part aligned to a cache line.
struct Blocks {
  Tensor memory;
  int64_t bytes_per_block;

  Blocks(int64_t blocks, int64_t bytes) : bytes_per_block(round_up(bytes, 64)) {
    memory = at::empty({blocks * bytes_per_block + 64}, at::kByte);
  }
  void* operator[](int64_t block) const {
    const auto base = round_up(reinterpret_cast<int64_t>(memory.mutable_data_ptr()), 64);
    return reinterpret_cast<char*>(base) + block * bytes_per_block;
  }
  float* floats(int64_t block) const { return static_cast<float*>((*this)[block]); }
};

// The rows, normalised and packed block by block.
struct Operands {
  Tensor z1, z2;
  Rows rows;
  int64_t count;       // N
  int64_t dim;         // padded
  bool normalize;
  const Engine& engine;
  const TilePlan plan;
  Blocks left, right, right_pairs, left_columns;
  Tensor inverse_norm;
  float largest_square = 0;  // max |z_i|^2, 1 where rows are normalised, NaN where one is

  Operands(const Tensor& z1_, const Tensor& z2_, bool normalize, const Engine& engine, bool for_backward)
      : z1(z1_.stride(1) == 1 ? z1_ : z1_.contiguous()),
        z2(z2_.stride(1) == 1 ? z2_ : z2_.contiguous()),
        rows{{z1.const_data_ptr(), z2.const_data_ptr()},
             {z1.stride(0), z2.stride(0)},
             z1.size(0),
             z1.size(1),
             z1.scalar_type() == at::kFloat      ? Element::Float32
                 : z1.scalar_type() == at::kHalf ? Element::Float16
                                                 : Element::BFloat16},
        count(2 * z1.size(0)),
        dim(round_up(z1.size(1), kPadding)),
        normalize(normalize),
        engine(engine),
        plan(tile_plan(count, z1.size(1), at::get_num_threads())),
        left(plan.blocks, block_bytes()),
        right(plan.blocks, block_bytes()),
        right_pairs(plan.blocks, engine.half() && for_backward ? block_bytes() : 0),
        left_columns(plan.blocks, engine.half() && for_backward ? block_bytes() : 0),
        inverse_norm(at::empty({count}, at::kFloat)) {
    const Blocks scratch(plan.threads, plan.block * dim * 4);
    const Tensor squares = at::zeros({plan.blocks}, at::kFloat);
    float* square = squares.mutable_data_ptr<float>();
    run(plan, plan.blocks, [&](int64_t b) {
      const bool pairs = engine.half() && for_backward;
      const Packed out{left[b], right[b], pairs ? right_pairs[b] : nullptr, pairs ? left_columns[b] : nullptr};
      square[b] = engine.tile.pack(rows, first(b), size(b), padded(b), dim, normalize, engine.operand,
                                   inverse_norm.mutable_data_ptr<float>() + first(b),
                                   scratch.floats(slot(plan)), out);
    }, nothing);
    for (int64_t b = 0; b < plan.blocks; ++b)
      largest_square = square[b] <= largest_square ? largest_square : square[b];  // keeps a NaN
  }

  int64_t block_bytes() const { return plan.block * dim * engine.bytes(); }
  int64_t first(int64_t b) const { return b * plan.block; }
  int64_t size(int64_t b) const { return std::min(plan.block, count - first(b)); }
  int64_t padded(int64_t b) const { return round_up(size(b), kPadding); }
  int64_t positive(int64_t i) const { return i < rows.batch ? i + rows.batch : i - rows.batch; }

  // S of tile (I, J), unscaled, as (padded(I), padded(J)).
  void similarities(int64_t I, int64_t J, float* S) const {
    engine.multiply(padded(I), padded(J), dim, false, left[I], right[J], S);
  }

  // Makes 2^(c S) zero in the padding of tile (I, J) and, in a tile of the diagonal, for rows with themselves.
  void exclude(int64_t I, int64_t J, float excluded, float* S) const {
    const int64_t ld = padded(J);
    if (I == J)
      for (int64_t r = 0; r < size(I); ++r) S[r * ld + r] = excluded;
    if (size(J) < ld)
      for (int64_t r = 0; r < size(I); ++r) std::fill(S + r * ld + size(J), S + (r + 1) * ld, excluded);
    std::fill(S + size(I) * ld, S + padded(I) * ld, excluded);
  }

  // f(r, c, i, j) for every positive pair in tile (I, J): its place (r, c) in the tile and its rows (i, j).
  template <typename F>
  void each_positive(int64_t I, int64_t J, const F& f) const {
    // Row i of the first half meets column i + B, row i of the second column i - B: two diagonals of the matrix.
    for (const int64_t offset : {rows.batch, -rows.batch}) {
      const int64_t low = std::max(first(I), first(J) - offset);
      const int64_t high = std::min(first(I) + size(I), first(J) + size(J) - offset);
      for (int64_t i = low; i < high; ++i)
        if (positive(i) == i + offset) f(i - first(I), i + offset - first(J), i, i + offset);
    }
  }
};

// c with 2^(c S) = exp(scale S). Never 0, which would turn the -inf of an excluded entry into NaN.
float exponent_factor(float scale) {
  const float c = static_cast<float>(scale * kLog2E);
  return c == 0 ? std::numeric_limits<float>::min() : c;
}

// fastssl.functional says this in better words; here it keeps a direct call from reading out of bounds.
void check(const Tensor& z1, const Tensor& z2, const Tensor& scale, at::TensorList per_row) {
  TORCH_CHECK_VALUE(z1.dim() == 2 && z1.size(1) > 0 && z1.sizes() == z2.sizes(),
                    "z1 and z2 must have the same shape (B, D), D > 0, got ", z1.sizes(), " and ", z2.sizes());
  const at::ScalarType dtype = z1.scalar_type();
  TORCH_CHECK_VALUE(dtype == z2.scalar_type() && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf),
                    "z1 and z2 must both be float32, bfloat16 or float16, got ", dtype, " and ", z2.scalar_type());
  TORCH_CHECK_VALUE(scale.numel() == 1, "scale must have one element, got shape ", scale.sizes());
  for (const Tensor& t : per_row)
    TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.dim() == 1 && t.size(0) == 2 * z1.size(0),
                      "grad_loss, shift and total must be float32 of shape (", 2 * z1.size(0), "), got ",
                      t.scalar_type(), " of shape ", t.sizes());
}

std::tuple<Tensor, Tensor, Tensor> nt_xent(const Tensor& z1, const Tensor& z2, const Tensor& scale_tensor,
                                           bool normalize, c10::string_view precision) {
  if (z1.scalar_type() == at::kDouble) {
    static const auto portable = c10::Dispatcher::singleton()
        .findSchemaOrThrow("fastssl::nt_xent_portable", "")
        .typed<decltype(nt_xent)>();
    return portable.call(z1, z2, scale_tensor, normalize, precision);
  }
  check(z1, z2, scale_tensor, {});
  const Engine engine(precision);
  const Operands z(z1, z2, normalize, engine, false);
  const TilePlan& plan = z.plan;
  const float scale = scale_tensor.item<float>(), c = exponent_factor(scale);
  const float excluded = -std::copysign(std::numeric_limits<float>::infinity(), c);
  const bool shared = std::abs(scale) * z.largest_square <= kShared;
  // As the backward pass will see it.
  const float shared_shift = std::abs(scale) * z.largest_square, shared_origin = scale ? shared_shift / scale : 0;

  const Tensor loss = at::empty({z.count}, at::kFloat), total = at::empty({z.count}, at::kFloat);
  const Tensor shift = at::empty({z.count}, at::kFloat);
  // Padded, since tiles add to whole vectors.
  const Tensor totals = at::zeros({plan.blocks * plan.block}, at::kDouble);
  const Tensor origins = at::full({plan.blocks * plan.block}, excluded, at::kFloat);
  const Tensor aligned = at::empty({z.count}, at::kFloat);  // <z_i, z_pos(i)>, from the very tile that is summed
  const Blocks tile(plan.threads, plan.block * plan.block * 4);
  double* const sum = totals.mutable_data_ptr<double>();
  float* const origin = origins.mutable_data_ptr<float>();
  float* const alignment = aligned.mutable_data_ptr<float>();

  tournament(plan, [&](int64_t I, int64_t J) {
    float* S = tile.floats(slot(plan));
    const int64_t ld = z.padded(J);
    z.similarities(I, J, S);
    z.each_positive(I, J, [&](int64_t r, int64_t col, int64_t i, int64_t j) {
      alignment[i] = alignment[j] = S[r * ld + col];
    });
    z.exclude(I, J, excluded, S);
    double* const row_sum = sum + z.first(I);
    double* const column_sum = I == J ? nullptr : sum + z.first(J);
    if (shared) {
      engine.tile.sum_exponentials(S, ld, z.size(I), ld, c, shared_origin, row_sum, column_sum);
    } else {
      engine.tile.sum_exponentials_online(S, ld, z.size(I), ld, c, row_sum, origin + z.first(I), column_sum,
                                          origin + z.first(J));
    }
  }, [&] { engine.release(); });

  const double step = c * kLn2;  // scale, as the exponentials have it
  float* const out = loss.mutable_data_ptr<float>();
  float* const out_total = total.mutable_data_ptr<float>();
  float* const out_shift = shift.mutable_data_ptr<float>();
  at::parallel_for(0, z.count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float from = shared ? shared_origin : origin[i];
      const double value = std::log(sum[i]) + step * (from - alignment[i]);
      // No loss is below 0, and a pair alone has none: what is left of it is rounding. Not 0, so that NaN stays NaN.
      out[i] = static_cast<float>(value < 0 || z.count == 2 ? value - value : value);
      out_shift[i] = shared ? shared_shift : scale * from;
      // The backward pass will find the origin from the rounded shift: the total moves there.
      out_total[i] = static_cast<float>(shared ? sum[i] : sum[i] * std::exp(step * (from - out_shift[i] / scale)));
    }
  });
  return {loss, shift, total};
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(const Tensor& grad_loss, const Tensor& z1, const Tensor& z2,
                                                    const Tensor& scale_tensor, const Tensor& shift,
                                                    const Tensor& total, bool normalize, c10::string_view precision) {
  if (z1.scalar_type() == at::kDouble) {
    static const auto portable = c10::Dispatcher::singleton()
        .findSchemaOrThrow("fastssl::nt_xent_backward_portable", "")
        .typed<decltype(nt_xent_backward)>();
    return portable.call(grad_loss, z1, z2, scale_tensor, shift, total, normalize, precision);
  }
  check(z1, z2, scale_tensor, {grad_loss, shift, total});
  const Engine engine(precision);
  const Operands z(z1, z2, normalize, engine, true);
  const TilePlan& plan = z.plan;
  const float scale = scale_tensor.item<float>(), c = exponent_factor(scale);
  const float excluded = -std::copysign(std::numeric_limits<float>::infinity(), c);

  // Padded, since tiles read whole vectors.
  const int64_t padded_count = plan.blocks * plan.block;
  const Tensor a = at::zeros({padded_count}, at::kFloat), o = at::zeros({padded_count}, at::kFloat);
  const Tensor g = grad_loss.contiguous();
  a.narrow(0, 0, z.count).copy_(g.div(total));
  if (scale) o.narrow(0, 0, z.count).copy_(shift.div(scale));
  const Tensor positive_weights = at::empty({z.count}, at::kFloat);
  const float* const grad = g.const_data_ptr<float>();
  const float* const coefficient = a.const_data_ptr<float>();
  const float* const origin = o.const_data_ptr<float>();
  const bool shared = std::all_of(origin, origin + z.count, [&](float x) { return x == origin[0]; });
  float* const positive_weight = positive_weights.mutable_data_ptr<float>();

  const int64_t dim = z.dim;
  const Blocks tile(plan.threads, plan.block * std::max(plan.block, dim) * 4);
  const Blocks half_tile(plan.threads, engine.half() ? 2 * plan.block * plan.block * 2 : 0);
  const Blocks gradient(plan.blocks, plan.block * dim * 4), transposed(plan.blocks, plan.block * dim * 4);
  run(plan, plan.blocks, [&](int64_t b) {  // first touched by the threads that will use it
    std::fill_n(gradient.floats(b), z.padded(b) * dim, 0.f);
    std::fill_n(transposed.floats(b), z.padded(b) * dim, 0.f);
  }, nothing);

  tournament(plan, [&](int64_t I, int64_t J) {
    float* S = tile.floats(slot(plan));
    const int64_t m = z.padded(I), n = z.padded(J);
    z.similarities(I, J, S);
    const float* a_row = coefficient + z.first(I);
    const float* a_column = coefficient + z.first(J);
    z.each_positive(I, J, [&](int64_t r, int64_t col, int64_t i, int64_t j) {
      const auto p = [&](int64_t k) {
        return coefficient[k] * std::exp2((S[r * n + col] - origin[k]) * c);
      };
      positive_weight[i] = positive_weight[j] = p(i) + p(j) - (grad[i] + grad[j]);
      S[r * n + col] = excluded;
    });
    z.exclude(I, J, excluded, S);
    auto* half = engine.half() ? static_cast<at::BFloat16*>(half_tile[slot(plan)]) : nullptr;
    auto* pairs = engine.half() ? half + m * n : nullptr;
    if (shared) {
      engine.tile.weights(S, n, m, n, c, origin[0], a_row, a_column, half, pairs);
    } else {
      engine.tile.weights_online(S, n, m, n, c, a_row, origin + z.first(I), a_column, origin + z.first(J), half, pairs);
    }
    engine.multiply(m, dim, n, true, half ? static_cast<void*>(half) : S, half ? z.right_pairs[J] : z.left[J],
                    gradient.floats(I));
    if (I != J)
      engine.multiply(dim, n, m, true, half ? z.left_columns[I] : z.right[I], half ? static_cast<void*>(pairs) : S,
                      transposed.floats(J));
  }, [&] { engine.release(); });

  const Tensor dz1 = at::empty(z1.sizes(), z1.options()), dz2 = at::empty(z2.sizes(), z2.options());
  const Rows out{{dz1.mutable_data_ptr(), dz2.mutable_data_ptr()}, {z.rows.dim, z.rows.dim}, z.rows.batch, z.rows.dim,
                 z.rows.element};
  const Tensor alongs = at::zeros({plan.blocks}, at::kDouble);
  double* const along = alongs.mutable_data_ptr<double>();
  const float* const inverse_norm = z.inverse_norm.const_data_ptr<float>();
  run(plan, plan.blocks, [&](int64_t b) {
    float* scratch = tile.floats(slot(plan));
    float* sums = gradient.floats(b);
    engine.tile.add_transposed(transposed.floats(b), z.padded(b), dim, sums, scratch);
    for (int64_t r = 0; r < z.size(b); ++r) {
      const int64_t i = z.first(b) + r, p = z.positive(i);
      along[b] += engine.tile.finish_row(z.rows[i], inverse_norm[i], z.rows[p], inverse_norm[p], positive_weight[i],
                                         scale, normalize, z.rows.element, z.rows.dim, sums + r * dim, scratch,
                                         const_cast<void*>(out[i]));
    }
  }, nothing);
  double dscale = 0;
  for (int64_t b = 0; b < plan.blocks; ++b) dscale += along[b] / 2;  // in this order: deterministic
  return {dz1, dz2, at::full({}, dscale, scale_tensor.options())};
}

TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("nt_xent", &nt_xent);
  m.impl("nt_xent_backward", &nt_xent_backward);
}

}  // namespace

TilePlan tile_plan(int64_t rows, int64_t dim, int threads) {
  const int64_t padded = round_up(std::max<int64_t>(dim, 1), kPadding);
  TilePlan plan;
  plan.threads = rows * rows * dim < kSerialWork ? 1 : threads;
  // A tile, its operands and its outputs share the second-level cache.
  plan.block = padded <= 256 ? 256 : padded <= 768 ? 128 : 64;
  // Every thread gets work in every round: two blocks per thread, and some more to even out.
  while (plan.block > 64 && rows < 4 * plan.threads * plan.block) plan.block /= 2;
  plan.block = std::min(plan.block, round_up(std::max<int64_t>(rows, 1), kPadding));
  plan.blocks = cut(rows, plan.block);
  plan.group = 1;
  while (2 * plan.group <= kMaxGroup && plan.blocks >= 8 * plan.threads * plan.group) plan.group *= 2;
  return plan;
}

}  // namespace fastssl
