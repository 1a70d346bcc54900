// Large new tensors, for results and scratch: in large pages, and in memory that was used before, where possible.
#pragma once

#include <ATen/ATen.h>

namespace fastssl {

// at::empty on the CPU. The memory of 8 MiB and more is kept when it is freed, for the next.
at::Tensor empty_in_large_pages(at::IntArrayRef sizes, const at::TensorOptions& options);

// Gives the system all that is kept.
void release_kept_memory();

}  // namespace fastssl
