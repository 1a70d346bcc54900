// Moving tokens about on the CPU, as masked autoencoders do (MAE, arXiv:2111.06377).
//
//     gather_tokens    out[b, k] = x[b, ids[b, k]]
//     scatter_tokens   out[b, l] = sum of tokens[b, k] with ids[b, k] = l, `fill` where there is none
//     restore_tokens   out[b, l] = x_visible[b, ids_restore[b, l]] or the mask token, + pos_embed[l]
//
// Every element is read once and written once, by one thread: each output is written whole, so nothing is zeroed first.
// Where several terms are summed up, it is in float32 and in one order.
//
// masking_ids draws a permutation of each sample: a hash of the seed and the position (SplitMix64), whose lowest bits
// give way to the position itself, is sorted. The same on every device; fastssl/ops/masking.py has it in PyTorch.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace fastssl {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

int64_t samples_per_thread(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1)); }

std::tuple<Tensor, Tensor, Tensor> masking_ids(const Tensor& seed, int64_t batch, int64_t length, int64_t keep) {
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.numel() == 1, "seed must be one int64, got ",
                    seed.scalar_type(), " of shape ", seed.sizes());
  TORCH_CHECK_VALUE(batch >= 0 && length >= 0 && keep >= 0 && keep <= length, "keep must be from 0 to length, got ",
                    keep, " of ", length);
  const Tensor ids_keep = at::empty({batch, keep}, at::kLong), ids_restore = at::empty({batch, length}, at::kLong);
  const Tensor mask = at::empty({batch, length}, at::kFloat);
  const uint64_t start = static_cast<uint64_t>(seed.item<int64_t>());
  int bits = 0;
  while (length > int64_t(1) << bits) ++bits;
  const uint64_t low = (uint64_t(1) << bits) - 1;
  int64_t* const kept = ids_keep.mutable_data_ptr<int64_t>();
  int64_t* const restore = ids_restore.mutable_data_ptr<int64_t>();
  float* const masked = mask.mutable_data_ptr<float>();
  at::parallel_for(0, batch, samples_per_thread(16 * length), [&](int64_t first, int64_t last) {
    std::vector<uint64_t> order(length);
    for (int64_t b = first; b < last; ++b) {
      for (int64_t l = 0; l < length; ++l) {
        uint64_t x = start + (static_cast<uint64_t>(b * length + l) + 1) * 0x9E3779B97F4A7C15;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
        x = (x ^ x >> 27) * 0x94D049BB133111EB;
        x = (x ^ x >> 31) >> 1;
        order[l] = (x & ~low) | static_cast<uint64_t>(l);
      }
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

void check_ids(const char* name, const Tensor& ids, const Tensor& tokens) {
  TORCH_CHECK_VALUE(tokens.dim() == 3 && ids.dim() == 2 && ids.size(0) == tokens.size(0), name,
                    " must have shape (B, K) beside tokens of shape (B, L, D), got ", ids.sizes(), " and ",
                    tokens.sizes());
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, name,
                    " must be int64 or int32, got ", ids.scalar_type());
}

// ids as int64, all of them from 0 to below `length`.
Tensor checked_ids(const Tensor& ids_, int64_t length) {
  const Tensor ids = ids_.to(at::kLong).contiguous();
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < length, "ids must be from 0 to below ", length, ", got ", id[i]);
  return ids;
}

// ids_restore as int64, none negative, `keep` where they are that or above.
Tensor checked_places(const Tensor& ids_, int64_t keep) {
  const Tensor ids = ids_.to(at::kLong).clamp_max(keep).contiguous();
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK_INDEX(id[i] >= 0, "ids_restore must not be negative, got ", id[i]);
  return ids;
}

Tensor gather_tokens(const Tensor& x_, const Tensor& ids_) {
  check_ids("ids", ids_, x_);
  const Tensor ids = checked_ids(ids_, x_.size(1));
  const Tensor x = x_.stride(2) == 1 ? x_ : x_.contiguous();
  const int64_t batch = ids.size(0), count = ids.size(1);
  const Tensor out = at::empty({batch, count, x.size(2)}, x.options());
  const int64_t bytes = x.size(2) * x.element_size();
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t sample = x.stride(0) * x.element_size(), row = x.stride(1) * x.element_size();
  at::parallel_for(0, batch, samples_per_thread(count * x.size(2)), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      for (int64_t k = 0; k < count; ++k)
        std::memcpy(to + (b * count + k) * bytes, from + b * sample + id[b * count + k] * row, bytes);
  });
  return out;
}

// The tokens that go to each of `length` places of one sample, as lists: `head[l]`, then `next[k]`, in ascending order.
struct Places {
  std::vector<int64_t> head, next;

  Places(int64_t length, int64_t count) : head(length), next(count) {}

  void fill(const int64_t* ids) {
    std::fill(head.begin(), head.end(), -1);
    for (int64_t k = static_cast<int64_t>(next.size()) - 1; k >= 0; --k) {
      next[k] = head[ids[k]];
      head[ids[k]] = k;
    }
  }
};

template <typename scalar_t, typename Wide>
void add(const scalar_t* row, int64_t dim, Wide* sums) {
  for (int64_t d = 0; d < dim; ++d) sums[d] += static_cast<Wide>(row[d]);
}

// The sum of the rows that go to place l, 0 where none does.
template <typename scalar_t, typename Wide>
void write_sum(const Places& places, int64_t l, const scalar_t* rows, int64_t dim, std::vector<Wide>& sums,
               scalar_t* out) {
  const int64_t k = places.head[l];
  if (k >= 0 && places.next[k] < 0) {
    std::memcpy(out, rows + k * dim, dim * sizeof(scalar_t));
    return;
  }
  std::fill(sums.begin(), sums.end(), Wide(0));
  for (int64_t i = k; i >= 0; i = places.next[i]) add(rows + i * dim, dim, sums.data());
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<scalar_t>(sums[d]);
}

Tensor scatter_tokens(const Tensor& tokens_, const Tensor& ids_, int64_t length, const Tensor& fill_) {
  check_ids("ids", ids_, tokens_);
  TORCH_CHECK_VALUE(ids_.size(1) == tokens_.size(1), "ids must have as many columns as there are tokens, got ",
                    ids_.sizes(), " and ", tokens_.sizes());
  TORCH_CHECK_VALUE(fill_.numel() == tokens_.size(2), "fill must have one element for each feature, got shape ",
                    fill_.sizes());
  TORCH_CHECK_VALUE(length >= 0, "length must not be negative, got ", length);
  const Tensor ids = checked_ids(ids_, length), tokens = tokens_.contiguous();
  const Tensor fill = fill_.to(tokens.scalar_type()).contiguous();
  const int64_t batch = ids.size(0), count = ids.size(1), dim = tokens.size(2);
  const Tensor out = at::empty({batch, length, dim}, tokens.options());
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tokens.scalar_type(), "scatter_tokens", [&] {
    using Wide = at::opmath_type<scalar_t>;
    const scalar_t* const from = tokens.const_data_ptr<scalar_t>();
    const scalar_t* const empty = fill.const_data_ptr<scalar_t>();
    scalar_t* const to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch, samples_per_thread(length * dim), [&](int64_t first, int64_t last) {
      Places places(length, count);
      std::vector<Wide> sums(dim);
      for (int64_t b = first; b < last; ++b) {
        places.fill(id + b * count);
        for (int64_t l = 0; l < length; ++l) {
          scalar_t* const row = to + (b * length + l) * dim;
          if (places.head[l] < 0) {
            std::memcpy(row, empty, dim * sizeof(scalar_t));
          } else {
            write_sum(places, l, from + b * count * dim, dim, sums, row);
          }
        }
      }
    });
  });
  return out;
}

Tensor restore_tokens(const Tensor& x_, const Tensor& ids_, const Tensor& mask_token_,
                      const std::optional<Tensor>& pos_embed_) {
  check_ids("ids_restore", ids_, x_);
  const Tensor x = x_.contiguous();
  const int64_t batch = ids_.size(0), length = ids_.size(1), keep = x.size(1), dim = x.size(2);
  const Tensor ids = checked_places(ids_, keep);
  TORCH_CHECK_VALUE(mask_token_.numel() == dim, "mask_token must have one element for each feature, got shape ",
                    mask_token_.sizes());
  TORCH_CHECK_VALUE(mask_token_.device() == x.device() && (!pos_embed_ || pos_embed_->device() == x.device()),
                    "mask_token and pos_embed must be on the CPU, as x_visible is");
  TORCH_CHECK_VALUE(!pos_embed_ || pos_embed_->numel() == length * dim,
                    "pos_embed must have one row for each place, got shape ", pos_embed_ ? pos_embed_->sizes() : x.sizes());
  const Tensor mask_token = mask_token_.to(x.scalar_type()).contiguous();
  const Tensor pos_embed = pos_embed_ ? pos_embed_->to(x.scalar_type()).contiguous() : Tensor();
  const Tensor out = at::empty({batch, length, dim}, x.options());
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "restore_tokens", [&] {
    const scalar_t* const visible = x.const_data_ptr<scalar_t>();
    const scalar_t* const masked = mask_token.const_data_ptr<scalar_t>();
    const scalar_t* const positions = pos_embed.defined() ? pos_embed.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* const to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch, samples_per_thread(length * dim), [&](int64_t first, int64_t last) {
      for (int64_t i = first * length; i < last * length; ++i) {
        const scalar_t* const from = id[i] < keep ? visible + (i / length * keep + id[i]) * dim : masked;
        scalar_t* const row = to + i * dim;
        if (!positions) {
          std::memcpy(row, from, dim * sizeof(scalar_t));
          continue;
        }
        const scalar_t* const position = positions + i % length * dim;
        for (int64_t d = 0; d < dim; ++d) row[d] = from[d] + position[d];
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> restore_tokens_backward(const Tensor& grad_, const Tensor& ids_, int64_t keep,
                                                           bool positions) {
  check_ids("ids_restore", ids_, grad_);
  const Tensor grad = grad_.contiguous();
  const int64_t batch = ids_.size(0), length = ids_.size(1), dim = grad.size(2);
  const Tensor ids = checked_places(ids_, keep);
  const at::ScalarType wide = at::toOpMathType(grad.scalar_type());
  const Tensor dx = at::empty({batch, keep, dim}, grad.options());
  // Each thread sums up its samples; then the threads' sums are united, in their order.
  const int threads = at::get_num_threads();
  const Tensor dmask = at::zeros({threads, dim}, grad.options().dtype(wide));
  const Tensor dpos = at::zeros({positions ? threads : 0, length, dim}, grad.options().dtype(wide));
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "restore_tokens_backward", [&] {
    using Wide = at::opmath_type<scalar_t>;
    const scalar_t* const from = grad.const_data_ptr<scalar_t>();
    scalar_t* const visible = dx.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch, samples_per_thread(length * dim), [&](int64_t first, int64_t last) {
      Wide* const masked = dmask.mutable_data_ptr<Wide>() + at::get_thread_num() * dim;
      Wide* const position = positions ? dpos.mutable_data_ptr<Wide>() + at::get_thread_num() * length * dim : nullptr;
      Places places(keep + 1, length);  // the last: of masked ones
      std::vector<Wide> sums(dim);
      for (int64_t b = first; b < last; ++b) {
        const scalar_t* const rows = from + b * length * dim;
        places.fill(id + b * length);
        for (int64_t k = 0; k < keep; ++k) write_sum(places, k, rows, dim, sums, visible + (b * keep + k) * dim);
        for (int64_t l = 0; l < length; ++l) {
          if (id[b * length + l] >= keep) add(rows + l * dim, dim, masked);
          if (position) add(rows + l * dim, dim, position + l * dim);
        }
      }
    });
  });
  return {dx, dmask.sum(0), positions ? dpos.sum(0) : dmask.new_empty({0, dim})};
}

TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("masking_ids", &masking_ids);
  m.impl("gather_tokens", &gather_tokens);
  m.impl("scatter_tokens", &scatter_tokens);
  m.impl("restore_tokens", &restore_tokens);
  m.impl("restore_tokens_backward", &restore_tokens_backward);
}

}  // namespace
}  // namespace fastssl
