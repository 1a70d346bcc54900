// Reductions of the losses of rows, as fastssl/_reductions.py: in the operation, since in a small batch PyTorch's own,
// and their derivatives, take as long as a tenth of the products.
#pragma once

#include <string_view>

#include "common/checks.h"
#include "common/tensors.h"

namespace fastssl {

enum class Reduction { None, Mean, Sum };

inline Reduction reduction_of(std::string_view name) {
  TORCH_CHECK_VALUE(name == "none" || name == "mean" || name == "sum",
                    "reduction must be 'none', 'mean' or 'sum', got '", name, "'");
  return name == "none" ? Reduction::None : name == "mean" ? Reduction::Mean : Reduction::Sum;
}

// The losses of rows, (count,) of float32, reduced.
inline Tensor reduce(const Tensor& loss, Reduction reduction) {
  if (reduction == Reduction::None) return loss;
  const float* const losses = loss.const_data_ptr<float>();
  double sum = 0;
  for (int64_t i = 0; i < loss.numel(); ++i) sum += losses[i];
  return scalar(reduction == Reduction::Mean ? sum / static_cast<double>(loss.numel()) : sum);
}

// The gradients of `count` rows' losses, from that of what `reduce` made of them.
inline Numbers<float> gradient_of_rows(const Tensor& grad_loss, Reduction reduction, int64_t count) {
  if (reduction == Reduction::None) {
    check_vectors("grad_loss", count, grad_loss);
    Numbers<float> gradients(count);
    std::copy_n(grad_loss.contiguous().const_data_ptr<float>(), count, gradients.data);
    return gradients;
  }
  TORCH_CHECK_VALUE(grad_loss.scalar_type() == at::kFloat && grad_loss.dim() == 0,
                    "grad_loss must be float32 of no dimension, got ", grad_loss.scalar_type(), " of shape ",
                    grad_loss.sizes());
  const float gradient = number<float>(grad_loss);
  return {count, reduction == Reduction::Mean ? gradient / static_cast<float>(count) : gradient};
}

}  // namespace fastssl
