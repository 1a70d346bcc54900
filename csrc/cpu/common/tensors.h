// Tensors as kernels see them: their element types, and tensors of one number.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "common/arena.h"
#include "common/number.h"
#include "common/product_tiles.h"
#include "common/schedule.h"

namespace fastssl {

using at::Tensor;

// A 0-d tensor, of float32 or of `options`. A value too large for it becomes infinite.
inline Tensor scalar(double value, const at::TensorOptions& options = at::kFloat) {
  const Tensor out = at::empty({}, options);
  if (out.scalar_type() != at::kFloat) return out.fill_(static_cast<float>(value));
  *out.mutable_data_ptr<float>() = static_cast<float>(value);  // a small batch notices a call of `fill_`
  return out;
}

// Whether there are kernels for the dtype of x.
inline bool has_element(const Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}

inline Element element_of(const Tensor& x) {
  return x.scalar_type() == at::kFloat ? Element::Float32 : x.scalar_type() == at::kHalf ? Element::Float16
                                                                                         : Element::BFloat16;
}

}  // namespace fastssl
