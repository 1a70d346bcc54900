// A large tensor's memory comes from the system and goes back to it. The first write to each page waits until the
// system has found and cleared one, which takes several times as long as to write it: twice as long again where pages
// have 4 KiB, so that Linux is asked for pages of 2 MiB (transparent huge pages under "madvise"). And a training step
// wants tensors of the same sizes as the step before. So what is freed is kept for the next, under MADV_FREE: Linux may
// take its pages whenever memory is scarce, and until then they cost nobody anything, though they count as the
// process's. Blocks are whole large pages: the advice costs a few microseconds for each, but a hundred times as much
// for pages of 4 KiB, or where it splits a large one.
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

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

namespace fastssl {
namespace {

constexpr size_t kLargePage = 1 << 21;
constexpr size_t kLarge = 1 << 23;             // bytes; of what is smaller, whole large pages would waste too much
constexpr size_t kMostKept = size_t(1) << 32;  // bytes: what several operations of a step may want in turn

constexpr size_t whole_pages(size_t bytes) { return (bytes + kLargePage - 1) & ~(kLargePage - 1); }

// Asks for large pages within the memory.
void advise_large_pages(const void* memory, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), first = whole_pages(begin);
  const uintptr_t last = (begin + bytes) & ~(kLargePage - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// Whole large pages of the system's.
class Block {
 public:
  char* data;
  const size_t bytes;

  explicit Block(size_t wanted) : bytes(whole_pages(wanted)) {
    void* const mapped =
        mmap(nullptr, bytes + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, mapped != MAP_FAILED, "no memory for a tensor of ", wanted, " bytes");
    const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped);
    before = whole_pages(begin) - begin;
    data = static_cast<char*>(mapped) + before;
    madvise(data, bytes, MADV_HUGEPAGE);
  }

  ~Block() { munmap(data - before, bytes + kLargePage); }

  // Lets Linux take the pages. Whether it can.
  bool lend() { return madvise(data, bytes, MADV_FREE) == 0; }

 private:
  size_t before;
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
    if (block->bytes > kMostKept || !block->lend()) return;
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
    void* const data = block->data;
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, block.release(), &free, at::Device(at::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void free(void* block_) {
    std::unique_ptr<Block> block(static_cast<Block*>(block_));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    kept().keep(std::move(block));
  }
};

}  // namespace

at::Tensor empty_in_large_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::Context& context = at::globalContext();
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  if (filled || at::detail::computeStorageNbytesContiguous(sizes, options.dtype().itemsize()) < kLarge) {
    const at::Tensor out = at::empty(sizes, options);
    advise_large_pages(out.const_data_ptr(), out.nbytes());
    return out;
  }
  static auto* const allocator = new LargeTensors;  // never destroyed, as above
  return at::detail::empty_generic(sizes, allocator, at::DispatchKeySet(at::DispatchKey::CPU), dtype, std::nullopt);
}

void release_kept_memory() { kept().release(); }

}  // namespace fastssl

#endif
