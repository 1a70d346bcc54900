// For views with far fewer rows than columns: their N x N Gram matrices give sum_ij (A^T B)_ij^2 = <A A^T, B B^T>.
#pragma once

#include <vector>

#include "correlation/loss.h"

namespace fastssl::correlation {

// The Gram matrix of each view, (N, N). `cross`: whether the two views' will be multiplied with each other.
std::vector<Tensor> gram_matrices(const Panels& panels, bool cross);

// The inner product <x, y> of two Gram matrices.
double inner(const Panels& panels, const Tensor& x, const Tensor& y);

// Writes the gradients of the views, times `factor`, into `out`.
void derive_dual(const Panels& panels, const Loss& loss, const std::vector<Tensor>& grams, float factor,
                 const std::vector<Tensor>& out);

}  // namespace fastssl::correlation
