// Corrupting text, and drawing negatives, on the CPU.
//
//     mask_tokens        BERT's corruption (arXiv:1810.04805): which tokens are to be predicted, and what stands there
//     sample_negatives   for each step of a sequence, other steps of it, no two alike (wav2vec 2.0, arXiv:2006.11477)
//
// mask_tokens is one pass: an id is read, its fate is drawn from a hash of its position, and two ids are written.
//
// sample_negatives is Floyd's algorithm: of n steps, for i = n - k, ..., n - 1, a number up to i, or i itself where that
// number was drawn before, which a set of n bits remembers. It takes k hashes for each step.
//
// Both give the same ids on every device; fastssl/ops/tokens.py has them in PyTorch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/kernels.h"
#include "common/random.h"

namespace fastssl {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 1 << 13;  // fewer hashes are not worth another thread
constexpr int64_t kIgnored = -100;   // the target that torch.nn.functional.cross_entropy ignores

uint64_t checked_seed(const Tensor& seed) {
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.numel() == 1, "seed must be one int64, got ",
                    seed.scalar_type(), " of shape ", seed.sizes());
  return static_cast<uint64_t>(seed.item<int64_t>());
}

// Contiguous, or undefined.
Tensor checked_like(const char* name, const std::optional<Tensor>& x, at::ScalarType dtype, at::IntArrayRef shape) {
  if (!x) return Tensor();
  TORCH_CHECK_VALUE(x->is_cpu() && x->scalar_type() == dtype && x->sizes() == shape, name, " must be ", dtype,
                    " of shape ", shape, " on the CPU, got ", x->scalar_type(), " of shape ", x->sizes());
  return x->contiguous();
}

template <typename T>
const T* data_or_null(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

// What may happen to a token, as shares of 2^62, each including the one before it.
struct Fate {
  uint64_t chosen, masked, replaced;
  int64_t mask_token_id, vocab_size;
};

template <typename Id>
void mask_all(uint64_t seed, const Tensor& input_ids, const bool* special, const int64_t* word, const Fate& fate,
              const Tensor& corrupted, const Tensor& labels) {
  const int64_t count = input_ids.numel(), length = input_ids.size(1);
  const Id* const id = input_ids.const_data_ptr<Id>();
  Id* const out = corrupted.mutable_data_ptr<Id>();
  int64_t* const label = labels.mutable_data_ptr<int64_t>();
  at::parallel_for(0, count, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const uint64_t chance = word ? number(seed_at(seed, i / length), word[i]) : number(seed, i);
      bool taken = chance >> 1 < fate.chosen;
      if (word) taken = taken && word[i] >= 0;
      if (special) taken = taken && !special[i];
      label[i] = taken ? static_cast<int64_t>(id[i]) : kIgnored;
      out[i] = id[i];
      if (!taken) continue;
      const uint64_t then = number(seed, count + i);
      if (then >> 1 < fate.masked) {
        out[i] = static_cast<Id>(fate.mask_token_id);
      } else if (then >> 1 < fate.replaced) {
        out[i] = static_cast<Id>(number(then, 0) % static_cast<uint64_t>(fate.vocab_size));
      }
    }
  });
}

std::tuple<Tensor, Tensor> mask_tokens(const Tensor& seed, const Tensor& input_ids,
                                       const std::optional<Tensor>& special_tokens_mask,
                                       const std::optional<Tensor>& word_ids, int64_t chosen, int64_t masked,
                                       int64_t replaced, int64_t mask_token_id, int64_t vocab_size) {
  const bool narrow = input_ids.scalar_type() == at::kInt;
  TORCH_CHECK_VALUE(input_ids.dim() == 2 && (narrow || input_ids.scalar_type() == at::kLong),
                    "input_ids must be int64 or int32 of shape (B, L), got ", input_ids.scalar_type(), " of shape ",
                    input_ids.sizes());
  TORCH_CHECK_VALUE(0 <= chosen && 0 <= masked && masked <= replaced && vocab_size > 0,
                    "chosen, masked and replaced must be ascending shares, and vocab_size positive, got ", chosen, ", ",
                    masked, ", ", replaced, " and ", vocab_size);
  const Tensor ids = input_ids.contiguous(), corrupted = at::empty(ids.sizes(), ids.options());
  const Tensor labels = at::empty(ids.sizes(), at::kLong);
  const Tensor special = checked_like("special_tokens_mask", special_tokens_mask, at::kBool, ids.sizes());
  const Tensor words = checked_like("word_ids", word_ids, at::kLong, ids.sizes());
  const Fate fate{static_cast<uint64_t>(chosen), static_cast<uint64_t>(masked), static_cast<uint64_t>(replaced),
                  mask_token_id, vocab_size};
  const auto mask = narrow ? &mask_all<int32_t> : &mask_all<int64_t>;
  mask(checked_seed(seed), ids, data_or_null<bool>(special), data_or_null<int64_t>(words), fate, corrupted, labels);
  return {corrupted, labels};
}

Tensor sample_negatives(const Tensor& seed, const std::optional<Tensor>& mask, int64_t batch, int64_t length,
                        int64_t count) {
  TORCH_CHECK_VALUE(batch >= 0 && length >= 0 && length < int64_t(1) << 31 && count >= 0,
                    "batch, length and count must not be negative, and length below 2^31, got ", batch, ", ", length,
                    " and ", count);
  const Tensor checked = checked_like("mask", mask, at::kBool, {batch, length});
  const Tensor ids = at::empty({batch, length, count}, at::kLong);
  const uint64_t start = checked_seed(seed);
  const bool* const masked = data_or_null<bool>(checked);
  int64_t* const out = ids.mutable_data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(count, 1));
  at::parallel_for(0, batch * length, grain, [&](int64_t first, int64_t last) {
    std::vector<int64_t> order;  // the steps of the sequence that take part
    std::vector<int64_t> rank(length);
    std::vector<uint64_t> drawn((length + 63) / 64, 0);
    const auto bit = [](int64_t i) { return uint64_t(1) << (i % 64); };
    for (int64_t row = first; row < last; ++row) {
      const int64_t b = row / length, step = row % length;
      if (row == first || step == 0) {
        order.clear();
        for (int64_t l = 0; l < length; ++l) {
          rank[l] = static_cast<int64_t>(order.size());
          if (!masked || masked[b * length + l]) order.push_back(l);
        }
      }
      int64_t* const to = out + row * count;
      const bool takes_part = !masked || masked[row];
      const int64_t others = takes_part ? static_cast<int64_t>(order.size()) - 1 : 0, wanted = std::min(others, count);
      for (int64_t k = 0; k < wanted; ++k) {
        const int64_t last_one = others - wanted + k;
        int64_t id = static_cast<int64_t>((number(start, row * count + k) >> 31) * (last_one + 1) >> 32);
        if (drawn[id / 64] & bit(id)) id = last_one;
        drawn[id / 64] |= bit(id);
        to[k] = id;
      }
      for (int64_t k = 0; k < wanted; ++k) {
        const int64_t id = to[k];
        drawn[id / 64] = 0;
        to[k] = b * length + order[id + (id >= rank[step])];  // the step itself is left out
      }
      std::fill(to + wanted, to + count, -1);
    }
  });
  return ids;
}

FASTSSL_KERNELS(CPU, m) {
  m.impl("mask_tokens", &mask_tokens);
  m.impl("sample_negatives", &sample_negatives);
}

}  // namespace
}  // namespace fastssl
