// Elements as kernels read, add up and write them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace fastssl {

// Several elements that are read and written at once.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T at[kCount];
};

// Sums of T are of this.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The widest of 16, 8, 4, 2 and 1 bytes by which all of these addresses and distances are divisible.
template <typename... Bytes>
int common_alignment(Bytes... bytes) {
  const uint64_t together = (static_cast<uint64_t>(bytes) | ... | 16u);
  return static_cast<int>(together & -together);
}

// Threads for rows of `words` words: a warp at most for each row, and 256 in all.
inline dim3 threads_for_rows(int64_t words) {
  unsigned across = 1;
  while (across < 32 && across < words) across *= 2;
  return dim3(across, 256 / across);
}

}  // namespace fastssl
