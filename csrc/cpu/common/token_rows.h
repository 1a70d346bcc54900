// Rows of tokens or of patches, whatever their strides.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "common/tensors.h"

namespace fastssl {

// x, or a copy equal to it, with unit stride in its last dimension. Of an expanded tensor, such as the gradient of
// sum(), only the distinct rows are copied.
inline Tensor with_unit_stride(const Tensor& x) {
  if (x.stride(-1) == 1) return x;
  Tensor distinct = x;
  for (int64_t d = 0; d < x.dim() - 1; ++d)
    if (x.stride(d) == 0 && x.size(d) > 1) distinct = distinct.narrow(d, 0, 1);
  return distinct.contiguous().expand(x.sizes());
}

// The rows of a tensor (B, L, D), to be read, numbered from 0 to B L - 1.
struct TokenRows {
  Tensor tensor;
  Element element;
  const char* data;
  int64_t length, dim, bytes, sample, row;  // L, D, and in bytes: a row, and strides

  explicit TokenRows(const Tensor& x)
      : tensor(with_unit_stride(x)),
        element(element_of(x)),
        data(static_cast<const char*>(tensor.const_data_ptr())),
        length(x.size(1)),
        dim(x.size(2)),
        bytes(dim * bytes_of(element)),
        sample(tensor.stride(0) * bytes_of(element)),
        row(tensor.stride(1) * bytes_of(element)) {}

  const char* operator[](int64_t i) const { return data + i / length * sample + i % length * row; }
};

}  // namespace fastssl
