// Exponential moving averages on the CPU: the teachers of MoCo (arXiv:1911.05722), BYOL (arXiv:2006.07733) and DINO.
//
//     target = momentum target + (1 - momentum) source
//
// for lists of tensors, in one pass over memory: a target is read, its source is read, the target is written, 12 bytes
// for each float32 parameter. All tensors together are cut into runs of equal length, and the threads share those: a
// small tensor does not cost a call of its own, and a large one does not keep one thread busy alone. Arithmetic is
// float32, whatever the dtypes of both sides.
//
// Where the source is a model that AdamW updates (arXiv:1711.05101), one pass does both: with gradient g and step t
//
//     m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//     param = (1 - lr weight_decay) param - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
//     ema = momentum ema + (1 - momentum) param
//
// That takes 36 bytes for each float32 parameter, and 40 in two passes: the teacher reads new parameters from the
// first-level cache.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/portable.h"
#include "common/tensors.h"
#include "ema_tiles.h"

namespace fastssl {
namespace {

constexpr int64_t kRun = 1 << 15;  // elements of a run; fewer are not worth another thread

// A target and its source, whose elements lie in memory in the same order.
struct Pair {
  char* target;
  const char* source;
  Element target_element, source_element;
  int64_t count, end;  // elements of this pair; of this and all pairs before it
};

bool is_supported(const Tensor& x) { return has_element(x) || x.scalar_type() == at::kDouble; }

// How many elements lie in memory from the first to the last of x, both included.
int64_t elements(const Tensor& x) {
  int64_t count = 1;
  for (int64_t d = 0; d < x.dim(); ++d) count += (x.size(d) - 1) * x.stride(d);
  return count;
}

// The range of addresses of a tensor.
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

// A tensor that is written must not share memory with any other.
void check_spans(std::vector<Span>& spans, const char* written) {
  std::sort(spans.begin(), spans.end(), [](const Span& x, const Span& y) { return x.begin < y.begin; });
  const Span *last = nullptr, *last_written = nullptr;  // those that end last so far
  for (const Span& span : spans) {
    const Span* const before = span.written ? last : last_written;
    TORCH_CHECK_VALUE(!before || span.begin >= before->end, written, " must not share memory, got ", span.list, "[",
                      span.index, "] and ", before->list, "[", before->index, "]");
    if (!last || span.end > last->end) last = &span;
    if (span.written && (!last_written || span.end > last_written->end)) last_written = &span;
  }
}

// An argument: a list of tensors.
struct List {
  const char* name;
  at::TensorList tensors;
  bool written;
  bool may_be_first;  // its tensors may be the same as those of the first list
};

// Checks that the lists fit the first one, tensor by tensor, and that tensors which are written share no memory.
// `written`: the names of the lists that are written, for the message; `counts` are written, too.
void check_lists(const std::vector<List>& lists, const char* written, at::TensorList counts = {}) {
  const List& first = lists[0];
  for (const List& list : lists)
    TORCH_CHECK_VALUE(list.tensors.size() == first.tensors.size(), first.name, " and ", list.name,
                      " must have the same length, got ", first.tensors.size(), " and ", list.tensors.size());
  std::vector<Span> spans;
  for (size_t i = 0; i < first.tensors.size(); ++i) {
    const Tensor& like = first.tensors[i];
    for (const List& list : lists) {
      const Tensor& x = list.tensors[i];
      TORCH_CHECK_VALUE(x.sizes() == like.sizes(), first.name, "[", i, "] and ", list.name, "[", i,
                        "] must have the same shape, got ", like.sizes(), " and ", x.sizes());
      TORCH_CHECK_VALUE(x.device() == like.device(), first.name, "[", i, "] and ", list.name, "[", i,
                        "] must be on the same device, got ", like.device(), " and ", x.device());
      TORCH_CHECK_VALUE(x.layout() == at::kStrided, list.name, "[", i, "] must be a dense tensor, got ", x.layout());
      TORCH_CHECK_VALUE(is_supported(x), list.name, "[", i, "] must be of 16, 32 or 64 bits, floating-point, got ",
                        x.dtype());
      if (x.numel() == 0) continue;
      TORCH_CHECK_VALUE(x.const_data_ptr(), list.name, "[", i,
                        "] must have memory, got a tensor whose storage was freed");
      TORCH_CHECK_VALUE(!list.written || elements(x) >= x.numel(), list.name, "[", i,
                        "] must have no two elements in one place, got strides ", x.strides());
      if (list.may_be_first && x.const_data_ptr() == like.const_data_ptr() && x.strides() == like.strides() &&
          x.scalar_type() == like.scalar_type())
        continue;
      spans.emplace_back(x, list.name, i, list.written);
    }
  }
  for (size_t i = 0; i < counts.size(); ++i) spans.emplace_back(counts[i], "steps", i, true);
  check_spans(spans, written);
}

void check_steps(at::TensorList steps, at::TensorList params) {
  TORCH_CHECK_VALUE(steps.size() == params.size(), "params and steps must have the same length, got ", params.size(),
                    " and ", steps.size());
  for (size_t i = 0; i < steps.size(); ++i)
    TORCH_CHECK_VALUE(steps[i].dim() == 0 && steps[i].scalar_type() == at::kFloat && steps[i].is_cpu(), "steps[", i,
                      "] must be a 0-d tensor, float32, on the CPU, got ", steps[i].toString(), " of shape ",
                      steps[i].sizes());
}

// Calls visit(item, first element, number of elements) for the runs of all items, which the threads share.
template <typename Item, typename Visit>
void for_runs(const std::vector<Item>& items, const Visit& visit) {
  at::parallel_for(0, items.empty() ? 0 : items.back().end, kRun, [&](int64_t first, int64_t last) {
    auto item = std::upper_bound(items.begin(), items.end(), first, [](int64_t i, const Item& x) { return i < x.end; });
    for (; first < last; ++item) {
      const int64_t offset = first - (item->end - item->count), count = std::min(last, item->end) - first;
      visit(*item, offset, count);
      first += count;
    }
  });
}

Shares shares(double momentum) { return {static_cast<float>(momentum), static_cast<float>(1 - momentum)}; }

void ema_update_(at::TensorList targets, at::TensorList sources, const Tensor& momentum_) {
  check_lists({{"targets", targets, true, false}, {"sources", sources, false, true}}, "targets");
  const double momentum = momentum_.item<double>();
  std::vector<Pair> pairs;
  std::vector<Tensor> held;                        // copies of sources
  std::vector<std::pair<Tensor, Tensor>> strided;  // targets, and the tensors to be copied into them
  int64_t end = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    Tensor target = targets[i], source = sources[i];
    if (target.numel() == 0) continue;
    if (!has_element(target)) {
      portable<&ema_update_>(target, source, momentum_);
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
  const Shares of = shares(momentum);
  for_runs(pairs, [&](const Pair& pair, int64_t offset, int64_t count) {
    tile.blend(pair.target + offset * bytes_of(pair.target_element), pair.target_element,
               pair.source + offset * bytes_of(pair.source_element), pair.source_element, count, of);
  });
  for (const auto& [target, updated] : strided) target.copy_(updated);
}

// A parameter with its gradient and its averages, whose elements lie in memory in the same order, and AdamW's numbers.
struct Parameter {
  float* param;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  char* ema;
  Element ema_element;
  AdamWStep step;
  int64_t count, end;  // elements of this parameter; of this and all parameters before it
};

void adamw_ema_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                     at::TensorList ema_params, at::TensorList steps, const Tensor& lr_, double beta1, double beta2,
                     double eps, double weight_decay, const Tensor& momentum_) {
  check_steps(steps, params);
  check_lists({{"params", params, true, false},
               {"grads", grads, false, false},
               {"exp_avgs", exp_avgs, true, false},
               {"exp_avg_sqs", exp_avg_sqs, true, false},
               {"ema_params", ema_params, true, true}},
              "params, exp_avgs, exp_avg_sqs, ema_params and steps", steps);
  bool is_double = false;
  for (size_t i = 0; i < params.size(); ++i) {
    const auto dtype = params[i].scalar_type();
    TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble, "params[", i,
                      "] must be float32 or float64, got ", params[i].dtype());
    for (const auto& [name, tensors] : {std::pair("grads", grads), {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}})
      TORCH_CHECK_VALUE(tensors[i].scalar_type() == dtype, "params[", i, "] and ", name, "[", i,
                        "] must have the same dtype, got ", params[i].dtype(), " and ", tensors[i].dtype());
    is_double |= dtype == at::kDouble || ema_params[i].scalar_type() == at::kDouble;
  }
  if (is_double)
    return portable<&adamw_ema_step_>(params, grads, exp_avgs, exp_avg_sqs, ema_params, steps, lr_, beta1, beta2, eps,
                                      weight_decay, momentum_);
  const double lr = lr_.item<double>(), momentum = momentum_.item<double>();
  std::vector<Parameter> parameters;
  std::vector<Tensor> held;                        // copies
  std::vector<std::pair<Tensor, Tensor>> strided;  // tensors that are written, and those to be copied into them
  int64_t end = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const double step = *steps[i].mutable_data_ptr<float>() += 1;
    if (params[i].numel() == 0) continue;
    Tensor param = params[i];
    if (!param.is_non_overlapping_and_dense()) strided.emplace_back(params[i], param = param.contiguous());
    const auto in_order = [&](const Tensor& x, bool written) {
      if (x.const_data_ptr() == params[i].const_data_ptr()) return param;
      if (x.strides() == param.strides()) return x;
      held.push_back(at::empty_like(param, x.options()).copy_(x));
      if (written) strided.emplace_back(x, held.back());
      return held.back();
    };
    const Tensor ema = in_order(ema_params[i], true);
    end += param.numel();
    parameters.push_back({param.mutable_data_ptr<float>(), in_order(grads[i], false).const_data_ptr<float>(),
                          in_order(exp_avgs[i], true).mutable_data_ptr<float>(),
                          in_order(exp_avg_sqs[i], true).mutable_data_ptr<float>(),
                          static_cast<char*>(ema.mutable_data_ptr()), element_of(ema),
                          {static_cast<float>(1 - beta1), static_cast<float>(beta2), static_cast<float>(1 - beta2),
                           static_cast<float>(eps), static_cast<float>(1 - lr * weight_decay),
                           static_cast<float>(lr / (1 - std::pow(beta1, step))),
                           static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)))},
                          param.numel(), end});
  }
  const EmaTiles& tile = FASTSSL_TABLE_IN_USE(ema_tiles);
  const Shares of = shares(momentum);
  for_runs(parameters, [&](const Parameter& p, int64_t offset, int64_t count) {
    tile.adamw(p.param + offset, p.grad + offset, p.exp_avg + offset, p.exp_avg_sq + offset,
               p.ema + offset * bytes_of(p.ema_element), p.ema_element, count, p.step, of);
  });
  for (const auto& [written, updated] : strided) written.copy_(updated);
}

FASTSSL_KERNELS(CPU, m) {
  implement<&ema_update_, 0>(m, "ema_update_");
  implement<&adamw_ema_step_, 0>(m, "adamw_ema_step_");
}

}  // namespace
}  // namespace fastssl
