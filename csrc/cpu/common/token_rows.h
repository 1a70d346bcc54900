// Rows of tokens or of patches, wherever they lie.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "common/tensors.h"

namespace fastssl {

// x, or what equals it, with the elements of each row of its last dimension side by side. Of what is expanded, such as
// the gradient that sum() sends, one row is copied and not all.
inline Tensor with_unit_stride(const Tensor& x) {
  if (x.stride(-1) == 1) return x;
  Tensor distinct = x;
  for (int64_t d = 0; d < x.dim() - 1; ++d)
    if (x.stride(d) == 0 && x.size(d) > 1) distinct = distinct.narrow(d, 0, 1);
  return distinct.contiguous().expand(x.sizes());
}

// Rows (B, L, D) to read, numbered from 0 to B L.
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
