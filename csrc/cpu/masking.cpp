// Selecting and restoring tokens on the CPU, as masked autoencoders do (MAE, arXiv:2111.06377).
//
//     gather_tokens    out[b, k] = x[b, ids[b, k]]
//     scatter_tokens   out[b, l] = sum of tokens[b, k] with ids[b, k] = l, `fill` where there is none
//     restore_tokens   out[b, l] = x_visible[b, ids_restore[b, l]] or the mask token, + pos_embed[l]
//
// Cost: every element is read once and written once, by one thread. Outputs are written whole, so nothing is zeroed
// first, and into large pages: with small ones the system would take longer to hand out the memory than the kernel
// takes to fill it. Sums are float32 and in a fixed order: within a group of samples, then over groups, then over
// threads. So the error grows with the length of the longest of these sums, not with the number of all terms.
//
// masking_ids draws a permutation for each sample: it sorts a hash (SplitMix64) of the seed and the position, whose
// lowest bits are replaced by the position itself. block_masking_ids masks rectangles of random area, aspect ratio and
// place until the wanted number of tokens is masked or ten rectangles in a row did not fit, then single tokens (BEiT,
// arXiv:2106.08254). Both give the same ids on every device; fastssl/ops/masking.py has them in PyTorch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "common/pages.h"
#include "common/places.h"
#include "common/portable.h"
#include "common/random.h"
#include "common/token_rows.h"
#include "masking_tiles.h"

namespace fastssl {
namespace {

constexpr int64_t kGrain = 1 << 15;  // fewer elements are not worth another thread

int64_t per_thread(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1)); }

// A mask of the lowest bits, as many as positions below `length` take.
uint64_t position_bits(int64_t length) {
  int bits = 0;
  while (length > int64_t(1) << bits) ++bits;
  return (uint64_t(1) << bits) - 1;
}

void check_masking(const Tensor& seed, int64_t batch, int64_t length, int64_t keep) {
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.numel() == 1, "seed must be one int64, got ",
                    seed.scalar_type(), " of shape ", seed.sizes());
  TORCH_CHECK_VALUE(batch >= 0 && length >= 0 && keep >= 0 && keep <= length, "keep must be from 0 to length, got ",
                    keep, " of ", length);
}

std::tuple<Tensor, Tensor, Tensor> masking_ids(const Tensor& seed, int64_t batch, int64_t length, int64_t keep) {
  check_masking(seed, batch, length, keep);
  const Tensor ids_keep = at::empty({batch, keep}, at::kLong), ids_restore = at::empty({batch, length}, at::kLong);
  const Tensor mask = at::empty({batch, length}, at::kFloat);
  const uint64_t start = static_cast<uint64_t>(seed.item<int64_t>());
  const uint64_t low = position_bits(length);
  int64_t* const kept = ids_keep.mutable_data_ptr<int64_t>();
  int64_t* const restore = ids_restore.mutable_data_ptr<int64_t>();
  float* const masked = mask.mutable_data_ptr<float>();
  at::parallel_for(0, batch, per_thread(16 * length), [&](int64_t first, int64_t last) {
    std::vector<uint64_t> order(length);
    for (int64_t b = first; b < last; ++b) {
      for (int64_t l = 0; l < length; ++l)
        order[l] = (number(start, b * length + l) & ~low) | static_cast<uint64_t>(l);
      std::sort(order.begin(), order.end());
      for (int64_t k = 0; k < length; ++k) {
        const int64_t l = static_cast<int64_t>(order[k] & low);
        if (k < keep) kept[b * keep + k] = l;
        restore[b * length + l] = k;
        masked[b * length + l] = k >= keep;
      }
    }
  });
  return {ids_keep, ids_restore, mask};
}

// A sample's masked tokens, drawn from its own seed.
struct BlockMask {
  int64_t height, width, low, high;
  at::IntArrayRef aspect_ratios;
  std::vector<uint64_t> order;  // in which single tokens are masked

  // Sets `target` of the height x width elements of `masked` to 1, the others to 0.
  void draw(uint64_t seed, int64_t target, char* masked) {
    constexpr int kAttempts = 10;
    constexpr int64_t kAspectOne = 1 << 16;
    const int64_t length = height * width;
    std::fill(masked, masked + length, 0);
    int64_t left = target, next = length;
    for (int failures = 0; left > 0 && failures < kAttempts; ++failures, next += 4) {
      const int64_t most = std::min(left, high), fewest = std::min(low, most);
      const int64_t area = fewest + below(std::max(low, most) - fewest + 1, seed, next);
      const int64_t ratio = aspect_ratios[below(aspect_ratios.size(), seed, next + 1)];
      const int64_t h = static_cast<int64_t>(std::sqrt(static_cast<double>(area * ratio) / kAspectOne) + 0.5);
      const int64_t w = static_cast<int64_t>(std::sqrt(static_cast<double>(area * kAspectOne) / ratio) + 0.5);
      if (h < 1 || h > height || w < 1 || w > width) continue;
      char* const block = masked + below(height - h + 1, seed, next + 2) * width + below(width - w + 1, seed, next + 3);
      int64_t added = 0;
      for (int64_t y = 0; y < h; ++y)
        for (int64_t x = 0; x < w; ++x) added += !block[y * width + x];
      if (added == 0 || added > most) continue;
      for (int64_t y = 0; y < h; ++y) std::fill(block + y * width, block + y * width + w, 1);
      left -= added;
      failures = -1;
    }
    if (left == 0) return;
    order.clear();
    const uint64_t position = position_bits(length);
    for (int64_t l = 0; l < length; ++l)
      if (!masked[l]) order.push_back((number(seed, l) & ~position) | static_cast<uint64_t>(l));
    std::nth_element(order.begin(), order.begin() + (left - 1), order.end());
    for (int64_t i = 0; i < left; ++i) masked[order[i] & position] = 1;
  }

  static int64_t below(int64_t bound, uint64_t seed, int64_t i) {
    return static_cast<int64_t>(number(seed, i) % static_cast<uint64_t>(bound));
  }
};

std::tuple<Tensor, Tensor, Tensor> block_masking_ids(const Tensor& seed, int64_t batch, int64_t height, int64_t width,
                                                     int64_t keep, int64_t low, int64_t high,
                                                     at::IntArrayRef aspect_ratios) {
  const int64_t length = height * width;
  check_masking(seed, batch, length, keep);
  TORCH_CHECK_VALUE(height >= 0 && width >= 0 && low >= 1 && high >= low, "low must be from 1 to high, got ", low,
                    " and ", high);
  TORCH_CHECK_VALUE(!aspect_ratios.empty() && *std::min_element(aspect_ratios.begin(), aspect_ratios.end()) > 0,
                    "aspect_ratios must be positive, got ", aspect_ratios);
  const Tensor ids_keep = at::empty({batch, keep}, at::kLong), ids_restore = at::empty({batch, length}, at::kLong);
  const Tensor mask = at::empty({batch, length}, at::kFloat);
  const uint64_t start = static_cast<uint64_t>(seed.item<int64_t>());
  int64_t* const kept = ids_keep.mutable_data_ptr<int64_t>();
  int64_t* const restore = ids_restore.mutable_data_ptr<int64_t>();
  float* const mask_out = mask.mutable_data_ptr<float>();
  at::parallel_for(0, batch, per_thread(16 * length), [&](int64_t first, int64_t last) {
    BlockMask blocks{height, width, low, high, aspect_ratios, {}};
    std::vector<char> masked(length);
    for (int64_t b = first; b < last; ++b) {
      blocks.draw(seed_at(start, b), length - keep, masked.data());
      int64_t visible = 0, hidden = keep;
      for (int64_t l = 0; l < length; ++l) {
        mask_out[b * length + l] = masked[l];
        if (!masked[l]) kept[b * keep + visible] = l;
        restore[b * length + l] = masked[l] ? hidden++ : visible++;
      }
    }
  });
  return {ids_keep, ids_restore, mask};
}

void check_ids(const char* name, const Tensor& ids, const Tensor& tokens) {
  TORCH_CHECK_VALUE(tokens.dim() == 3 && ids.dim() == 2 && ids.size(0) == tokens.size(0), name,
                    " must have shape (B, K) beside tokens of shape (B, L, D), got ", ids.sizes(), " and ",
                    tokens.sizes());
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, name,
                    " must be int64 or int32, got ", ids.scalar_type());
}

// ids_restore as int64, in [0, keep]: all ids above are replaced by `keep`.
Tensor checked_places(const Tensor& ids_, int64_t keep) {
  const Tensor ids = ids_.to(at::kLong).clamp_max(keep).contiguous();
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK_INDEX(id[i] >= 0, "ids_restore must not be negative, got ", id[i]);
  return ids;
}

void check_dtype(const char* name, const Tensor& tokens) {
  TORCH_CHECK_VALUE(has_element(tokens), name, " must be float32, bfloat16 or float16, got ", tokens.scalar_type());
}

Tensor gather_tokens(const Tensor& x_, const Tensor& ids_) {
  check_ids("ids", ids_, x_);
  const Tensor ids = checked_ids("ids", ids_, x_.size(1));
  const Tensor x = with_unit_stride(x_);
  const int64_t batch = ids.size(0), count = ids.size(1);
  const Tensor out = empty_in_large_pages({batch, count, x.size(2)}, x.options());
  const int64_t bytes = x.size(2) * x.element_size();
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t sample = x.stride(0) * x.element_size(), row = x.stride(1) * x.element_size();
  at::parallel_for(0, batch * count, per_thread(x.size(2)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      std::memcpy(to + i * bytes, from + i / count * sample + id[i] * row, bytes);
  });
  return out;
}

// Rows to be written one after the other.
struct Target {
  char* data;
  int64_t bytes;

  explicit Target(const Tensor& x)
      : data(static_cast<char*>(x.mutable_data_ptr())), bytes(x.size(-1) * x.element_size()) {}

  char* operator[](int64_t i) const { return data + i * bytes; }
};

// out = the sum of the rows in one list of `places`, which is not empty. `sums`: dim floats.
void write_sum(const MaskingTiles& tile, const Places& places, int64_t head, const TokenRows& rows, int64_t first,
               std::vector<float>& sums, char* out) {
  if (places.next[head] < 0) {
    std::memcpy(out, rows[first + head], rows.bytes);
    return;
  }
  std::fill(sums.begin(), sums.end(), 0.f);
  for (int64_t i = head; i >= 0; i = places.next[i]) {
    const void* const row = rows[first + i];
    tile.accumulate(&row, 1, rows.element, rows.dim, sums.data());
  }
  tile.round(sums.data(), rows.element, rows.dim, out);
}

Tensor scatter_tokens(const Tensor& tokens_, const Tensor& ids_, int64_t length, const Tensor& fill_) {
  check_ids("ids", ids_, tokens_);
  check_dtype("tokens", tokens_);
  TORCH_CHECK_VALUE(ids_.size(1) == tokens_.size(1), "ids must have as many columns as there are tokens, got ",
                    ids_.sizes(), " and ", tokens_.sizes());
  TORCH_CHECK_VALUE(fill_.numel() == tokens_.size(2), "fill must have one element for each feature, got shape ",
                    fill_.sizes());
  TORCH_CHECK_VALUE(length >= 0, "length must not be negative, got ", length);
  const Tensor ids = checked_ids("ids", ids_, length), fill = fill_.to(tokens_.scalar_type()).contiguous();
  const int64_t batch = ids.size(0), count = ids.size(1), dim = tokens_.size(2);
  const Tensor out = empty_in_large_pages({batch, length, dim}, tokens_.options());
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  const TokenRows from(tokens_);
  const Target to(out);
  const MaskingTiles& tile = FASTSSL_TABLE_IN_USE(masking_tiles);
  at::parallel_for(0, batch, per_thread(length * dim), [&](int64_t first, int64_t last) {
    Places places(length, count);
    std::vector<float> sums(dim);
    for (int64_t b = first; b < last; ++b) {
      places.fill(id + b * count);
      for (int64_t l = 0; l < length; ++l) {
        if (places.head[l] < 0) {
          std::memcpy(to[b * length + l], fill.const_data_ptr(), to.bytes);
        } else {
          write_sum(tile, places, places.head[l], from, b * count, sums, to[b * length + l]);
        }
      }
    }
  });
  return out;
}

Tensor restore_tokens(const Tensor& x_, const Tensor& ids_, const Tensor& mask_token_,
                      const std::optional<Tensor>& pos_embed_) {
  check_ids("ids_restore", ids_, x_);
  check_dtype("x_visible", x_);
  const int64_t batch = ids_.size(0), length = ids_.size(1), keep = x_.size(1), dim = x_.size(2);
  const Tensor ids = checked_places(ids_, keep);
  TORCH_CHECK_VALUE(mask_token_.numel() == dim, "mask_token must have one element for each feature, got shape ",
                    mask_token_.sizes());
  TORCH_CHECK_VALUE(mask_token_.device() == x_.device() && (!pos_embed_ || pos_embed_->device() == x_.device()),
                    "mask_token and pos_embed must be on the CPU, as x_visible is");
  TORCH_CHECK_VALUE(!pos_embed_ || pos_embed_->numel() == length * dim,
                    "pos_embed must have one row for each place, got shape ", pos_embed_ ? pos_embed_->sizes() : x_.sizes());
  const TokenRows visible(x_), masked(mask_token_.to(x_.scalar_type()).reshape({1, 1, dim}));
  const TokenRows positions(pos_embed_ ? pos_embed_->to(x_.scalar_type()).reshape({1, length, dim}) : x_);
  const Tensor out = empty_in_large_pages({batch, length, dim}, x_.options());
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  const Target to(out);
  const MaskingTiles& tile = FASTSSL_TABLE_IN_USE(masking_tiles);
  at::parallel_for(0, batch * length, per_thread(dim), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const char* const from = id[i] < keep ? visible[i / length * keep + id[i]] : masked[0];
      if (pos_embed_) {
        tile.add(from, positions[i % length], visible.element, dim, to[i]);
      } else {
        std::memcpy(to[i], from, to.bytes);
      }
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> restore_tokens_backward(const Tensor& grad_tokens, const Tensor& ids_restore,
                                                           at::IntArrayRef size_x_visible, bool needs_pos_embed) {
  check_ids("ids_restore", ids_restore, grad_tokens);
  TORCH_CHECK_VALUE(ids_restore.size(1) == grad_tokens.size(1),
                    "ids_restore must have as many columns as grad_tokens has rows, got ", ids_restore.sizes(), " and ",
                    grad_tokens.sizes());
  check_dtype("grad_tokens", grad_tokens);
  const int64_t batch = ids_restore.size(0), length = ids_restore.size(1), dim = grad_tokens.size(2);
  TORCH_CHECK_VALUE(size_x_visible.size() == 3 && size_x_visible[0] == batch && size_x_visible[2] == dim,
                    "size_x_visible must be (", batch, ", K, ", dim, "), got ", size_x_visible);
  const int64_t keep = size_x_visible[1];
  const Tensor ids = checked_places(ids_restore, keep);
  const Tensor grad_x_visible = empty_in_large_pages({batch, keep, dim}, grad_tokens.options());
  // Each thread adds up its samples, in groups; then the threads' sums are added, in their order.
  constexpr int64_t kGroup = 8;
  const int threads = at::get_num_threads();
  const Tensor grad_mask_token = at::zeros({threads, dim}, grad_tokens.options().dtype(at::kFloat));
  const Tensor grad_pos_embed = at::zeros({needs_pos_embed ? threads : 0, length, dim}, grad_tokens.options().dtype(at::kFloat));
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  const TokenRows from(grad_tokens);
  const Target visible(grad_x_visible);
  const MaskingTiles& tile = FASTSSL_TABLE_IN_USE(masking_tiles);
  at::parallel_for(0, batch, per_thread(length * dim), [&](int64_t first, int64_t last) {
    const int thread = at::get_thread_num();
    float* const masked = grad_mask_token.mutable_data_ptr<float>() + thread * dim;
    float* const position =
        needs_pos_embed ? grad_pos_embed.mutable_data_ptr<float>() + thread * length * dim : nullptr;
    std::vector<Places> places(kGroup, Places(keep + 1, length));  // the last place is that of masked tokens
    std::vector<float> sums(dim), group(dim);
    for (int64_t begin = first; begin < last; begin += kGroup) {
      const int64_t count = std::min(kGroup, last - begin);
      for (int64_t j = 0; j < count; ++j) {
        places[j].fill(id + (begin + j) * length);
        for (int64_t k = 0; k < keep; ++k)
          if (places[j].head[k] < 0) std::memset(visible[(begin + j) * keep + k], 0, visible.bytes);
      }
      std::fill(group.begin(), group.end(), 0.f);
      for (int64_t l = 0; l < length; ++l) {
        const void *rows[kGroup], *masked_rows[kGroup];
        int64_t masked_count = 0;
        for (int64_t j = 0; j < count; ++j) {
          const int64_t b = begin + j, k = id[b * length + l];
          rows[j] = from[b * length + l];
          if (k == keep) {
            masked_rows[masked_count++] = rows[j];
          } else if (places[j].head[k] == l) {
            write_sum(tile, places[j], l, from, b * length, sums, visible[b * keep + k]);
          }
        }
        tile.accumulate(masked_rows, masked_count, from.element, dim, group.data());
        if (position) tile.accumulate(rows, count, from.element, dim, position + l * dim);
      }
      for (int64_t d = 0; d < dim; ++d) masked[d] += group[d];
    }
  });
  return {grad_x_visible, grad_mask_token.sum(0),
          needs_pos_embed ? grad_pos_embed.sum(0) : grad_pos_embed.new_empty({0, dim})};
}

FASTSSL_KERNELS(CPU, m) {
  m.impl("masking_ids", &masking_ids);
  m.impl("block_masking_ids", &block_masking_ids);
  m.impl("gather_tokens", &gather_tokens);
  implement<&scatter_tokens>(m, "scatter_tokens");
  implement<&restore_tokens>(m, "restore_tokens");
  implement<&restore_tokens_backward>(m, "restore_tokens_backward");
}

}  // namespace
}  // namespace fastssl
