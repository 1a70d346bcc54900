// Sinkhorn-Knopp on the CPU (SwAV, arXiv:2006.09882; DINOv2, arXiv:2304.07193), and the mean of logits.
//
// The assignments of logits t (N, K) at temperature T are P = softmax((t - center) / T), where center (K) is found
// iteratively:
//
//     center_k = T log mean_i exp(t_ik / T),                at first
//     center_k = center_k + T log(K mean_i P_ik),           then
//
// Algorithm. column_logsumexp keeps the largest logit so far of each column, and the sum of exponentials relative to
// it. assignment_sums takes four rows at a time: their exponentials stay in the second-level cache until each row's sum
// is known, and are then added to the columns. Sums of columns are taken over blocks of rows, then over the blocks in
// their order: the same bits with any number of threads.
//
// Cost. Each iteration is one pass over the logits, with one exponential for each of them (and a few more for maxima
// that grow), and writes nothing of their size.
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "common/exponents.h"
#include "common/pages.h"
#include "common/portable.h"
#include "distillation/sinkhorn_tiles.h"

namespace fastssl {
namespace {

// The rows of logits (N, K) with unit stride within each row.
Rows rows_of(const Tensor& logits) {
  return {{logits.const_data_ptr(), nullptr}, {logits.stride(0), 0}, logits.size(0), logits.size(1), element_of(logits)};
}

Tensor checked(const Tensor& logits, int64_t columns, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) == columns && columns > 0 && logits.scalar_type() == dtype &&
                        has_element(logits),
                    "logits must have shapes (N, K), K > 0, and be float32, bfloat16 or float16, got ",
                    logits.scalar_type(), " of shape ", logits.sizes());
  return columns > 1 && logits.stride(1) != 1 ? logits.contiguous() : logits;
}

// All rows of several matrices of K columns, in blocks. The cut depends on the numbers of rows alone.
struct RowBlocks {
  struct Block {
    Rows rows;
    int64_t first, count;
  };
  std::vector<Tensor> held;
  std::vector<Block> blocks;
  int64_t columns, padded;
  at::TensorOptions options;
  int threads;

  explicit RowBlocks(at::TensorList logits) {
    TORCH_CHECK_VALUE(!logits.empty() && logits[0].dim() == 2, "logits must be at least one matrix");
    columns = logits[0].size(1);
    padded = round_up(columns, 32);
    options = logits[0].options().dtype(at::kFloat);
    int64_t all = 0;
    for (const Tensor& x : logits) {
      held.push_back(checked(x, columns, logits[0].scalar_type()));
      all += x.size(0);
    }
    // Blocks of 8 to 64 rows, about 32 of them where that range allows: their sums are much smaller than the logits.
    const int64_t size = std::min<int64_t>(64, round_up(std::max<int64_t>(all / 32, 1), 8));
    for (const Tensor& x : held)
      for (int64_t first = 0; first < x.size(0); first += size)
        blocks.push_back({rows_of(x), first, std::min(size, x.size(0) - first)});
    threads = all * columns < 1 << 15 ? 1 : at::get_num_threads();
  }

  int64_t size() const { return static_cast<int64_t>(blocks.size()); }

  // A row of floats for each block, or one row if there are none.
  Tensor sums(float value) const { return at::full({std::max<int64_t>(size(), 1), padded}, value, options); }

  // Calls task(first, count) for chunks of columns, which the threads share.
  template <typename Task>
  void each_chunk(const Task& task) const {
    run(threads, pieces(padded, kChunk), [&](int64_t n) {
      const int64_t first = n * kChunk;
      task(first, std::min(kChunk, padded - first));
    });
  }

  // The sum over the blocks.
  Tensor total(const Tensor& of_blocks) const {
    float* const sums = of_blocks.mutable_data_ptr<float>();
    each_chunk([&](int64_t first, int64_t count) {
      for (int64_t k = first; k < first + count; ++k) {
        double sum = 0;
        for (int64_t b = 0; b < std::max<int64_t>(size(), 1); ++b) sum += sums[b * padded + k];
        sums[k] = static_cast<float>(sum);
      }
    });
    return row(of_blocks);
  }

  // The first block's row, without padding.
  Tensor row(const Tensor& of_blocks) const { return of_blocks[0].narrow(0, 0, columns).clone(); }
};

bool is_double(at::TensorList logits) { return !logits.empty() && logits[0].scalar_type() == at::kDouble; }

std::tuple<Tensor, Tensor> column_logsumexp(at::TensorList logits, double temperature) {
  if (is_double(logits)) return portable<&column_logsumexp>(logits, temperature);
  const SinkhornTiles& tile = FASTSSL_TABLE_IN_USE(sinkhorn_tiles);
  const RowBlocks all(logits);
  const float c = exponent_scale_at(temperature);
  const Tensor totals = all.sums(0), tops = all.sums(kLowest);
  float *const total = totals.mutable_data_ptr<float>(), *const top = tops.mutable_data_ptr<float>();
  run(all.threads, all.size(), [&](int64_t b) {
    const auto& [rows, first, count] = all.blocks[b];
    tile.sum_exponentials(rows, first, count, c, total + b * all.padded, top + b * all.padded);
  });
  all.each_chunk([&](int64_t first, int64_t count) {
    for (int64_t b = 1; b < all.size(); ++b) {
      const int64_t at = b * all.padded + first;
      tile.add_exponentials(total + at, top + at, count, c, total + first, top + first);
    }
  });
  return {all.row(totals), all.row(tops)};
}

// The center, checked to be float32 of shape (columns), and padded.
Tensor checked_center(const Tensor& center, int64_t columns) {
  TORCH_CHECK_VALUE(center.scalar_type() == at::kFloat && center.dim() == 1 && center.size(0) == columns,
                    "center must be float32 of shape (", columns, "), got ", center.scalar_type(), " of shape ",
                    center.sizes());
  return at::constant_pad_nd(center, {0, round_up(columns, 32) - columns}).contiguous();
}

// How many rows' exponentials a thread keeps in the second-level cache, and how many bytes they take.
int64_t together(int64_t columns) { return columns <= 1 << 16 ? 4 : columns <= 1 << 17 ? 2 : 1; }
int64_t scratch_bytes(int64_t columns) {
  return together(columns) * (round_up(columns, 32) + 2 * pieces(columns, kChunk)) * 4;
}

Tensor assignment_sums(at::TensorList logits, const Tensor& center_, double temperature) {
  if (is_double(logits)) return portable<&assignment_sums>(logits, center_, temperature);
  const SinkhornTiles& tile = FASTSSL_TABLE_IN_USE(sinkhorn_tiles);
  const RowBlocks all(logits);
  const Tensor center = checked_center(center_, all.columns), sums = all.sums(0);
  const float c = exponent_scale_at(temperature);
  const Blocks scratch(all.threads, scratch_bytes(all.columns));
  run(all.threads, all.size(), [&](int64_t b) {
    const auto& [rows, first, count] = all.blocks[b];
    const int64_t step = together(all.columns);
    for (int64_t i = 0; i < count; i += step)
      tile.assign(rows, first + i, std::min(step, count - i), center.const_data_ptr<float>(), c,
                  scratch.floats(slot(all.threads)), sums.mutable_data_ptr<float>() + b * all.padded, nullptr);
  });
  return all.total(sums);
}

Tensor assignments(const Tensor& logits, const Tensor& center_, double temperature) {
  const SinkhornTiles& tile = FASTSSL_TABLE_IN_USE(sinkhorn_tiles);
  const RowBlocks all(logits);
  const Tensor center = checked_center(center_, all.columns);
  const float c = exponent_scale_at(temperature);
  const Tensor out = empty_in_large_pages(logits.sizes(), all.options);
  const Blocks scratch(all.threads, scratch_bytes(all.columns));
  run(all.threads, all.size(), [&](int64_t b) {
    const auto& [rows, first, count] = all.blocks[b];
    const int64_t step = together(all.columns);
    for (int64_t i = first; i < first + count; i += step)
      tile.assign(rows, i, std::min(step, first + count - i), center.const_data_ptr<float>(), c,
                  scratch.floats(slot(all.threads)), nullptr, out.mutable_data_ptr<float>() + i * all.columns);
  });
  return out;
}

Tensor column_sums(at::TensorList logits) {
  if (is_double(logits)) return portable<&column_sums>(logits);
  const SinkhornTiles& tile = FASTSSL_TABLE_IN_USE(sinkhorn_tiles);
  const RowBlocks all(logits);
  const Tensor sums = all.sums(0);
  run(all.threads, all.size(), [&](int64_t b) {
    const auto& [rows, first, count] = all.blocks[b];
    tile.sum(rows, first, count, sums.mutable_data_ptr<float>() + b * all.padded);
  });
  return all.total(sums);
}

FASTSSL_KERNELS(CPU, m) {
  implement<&column_logsumexp, 0>(m, "column_logsumexp");
  implement<&assignment_sums, 0>(m, "assignment_sums");
  implement<&assignments>(m, "assignments");
  implement<&column_sums, 0>(m, "column_sums");
}

}  // namespace
}  // namespace fastssl
