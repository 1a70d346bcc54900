// A ring buffer of keys on the CPU, written in place (MoCo, arXiv:1911.05722).
//
//     keys[(position + i) mod size] = new_keys[i],  position = (position + B) mod size
//
// for the last `size` of B new keys, each divided by max(|x|, 1e-12) if `normalize`. One pass: each new key is read,
// converted, and written to its place. To be normalised it is read twice, the second time from the first-level cache.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common/kernels.h"

namespace fastssl {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 1 << 15;  // fewer elements are not worth another thread

// max(|x|, 1e-12), from several partial sums, which need not wait for each other.
template <typename Wide, typename scalar_t>
Wide norm(const scalar_t* x, int64_t dim) {
  constexpr int64_t kSums = 16;
  Wide sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= dim; d += kSums)
    for (int64_t i = 0; i < kSums; ++i) sums[i] += static_cast<Wide>(x[d + i]) * static_cast<Wide>(x[d + i]);
  for (int64_t i = 0; d < dim; ++d, ++i) sums[i] += static_cast<Wide>(x[d]) * static_cast<Wide>(x[d]);
  Wide total = 0;
  for (const Wide sum : sums) total += sum;
  const Wide root = std::sqrt(total);
  return root < Wide(1e-12) ? Wide(1e-12) : root;  // NaN stays NaN
}

void enqueue_(const Tensor& keys, const Tensor& position, const Tensor& new_keys_, bool normalize) {
  TORCH_CHECK_VALUE(keys.dim() == 2 && new_keys_.dim() == 2 && keys.size(1) == new_keys_.size(1) && keys.size(0) > 0,
                    "keys (K, D) and new_keys (B, D) must have as many features, and keys a row, got shapes ",
                    keys.sizes(), " and ", new_keys_.sizes());
  TORCH_CHECK_VALUE(position.scalar_type() == at::kLong && position.numel() == 1, "position must be one int64, got ",
                    position.scalar_type(), " of shape ", position.sizes());
  TORCH_CHECK_VALUE(position.is_cpu() && new_keys_.is_cpu(), "position and new_keys must be on the CPU, as keys is");
  at::assert_no_internal_overlap(keys);
  const int64_t size = keys.size(0), dim = keys.size(1), count = new_keys_.size(0);
  Tensor new_keys = new_keys_.is_alias_of(keys) ? new_keys_.clone() : new_keys_;
  if (new_keys.stride(1) != 1) new_keys = new_keys.contiguous();
  const Tensor rows = keys.stride(1) == 1 ? keys : keys.contiguous();
  int64_t* const place = position.mutable_data_ptr<int64_t>();
  const int64_t start = (*place % size + size) % size;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, keys.scalar_type(), "enqueue_", [&] {
    using key_t = scalar_t;
    key_t* const to = rows.mutable_data_ptr<key_t>();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, new_keys.scalar_type(), "enqueue_", [&] {
      using Wide = at::opmath_type<scalar_t>;
      const scalar_t* const from = new_keys.const_data_ptr<scalar_t>();
      at::parallel_for(std::max<int64_t>(count - size, 0), count, std::max<int64_t>(1, kGrain / std::max<int64_t>(dim, 1)),
                       [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const scalar_t* const x = from + i * new_keys.stride(0);
          key_t* const out = to + (start + i) % size * rows.stride(0);
          const Wide length = normalize ? norm<Wide>(x, dim) : Wide(1);
          for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<key_t>(static_cast<Wide>(x[d]) / length);
        }
      });
    });
  });
  if (!rows.is_same(keys)) keys.copy_(rows);
  *place = (start + count) % size;
}

FASTSSL_KERNELS(CPU, m) { m.impl("enqueue_", &enqueue_); }

}  // namespace
}  // namespace fastssl
