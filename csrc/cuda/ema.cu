// Exponential moving averages on the GPU: the teachers of MoCo (arXiv:1911.05722), BYOL (arXiv:2006.07733) and DINO.
//
//     target = momentum target + (1 - momentum) source
//
// of lists of tensors in one pass over memory: a target is read, its source is read, the target is written, 12 bytes for
// each float32 parameter. One launch serves up to 1024 pairs (128 where they are no more, or before CUDA 12.1): the table
// of their addresses goes along as the kernel's parameter, so nothing is copied and nobody waits. All tensors together are
// cut into chunks of 4096 elements, one for each block, which finds its pair by bisection. Arithmetic is float32, or
// float64 where the target is; four elements at once where both addresses allow it.
//
// A momentum on the GPU is read there.
#include <algorithm>
#include <utility>
#include <vector>

#include "common/elements.h"
#include "common/launch.h"

namespace fastssl {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;
constexpr int kChunk = 16 * kThreads;  // elements of a block

#if CUDART_VERSION >= 12010
constexpr int kMostPairs = 1024;  // 32 KiB of parameters
#else
constexpr int kMostPairs = 128;  // 4 KiB
#endif

// Pairs whose elements lie in memory in one order. `ends` are chunks: of a pair with those of all pairs before it.
template <int kPairs>
struct Pairs {
  void* targets[kPairs];
  const void* sources[kPairs];
  int64_t counts[kPairs];
  unsigned ends[kPairs];
  Element target_elements[kPairs], source_elements[kPairs];
  int size;
};

struct Momentum {
  const double* at;  // nullptr: `value` it is
  double value;
};

// torch.lerp's formula: exact at either end, the nearer one being the starting point.
template <typename W>
__device__ W lerp(W target, W source, W weight) {
  const W apart = source - target;
  return weight < W(0.5) ? target + apart * weight : source - apart * (1 - weight);
}

template <typename T>
__device__ bool is_aligned(const T* x) {
  return reinterpret_cast<uint64_t>(x) % alignof(Vector<T, kAtOnce>) == 0;
}

template <typename T, typename S>
__device__ void blend(void* targets, const void* sources, int64_t first, int count, double weight_) {
  using W = Wide<T>;
  T* const target = static_cast<T*>(targets) + first;
  const S* const source = static_cast<const S*>(sources) + first;
  const W weight = static_cast<W>(weight_);
  int done = 0;
  if (is_aligned(target) && is_aligned(source)) {
    done = count / kAtOnce * kAtOnce;
    for (int i = kAtOnce * threadIdx.x; i < done; i += kAtOnce * kThreads) {
      auto* const at = reinterpret_cast<Vector<T, kAtOnce>*>(target + i);
      Vector<T, kAtOnce> t = *at;
      const Vector<S, kAtOnce> s = *reinterpret_cast<const Vector<S, kAtOnce>*>(source + i);
      for (int j = 0; j < kAtOnce; ++j)
        t.at[j] = static_cast<T>(lerp(static_cast<W>(t.at[j]), static_cast<W>(s.at[j]), weight));
      *at = t;
    }
  }
  for (int i = done + threadIdx.x; i < count; i += kThreads)
    target[i] = static_cast<T>(lerp(static_cast<W>(target[i]), static_cast<W>(source[i]), weight));
}

template <typename T>
__device__ void blend(void* target, const void* source, Element source_element, int64_t first, int count,
                      double weight) {
  switch (source_element) {
    case Element::Float32: return blend<T, float>(target, source, first, count, weight);
    case Element::BFloat16: return blend<T, torch::headeronly::BFloat16>(target, source, first, count, weight);
    case Element::Float16: return blend<T, torch::headeronly::Half>(target, source, first, count, weight);
    case Element::Float64: return blend<T, double>(target, source, first, count, weight);
  }
}

template <int kPairs>
__global__ void __launch_bounds__(kThreads, 4)
    update(const __grid_constant__ Pairs<kPairs> pairs, const __grid_constant__ Momentum momentum) {
  int pair = 0;
  for (int beyond = pairs.size - 1; pair < beyond;) {
    const int middle = (pair + beyond) / 2;
    if (pairs.ends[middle] > blockIdx.x)
      beyond = middle;
    else
      pair = middle + 1;
  }
  const int64_t first = int64_t(blockIdx.x - (pair ? pairs.ends[pair - 1] : 0)) * kChunk;
  const int64_t left = pairs.counts[pair] - first;
  const int count = left < kChunk ? static_cast<int>(left) : kChunk;
  const double weight = 1 - (momentum.at ? *momentum.at : momentum.value);
  void* const target = pairs.targets[pair];
  const void* const source = pairs.sources[pair];
  const Element element = pairs.source_elements[pair];
  switch (pairs.target_elements[pair]) {
    case Element::Float32: return blend<float>(target, source, element, first, count, weight);
    case Element::BFloat16: return blend<torch::headeronly::BFloat16>(target, source, element, first, count, weight);
    case Element::Float16: return blend<torch::headeronly::Half>(target, source, element, first, count, weight);
    case Element::Float64: return blend<double>(target, source, element, first, count, weight);
  }
}

// Whether the elements lie one behind another, in any order.
bool is_dense(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) > 1) dims.emplace_back(x.stride(d), x.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t next = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != next) return false;
    next *= size;
  }
  return true;
}

// The addresses of a tensor.
struct Span {
  uint64_t begin, end;
  const char* list;
  size_t index;
  bool written;

  Span(const Tensor& x, const char* list, size_t index, bool written)
      : begin(address(x)), end(begin + elements(x) * x.element_size()), list(list), index(index), written(written) {}
};

// No target may share memory with another tensor, but for its very source.
void check_spans(std::vector<Span>& spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& x, const Span& y) { return x.begin < y.begin; });
  const Span *last = nullptr, *last_target = nullptr;  // those that end last
  for (const Span& span : spans) {
    const Span* const before = span.written ? last : last_target;
    if (before && span.begin < before->end)
      refuse("targets must not share memory, got ", span.list, "[", span.index, "] and ", before->list, "[",
             before->index, "]");
    if (!last || span.end > last->end) last = &span;
    if (span.written && (!last_target || span.end > last_target->end)) last_target = &span;
  }
}

void check_pairs(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources) {
  if (targets.size() != sources.size())
    refuse("targets and sources must have the same length, got ", targets.size(), " and ", sources.size());
  std::vector<Span> spans;
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &target = targets[i], &source = sources[i];
    if (!same(target.sizes(), source.sizes()))
      refuse("targets[", i, "] and sources[", i, "] must have the same shape, got ", text(target.sizes()), " and ",
             text(source.sizes()));
    if (device_of(target) != device_of(source))
      refuse("targets[", i, "] and sources[", i, "] must be on the same device, got ", device_of(target), " and ",
             device_of(source));
    if (device_of(target) != device_of(targets[0]))
      refuse("targets must be on one device, got ", device_of(targets[0]), " and ", device_of(target));
    if (!element_of(target))
      refuse("targets[", i, "] must be of 16, 32 or 64 bits, floating-point, got ", target.scalar_type());
    if (!element_of(source))
      refuse("sources[", i, "] must be of 16, 32 or 64 bits, floating-point, got ", source.scalar_type());
    if (target.numel() == 0) continue;
    if (elements(target) < target.numel())
      refuse("targets[", i, "] must have no two elements in one place, got strides ", text(target.strides()));
    spans.emplace_back(target, "targets", i, true);
    if (address(target) != address(source) || !same(target.strides(), source.strides()) ||
        target.scalar_type() != source.scalar_type())
      spans.emplace_back(source, "sources", i, false);
  }
  check_spans(spans);
}

// Launches for all pairs, kPairs at a time.
template <int kPairs>
void update_all(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources, const Momentum& momentum) {
  const Launch launch(targets[0]);
  Pairs<kPairs> pairs;
  for (size_t begin = 0; begin < targets.size(); begin += kPairs) {
    pairs.size = static_cast<int>(std::min<size_t>(kPairs, targets.size() - begin));
    unsigned chunks = 0;
    for (int i = 0; i < pairs.size; ++i) {
      const Tensor &target = targets[begin + i], &source = sources[begin + i];
      pairs.targets[i] = target.mutable_data_ptr();
      pairs.sources[i] = source.const_data_ptr();
      pairs.counts[i] = target.numel();
      pairs.ends[i] = chunks += static_cast<unsigned>(ceil_div(target.numel(), kChunk));
      pairs.target_elements[i] = *element_of(target);
      pairs.source_elements[i] = *element_of(source);
    }
    launch(update<kPairs>, chunks, kThreads, pairs, momentum);
  }
}

void ema_update_(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources, const Tensor& momentum) {
  check_pairs(targets, sources);
  if (momentum.numel() != 1) refuse("momentum must be one number, got shape ", text(momentum.sizes()));
  std::vector<Tensor> written, read;               // pairs in one order, sources perhaps copied
  std::vector<std::pair<Tensor, Tensor>> strided;  // targets, and what is to be copied into them
  for (size_t i = 0; i < targets.size(); ++i) {
    Tensor target = targets[i], source = sources[i];
    if (target.numel() == 0) continue;
    if (!same(target.strides(), source.strides()) || !is_dense(target)) {
      source = torch::stable::contiguous(source);
      if (!target.is_contiguous()) {
        strided.emplace_back(target, torch::stable::contiguous(target));
        target = strided.back().second;
      }
    }
    written.push_back(target);
    read.push_back(source);
  }
  if (written.empty()) return;
  Tensor number = to_dtype(momentum, ScalarType::Double);
  Momentum value{nullptr, 0};
  if (number.is_cpu()) {
    value.value = *number.const_data_ptr<double>();
  } else {
    if (device_of(number) != device_of(written[0])) number = torch::stable::to(number, written[0].device(), true);
    value.at = number.const_data_ptr<double>();
  }
  if (written.size() <= 128)
    update_all<128>(written, read, value);
  else
    update_all<kMostPairs>(written, read, value);
  for (auto& [target, updated] : strided) torch::stable::copy_(target, updated);
}

STABLE_TORCH_LIBRARY_IMPL(fastssl, CUDA, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_)); }

}  // namespace
}  // namespace fastssl
