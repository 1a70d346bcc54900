// Autograd in C++: in Python, a small batch would spend more time than in its kernels.
//
// The formulas are those of fastssl/ops/_derivative.py, which serve torch.compile, torch.func, other devices, and
// installs without this library. Here they need no code of their own, because an operation and its backward operation
// agree on names. The arguments of the latter are
//
//     grad_<output>   the gradient of an output; outputs without one are not differentiable
//     needs_<input>   whether that input needs its gradient (for one input at most): if not, its values are not read,
//                     and may have changed
//     size_<input>    the shape of an input
//     others          the input or the output of that name
//
// and it returns grad_<input>. The second derivative is the derivative of the backward operation, taken in Python.
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/kernels.h"

namespace fastssl {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// How the backward operation of `name` is called.
struct Formula {
  enum Kind {
    kGradient,  // the gradient of outputs[index]
    kNeeds,     // whether inputs[index] needs its gradient
    kSaved,     // the tensor, or None, that has this index among inputs and outputs of the operation
    kKept,      // the value that has this index and is not a tensor
    kSize,      // the shape of the tensor that has this index
    kUnread,    // as kSaved, for a tensor that is only read for its own gradient
  };
  struct Argument {
    Kind kind;
    size_t index;
  };

  c10::OperatorHandle backward;
  std::vector<Argument> arguments;
  std::vector<size_t> inputs;   // those whose gradients it returns
  std::vector<size_t> outputs;  // those whose gradients it takes

  explicit Formula(const std::string& name) : backward(find(name + "_backward")) {
    const c10::FunctionSchema& forward = find(name).schema();
    std::vector<std::string> names;
    for (const c10::Argument& input : forward.arguments()) names.push_back(input.name());
    for (const c10::Argument& output : forward.returns()) names.push_back(output.name());
    const auto place = [&](std::string_view name, size_t from) -> size_t {
      return std::find(names.begin() + from, names.end(), name) - names.begin();
    };
    const size_t first_output = forward.arguments().size();
    for (const c10::Argument& gradient : backward.schema().returns())
      inputs.push_back(place(gradient.name().substr(5), 0));
    for (const c10::Argument& argument : backward.schema().arguments()) {
      const std::string& name = argument.name();
      if (const size_t index = place(name, 0); index < names.size()) {
        const auto kind = argument.type()->kind();
        const bool tensor = kind == c10::TypeKind::TensorType || kind == c10::TypeKind::OptionalType;
        arguments.push_back({tensor ? kSaved : kKept, index});
      } else if (name.starts_with("grad_")) {
        arguments.push_back({kGradient, outputs.size()});
        outputs.push_back(place(name.substr(5), first_output));
      } else if (name.starts_with("needs_")) {
        const size_t input = place(name.substr(6), 0);
        arguments.push_back({kNeeds, size_t(std::find(inputs.begin(), inputs.end(), input) - inputs.begin())});
        for (Argument& other : arguments)
          if (other.kind == kSaved && other.index == input) other.kind = kUnread;
      } else {
        TORCH_CHECK(name.starts_with("size_"), name, " is no argument of a backward operation");
        arguments.push_back({kSize, place(name.substr(5), 0)});
      }
    }
  }

  static c10::OperatorHandle find(const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  }
};

// A call of the operation: the top of the stack holds its inputs, then its outputs.
struct Call {
  const Formula& formula;
  const c10::OperatorHandle& op;
  c10::DispatchKeySet keys;
  torch::jit::Stack& stack;

  at::ArrayRef<IValue> inputs() const { return torch::jit::last(stack, op.schema().arguments().size()); }
  at::ArrayRef<IValue> outputs() const { return torch::jit::last(stack, op.schema().returns().size()); }

  void run_below_autograd() const {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, &stack);
  }
};

int64_t version_of(const Tensor& x) { return x.is_inference() ? 0 : x._version(); }

struct Derivative : torch::autograd::Function<Derivative> {
  // From the inputs that have gradients to the outputs that have gradients.
  static variable_list forward(AutogradContext* context, at::TensorList, const Call& call) {
    std::vector<IValue> values = call.inputs().vec();
    call.run_below_autograd();
    values.insert(values.end(), call.outputs().begin(), call.outputs().end());
    variable_list saved;
    std::vector<IValue> kept{reinterpret_cast<int64_t>(&call.formula)};
    for (const auto [kind, index] : call.formula.arguments) {
      if (kind == Formula::kSaved) {
        saved.push_back(values[index].isNone() ? Tensor() : values[index].toTensor());
      } else if (kind == Formula::kKept) {
        kept.push_back(values[index]);
      } else if (kind == Formula::kSize) {
        kept.emplace_back(values[index].toTensor().sym_sizes());
      } else if (kind == Formula::kUnread) {
        context->saved_data["unread"] = values[index];
        context->saved_data["version"] = version_of(values[index].toTensor());
      }
    }
    context->save_for_backward(std::move(saved));
    context->saved_data["kept"] = c10::ivalue::Tuple::create(std::move(kept));
    variable_list outputs;
    for (const size_t index : call.formula.outputs) outputs.push_back(values[index].toTensor());
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto holder = context->saved_data["kept"].toTuple();
    auto kept = holder->elements().begin();
    const auto& formula = *reinterpret_cast<const Formula*>((kept++)->toInt());
    const variable_list all_saved = context->get_saved_variables();
    auto saved = all_saved.begin();
    const auto needs = [&](size_t i) { return context->needs_input_grad(i); };
    torch::jit::Stack stack;
    for (const auto [kind, index] : formula.arguments) {
      switch (kind) {
        case Formula::kGradient: stack.emplace_back(gradients[index]); break;
        case Formula::kNeeds:
          stack.emplace_back(needs(index));
          check_version(context->saved_data, needs(index), formula.backward.schema().returns()[index].name().substr(5));
          break;
        case Formula::kSaved: stack.push_back(saved->defined() ? IValue(*saved) : IValue()); ++saved; break;
        case Formula::kKept:
        case Formula::kSize: stack.push_back(*kept++); break;
        case Formula::kUnread: stack.push_back(context->saved_data["unread"]);
      }
    }
    if (at::GradMode::is_enabled()) {
      formula.backward.callBoxed(&stack);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;
      formula.backward.callBoxed(&stack);
    }
    variable_list results;
    for (size_t i = 0; i < stack.size(); ++i) results.push_back(needs(i) ? stack[i].toTensor() : Tensor());
    results.emplace_back();  // of the Call
    return results;
  }

  template <typename Saved>
  static void check_version(Saved& saved, bool needed, const std::string& name) {
    if (saved.count("unread") == 0 || (!needed && !at::GradMode::is_enabled())) return;
    const int64_t version = version_of(saved["unread"].toTensor()), expected = saved["version"].toInt();
    TORCH_CHECK(version == expected, name, " was modified in place after the forward pass, and ",
                needed ? "its gradient" : "a second derivative", " needs its values: it is at version ", version,
                ", expected ", expected);
  }
};

struct Autograd : c10::OperatorKernel {
  const Formula formula;

  explicit Autograd(const char* name) : formula(std::string("fastssl::") + name) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const Call call{formula, op, keys, *stack};
    variable_list inputs;
    for (const size_t index : formula.inputs) {
      const IValue& input = call.inputs()[index];
      inputs.push_back(input.isNone() ? at::empty({0}) : input.toTensor());
    }
    const auto requires_grad = [](const Tensor& x) { return x.requires_grad(); };
    if (!at::GradMode::is_enabled() || std::none_of(inputs.begin(), inputs.end(), requires_grad))
      return call.run_below_autograd();
    const variable_list outputs = Derivative::apply(at::TensorList(inputs), call);
    const auto first = stack->end() - op.schema().returns().size() - op.schema().arguments().size();
    for (size_t i = 0; i < outputs.size(); ++i) first[formula.outputs[i]] = outputs[i];
  }
};

FASTSSL_KERNELS(AutogradCPU, m) {
  for (const char* name : {"nt_xent", "dcl", "similarity_logsumexp", "pair_logsumexp", "self_logsumexp", "clip_loss",
                           "info_nce", "sup_con", "selected_logsumexp", "similarity_softplus", "siglip_loss",
                           "barlow_twins", "vicreg", "variance_covariance", "masked_patch_loss", "masked_feature_loss",
                           "restore_tokens", "koleo_loss"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Autograd>(name)));
}

}  // namespace
}  // namespace fastssl
