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
#include <vector>

#include "common/tiled.h"
#include "ema_tiles.h"

namespace fastssl {
namespace {

constexpr int64_t kRun = 1 << 15;  // elements of a run; fewer are one thread's

// A pair whose elements lie in memory in one order.
struct Pair {
  char* target;
  const char* source;
  Element target_element, source_element;
  int64_t count, end;  // elements; with those of all pairs before it
};

bool is_supported(const Tensor& x) { return has_element(x) || x.scalar_type() == at::kDouble; }

// From the first to the last in memory.
int64_t elements(const Tensor& x) {
  int64_t count = 1;
  for (int64_t d = 0; d < x.dim(); ++d) count += (x.size(d) - 1) * x.stride(d);
  return count;
}

// The addresses of a tensor.
struct Span {
  const char *begin, *end;
  const char* list;
  size_t index;
  bool written;

  Span(const Tensor& x, const char* list, size_t index, bool written)
      : begin(static_cast<const char*>(x.const_data_ptr())),
        end(begin + elements(x) * x.element_size()),
        list(list),
        index(index),
        written(written) {}
};

// No target may share memory with another tensor, but for its very source.
void check_spans(std::vector<Span>& spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& x, const Span& y) { return x.begin < y.begin; });
  const Span *last = nullptr, *last_target = nullptr;  // those that end last
  for (const Span& span : spans) {
    const Span* const before = span.written ? last : last_target;
    TORCH_CHECK_VALUE(!before || span.begin >= before->end, "targets must not share memory, got ", span.list, "[",
                      span.index, "] and ", before->list, "[", before->index, "]");
    if (!last || span.end > last->end) last = &span;
    if (span.written && (!last_target || span.end > last_target->end)) last_target = &span;
  }
}

void check_pairs(at::TensorList targets, at::TensorList sources) {
  TORCH_CHECK_VALUE(targets.size() == sources.size(), "targets and sources must have the same length, got ",
                    targets.size(), " and ", sources.size());
  std::vector<Span> spans;
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &target = targets[i], &source = sources[i];
    TORCH_CHECK_VALUE(target.sizes() == source.sizes(), "targets[", i, "] and sources[", i,
                      "] must have the same shape, got ", target.sizes(), " and ", source.sizes());
    TORCH_CHECK_VALUE(target.device() == source.device(), "targets[", i, "] and sources[", i,
                      "] must be on the same device, got ", target.device(), " and ", source.device());
    TORCH_CHECK_VALUE(is_supported(target), "targets[", i, "] must be of 16, 32 or 64 bits, floating-point, got ",
                      target.dtype());
    TORCH_CHECK_VALUE(is_supported(source), "sources[", i, "] must be of 16, 32 or 64 bits, floating-point, got ",
                      source.dtype());
    if (target.numel() == 0) continue;
    TORCH_CHECK_VALUE(elements(target) >= target.numel(), "targets[", i,
                      "] must have no two elements in one place, got strides ", target.strides());
    spans.emplace_back(target, "targets", i, true);
    if (target.const_data_ptr() != source.const_data_ptr() || target.strides() != source.strides() ||
        target.scalar_type() != source.scalar_type())
      spans.emplace_back(source, "sources", i, false);
  }
  check_spans(spans);
}

void ema_update_(at::TensorList targets, at::TensorList sources, const Tensor& momentum_) {
  check_pairs(targets, sources);
  const double momentum = momentum_.item<double>();
  std::vector<Pair> pairs;
  std::vector<Tensor> held;                        // copies of sources
  std::vector<std::pair<Tensor, Tensor>> strided;  // targets, and what is to be copied into them
  int64_t end = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    Tensor target = targets[i], source = sources[i];
    if (target.numel() == 0) continue;
    if (!has_element(target)) {
      target.lerp_(source.to(target.scalar_type()), 1 - momentum);
      continue;
    }
    if (!has_element(source)) held.push_back(source = source.to(at::kFloat));
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
