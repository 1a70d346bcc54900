// Exponential moving averages on the CPU: the teachers of MoCo (arXiv:1911.05722), BYOL (arXiv:2006.07733) and DINO.
//
//     target = momentum target + (1 - momentum) source
//
// of lists of tensors in one pass over memory: a target is read, its source is read, the target is written, 12 bytes for
// each float32 parameter. All tensors together are cut into runs of equal length, and the threads share those: small
// tensors cost no call each, and large ones are no thread's alone. Sums are float32, whatever the two sides are.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <unordered_set>
#include <vector>

#include "common/isa.h"
#include "ema_tiles.h"

namespace fastssl {
namespace {

using at::Tensor;

constexpr int64_t kRun = 1 << 15;  // elements of a run; fewer are one thread's

Element element_of(const Tensor& x) {
  return x.scalar_type() == at::kFloat ? Element::Float32
      : x.scalar_type() == at::kHalf   ? Element::Float16
                                       : Element::BFloat16;
}

bool has_kernel(const Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
}

// A pair whose elements lie in memory in one order.
struct Pair {
  char* target;
  const char* source;
  Element target_element, source_element;
  int64_t count, end;  // elements; with those of all pairs before it
};

void ema_update_(at::TensorList targets, at::TensorList sources, const Tensor& momentum_) {
  TORCH_CHECK_VALUE(targets.size() == sources.size(), "targets and sources must have the same length, got ",
                    targets.size(), " and ", sources.size());
  std::unordered_set<const void*> seen;
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &target = targets[i], &source = sources[i];
    TORCH_CHECK_VALUE(target.sizes() == source.sizes(), "targets[", i, "] and sources[", i,
                      "] must have the same shape, got ", target.sizes(), " and ", source.sizes());
    TORCH_CHECK_VALUE(target.device() == source.device(), "targets[", i, "] and sources[", i,
                      "] must be on the same device, got ", target.device(), " and ", source.device());
    TORCH_CHECK_VALUE(target.is_floating_point() && source.is_floating_point(), "targets[", i, "] and sources[", i,
                      "] must be of floating-point dtypes, got ", target.scalar_type(), " and ", source.scalar_type());
    TORCH_CHECK_VALUE(target.numel() == 0 || seen.insert(target.const_data_ptr()).second,
                      "targets must not share memory, but targets[", i, "] is there twice");
  }
  const double momentum = momentum_.item<double>();
  std::vector<Pair> pairs;
  std::vector<Tensor> held;                        // copies of those that lay in another order
  std::vector<std::pair<Tensor, Tensor>> strided;  // targets, and what is to be copied into them
  int64_t end = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    Tensor target = targets[i], source = sources[i];
    if (target.numel() == 0) continue;
    if (!has_kernel(target) || !has_kernel(source)) {
      target.lerp_(source.to(target.scalar_type()), 1 - momentum);
      continue;
    }
    if (target.strides() != source.strides() || !target.is_non_overlapping_and_dense()) {
      held.push_back(source = source.contiguous());
      if (!target.is_contiguous()) {
        strided.emplace_back(target, target.contiguous());
        target = strided.back().second;
      }
    }
    end += target.numel();
    pairs.push_back({static_cast<char*>(target.mutable_data_ptr()), static_cast<const char*>(source.const_data_ptr()),
                     element_of(target), element_of(source), target.numel(), end});
  }
  const EmaTiles& tile = FASTSSL_TABLE_IN_USE(ema_tiles);
  const float weight = static_cast<float>(1 - momentum);
  at::parallel_for(0, end, kRun, [&](int64_t first, int64_t last) {
    auto pair = std::upper_bound(pairs.begin(), pairs.end(), first,
                                 [](int64_t i, const Pair& p) { return i < p.end; });
    for (; first < last; ++pair) {
      const int64_t offset = first - (pair->end - pair->count), count = std::min(last, pair->end) - first;
      tile.blend(pair->target + offset * bytes_of(pair->target_element), pair->target_element,
                 pair->source + offset * bytes_of(pair->source_element), pair->source_element, count, weight);
      first += count;
    }
  });
  for (const auto& [target, updated] : strided) target.copy_(updated);
}

TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("ema_update_", &ema_update_); }

}  // namespace
}  // namespace fastssl
