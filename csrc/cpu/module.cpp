// What of this library is not a tensor operation of fastssl, for fastssl/_C.py. It goes through PyTorch's dispatcher too:
// so the library needs nothing of Python, and serves every version of it.
#include <torch/library.h>
#include <torch/version.h>

#include <memory>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/kernels.h"
#include "common/kept_tiles.h"
#include "common/pages.h"

namespace {

std::vector<std::string> names(const std::vector<fastssl::Isa>& isas) {
  std::vector<std::string> result;
  for (fastssl::Isa isa : isas) result.emplace_back(fastssl::name(isa));
  return result;
}

// All or, where one does not fit its operation, none.
void register_kernels() {
  static std::vector<std::unique_ptr<torch::Library>> registered;
  if (!registered.empty()) return;
  std::vector<std::unique_ptr<torch::Library>> libraries;
  for (const auto& [key, add] : fastssl::kernels()) {
    libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "fastssl", key, __FILE__, __LINE__));
    add(*libraries.back());
  }
  registered = std::move(libraries);
}

c10::Dict<std::string, int64_t> contrastive_tile_plan(
    int64_t rows, int64_t dim, int64_t threads, bool symmetric, int64_t keep, bool narrow) {
  const fastssl::TilePlan plan = fastssl::tile_plan(rows, dim, int(threads), symmetric, keep, narrow);
  c10::Dict<std::string, int64_t> result;
  result.insert("threads", plan.threads);
  result.insert("block", plan.block);
  result.insert("blocks", plan.blocks);
  result.insert("group", plan.group);
  result.insert("tiles", plan.tiles);
  result.insert("kept", plan.kept);
  return result;
}

bool openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

TORCH_LIBRARY(fastssl_cpu, m) {
  m.def("register_kernels() -> ()", &register_kernels);
  m.def("compiler() -> str", [] { return std::string(FASTSSL_COMPILER); });
  m.def("torch_version() -> str", [] { return std::string(TORCH_VERSION); });
  m.def("openmp() -> bool", &openmp);
  m.def("built_isas() -> str[]", [] { return names(fastssl::built()); });
  m.def("available_isas() -> str[]", [] { return names(fastssl::available()); });
  m.def("current_isa() -> str", [] { return std::string(fastssl::name(fastssl::current())); });
  m.def("set_current_isa(str name) -> ()", [](const std::string& name) {
    fastssl::set_current(fastssl::isa_from_name(name));
  });
  m.def("release_kept_memory() -> ()", &fastssl::release_kept_memory);
  m.def("contrastive_tile_plan(int rows, int dim, int threads, bool symmetric=False, int keep=0, bool narrow=False)"
        " -> Dict(str, int)", &contrastive_tile_plan);
}

}  // namespace
