// Included before a launcher's file: registers its operations for the CPU, as fastssl_cuda_host::<name>.
#pragma once

#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(fastssl_cuda_host, CPU, m, C10_UID)
