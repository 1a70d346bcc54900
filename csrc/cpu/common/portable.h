// The portable variants of operations, in PyTorch's own operations.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <type_traits>
#include <utility>

namespace fastssl {

// What float64 calls: the portable variant `name` of the operation whose kernel here is F.
template <auto F, typename... Args>
auto portable(const char* name, Args&&... args) {
  static const auto op = c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .template typed<std::remove_pointer_t<decltype(F)>>();
  return op.call(std::forward<Args>(args)...);
}

}  // namespace fastssl
