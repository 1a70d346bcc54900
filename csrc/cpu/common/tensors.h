// Tensors as kernels see them: their elements, numbers, and memory of one array per block.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "common/product_tiles.h"
#include "common/schedule.h"

namespace fastssl {

using at::Tensor;

// One array per block, all in one allocation, each block's part aligned to a cache line.
struct Blocks {
  Tensor memory;
  int64_t bytes_per_block;

  Blocks(int64_t blocks, int64_t bytes) : bytes_per_block(round_up(bytes, 64)) {
    memory = at::empty({blocks * bytes_per_block + 64}, at::kByte);
  }
  void* operator[](int64_t block) const {
    if (bytes_per_block == 0) return nullptr;
    const auto base = round_up(reinterpret_cast<int64_t>(memory.mutable_data_ptr()), 64);
    return reinterpret_cast<char*>(base) + block * bytes_per_block;
  }
  float* floats(int64_t block) const { return static_cast<float*>((*this)[block]); }
};

// 0-d float32, or of `options`. More than that holds is infinite.
inline Tensor scalar(double value, const at::TensorOptions& options = at::kFloat) {
  return at::full({}, static_cast<float>(value), options);
}

// Whether elements of x have kernels; and which they are then.
inline bool has_element(const Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}

inline Element element_of(const Tensor& x) {
  return x.scalar_type() == at::kFloat ? Element::Float32 : x.scalar_type() == at::kHalf ? Element::Float16
                                                                                         : Element::BFloat16;
}

}  // namespace fastssl
