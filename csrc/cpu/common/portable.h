// The portable variants of operations, made of PyTorch's own operations. They compute what the kernels here do not.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <string>
#include <type_traits>
#include <utility>

#include "common/kernels.h"
#include "common/number.h"

namespace fastssl {

// Whether one of the first `Operands` tensors, or lists of tensors, is float64.
template <int Operands, typename First, typename... Rest>
bool is_double(const First& first, const Rest&... rest) {
  constexpr bool is_tensor = std::is_same_v<First, at::Tensor>, is_list = std::is_same_v<First, at::TensorList>;
  if constexpr (is_tensor)
    if (first.scalar_type() == at::kDouble) return true;
  if constexpr (is_list)
    for (const at::Tensor& x : first)
      if (x.scalar_type() == at::kDouble) return true;
  constexpr int kLeft = Operands - (is_tensor || is_list);
  if constexpr (kLeft > 0 && sizeof...(Rest) > 0) return is_double<kLeft>(rest...);
  return false;
}

// Operations take numbers as tensors; see fastssl/ops/_numbers.py.
template <typename T>
using Taken = std::conditional_t<std::is_same_v<T, double>, const at::Tensor&, T>;

template <typename T>
T given(Taken<T> x) {
  if constexpr (std::is_same_v<T, double>)
    return number<double>(x);
  else
    return x;
}

template <typename T>
decltype(auto) taken(T&& x) {
  if constexpr (std::is_same_v<std::decay_t<T>, double>)
    return at::scalar_tensor(x, at::kDouble);
  else
    return std::forward<T>(x);
}

template <auto F>
struct Kernel;

// F as the kernel of an operation on the CPU.
template <typename Result, typename... Args, Result (*F)(Args...)>
struct Kernel<F> {
  inline static const char* name = nullptr;  // no std::string: its constructor would run after `implement` has set it

  static Result portable(Taken<Args>... args) {
    static const auto op = c10::Dispatcher::singleton()
        .findSchemaOrThrow(portable_name().c_str(), "")
        .template typed<Result(Taken<Args>...)>();
    return op.call(args...);
  }

  // As fastssl/ops/_op.py names it.
  static std::string portable_name() {
    const std::string full = std::string("fastssl::") + name;
    return full + (full.ends_with('_') ? "portable_" : "_portable");
  }

  template <int Operands>
  static Result call(Taken<Args>... args) {
    if constexpr (Operands > 0)
      if (is_double<Operands>(args...)) return portable(args...);
    return F(given<Args>(args)...);
  }
};

// Computes what F does, with the portable variant of its operation.
template <auto F, typename... Args>
auto portable(Args&&... args) {
  return Kernel<F>::portable(taken(std::forward<Args>(args))...);
}

// Makes F the kernel of the operation `name`. Calls in which one of the first `Operands` tensors is float64 go to the
// portable variant instead; with `Operands` = 0, F itself decides.
template <auto F, int Operands = 1>
void implement(torch::Library& library, const char* name) {
  Kernel<F>::name = name;
  library.impl(name, &Kernel<F>::template call<Operands>);
}

}  // namespace fastssl
