// Tiled products on the CPU: how to multiply, what to multiply, and which thread takes which tile.
//
// A matrix S = X Y^T of similarities is cut into blocks of rows and of columns; their tiles are computed one at a time,
// in float32 and small enough for the second-level cache, used, and forgotten. Products run in oneDNN's micro-kernels
// (AMX, AVX-512) through ATen, else in common/gemm.h. bfloat16 products read operands rounded once, and weights rounded
// once; "tf32" and "float16" multiply in float32.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "product_tiles.h"

namespace fastssl {

using at::Tensor;

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr int64_t kPadding = 32;  // of rows and features: what AMX, and transposes of pairs, want

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int64_t pieces(int64_t x, int64_t size) { return (x + size - 1) / size; }

// How this process multiplies: the instruction set's functions, oneDNN or not, and in what precision.
struct Engine {
  const ProductTiles& tile;
  bool onednn;
  Operand operand;

  explicit Engine(std::string_view precision)
      : tile(FASTSSL_TABLE_IN_USE(product_tiles)),
        onednn(current() >= Isa::Avx512 && at::globalContext().userEnabledMkldnn()) {
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

// How many threads share M x N similarities of D features: one where more cost more than they bring.
inline int threads_for(int64_t M, int64_t N, int64_t D, int threads = at::get_num_threads()) {
  return double(M) * double(N) * double(D) < double(1 << 20) ? 1 : threads;
}

// `task(i)` for i in [0, count), on that many threads; `done()` by each thread when it has no more.
template <typename Task, typename Done>
void run(int threads, int64_t count, const Task& task, const Done& done) {
  const auto tasks = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
    done();
  };
  if (threads == 1) {
    if (count) tasks(0, count);
  } else {
    at::parallel_for(0, count, 1, tasks);
  }
}

template <typename Task>
void run(int threads, int64_t count, const Task& task) {
  run(threads, count, task, [] {});
}

// The calling thread's number among that many.
inline int slot(int threads) { return threads == 1 ? 0 : at::get_thread_num(); }

// How rows are cut: into `blocks` of `block` rows, `group` of which one task takes together, to read memory less often.
struct Cut {
  int64_t block, blocks, group;

  Cut(int64_t rows, int64_t dim, int threads) {
    const int64_t padded = round_up(std::max<int64_t>(dim, 1), kPadding);
    // A tile, its operands and its outputs share the second-level cache.
    block = padded <= 256 ? 256 : padded <= 768 ? 128 : 64;
    // Every thread gets work in every round: two blocks per thread, and some more to even out.
    while (block > 64 && rows < 4 * threads * block) block /= 2;
    if (threads > 1 && rows < threads * block) block = 32;
    block = std::min(block, round_up(std::max<int64_t>(rows, 1), kPadding));
    blocks = pieces(rows, block);
    group = 1;
    while (group < 4 && blocks >= 8 * threads * group) group *= 2;
  }

  int64_t groups() const { return pieces(blocks, group); }

  template <typename F>
  void each(int64_t g, const F& f) const {
    for (int64_t b = g * group; b < std::min((g + 1) * group, blocks); ++b) f(b);
  }
};

// Calls visit(I, J) for every pair of blocks I <= J. Two calls that share a block never run at once, and come in
// the same order in every run: what a block gathers has the same bits, whatever thread runs which tile. Groups of
// blocks are players of a round-robin tournament (the circle method).
template <typename Visit, typename Done>
void tournament(int threads, const Cut& cut, const Visit& visit, const Done& done) {
  const int64_t players = cut.groups();
  // Round 0: every player against itself.
  run(threads, players, [&](int64_t p) {
    cut.each(p, [&](int64_t i) {
      cut.each(p, [&](int64_t j) {
        if (i <= j) visit(i, j);
      });
    });
  }, done);
  // The last player stays, the others turn; with an odd number one of them rests.
  const int64_t seats = players + players % 2, turning = seats - 1;
  for (int64_t round = 0; round < (players > 1 ? turning : 0); ++round) {
    run(threads, seats / 2, [&](int64_t table) {
      int64_t p = table == 0 ? turning : (round + table) % turning;
      int64_t q = table == 0 ? round : (round - table + turning) % turning;
      if (p > q) std::swap(p, q);
      if (q >= players) return;
      cut.each(p, [&](int64_t i) { cut.each(q, [&](int64_t j) { visit(i, j); }); });
    }, done);
  }
}

// The same for every pair of a block of rows I and a block of columns J: in round k row group p meets column group
// p + k, modulo the larger number of groups.
template <typename Visit, typename Done>
void match(int threads, const Cut& rows, const Cut& columns, const Visit& visit, const Done& done) {
  const int64_t P = rows.groups(), Q = columns.groups(), rounds = std::max(P, Q);
  for (int64_t round = 0; round < rounds; ++round) {
    run(threads, std::min(P, Q), [&](int64_t table) {
      const int64_t p = P <= Q ? table : (table + round) % rounds, q = P <= Q ? (table + round) % rounds : table;
      rows.each(p, [&](int64_t i) { columns.each(q, [&](int64_t j) { visit(i, j); }); });
    }, done);
  }
}

// One array per block, all in one allocation, each block's part aligned to a cache line.
struct Blocks {
  Tensor memory;
  int64_t bytes_per_block;

  Blocks(int64_t blocks, int64_t bytes) : bytes_per_block(round_up(bytes, 64)) {
    memory = at::empty({blocks * bytes_per_block + 64}, at::kByte);
  }
  void* operator[](int64_t block) const {
    if (bytes_per_block == 0) return nullptr;
    const auto base = round_up(reinterpret_cast<int64_t>(memory.mutable_data_ptr()), 64);
    return reinterpret_cast<char*>(base) + block * bytes_per_block;
  }
  float* floats(int64_t block) const { return static_cast<float*>((*this)[block]); }
};

// 0-d float32, or of `options`. More than that holds is infinite.
inline Tensor scalar(double value, const at::TensorOptions& options = at::kFloat) {
  return at::full({}, static_cast<float>(value), options);
}

// What a block of rows Z is multiplied as.
enum Role : int {
  kRows = 1,      // Z in S = Z Y^T
  kColumns = 2,   // Z in S = X Z^T
  kWeighed = 4,   // Z in W Z
  kWeighing = 8,  // Z in W^T Z; see `Gathered`
};

// Whether elements of x have kernels; and which they are then.
inline bool has_element(const Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}

inline Element element_of(const Tensor& x) {
  return x.scalar_type() == at::kFloat ? Element::Float32 : x.scalar_type() == at::kHalf ? Element::Float16
                                                                                         : Element::BFloat16;
}

// One side of S: the rows of a tensor, or of two on top of each other, (normalised and) packed block by block. A lazy
// one is not packed as a whole: a thread calls prepare(b) before it uses block b, and keeps one block at a time.
struct Side {
  Tensor first_part, second_part;
  Rows rows;
  int64_t count;
  int64_t dim;  // padded
  const Engine& engine;
  int threads;
  Cut cut;
  bool normalize, lazy;
  bool turned;  // W^T Z is a product of turned W, else of Z^T
  int roles;
  Blocks left, right, right_pairs, left_columns, scratch;
  Tensor inverse_norm;
  float largest_square = 0;  // max |z_i|^2, 1 where rows are normalised; with NaN rows any number: tiles carry NaN

  Side(const Tensor& x, int wanted, const Engine& engine, int threads, bool lazy = false)
      : Side(x, x.narrow(0, 0, 0), false, wanted, engine, threads, lazy) {}

  Side(const Tensor& x1, const Tensor& x2, bool normalize, int wanted, const Engine& engine, int threads,
       bool lazy = false)
      : first_part(x1.stride(1) == 1 ? x1 : x1.contiguous()),
        second_part(x2.stride(1) == 1 ? x2 : x2.contiguous()),
        rows{{first_part.const_data_ptr(), second_part.const_data_ptr()},
             {first_part.stride(0), second_part.stride(0)},
             x1.size(0),
             x1.size(1),
             element_of(x1)},
        count(x1.size(0) + x2.size(0)),
        dim(round_up(x1.size(1), kPadding)),
        engine(engine),
        threads(threads),
        cut(count, x1.size(1), threads),
        normalize(normalize),
        lazy(lazy),
        turned(count <= 2 * dim),
        roles(turned && (wanted & kWeighing) ? (wanted & ~kWeighing) | kWeighed : wanted),
        left(places(), roles & (kRows | (engine.half() ? 0 : kWeighed)) ? block_bytes() : 0),
        right(places(), roles & (kColumns | (engine.half() ? 0 : kWeighing)) ? block_bytes() : 0),
        right_pairs(places(), engine.half() && (roles & kWeighed) ? block_bytes() : 0),
        left_columns(places(), engine.half() && (roles & kWeighing) ? block_bytes() : 0),
        scratch(threads, 2 * cut.block * dim * 4),
        inverse_norm(at::empty({count}, at::kFloat)) {
    const Tensor squares = at::zeros({cut.blocks}, at::kFloat);
    float* square = squares.mutable_data_ptr<float>();
    run(threads, cut.blocks, [&](int64_t b) {
      square[b] = lazy ? engine.tile.largest_square(rows, first(b), size(b), scratch.floats(slot(threads))) : prepare(b);
    });
    for (int64_t b = 0; b < cut.blocks; ++b)
      largest_square = square[b] <= largest_square ? largest_square : square[b];
    if (!lazy) scratch.memory = Tensor();
  }

  // Packs block b, and returns its largest |z|^2.
  float prepare(int64_t b) const {
    const int64_t at = place(b);
    const Packed out{as_they_lie(b) ? nullptr : left[at], right[at], right_pairs[at], left_columns[at]};
    return engine.tile.pack(rows, first(b), size(b), padded(b), dim, normalize, engine.operand,
                            inverse_norm.mutable_data_ptr<float>() + first(b), scratch.floats(slot(threads)), out);
  }

  // Whether block b is an operand without being packed.
  bool as_they_lie(int64_t b) const {
    return engine.operand == Operand::Float32 && rows.element == Element::Float32 && !normalize && rows.dim == dim &&
        rows.stride[0] == dim && size(b) == padded(b) && rows.batch == count;
  }

  // Where block b is packed.
  int64_t places() const { return lazy ? threads : cut.blocks; }
  int64_t place(int64_t b) const { return lazy ? slot(threads) : b; }

  int64_t block_bytes() const { return cut.block * dim * engine.bytes(); }
  int64_t first(int64_t b) const { return b * cut.block; }
  int64_t size(int64_t b) const { return std::min(cut.block, count - first(b)); }
  int64_t padded(int64_t b) const { return round_up(size(b), kPadding); }
  int64_t padded_count() const { return cut.blocks * cut.block; }

  // Block b as each operand.
  const void* as_rows(int64_t b) const { return as_they_lie(b) ? rows[first(b)] : left[place(b)]; }
  const void* as_columns(int64_t b) const { return right[place(b)]; }
  const void* weighed(int64_t b) const { return engine.half() ? right_pairs[place(b)] : as_rows(b); }
  const void* weighing(int64_t b) const { return engine.half() ? left_columns[place(b)] : right[place(b)]; }
};

// What the blocks of a side gather of their gradient from weights W of tiles of S: W Y of its columns where the side is
// X, W^T X of its rows where it is Y.
//
// W^T X is gathered transposed, as X^T W: W is then a right operand as it lies, and X is packed transposed, once. Where
// X has few rows, at most twice its features, to turn the tiles is less work.
struct Gathered {
  const Side& side;
  Blocks sums, transposed;  // (rows, dim) and (dim, rows) floats each
  Blocks turned;
  std::vector<char> has_sums, has_transposed;  // the first term of a sum is stored, not added

  // Of rows' tiles, if `of_rows`, and of columns' unless `x` is null, the side that S has as rows then.
  Gathered(const Side& side, bool of_rows, const Side* x)
      : side(side),
        sums(side.cut.blocks, of_rows || (x && x->turned) ? side.cut.block * side.dim * 4 : 0),
        transposed(side.cut.blocks, x && !x->turned ? side.cut.block * side.dim * 4 : 0),
        turned(side.threads, x && x->turned ? x->cut.block * side.cut.block * side.engine.bytes() : 0),
        has_sums(side.cut.blocks),
        has_transposed(side.cut.blocks) {}

  // Block I gathers W Y_J, W being (rows, columns) of float32 or bfloat16.
  void add(int64_t I, const void* W, const Side& y, int64_t J) {
    side.engine.multiply(side.padded(I), side.dim, y.padded(J), std::exchange(has_sums[I], 1), W, y.weighed(J),
                         sums.floats(I));
  }

  // Block J gathers W^T X_I, W being float32, or bfloat16 in pairs.
  void add_columns(int64_t J, const void* W, const Side& x, int64_t I) {
    const int64_t m = x.padded(I), n = side.padded(J);
    if (!x.turned) {
      side.engine.multiply(side.dim, n, m, std::exchange(has_transposed[J], 1), x.weighing(I), W, transposed.floats(J));
      return;
    }
    float* const turn = turned.floats(slot(side.threads));
    side.engine.tile.transposed(static_cast<const float*>(W), n, side.engine.half() ? m / 2 : m, turn);
    side.engine.multiply(n, side.dim, m, std::exchange(has_sums[J], 1), turn, x.weighed(I), sums.floats(J));
  }

  // What block b has gathered, (rows, dim). `spare` has room for it.
  float* operator()(int64_t b, float* spare) const {
    const int64_t elements = side.padded(b) * side.dim;
    if (has_transposed[b]) side.engine.tile.transposed(transposed.floats(b), side.padded(b), side.dim, spare);
    if (!has_sums[b]) {
      if (!has_transposed[b]) std::fill_n(spare, elements, 0.f);
      return spare;
    }
    float* const sum = sums.floats(b);
    if (has_transposed[b])
      for (int64_t i = 0; i < elements; ++i) sum[i] += spare[i];
    return sum;
  }
};

// c with 2^(c S) = exp(scale S). Never 0, which would turn the -inf of an excluded entry into NaN.
inline float exponent_factor(float scale) {
  const float c = static_cast<float>(scale * kLog2E);
  return c == 0 ? std::numeric_limits<float>::min() : c;
}

// Tiles of S = X Y^T, unscaled, and what is left out of it.
struct Similarities {
  const Side& x;
  const Side& y;
  float excluded;          // what stands for an entry that is left out, and for padding
  const int64_t* exclude;  // the column to leave out of each row, or null
  bool diagonal;           // leave out the diagonal, where x and y are one side

  void compute(int64_t I, int64_t J, float* S) const {
    x.engine.multiply(x.padded(I), y.padded(J), x.dim, false, x.as_rows(I), y.as_columns(J), S);
  }

  void exclude_from(int64_t I, int64_t J, float* S) const {
    const int64_t rows = x.size(I), columns = y.size(J), ld = y.padded(J);
    if (diagonal && I == J)
      for (int64_t r = 0; r < rows; ++r) S[r * ld + r] = excluded;
    if (exclude)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t column = exclude[x.first(I) + r] - y.first(J);
        if (column >= 0 && column < columns) S[r * ld + column] = excluded;
      }
    if (columns < ld)
      for (int64_t r = 0; r < rows; ++r) std::fill(S + r * ld + columns, S + (r + 1) * ld, excluded);
    std::fill(S + rows * ld, S + x.padded(I) * ld, excluded);
  }

  void operator()(int64_t I, int64_t J, float* S) const {
    compute(I, J, S);
    exclude_from(I, J, S);
  }
};

// fastssl.functional says this in better words; here it keeps a direct call from reading out of bounds.
inline void check_sides(const char* names, const Tensor& x, const Tensor& y, const Tensor& scale) {
  TORCH_CHECK_VALUE(x.dim() == 2 && y.dim() == 2 && x.size(1) > 0 && x.size(1) == y.size(1), names,
                    " must have shapes (M, D) and (N, D), D > 0, got ", x.sizes(), " and ", y.sizes());
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_VALUE(dtype == y.scalar_type() && has_element(x),
                    names, " must both be float32, bfloat16 or float16, got ", dtype, " and ", y.scalar_type());
  TORCH_CHECK_VALUE(scale.numel() == 1, "scale must have one element, got shape ", scale.sizes());
}

// The same of rows that are pairs.
inline void check_pairs(const char* names, const Tensor& x, const Tensor& y, const Tensor& scale) {
  check_sides(names, x, y, scale);
  TORCH_CHECK_VALUE(x.size(0) == y.size(0), names, " must have the same shape, got ", x.sizes(), " and ", y.sizes());
}

inline Tensor checked_exclude(const std::optional<Tensor>& exclude, const Tensor& x) {
  if (!exclude) return Tensor();
  TORCH_CHECK_VALUE(exclude->scalar_type() == at::kLong && exclude->dim() == 1 && exclude->size(0) == x.size(0),
                    "exclude must be int64 of shape (", x.size(0), "), got ", exclude->scalar_type(), " of shape ",
                    exclude->sizes());
  return exclude->contiguous();
}

inline const int64_t* data_of(const Tensor& exclude) { return exclude.defined() ? exclude.const_data_ptr<int64_t>() : nullptr; }

// What float64 calls: the portable variant `name` of the operation whose kernel here is F.
template <auto F, typename... Args>
auto portable(const char* name, Args&&... args) {
  static const auto op = c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .template typed<std::remove_pointer_t<decltype(F)>>();
  return op.call(std::forward<Args>(args)...);
}

// log(1 + exp(x)), and its derivative.
struct Softplus {
  double value, slope;

  explicit Softplus(double x) {
    const double t = std::exp(-std::abs(x));
    value = std::isnan(x) ? x : std::max(x, 0.) + std::log1p(t);
    slope = (x >= 0 ? 1 : t) / (1 + t);
  }
};

// <x_i, y_i> for all rows of two sides, unrounded.
inline Tensor dot_rows(const Side& x, const Side& y) {
  const Tensor dots = at::empty({x.count}, at::kFloat);
  float* const dot = dots.mutable_data_ptr<float>();
  const Blocks scratch(x.threads, 2 * x.dim * 4);
  run(x.threads, x.cut.blocks, [&](int64_t b) {
    for (int64_t i = x.first(b); i < x.first(b) + x.size(b); ++i)
      dot[i] = static_cast<float>(
          x.engine.tile.dot(x.rows[i], y.rows[i], x.rows.element, x.rows.dim, scratch.floats(slot(x.threads))));
  });
  return dots;
}

// A positive for each row of a side: the row of `other` with its number, and its weight.
struct Positives {
  const Side& other;
  const float* weight;
};

// The gradient G of a side, what its blocks have gathered [+ weights of positives]: dx = scale G, in dx's dtype; where
// rows were normalised, through that. Returns sum_i <G_i, z_i>, z the rows as they were multiplied.
inline double finish_side(const Gathered& gathered, const Positives* positives, float scale, const Tensor& dx) {
  const Side& side = gathered.side;
  const Tensor alongs = at::zeros({side.cut.blocks}, at::kDouble);
  double* const along = alongs.mutable_data_ptr<double>();
  const Blocks scratch(side.threads, (side.dim + side.cut.block * side.dim) * 4);
  char* const out = static_cast<char*>(dx.mutable_data_ptr());
  const int64_t row_bytes = side.rows.dim * dx.element_size();
  const float* const inverse_norm = side.inverse_norm.const_data_ptr<float>();
  run(side.threads, side.cut.blocks, [&](int64_t b) {
    float* const row = scratch.floats(slot(side.threads));
    float* const sums = gathered(b, row + side.dim);
    for (int64_t r = 0; r < side.size(b); ++r) {
      const int64_t i = side.first(b) + r;
      along[b] += side.engine.tile.finish(side.rows[i], inverse_norm[i],
                                          positives ? positives->other.rows[i] : nullptr, 1,
                                          positives ? positives->weight[i] : 0, scale, side.normalize,
                                          side.rows.element, side.rows.dim, sums + r * side.dim, row,
                                          element_of(dx), out + i * row_bytes);
    }
  });
  double total = 0;
  for (int64_t b = 0; b < side.cut.blocks; ++b) total += along[b];  // in this order: deterministic
  return total;
}

}  // namespace fastssl
