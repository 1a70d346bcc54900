// Which tokens or patches: ids (B, K) of places in each sample, checked, and the other way round.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

namespace fastssl {

// ids as int64, all of them from 0 to below `length`. `name`: what an error calls them.
inline at::Tensor checked_ids(const char* name, const at::Tensor& ids_, int64_t length) {
  const at::Tensor ids = ids_.to(at::kLong).contiguous();
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < length, name, " must be from 0 to below ", length, ", got ", id[i]);
  return ids;
}

// The rows that go to each of `length` places of one sample, as lists: `head[l]`, then `next[k]`, in ascending order.
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

}  // namespace fastssl
