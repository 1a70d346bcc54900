// fastssl._C: bindings of what is not a tensor operation. Operations are reached through PyTorch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <memory>
#include <vector>

#include "common/isa.h"
#include "common/kernels.h"
#include "common/kept_tiles.h"

namespace py = pybind11;

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What fastssl's C++ library was built with, and the instruction sets it uses.";
  m.attr("compiler") = FASTSSL_COMPILER;
  m.attr("torch_version") = TORCH_VERSION;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("register_kernels", &register_kernels, "Make the library's kernels those of fastssl's operations.");
  m.def("built_isas", [] { return names(fastssl::built()); }, "Instruction sets that kernels were compiled for.");
  m.def("available_isas", [] { return names(fastssl::available()); }, "Of those built, what this CPU can run.");
  m.def("current_isa", [] { return fastssl::name(fastssl::current()); }, "The instruction set that kernels use.");
  m.def(
      "set_current_isa",
      [](const std::string& name) { fastssl::set_current(fastssl::isa_from_name(name)); },
      py::arg("name"),
      "Make kernels use one of available_isas(), in this process.");
  m.def(
      "contrastive_tile_plan",
      [](int64_t rows, int64_t dim, int threads, bool symmetric, int64_t keep, bool narrow) {
        const fastssl::TilePlan plan = fastssl::tile_plan(rows, dim, threads, symmetric, keep, narrow);
        return py::dict(
            py::arg("threads") = plan.threads,
            py::arg("block") = plan.block,
            py::arg("blocks") = plan.blocks,
            py::arg("group") = plan.group,
            py::arg("tiles") = plan.tiles,
            py::arg("kept") = plan.kept);
      },
      py::arg("rows"),
      py::arg("dim"),
      py::arg("threads"),
      py::arg("symmetric") = false,
      py::arg("keep") = 0,
      py::arg("narrow") = false,
      "How the contrastive losses cut rows x rows similarities of dim features into tiles for that many threads, and\n"
      "how many tiles' exponentials, float32 or, if narrow, bfloat16, are kept in `keep` bytes between the passes.");
}
