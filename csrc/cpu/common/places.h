// Ids (B, K) of tokens or patches within each sample: their check, and their inverse, from places to ids.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

namespace fastssl {

// ids as int64, checked to lie in [0, length). `name`: what an error calls them.
inline at::Tensor checked_ids(const char* name, const at::Tensor& ids_, int64_t length) {
  const at::Tensor ids = ids_.to(at::kLong).contiguous();
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < length, name, " must be from 0 to below ", length, ", got ", id[i]);
  return ids;
}

// For each of the `length` places of one sample, the rows that go to it, as a linked list in ascending order: first
// `head[l]`, then `next[k]`, until -1.
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
