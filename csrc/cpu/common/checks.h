// Checks of the kernels' arguments.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "common/tensors.h"

namespace fastssl {

// fastssl.functional reports the same errors in better words; these keep a direct call from reading out of bounds.
inline void check_sides(const char* names, const Tensor& x, const Tensor& y, const Tensor& scale) {
  TORCH_CHECK_VALUE(x.dim() == 2 && y.dim() == 2 && x.size(1) > 0 && x.size(1) == y.size(1), names,
                    " must have shapes (M, D) and (N, D), D > 0, got ", x.sizes(), " and ", y.sizes());
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_VALUE(dtype == y.scalar_type() && has_element(x),
                    names, " must both be float32, bfloat16 or float16, got ", dtype, " and ", y.scalar_type());
  TORCH_CHECK_VALUE(scale.numel() == 1, "scale must have one element, got shape ", scale.sizes());
}

// The same for the rows of a linear layer, whose dtypes may be unlike. A bias of no elements is none.
inline void check_layer(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& scale) {
  TORCH_CHECK_VALUE(input.dim() == 2 && weight.dim() == 2 && input.size(1) == weight.size(1) && weight.numel() > 0,
                    "input and linear_weight must have shapes (N, D) and (V, D), V > 0, D > 0, got ", input.sizes(),
                    " and ", weight.sizes());
  TORCH_CHECK_VALUE(has_element(input) && has_element(weight),
                    "input and linear_weight must be float32, bfloat16 or float16, got ", input.scalar_type(), " and ",
                    weight.scalar_type());
  TORCH_CHECK_VALUE(bias.dim() == 1 && (bias.size(0) == 0 || bias.size(0) == weight.size(0)),
                    "linear_bias must have shape (", weight.size(0), ") or (0), got ", bias.sizes());
  TORCH_CHECK_VALUE(scale.numel() == 1, "scale must have one element, got shape ", scale.sizes());
}

// The same as of sides for paired rows: row i of x belongs to row i of y.
inline void check_pairs(const char* names, const Tensor& x, const Tensor& y, const Tensor& scale) {
  check_sides(names, x, y, scale);
  TORCH_CHECK_VALUE(x.size(0) == y.size(0), names, " must have the same shape, got ", x.sizes(), " and ", y.sizes());
}

// The same for vectors with one number for each of `count` rows.
inline void check_vectors(const char* names, int64_t count, at::TensorList vectors) {
  for (const Tensor& t : vectors)
    TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.dim() == 1 && t.size(0) == count, names,
                      " must be float32 of shape (", count, "), got ", t.scalar_type(), " of shape ", t.sizes());
}

// What a forward pass has kept; see common/kept_tiles.h.
inline void check_kept(const Tensor& kept) {
  TORCH_CHECK_VALUE(kept.scalar_type() == at::kByte && kept.dim() == 1 && kept.is_contiguous(),
                    "kept must be uint8 of one dimension, got ", kept.scalar_type(), " of shape ", kept.sizes());
}

inline Tensor checked_exclude(const std::optional<Tensor>& exclude, const Tensor& x) {
  if (!exclude) return Tensor();
  TORCH_CHECK_VALUE(exclude->scalar_type() == at::kLong && exclude->dim() == 1 && exclude->size(0) == x.size(0),
                    "exclude must be int64 of shape (", x.size(0), "), got ", exclude->scalar_type(), " of shape ",
                    exclude->sizes());
  return exclude->contiguous();
}

inline const int64_t* data_of(const Tensor& exclude) {
  return exclude.defined() ? exclude.const_data_ptr<int64_t>() : nullptr;
}

}  // namespace fastssl
