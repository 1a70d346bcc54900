// Exponential moving averages on the GPU: the teachers of MoCo (arXiv:1911.05722), BYOL (arXiv:2006.07733) and DINO.
//
//     target = momentum target + (1 - momentum) source
//
// for lists of tensors, in one pass over memory: a target is read, its source is read, the target is written, 12 bytes
// for each float32 parameter. One launch serves up to 900 pairs (120 if there are no more, or before CUDA 12.1): the
// table of their addresses is a parameter of the kernel, so nothing is copied and nothing waits. All tensors together
// are cut into chunks of 4096 elements, one for each block, which finds its pair by bisection. Arithmetic is float32,
// or float64 where the target is; a thread takes four elements at once where both addresses allow it.
//
// Where the source is a model that AdamW updates (arXiv:1711.05101), one pass does both, with 36 bytes instead of 40:
// with gradient g and step t, which is on the CPU as in PyTorch,
//
//     m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//     param = (1 - lr weight_decay) param - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
//     ema = momentum ema + (1 - momentum) param
//
// If the momentum is on the GPU, the kernel reads it there.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/elements.h"
#include "common/launch.h"

namespace fastssl {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;
constexpr int kChunk = 16 * kThreads;  // elements of a block

constexpr int kFewBytes = 3840;  // of a table: a kernel's parameters may take 4 KiB
#if CUDART_VERSION >= 12010
constexpr int kManyBytes = 28800;  // parameters may take 32764
#else
constexpr int kManyBytes = kFewBytes;
#endif

// Items of work, which are cut into chunks. An item's `end` is the number of its chunks and of all chunks before it.
template <typename Item, int kItems>
struct Table {
  Item items[kItems];
  int size;
};

// A target and its source, whose elements lie in memory in the same order.
struct Pair {
  void* target;
  const void* source;
  int64_t count;
  unsigned end;
  Element target_element, source_element;
};

struct Momentum {
  const double* at;  // nullptr: the momentum is `value`
  double value;

  __device__ double get() const { return at ? *at : value; }
};

// The item of this block, and which of its elements the block takes.
template <typename Item>
struct Chunk {
  const Item& item;
  int64_t first;
  int count;
};

template <typename Item, int kItems>
__device__ Chunk<Item> chunk_of(const Table<Item, kItems>& table) {
  int i = 0;
  for (int beyond = table.size - 1; i < beyond;) {
    const int middle = (i + beyond) / 2;
    if (table.items[middle].end > blockIdx.x)
      beyond = middle;
    else
      i = middle + 1;
  }
  const int64_t first = int64_t(blockIdx.x - (i ? table.items[i - 1].end : 0)) * kChunk;
  const int64_t left = table.items[i].count - first;
  return {table.items[i], first, left < kChunk ? static_cast<int>(left) : kChunk};
}

// torch.lerp's formula.
template <typename W>
__device__ W lerp(W start, W end, W weight) {
  const W apart = end - start;
  return weight < W(0.5) ? start + apart * weight : end - apart * (1 - weight);
}

// A moving average, computed from the nearer of the two values, so that equal values stay as they are, -0 too. If their
// difference is infinite or NaN, as it may be for infinities and huge numbers, it is the weighted sum instead.
template <typename W>
struct Average {
  W momentum, weight;

  __device__ explicit Average(double momentum)
      : momentum(static_cast<W>(momentum)), weight(static_cast<W>(1 - momentum)) {}

  __device__ W operator()(W target, W source) const {
    if (momentum == 0) return source;
    if (weight == 0) return target;
    const W apart = target - source;
    if (!(apart - apart == 0)) return momentum * target + weight * source;
    return weight < W(0.5) ? target - apart * weight : source - (source - target) * momentum;
  }
};

template <typename T>
__device__ bool is_aligned(const T* x) {
  return reinterpret_cast<uint64_t>(x) % alignof(Vector<T, kAtOnce>) == 0;
}

template <typename T, typename S>
__device__ void blend(void* targets, const void* sources, int64_t first, int count, double momentum) {
  using W = Wide<T>;
  T* const target = static_cast<T*>(targets) + first;
  const S* const source = static_cast<const S*>(sources) + first;
  const Average<W> average(momentum);
  int done = 0;
  if (is_aligned(target) && is_aligned(source)) {
    done = count / kAtOnce * kAtOnce;
    for (int i = kAtOnce * threadIdx.x; i < done; i += kAtOnce * kThreads) {
      auto* const at = reinterpret_cast<Vector<T, kAtOnce>*>(target + i);
      Vector<T, kAtOnce> t = *at;
      const Vector<S, kAtOnce> s = *reinterpret_cast<const Vector<S, kAtOnce>*>(source + i);
      for (int j = 0; j < kAtOnce; ++j)
        t.at[j] = static_cast<T>(average(static_cast<W>(t.at[j]), static_cast<W>(s.at[j])));
      *at = t;
    }
  }
  for (int i = done + threadIdx.x; i < count; i += kThreads)
    target[i] = static_cast<T>(average(static_cast<W>(target[i]), static_cast<W>(source[i])));
}

template <typename T>
__device__ void blend(void* target, const void* source, Element source_element, int64_t first, int count,
                      double momentum) {
  switch (source_element) {
    case Element::Float32: return blend<T, float>(target, source, first, count, momentum);
    case Element::BFloat16: return blend<T, torch::headeronly::BFloat16>(target, source, first, count, momentum);
    case Element::Float16: return blend<T, torch::headeronly::Half>(target, source, first, count, momentum);
    case Element::Float64: return blend<T, double>(target, source, first, count, momentum);
  }
}

template <int kPairs>
__global__ void __launch_bounds__(kThreads, 4)
    update(const __grid_constant__ Table<Pair, kPairs> pairs, const __grid_constant__ Momentum momentum) {
  const auto& [pair, first, count] = chunk_of(pairs);
  const double number = momentum.get();
  void* const target = pair.target;
  const void* const source = pair.source;
  const Element element = pair.source_element;
  switch (pair.target_element) {
    case Element::Float32: return blend<float>(target, source, element, first, count, number);
    case Element::BFloat16: return blend<torch::headeronly::BFloat16>(target, source, element, first, count, number);
    case Element::Float16: return blend<torch::headeronly::Half>(target, source, element, first, count, number);
    case Element::Float64: return blend<double>(target, source, element, first, count, number);
  }
}

// A parameter with its gradient and its averages.
struct Parameter {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq, *ema;
  int64_t count;
  double size, scale;  // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
  unsigned end;
  Element element, ema_element;
};

struct AdamW {
  double weight1, beta2, weight2, eps, decay;  // 1 - beta1; 1 - beta2; 1 - lr weight_decay
};

template <typename W>
struct Step {
  W weight1, beta2, weight2, eps, decay, size, scale;

  __device__ Step(const AdamW& all, const Parameter& one)
      : weight1(all.weight1), beta2(all.beta2), weight2(all.weight2), eps(all.eps), decay(all.decay), size(one.size),
        scale(one.scale) {}
};

// A step for kCount elements at once. `ema` may be `param`: it is read after `param` is written.
template <int kCount, typename T, typename S>
__device__ void advance(T* param, const T* grad, T* exp_avg, T* exp_avg_sq, S* ema, const Step<T>& step,
                        const Average<Wide<S>>& average) {
  using Ts = Vector<T, kCount>;
  using Ss = Vector<S, kCount>;
  Ts p = *reinterpret_cast<Ts*>(param), m = *reinterpret_cast<Ts*>(exp_avg), v = *reinterpret_cast<Ts*>(exp_avg_sq);
  const Ts g = *reinterpret_cast<const Ts*>(grad);
  for (int j = 0; j < kCount; ++j) {
    m.at[j] = lerp(m.at[j], g.at[j], step.weight1);
    v.at[j] = step.beta2 * v.at[j] + step.weight2 * g.at[j] * g.at[j];
    p.at[j] = step.decay * p.at[j] - step.size * m.at[j] / (step.scale * sqrt(v.at[j]) + step.eps);
  }
  *reinterpret_cast<Ts*>(exp_avg) = m;
  *reinterpret_cast<Ts*>(exp_avg_sq) = v;
  *reinterpret_cast<Ts*>(param) = p;
  Ss t = *reinterpret_cast<Ss*>(ema);
  for (int j = 0; j < kCount; ++j)
    t.at[j] = static_cast<S>(average(static_cast<Wide<S>>(t.at[j]), static_cast<Wide<S>>(p.at[j])));
  *reinterpret_cast<Ss*>(ema) = t;
}

template <typename T, typename S>
__device__ void advance(const Parameter& one, const AdamW& all, int64_t first, int count, double momentum) {
  T* const param = static_cast<T*>(one.param) + first;
  const T* const grad = static_cast<const T*>(one.grad) + first;
  T* const exp_avg = static_cast<T*>(one.exp_avg) + first;
  T* const exp_avg_sq = static_cast<T*>(one.exp_avg_sq) + first;
  S* const ema = static_cast<S*>(one.ema) + first;
  const Step<T> step(all, one);
  const Average<Wide<S>> average(momentum);
  int done = 0;
  if constexpr (sizeof(T) == 4)
    if (is_aligned(param) && is_aligned(grad) && is_aligned(exp_avg) && is_aligned(exp_avg_sq) && is_aligned(ema)) {
      done = count / kAtOnce * kAtOnce;
      for (int i = kAtOnce * threadIdx.x; i < done; i += kAtOnce * kThreads)
        advance<kAtOnce>(param + i, grad + i, exp_avg + i, exp_avg_sq + i, ema + i, step, average);
    }
#pragma unroll 1
  for (int i = done + threadIdx.x; i < count; i += kThreads)
    advance<1>(param + i, grad + i, exp_avg + i, exp_avg_sq + i, ema + i, step, average);
}

template <typename T>
__device__ void advance(const Parameter& one, const AdamW& all, int64_t first, int count, double momentum) {
  switch (one.ema_element) {
    case Element::Float32: return advance<T, float>(one, all, first, count, momentum);
    case Element::BFloat16: return advance<T, torch::headeronly::BFloat16>(one, all, first, count, momentum);
    case Element::Float16: return advance<T, torch::headeronly::Half>(one, all, first, count, momentum);
    case Element::Float64: return advance<T, double>(one, all, first, count, momentum);
  }
}

template <int kParameters>
__global__ void __launch_bounds__(kThreads, 4)
    step(const __grid_constant__ Table<Parameter, kParameters> parameters, const __grid_constant__ AdamW adamw,
         const __grid_constant__ Momentum momentum) {
  const auto& [parameter, first, count] = chunk_of(parameters);
  const double number = momentum.get();
  if (parameter.element == Element::Float64)
    advance<double>(parameter, adamw, first, count, number);
  else
    advance<float>(parameter, adamw, first, count, number);
}

// Whether the elements fill a range of memory without gaps, in any order.
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

// The range of addresses of a tensor.
struct Span {
  uint64_t begin, end;
  const char* list;
  size_t index;
  bool written;

  Span(const Tensor& x, const char* list, size_t index, bool written)
      : begin(address(x)), end(begin + elements(x) * x.element_size()), list(list), index(index), written(written) {}
};

// A tensor that is written must not share memory with any other.
void check_spans(std::vector<Span>& spans, const char* written) {
  std::sort(spans.begin(), spans.end(), [](const Span& x, const Span& y) { return x.begin < y.begin; });
  const Span *last = nullptr, *last_written = nullptr;  // those that end last so far
  for (const Span& span : spans) {
    const Span* const before = span.written ? last : last_written;
    if (before && span.begin < before->end)
      refuse(written, " must not share memory, got ", span.list, "[", span.index, "] and ", before->list, "[",
             before->index, "]");
    if (!last || span.end > last->end) last = &span;
    if (span.written && (!last_written || span.end > last_written->end)) last_written = &span;
  }
}

using Tensors = std::vector<Tensor>;

// An argument: a list of tensors.
struct List {
  const char* name;
  const Tensors& tensors;
  bool written;
  bool may_be_first;  // its tensors may be the same as those of the first list
};

// Checks that the lists fit the first one, tensor by tensor, and that tensors which are written share no memory.
// `written`: the names of the lists that are written, for the message; `counts` are written, too.
void check_lists(const std::vector<List>& lists, const char* written, const Tensors& counts = {}) {
  const List& first = lists[0];
  for (const List& list : lists)
    if (list.tensors.size() != first.tensors.size())
      refuse(first.name, " and ", list.name, " must have the same length, got ", first.tensors.size(), " and ",
             list.tensors.size());
  std::vector<Span> spans;
  for (size_t i = 0; i < first.tensors.size(); ++i) {
    const Tensor& like = first.tensors[i];
    if (device_of(like) != device_of(first.tensors[0]))
      refuse(first.name, " must be on one device, got ", device_of(first.tensors[0]), " and ", device_of(like));
    for (const List& list : lists) {
      const Tensor& x = list.tensors[i];
      if (!same(x.sizes(), like.sizes()))
        refuse(first.name, "[", i, "] and ", list.name, "[", i, "] must have the same shape, got ", text(like.sizes()),
               " and ", text(x.sizes()));
      if (device_of(x) != device_of(like))
        refuse(first.name, "[", i, "] and ", list.name, "[", i, "] must be on the same device, got ", device_of(like),
               " and ", device_of(x));
      if (!element_of(x))
        refuse(list.name, "[", i, "] must be of 16, 32 or 64 bits, floating-point, got ", x.scalar_type());
      if (x.numel() == 0) continue;
      if (list.written && elements(x) < x.numel())
        refuse(list.name, "[", i, "] must have no two elements in one place, got strides ", text(x.strides()));
      if (list.may_be_first && address(x) == address(like) && same(x.strides(), like.strides()) &&
          x.scalar_type() == like.scalar_type())
        continue;
      spans.emplace_back(x, list.name, i, list.written);
    }
  }
  for (size_t i = 0; i < counts.size(); ++i) spans.emplace_back(counts[i], "steps", i, true);
  check_spans(spans, written);
}

void check_steps(const Tensors& steps, const Tensors& params) {
  if (steps.size() != params.size())
    refuse("params and steps must have the same length, got ", params.size(), " and ", steps.size());
  for (size_t i = 0; i < steps.size(); ++i)
    if (steps[i].dim() || steps[i].scalar_type() != ScalarType::Float || !steps[i].is_cpu())
      refuse("steps[", i, "] must be a 0-d tensor, float32, on the CPU, got ", steps[i].scalar_type(), " on ",
             device_of(steps[i]), " of shape ", text(steps[i].sizes()));
}

// Launches the kernel for all items, as many at a time as a table holds.
template <typename Item, int kItems, typename... Numbers>
void launch_all(void (*kernel)(Table<Item, kItems>, Numbers...), const std::vector<Item>& items, const Tensor& on,
                const Numbers&... numbers) {
  const Launch launch(on);
  Table<Item, kItems> table;
  for (size_t begin = 0; begin < items.size(); begin += kItems) {
    table.size = static_cast<int>(std::min<size_t>(kItems, items.size() - begin));
    unsigned chunks = 0;
    for (int i = 0; i < table.size; ++i) {
      table.items[i] = items[begin + i];
      table.items[i].end = chunks += static_cast<unsigned>(ceil_div(table.items[i].count, kChunk));
    }
    launch(kernel, chunks, kThreads, table, numbers...);
  }
}

// The momentum, and the tensor that keeps it alive.
std::pair<Momentum, Tensor> read_momentum(const Tensor& momentum, const Tensor& on) {
  Tensor number = to_dtype(momentum, ScalarType::Double);
  if (number.is_cpu()) return {{nullptr, *number.const_data_ptr<double>()}, number};
  if (device_of(number) != device_of(on)) number = torch::stable::to(number, on.device(), true);
  return {{number.const_data_ptr<double>(), 0}, number};
}

void ema_update_(const Tensors& targets, const Tensors& sources, const Tensor& momentum) {
  check_lists({{"targets", targets, true, false}, {"sources", sources, false, true}}, "targets");
  if (momentum.numel() != 1) refuse("momentum must be one number, got shape ", text(momentum.sizes()));
  std::vector<Pair> pairs;
  Tensors held;                                    // copies of sources
  std::vector<std::pair<Tensor, Tensor>> strided;  // targets, and the tensors to be copied into them
  for (size_t i = 0; i < targets.size(); ++i) {
    Tensor target = targets[i], source = sources[i];
    if (target.numel() == 0) continue;
    if (!same(target.strides(), source.strides()) || !is_dense(target)) {
      held.push_back(source = torch::stable::contiguous(source));
      if (!target.is_contiguous()) {
        strided.emplace_back(target, torch::stable::contiguous(target));
        target = strided.back().second;
      }
    }
    pairs.push_back({target.mutable_data_ptr(), source.const_data_ptr(), target.numel(), 0, *element_of(target),
                     *element_of(source)});
  }
  if (pairs.empty()) return;
  const auto [number, kept] = read_momentum(momentum, targets[0]);
  constexpr int kFew = kFewBytes / sizeof(Pair), kMany = kManyBytes / sizeof(Pair);
  if (pairs.size() <= kFew)
    launch_all(update<kFew>, pairs, targets[0], number);
  else
    launch_all(update<kMany>, pairs, targets[0], number);
  for (auto& [target, updated] : strided) torch::stable::copy_(target, updated);
}

void adamw_ema_step_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                     const Tensors& ema_params, const Tensors& steps, const Tensor& lr_, const Tensor& beta1_,
                     const Tensor& beta2_, const Tensor& eps, const Tensor& weight_decay, const Tensor& momentum) {
  check_steps(steps, params);
  check_lists({{"params", params, true, false},
               {"grads", grads, false, false},
               {"exp_avgs", exp_avgs, true, false},
               {"exp_avg_sqs", exp_avg_sqs, true, false},
               {"ema_params", ema_params, true, true}},
              "params, exp_avgs, exp_avg_sqs, ema_params and steps", steps);
  for (const auto& [name, number] : {std::pair("lr", lr_), {"momentum", momentum}})
    if (number.numel() != 1) refuse(name, " must be one number, got shape ", text(number.sizes()));
  if (!lr_.is_cpu()) refuse("lr must be on the CPU, got ", device_of(lr_));
  for (size_t i = 0; i < params.size(); ++i) {
    const ScalarType dtype = params[i].scalar_type();
    if (dtype != ScalarType::Float && dtype != ScalarType::Double)
      refuse("params[", i, "] must be float32 or float64, got ", dtype);
    for (const List& list : {List{"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}})
      if (list.tensors[i].scalar_type() != dtype)
        refuse("params[", i, "] and ", list.name, "[", i, "] must have the same dtype, got ", dtype, " and ",
               list.tensors[i].scalar_type());
  }
  const double lr = *to_dtype(lr_, ScalarType::Double).const_data_ptr<double>();
  const double beta1 = number_in(beta1_), beta2 = number_in(beta2_);
  std::vector<Parameter> parameters;
  Tensors held;                                    // copies
  std::vector<std::pair<Tensor, Tensor>> strided;  // tensors that are written, and those to be copied into them
  for (size_t i = 0; i < params.size(); ++i) {
    const double step = *static_cast<float*>(steps[i].mutable_data_ptr()) += 1;
    if (params[i].numel() == 0) continue;
    bool in_order = is_dense(params[i]);
    for (const Tensors* list : {&grads, &exp_avgs, &exp_avg_sqs, &ema_params})
      in_order &= same((*list)[i].strides(), params[i].strides());
    const auto laid_out = [&](const Tensor& x, bool written) {
      if (in_order || x.is_contiguous()) return x;
      held.push_back(torch::stable::contiguous(x));
      if (written) strided.emplace_back(x, held.back());
      return held.back();
    };
    const Tensor param = laid_out(params[i], true);
    const Tensor ema = address(ema_params[i]) == address(params[i]) ? param : laid_out(ema_params[i], true);
    parameters.push_back({param.mutable_data_ptr(), laid_out(grads[i], false).const_data_ptr(),
                          laid_out(exp_avgs[i], true).mutable_data_ptr(),
                          laid_out(exp_avg_sqs[i], true).mutable_data_ptr(), ema.mutable_data_ptr(), param.numel(),
                          lr / (1 - std::pow(beta1, step)), 1 / std::sqrt(1 - std::pow(beta2, step)), 0,
                          *element_of(param), *element_of(ema)});
  }
  if (parameters.empty()) return;
  const auto [number, kept] = read_momentum(momentum, params[0]);
  const AdamW adamw{1 - beta1, beta2, 1 - beta2, number_in(eps), 1 - lr * number_in(weight_decay)};
  constexpr int kFew = kFewBytes / sizeof(Parameter), kMany = kManyBytes / sizeof(Parameter);
  if (parameters.size() <= kFew)
    launch_all(step<kFew>, parameters, params[0], adamw, number);
  else
    launch_all(step<kMany>, parameters, params[0], adamw, number);
  for (auto& [written, updated] : strided) torch::stable::copy_(written, updated);
}

STABLE_TORCH_LIBRARY_IMPL(fastssl, CUDA, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update_));
  m.impl("adamw_ema_step_", TORCH_BOX(&adamw_ema_step_));
}

}  // namespace
}  // namespace fastssl
