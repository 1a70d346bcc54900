// A large tensor's memory comes from the system and goes back to it. The first write to each page waits until the
// system has found and cleared one, which takes several times as long as to write it: twice as long again where pages
// have 4 KiB, so that Linux is asked for pages of 2 MiB (transparent huge pages under "madvise"). And a training step
// wants tensors of the same sizes as the step before. So what is freed is kept for the next, under MADV_FREE: Linux may
// take its pages whenever memory is scarce, and until then they cost nobody anything, though they count as the
// process's.
#include "common/pages.h"

#if !defined(__linux__)

namespace fastssl {

at::Tensor empty_in_large_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

void release_kept_memory() {}

}  // namespace fastssl

#else

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

namespace fastssl {
namespace {

constexpr size_t kLargePage = 1 << 21;
constexpr size_t kLarge = 1 << 25;             // bytes; what is smaller malloc keeps by itself
constexpr size_t kMostKept = size_t(1) << 32;  // bytes: what several operations of a step may want in turn

// Whether the system takes the advice, for all whole pages of the memory.
bool advise(const void* memory, size_t bytes, size_t page, int advice) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  const uintptr_t first = (begin + page - 1) & ~(page - 1), last = end & ~(page - 1);
  return last > first && madvise(reinterpret_cast<void*>(first), last - first, advice) == 0;
}

struct Block {
  at::DataPtr memory;
  size_t bytes;

  explicit Block(size_t bytes) : memory(c10::GetCPUAllocator()->allocate(bytes)), bytes(bytes) {
    advise(memory.get(), bytes, kLargePage, MADV_HUGEPAGE);
  }
};

// Blocks that were freed, the oldest first. Nobody waits for the lock: a process that was forked while another thread
// held it would wait forever.
class KeptBlocks {
 public:
  // The smallest that holds so many bytes and is not much larger, or null.
  std::unique_ptr<Block> take(size_t bytes) {
    const std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock) return nullptr;
    const auto order = [&](const std::unique_ptr<Block>& b) { return b->bytes < bytes ? SIZE_MAX : b->bytes; };
    const auto found = std::min_element(blocks.begin(), blocks.end(),
                                        [&](const auto& a, const auto& b) { return order(a) < order(b); });
    if (found == blocks.end() || order(*found) / 2 > bytes) return nullptr;
    return remove(found);
  }

  void keep(std::unique_ptr<Block> block) {
    static const size_t page = sysconf(_SC_PAGESIZE);
    if (block->bytes > kMostKept || !advise(block->memory.get(), block->bytes, page, MADV_FREE)) return;
    const std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock) return;
    bytes += block->bytes;
    blocks.push_back(std::move(block));
    while (bytes > kMostKept) remove(blocks.begin());
  }

  void release() {
    const std::unique_lock lock(mutex, std::try_to_lock);
    while (lock && !blocks.empty()) remove(blocks.begin());
  }

 private:
  std::unique_ptr<Block> remove(std::deque<std::unique_ptr<Block>>::iterator place) {
    std::unique_ptr<Block> block = std::move(*place);
    blocks.erase(place);
    bytes -= block->bytes;
    return block;
  }

  std::mutex mutex;
  std::deque<std::unique_ptr<Block>> blocks;
  size_t bytes = 0;
};

KeptBlocks& kept() {
  static auto* const blocks = new KeptBlocks;  // never destroyed: tensors may be freed at the very end
  return *blocks;
}

class LargeTensors final : public at::Allocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    std::unique_ptr<Block> block = kept().take(bytes);
    if (!block) block = std::make_unique<Block>(bytes);
    void* const data = block->memory.get();
    return {data, block.release(), &free, at::Device(at::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void free(void* block) { kept().keep(std::unique_ptr<Block>(static_cast<Block*>(block))); }
};

}  // namespace

at::Tensor empty_in_large_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::Context& context = at::globalContext();
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  if (filled || at::detail::computeStorageNbytesContiguous(sizes, options.dtype().itemsize()) < kLarge) {
    const at::Tensor out = at::empty(sizes, options);
    advise(out.const_data_ptr(), out.nbytes(), kLargePage, MADV_HUGEPAGE);
    return out;
  }
  static auto* const allocator = new LargeTensors;  // never destroyed, as above
  return at::detail::empty_generic(sizes, allocator, at::DispatchKeySet(at::DispatchKey::CPU), dtype, std::nullopt);
}

void release_kept_memory() { kept().release(); }

}  // namespace fastssl

#endif
