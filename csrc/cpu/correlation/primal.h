// For views with about as many rows as columns, or more: by the D x D matrix A^T B, or A^T A of each view.
#pragma once

#include <vector>

#include "correlation/loss.h"

namespace fastssl::correlation {

// The sum of all squares off the diagonals; and if `products` are defined, B (A^T B)^T and A (A^T B) into them, or
// A (A^T A) and B (B^T B), (N, D) each.
double primal(const Panels& panels, const Loss& loss, const std::vector<Tensor>& products);

// Writes the gradients of the views, times `factor`, into `out`, given those products.
void derive_primal(const Panels& panels, const Loss& loss, const std::vector<Tensor>& products, float factor,
                   const std::vector<Tensor>& out);

}  // namespace fastssl::correlation
