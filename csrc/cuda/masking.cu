// Selecting and restoring tokens on the GPU, as masked autoencoders do (MAE, arXiv:2111.06377).
//
//     masking_ids      which tokens of each sample stay, at random
//     gather_tokens    out[b, k] = x[b, ids[b, k]]
//     scatter_tokens   out[b, l] = sum of tokens[b, k] with ids[b, k] = l, `fill` where there is none
//     restore_tokens   out[b, l] = x_visible[b, ids_restore[b, l]] or the mask token, + pos_embed[l]
//
// Algorithm. A warp moves each row of D elements, 16 bytes per lane where all rows are aligned to that. Each element of
// an output is written once, by one thread, so nothing is zeroed first and there are no atomic sums: the same bits in
// every run. Sums are float32 (float64 for float64 tokens), in ascending order of the tokens.
//
// Cost, in bytes, with s the size of an element: gather 2 B K D s, scatter (B K + B L) D s, restore the same plus one
// read of pos_embed. The gradients of restore_tokens read the visible rows once for x_visible and the masked rows once
// for the mask token; where pos_embed's gradient is wanted, one read of all rows gives both sums. A partial sum for
// every 32 samples and 8 places costs a few per cent more.
//
// masking_ids sorts nothing. A position's key is a hash of the seed (SplitMix64) whose lowest bits are replaced by the
// position itself, so that no two keys are equal. ids_restore, the place in sorted order, is the number of smaller
// keys: L^2 comparisons with keys in shared memory, 256 at a time, for any L. The seed stays on the GPU.
//
// An id out of range stops the process with an assertion, as in PyTorch's own kernels: reporting it in another way
// would make the CPU wait.
#include <cassert>
#include <climits>
#include <optional>
#include <tuple>

#include "common/elements.h"
#include "common/launch.h"

namespace fastssl {
namespace {

constexpr int kThreads = 256;
constexpr int kPlaces = 64;           // places of a sample that a block of `scatter` fills
constexpr int kRows = kThreads / 32;  // rows of a block of threads that takes sums
constexpr int kSamples = 32;          // samples of a partial sum, at least
constexpr int kMostPartialSums = 64;
constexpr int64_t kMost = 1 << 30;  // places of a sample, and features of a token: they are counted with 32 bits

__device__ uint64_t key_of(uint64_t seed, int64_t batch_position, int64_t position, uint64_t low) {
  uint64_t x = seed + (static_cast<uint64_t>(batch_position) + 1) * 0x9E3779B97F4A7C15;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  x = (x ^ x >> 31) >> 1;
  return (x & ~low) | static_cast<uint64_t>(position);
}

// Blocks: (sample, 256 positions). `low` masks the bits that a position takes.
__global__ void __launch_bounds__(kThreads, 4)
    rank(const int64_t* seed, int64_t length, int64_t keep, uint64_t low, int64_t* ids_keep, int64_t* ids_restore,
         float* mask) {
  __shared__ uint64_t keys[kThreads];
  const int64_t sample = blockIdx.x;
  const uint64_t start = static_cast<uint64_t>(*seed);
  for (int64_t first = int64_t(blockIdx.y) * kThreads; first < length; first += int64_t(gridDim.y) * kThreads) {
    const int64_t position = first + threadIdx.x;
    const uint64_t own = key_of(start, sample * length + position, position, low);
    int64_t below = 0;
    for (int64_t other = 0; other < length; other += kThreads) {
      __syncthreads();
      keys[threadIdx.x] = key_of(start, sample * length + other + threadIdx.x, other + threadIdx.x, low);
      __syncthreads();
      const int count = length - other < kThreads ? static_cast<int>(length - other) : kThreads;
#pragma unroll 8
      for (int i = 0; i < count; ++i) below += keys[i] < own;
    }
    if (position < length) {
      if (below < keep) ids_keep[sample * keep + below] = position;
      ids_restore[sample * length + position] = below;
      mask[sample * length + position] = below >= keep;
    }
  }
}

// Gathers rows of `words` words; samples and rows of x are `sample` and `row` words apart. Blocks: (sample, some rows).
template <typename Word>
__global__ void __launch_bounds__(kThreads, 4)
    gather(const Word* __restrict__ x, int64_t sample, int64_t row, Ids ids, int64_t length, int count, int words,
           Word* __restrict__ out) {
  const int64_t first_id = int64_t(blockIdx.x) * count;
  x += blockIdx.x * sample;
  out += first_id * words;
  bool ids_are_in_range = true;
  for (int k = blockIdx.y * blockDim.y + threadIdx.y; k < count; k += gridDim.y * blockDim.y) {
    const int64_t id = ids[first_id + k];
    if (id < 0 || id >= length) {
      ids_are_in_range = false;
      continue;
    }
    const Word* const from = x + id * row;
    Word* const to = out + int64_t(k) * words;
#pragma unroll 4
    for (int w = threadIdx.x; w < words; w += blockDim.x) to[w] = from[w];
  }
  assert(ids_are_in_range);
}

// out[b, l] = sum of tokens[b, k] with ids[b, k] = l, `fill` (nullptr: 0) where there is none. `all_fit`: whether every
// id must be below length. Blocks: (sample, kPlaces places), which first find each place's first and last token.
template <typename scalar_t, int kCount>
__global__ void __launch_bounds__(kThreads, 4)
    scatter(const Vector<scalar_t, kCount>* __restrict__ tokens, Ids ids, bool all_fit, int count, int length,
            int vectors, const Vector<scalar_t, kCount>* __restrict__ fill,
            Vector<scalar_t, kCount>* __restrict__ out) {
  __shared__ int first[kPlaces], last[kPlaces];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t first_id = int64_t(blockIdx.x) * count;
  tokens += first_id * vectors;
  out += int64_t(blockIdx.x) * length * vectors;
  bool ids_are_in_range = true;
  for (int start = blockIdx.y * kPlaces; start < length; start += gridDim.y * kPlaces) {
    if (thread < kPlaces) {
      first[thread] = INT_MAX;
      last[thread] = -1;
    }
    __syncthreads();
    for (int k = thread; k < count; k += kThreads) {
      const int64_t id = ids[first_id + k];
      ids_are_in_range &= id >= 0 && (id < length || !all_fit);
      if (id >= start && id < start + kPlaces) {
        atomicMin(&first[id - start], k);
        atomicMax(&last[id - start], k);
      }
    }
    __syncthreads();
    for (int l = start + threadIdx.y; l < length && l < start + kPlaces; l += blockDim.y) {
      const int begin = first[l - start], end = last[l - start];
      Vector<scalar_t, kCount>* const to = out + int64_t(l) * vectors;
      const Vector<scalar_t, kCount>* const from = begin > end ? fill : tokens + int64_t(begin) * vectors;
      for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
        if (begin == end || (begin > end && fill)) {
          to[v] = from[v];
          continue;
        }
        Wide<scalar_t> sums[kCount] = {};
        for (int k = begin; k <= end; ++k) {
          if (ids[first_id + k] != l) continue;
          const Vector<scalar_t, kCount> token = tokens[int64_t(k) * vectors + v];
          for (int i = 0; i < kCount; ++i) sums[i] += static_cast<Wide<scalar_t>>(token.at[i]);
        }
        Vector<scalar_t, kCount> result;
        for (int i = 0; i < kCount; ++i) result.at[i] = static_cast<scalar_t>(sums[i]);
        to[v] = result;
      }
    }
    __syncthreads();
  }
  assert(ids_are_in_range);  // tokens with other ids were written nowhere
}

// Blocks: (sample, some rows).
template <typename scalar_t, int kCount>
__global__ void __launch_bounds__(kThreads, 4)
    restore(const Vector<scalar_t, kCount>* __restrict__ x, Ids ids, int keep, int length, int vectors,
            const Vector<scalar_t, kCount>* __restrict__ mask_token,
            const Vector<scalar_t, kCount>* __restrict__ positions, Vector<scalar_t, kCount>* __restrict__ out) {
  const int64_t first_id = int64_t(blockIdx.x) * length;
  x += int64_t(blockIdx.x) * keep * vectors;
  out += first_id * vectors;
  bool ids_are_in_range = true;
  for (int l = blockIdx.y * blockDim.y + threadIdx.y; l < length; l += gridDim.y * blockDim.y) {
    const int64_t id = ids[first_id + l];
    ids_are_in_range &= id >= 0;
    const Vector<scalar_t, kCount>* const from = id >= 0 && id < keep ? x + id * vectors : mask_token;
    Vector<scalar_t, kCount>* const to = out + int64_t(l) * vectors;
#pragma unroll 4
    for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
      Vector<scalar_t, kCount> token = from[v];
      if (positions) {
        const Vector<scalar_t, kCount> position = positions[int64_t(l) * vectors + v];
        for (int i = 0; i < kCount; ++i)
          token.at[i] = static_cast<scalar_t>(static_cast<Wide<scalar_t>>(token.at[i]) +
                                              static_cast<Wide<scalar_t>>(position.at[i]));
      }
      to[v] = token;
    }
  }
  assert(ids_are_in_range);
}

// Partial sums of the gradient of restored tokens. Blocks: (kRows places, 32 vectors, `samples` samples).
//     grad_pos_embed[z, l]     over the block's samples, (gridDim.z, L, D); nullptr: not wanted
//     grad_mask_token[z, x]    over its samples and places, of masked tokens only, (gridDim.z, gridDim.x, D)
template <typename scalar_t, int kCount>
__global__ void __launch_bounds__(kThreads, 4)
    sum_gradients(const Vector<scalar_t, kCount>* __restrict__ grad, Ids ids, int64_t batch, int64_t samples,
                  int64_t length, int64_t keep, int64_t vectors, Wide<scalar_t>* __restrict__ grad_pos_embed,
                  Wide<scalar_t>* __restrict__ grad_mask_token) {
  __shared__ Wide<scalar_t> rows[kRows][32 * kCount];
  const int64_t l = int64_t(blockIdx.x) * kRows + threadIdx.y;
  const int64_t v = int64_t(blockIdx.y) * 32 + threadIdx.x;
  const int64_t first = blockIdx.z * samples, dim = vectors * kCount;
  Wide<scalar_t> all[kCount] = {}, masked[kCount] = {};
  if (l < length && v < vectors) {
    for (int64_t b = first; b < batch && b < first + samples; ++b) {
      const bool is_masked = ids[b * length + l] >= keep;
      if (!is_masked && !grad_pos_embed) continue;
      const Vector<scalar_t, kCount> row = grad[(b * length + l) * vectors + v];
      for (int i = 0; i < kCount; ++i) {
        all[i] += static_cast<Wide<scalar_t>>(row.at[i]);
        if (is_masked) masked[i] += static_cast<Wide<scalar_t>>(row.at[i]);
      }
    }
    if (grad_pos_embed)
      for (int i = 0; i < kCount; ++i) grad_pos_embed[(blockIdx.z * length + l) * dim + v * kCount + i] = all[i];
  }
  for (int i = 0; i < kCount; ++i) rows[threadIdx.y][threadIdx.x * kCount + i] = masked[i];
  __syncthreads();
  for (int c = threadIdx.y * 32 + threadIdx.x; c < 32 * kCount; c += kThreads) {
    const int64_t column = int64_t(blockIdx.y) * 32 * kCount + c;
    if (column >= dim) break;
    Wide<scalar_t> sum = 0;
    for (int y = 0; y < kRows; ++y) sum += rows[y][c];
    grad_mask_token[(int64_t(blockIdx.z) * gridDim.x + blockIdx.x) * dim + column] = sum;
  }
}

// The sums of columns: each thread adds up every kRows-th row, then the threads' sums are added. Blocks: 32 columns.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    sum_rows(const T* __restrict__ x, int64_t rows, int64_t columns, T* __restrict__ out) {
  __shared__ T sums[kRows][32];
  const int64_t column = int64_t(blockIdx.x) * 32 + threadIdx.x;
  T sum = 0;
  if (column < columns)
    for (int64_t row = threadIdx.y; row < rows; row += kRows) sum += x[row * columns + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= columns) return;
  for (int y = 1; y < kRows; ++y) sum += sums[y][threadIdx.x];
  out[column] = sum;
}

std::tuple<Tensor, Tensor, Tensor> masking_ids(const Tensor& seed, int64_t batch, int64_t length, int64_t keep) {
  if (seed.scalar_type() != ScalarType::Long || seed.numel() != 1)
    refuse("seed must be one int64, got ", seed.scalar_type(), " of shape ", text(seed.sizes()));
  if (batch < 0 || length < 0 || keep < 0 || keep > length)
    refuse("keep must be from 0 to length, got ", keep, " of ", length);
  const Tensor ids_keep = torch::stable::new_empty(seed, {batch, keep});
  const Tensor ids_restore = torch::stable::new_empty(seed, {batch, length});
  const Tensor mask = torch::stable::new_empty(seed, {batch, length}, ScalarType::Float);
  int bits = 0;
  while (length > int64_t(1) << bits) ++bits;
  Launch{seed}(rank, dim3(batch, at_most_65535(ceil_div(length, kThreads))), kThreads, seed.const_data_ptr<int64_t>(),
               length, keep, (uint64_t(1) << bits) - 1, ids_keep.mutable_data_ptr<int64_t>(),
               ids_restore.mutable_data_ptr<int64_t>(), mask.mutable_data_ptr<float>());
  return {ids_keep, ids_restore, mask};
}

Tensor checked_ids(const char* name, const Tensor& ids, const Tensor& tokens) {
  if (tokens.dim() != 3 || ids.dim() != 2 || ids.size(0) != tokens.size(0))
    refuse(name, " must have shape (B, K) beside tokens of shape (B, L, D), got ", text(ids.sizes()), " and ",
           text(tokens.sizes()));
  if (ids.scalar_type() != ScalarType::Long && ids.scalar_type() != ScalarType::Int)
    refuse(name, " must be int64 or int32, got ", ids.scalar_type());
  check_device(name, ids, tokens);
  if (std::max({ids.size(1), tokens.size(1), tokens.size(2)}) > kMost)
    refuse(name, " and tokens must have at most 2^30 places and features, got ", text(ids.sizes()), " and ",
           text(tokens.sizes()));
  return torch::stable::contiguous(ids);
}

// `rows`, checked to have that many elements, converted to x's dtype and checked to be on its device.
Tensor checked_rows(const char* name, const Tensor& rows, const char* rule, int64_t elements, const Tensor& x) {
  if (rows.numel() != elements) refuse(name, " must have ", rule, ", got shape ", text(rows.sizes()));
  check_device(name, rows, x);
  return torch::stable::contiguous(to_dtype(rows, x.scalar_type()));
}

// Calls visit(Type<Vector<scalar_t, n>>(), vectors of a row), where n elements take 16 bytes if rows of `dim` elements
// at all these addresses allow it, and n = 1 otherwise.
template <typename Visit, typename... Rows>
void with_vectors(const char* name, ScalarType dtype, int64_t dim, const Visit& visit, const Rows&... rows) {
  with_float(dtype, name, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    constexpr int kCount = 16 / sizeof(scalar_t);
    if (common_alignment(dim * sizeof(scalar_t), address(rows)...) == 16)
      visit(Type<Vector<scalar_t, kCount>>(), dim / kCount);
    else
      visit(Type<Vector<scalar_t, 1>>(), dim);
  });
}

Tensor gather_tokens(const Tensor& x_, const Tensor& ids_) {
  const Tensor ids = checked_ids("ids", ids_, x_);
  const Tensor x = x_.stride(2) == 1 ? x_ : torch::stable::contiguous(x_);
  const int64_t batch = ids.size(0), count = ids.size(1), size = x.element_size();
  const Tensor out = torch::stable::new_empty(x, {batch, count, x.size(2)});
  const int64_t bytes = x.size(2) * size, sample = x.stride(0) * size, row = x.stride(1) * size;
  const auto launch = [&]<typename Word>(Type<Word>) {
    constexpr int64_t kWord = sizeof(Word);
    const dim3 threads = threads_for_rows(bytes / kWord);
    Launch{x}(gather<Word>, dim3(batch, at_most_65535(ceil_div(count, threads.y))), threads, read<Word>(x),
              sample / kWord, row / kWord, ids_of(ids), x.size(1), count, bytes / kWord, written<Word>(out));
  };
  switch (common_alignment(bytes, sample, row, address(x), address(out))) {
    case 16: launch(Type<uint4>()); break;
    case 8: launch(Type<uint2>()); break;
    case 4: launch(Type<uint32_t>()); break;
    case 2: launch(Type<uint16_t>()); break;
    default: launch(Type<uint8_t>());
  }
  return out;
}

// Launches the kernel `scatter`.
void launch_scatter(const Tensor& tokens, const Tensor& ids, bool all_fit, const Tensor* fill, const Tensor& out) {
  const int64_t length = out.size(1);
  const auto launch = [&]<typename scalar_t, int kCount>(Type<Vector<scalar_t, kCount>>, int64_t vectors) {
    using V = Vector<scalar_t, kCount>;
    Launch{tokens}(scatter<scalar_t, kCount>, dim3(out.size(0), at_most_65535(ceil_div(length, kPlaces))),
                   threads_for_rows(vectors), read<V>(tokens), ids_of(ids), all_fit, ids.size(1), length, vectors,
                   fill ? read<V>(*fill) : nullptr, written<V>(out));
  };
  with_vectors("tokens", tokens.scalar_type(), out.size(2), launch, tokens, out, fill ? *fill : out);
}

Tensor scatter_tokens(const Tensor& tokens_, const Tensor& ids_, int64_t length, const Tensor& fill_) {
  const Tensor ids = checked_ids("ids", ids_, tokens_);
  if (ids.size(1) != tokens_.size(1))
    refuse("ids must have as many columns as there are tokens, got ", text(ids.sizes()), " and ",
           text(tokens_.sizes()));
  if (length < 0 || length > kMost) refuse("length must be from 0 to 2^30, got ", length);
  const Tensor fill = checked_rows("fill", fill_, "one element for each feature", tokens_.size(2), tokens_);
  const Tensor tokens = torch::stable::contiguous(tokens_);
  const Tensor out = torch::stable::new_empty(tokens, {ids.size(0), length, tokens.size(2)});
  launch_scatter(tokens, ids, true, &fill, out);
  return out;
}

Tensor restore_tokens(const Tensor& x_, const Tensor& ids_, const Tensor& mask_token_,
                      const std::optional<Tensor>& pos_embed_) {
  const Tensor ids = checked_ids("ids_restore", ids_, x_), x = torch::stable::contiguous(x_);
  const int64_t batch = ids.size(0), length = ids.size(1), dim = x.size(2);
  const Tensor mask_token = checked_rows("mask_token", mask_token_, "one element for each feature", dim, x);
  const Tensor pos_embed =
      pos_embed_ ? checked_rows("pos_embed", *pos_embed_, "one row for each place", length * dim, x) : mask_token;
  const Tensor out = torch::stable::new_empty(x, {batch, length, dim});
  const auto launch = [&]<typename scalar_t, int kCount>(Type<Vector<scalar_t, kCount>>, int64_t vectors) {
    using V = Vector<scalar_t, kCount>;
    const dim3 threads = threads_for_rows(vectors);
    Launch{x}(restore<scalar_t, kCount>, dim3(batch, at_most_65535(ceil_div(length, threads.y))), threads, read<V>(x),
              ids_of(ids), x.size(1), length, vectors, read<V>(mask_token),
              pos_embed_ ? read<V>(pos_embed) : nullptr, written<V>(out));
  };
  with_vectors("x_visible", x.scalar_type(), dim, launch, x, mask_token, pos_embed, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> restore_tokens_backward(const Tensor& grad_tokens, const Tensor& ids_restore,
                                                           const std::vector<int64_t>& size_x_visible,
                                                           bool needs_pos_embed) {
  const Tensor ids = checked_ids("ids_restore", ids_restore, grad_tokens);
  const Tensor grad = torch::stable::contiguous(grad_tokens);
  const int64_t batch = ids.size(0), length = ids.size(1), dim = grad.size(2);
  if (size_x_visible.size() != 3 || size_x_visible[0] != batch || size_x_visible[2] != dim)
    refuse("size_x_visible must be [", batch, ", K, ", dim, "], got ", text(size_x_visible));
  const int64_t keep = size_x_visible[1];
  if (keep < 0 || keep > kMost) refuse("x_visible must have from 0 to 2^30 tokens, got ", keep);
  if (length != grad.size(1))
    refuse("ids_restore must have as many columns as there are tokens, got ", text(ids.sizes()), " and ",
           text(grad.sizes()));
  const ScalarType sum = wide(grad.scalar_type());
  const Tensor grad_x_visible = torch::stable::new_empty(grad, {batch, keep, dim});
  const Tensor grad_mask_token = torch::stable::new_empty(grad, {dim}, sum);
  const Tensor grad_pos_embed = torch::stable::new_empty(grad, {needs_pos_embed ? length : 0, dim}, sum);
  launch_scatter(grad, ids, false, nullptr, grad_x_visible);

  const int64_t samples = std::max<int64_t>(kSamples, ceil_div(batch, kMostPartialSums));
  const int64_t parts = std::max<int64_t>(1, ceil_div(batch, samples)), runs = ceil_div(length, kRows);
  const Tensor masked = torch::stable::new_empty(grad, {parts * runs, dim}, sum);
  const Tensor all =
      parts == 1 ? grad_pos_embed : torch::stable::new_empty(grad, {needs_pos_embed ? parts : 0, length, dim}, sum);
  const auto launch = [&]<typename scalar_t, int kCount>(Type<Vector<scalar_t, kCount>>, int64_t vectors) {
    using W = Wide<scalar_t>;
    const Launch launch(grad);
    launch(sum_gradients<scalar_t, kCount>, dim3(runs, ceil_div(vectors, 32), parts), dim3(32, kRows),
           read<Vector<scalar_t, kCount>>(grad), ids_of(ids), batch, samples, length, keep, vectors,
           needs_pos_embed ? written<W>(all) : nullptr, written<W>(masked));
    launch(sum_rows<W>, dim3(ceil_div(dim, 32)), dim3(32, kRows), read<W>(masked), parts * runs, dim,
           written<W>(grad_mask_token));
    if (needs_pos_embed && parts > 1)
      launch(sum_rows<W>, dim3(ceil_div(length * dim, 32)), dim3(32, kRows), read<W>(all), parts, length * dim,
             written<W>(grad_pos_embed));
  };
  with_vectors("grad_tokens", grad.scalar_type(), dim, launch, grad);
  return {grad_x_visible, grad_mask_token, grad_pos_embed};
}

STABLE_TORCH_LIBRARY_IMPL(fastssl, CUDA, m) {
  m.impl("masking_ids", TORCH_BOX(&masking_ids));
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens));
  m.impl("restore_tokens", TORCH_BOX(&restore_tokens));
  m.impl("restore_tokens_backward", TORCH_BOX(&restore_tokens_backward));
}

}  // namespace
}  // namespace fastssl
