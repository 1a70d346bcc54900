// How kernels read, add up and write elements.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace fastssl {

// Several elements, read and written in one access.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T at[kCount];
};

enum class Element : uint8_t { Float32, BFloat16, Float16, Float64 };

// Elements of any of these types, read as T.
template <typename T>
struct Elements {
  const void* at;
  Element element;

  __device__ T operator[](int64_t i) const {
    switch (element) {
      case Element::Float32: return static_cast<T>(static_cast<const float*>(at)[i]);
      case Element::BFloat16: return static_cast<T>(static_cast<const torch::headeronly::BFloat16*>(at)[i]);
      case Element::Float16: return static_cast<T>(static_cast<const torch::headeronly::Half*>(at)[i]);
      default: return static_cast<T>(static_cast<const double*>(at)[i]);
    }
  }
};

// Ids, int64 or int32.
struct Ids {
  const void* at;
  bool is_long;

  __device__ int64_t operator[](int64_t i) const {
    return is_long ? static_cast<const int64_t*>(at)[i] : static_cast<const int32_t*>(at)[i];
  }
};

// Division of numbers below 2^31 by a number that is only known at run time, as a multiplication and a shift.
struct Divisor {
  unsigned divisor, factor, shift;

  Divisor(unsigned divisor = 1) : divisor(divisor), shift(0) {
    while (uint64_t(1) << shift < divisor) ++shift;
    factor = static_cast<unsigned>((((uint64_t(1) << shift) - divisor) << 32) / divisor + 1);
  }

  __device__ unsigned quotient(unsigned x) const {
    return (static_cast<unsigned>(static_cast<uint64_t>(x) * factor >> 32) + x) >> shift;
  }
};

// The sum over a warp, for all its lanes, in a fixed order.
template <typename T>
__device__ T warp_sum(T x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
  return x;
}

// The type of sums of T.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The largest of 16, 8, 4, 2 and 1 that divides all of these addresses and distances, in bytes.
template <typename... Bytes>
int common_alignment(Bytes... bytes) {
  const uint64_t together = (static_cast<uint64_t>(bytes) | ... | 16u);
  return static_cast<int>(together & -together);
}

// A block of 256 threads for rows of `words` words, with at most a warp for each row.
inline dim3 threads_for_rows(int64_t words) {
  unsigned across = 1;
  while (across < 32 && across < words) across *= 2;
  return dim3(across, 256 / across);
}

}  // namespace fastssl
