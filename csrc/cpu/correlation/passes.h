// The forward and the backward pass of every loss on correlations.
#pragma once

#include <string_view>
#include <vector>

#include "correlation/loss.h"

namespace fastssl::correlation {

struct Result {
  double loss, invariance, variance, off;
  std::vector<Tensor> kept;
};

Result forward(const Loss& loss, bool dual, bool derive, std::string_view precision);

// The gradients of the views, from the tensors that the forward pass kept.
std::vector<Tensor> backward(const Loss& loss, const Tensor& grad_loss, const std::vector<Tensor>& kept, bool dual,
                             std::string_view precision);

}  // namespace fastssl::correlation
