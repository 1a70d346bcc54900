// The number of a tensor of one element.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastssl {

// As x.item<T>(), which goes through the dispatcher twice: a small batch notices.
template <typename T>
T number(const at::Tensor& x) {
  if (x.scalar_type() != c10::CppTypeToScalarType<T>::value || x.numel() != 1) return x.item<T>();
  return *x.const_data_ptr<T>();
}

}  // namespace fastssl
