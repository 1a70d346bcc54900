// What every launcher needs: errors, dtypes, and a launch on a tensor's device. This uses only PyTorch's stable ABI, so
// that one build serves every version from 2.10 on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "elements.h"

namespace fastssl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what becomes a ValueError in Python.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string text(torch::headeronly::IntHeaderOnlyArrayRef numbers) {
  std::string result = "[";
  for (size_t i = 0; i < numbers.size(); ++i) result += (i ? ", " : "") + std::to_string(numbers[i]);
  return result + "]";
}

inline bool same(torch::headeronly::IntHeaderOnlyArrayRef x, torch::headeronly::IntHeaderOnlyArrayRef y) {
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

// Operations take numbers as tensors; see fastssl/ops/_numbers.py.
inline double number_in(const Tensor& x) {
  if (!x.is_cpu() || x.scalar_type() != ScalarType::Double || x.numel() != 1)
    refuse("a number must be a 0-d float64 tensor on the CPU, got shape ", text(x.sizes()));
  return *x.const_data_ptr<double>();
}

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// For grid.y and grid.z, which are limited to 65535: blocks take several turns if there is more to do.
inline unsigned at_most_65535(int64_t blocks) { return static_cast<unsigned>(std::min<int64_t>(blocks, 65535)); }

template <typename T>
struct Type {
  using type = T;
};

// Calls visit(Type<float>()) and the like, for float32, bfloat16, float16 and float64.
template <typename Visit>
decltype(auto) with_float(ScalarType dtype, const char* name, const Visit& visit) {
  switch (dtype) {
    case ScalarType::Float: return visit(Type<float>());
    case ScalarType::BFloat16: return visit(Type<torch::headeronly::BFloat16>());
    case ScalarType::Half: return visit(Type<torch::headeronly::Half>());
    case ScalarType::Double: return visit(Type<double>());
    default: refuse(name, " must be of 16, 32 or 64 bits, floating-point, got ", dtype);
  }
}

inline std::optional<Element> element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Element::Float32;
    case ScalarType::BFloat16: return Element::BFloat16;
    case ScalarType::Half: return Element::Float16;
    case ScalarType::Double: return Element::Float64;
    default: return std::nullopt;
  }
}

// The dtype of sums of `dtype`.
inline ScalarType wide(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

inline Tensor to_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

template <typename T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* written(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline uint64_t address(const Tensor& x) { return reinterpret_cast<uint64_t>(x.const_data_ptr()); }

// How many elements lie in memory from the first to the last of x, both included; x must not be empty.
inline int64_t elements(const Tensor& x) {
  int64_t count = 1;
  for (int64_t d = 0; d < x.dim(); ++d) count += (x.size(d) - 1) * x.stride(d);
  return count;
}

inline std::string device_of(const Tensor& x) {
  return x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : x.is_cpu() ? "cpu" : "another device";
}

inline void check_device(const char* name, const Tensor& x, const Tensor& other) {
  if (device_of(x) != device_of(other))
    refuse(name, " must be on the same device as what it goes with, got ", device_of(x), " and ", device_of(other));
}

inline Ids ids_of(const Tensor& ids) { return {ids.const_data_ptr(), ids.scalar_type() == ScalarType::Long}; }

// Launches kernels on the device of a tensor, in its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), reinterpret_cast<void**>(&stream_)));
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, const Arguments&... arguments) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream_;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fastssl
