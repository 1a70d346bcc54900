// How kernels become those of operations: at a call, register_kernels, which may fail, and not while the library loads,
// where a kernel that does not fit its operation, as one that was built from older sources, would end the process.
#pragma once

#include <torch/library.h>

#include <vector>

namespace fastssl {

struct Kernels {
  c10::DispatchKey key;
  void (*add)(torch::Library&);
};

// Of all files.
inline std::vector<Kernels>& kernels() {
  static std::vector<Kernels> all;
  return all;
}

}  // namespace fastssl

// FASTSSL_KERNELS(CPU, m) { m.impl("name", &function); }, once in a file.
#define FASTSSL_KERNELS(key, m)                                            \
  static void add_kernels(torch::Library& m);                              \
  [[maybe_unused]] static const bool kernels_are_listed =                  \
      (::fastssl::kernels().push_back({c10::DispatchKey::key, &add_kernels}), true); \
  static void add_kernels(torch::Library& m)
