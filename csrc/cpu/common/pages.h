// New tensors in large pages, where the system has them.
//
// A large tensor's memory comes from the system and goes back to it. The first write to each page waits until the
// system has found and cleared one; with pages of 4 KiB this takes many times as long as the write itself. Linux gives
// pages of 2 MiB on request (transparent huge pages under "madvise").
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastssl {

// at::empty, with a request for large pages for every whole large page within it.
inline at::Tensor empty_in_large_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::Tensor out = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.const_data_ptr()), end = begin + out.nbytes();
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1), last = end & ~(kPage - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // refused: pages stay small
#endif
  return out;
}

}  // namespace fastssl
