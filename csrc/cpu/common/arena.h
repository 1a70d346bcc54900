// Scratch memory of a call.
//
// A call needs many arrays. For a small batch, allocating them and faulting in their new pages would take longer than
// the products. So each calling thread has one arena, which it keeps from call to call: arrays are handed out one after
// the other, and once all of them have been returned the next call begins at the front. What does not fit is allocated
// separately, and counts towards the arena's size at the next call.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace fastssl {

constexpr int64_t kLine = 64;             // bytes of a cache line, to which arrays are aligned
constexpr int64_t kLargestArena = 16 << 20;  // bytes that a thread may keep for its next call

class Arena {
 public:
  static Arena& of_this_thread() {
    thread_local Arena arena;
    return arena;
  }

  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() { std::free(memory); }

  // `bytes` bytes, a multiple of kLine, or null where they do not fit. Either way the caller must give_back().
  char* take(int64_t bytes) {
    if (takers++ == 0 && wanted > capacity && wanted <= kLargestArena) {
      std::free(memory);
      memory = static_cast<char*>(std::aligned_alloc(kLine, wanted));
      capacity = memory ? wanted : 0;
    }
    if (takers == 1) wanted = 0;
    wanted += bytes;
    if (wanted > capacity) return nullptr;
    return memory + wanted - bytes;
  }

  void give_back() { --takers; }

 private:
  char* memory = nullptr;
  int64_t capacity = 0;
  int64_t wanted = 0;  // bytes requested by the takers so far; once they are gone, by the last call
  int64_t takers = 0;
};

// An array in the arena of the thread that constructs it; the same thread must destroy it.
class Scratch {
 public:
  explicit Scratch(int64_t bytes_) {
    const int64_t bytes = (bytes_ + kLine - 1) / kLine * kLine;
    if (bytes == 0) return;
    arena = &Arena::of_this_thread();
    data = arena->take(bytes);
    if (!data) {
      own = at::empty({bytes}, at::kByte);  // aligned as PyTorch's tensors are, to a cache line
      data = static_cast<char*>(own.mutable_data_ptr());
    }
    const at::Context& context = at::globalContext();
    if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
      std::memset(data, 0xff, bytes);  // NaN, as at::empty fills it in that mode
  }
  Scratch(Scratch&& other) noexcept
      : data(std::exchange(other.data, nullptr)),
        arena(std::exchange(other.arena, nullptr)),
        own(std::move(other.own)) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (arena) arena->give_back();
  }

  char* data = nullptr;

 private:
  Arena* arena = nullptr;
  at::Tensor own;
};

// One array per block, each aligned to a cache line.
struct Blocks {
  int64_t bytes_per_block;
  Scratch memory;

  Blocks(int64_t blocks, int64_t bytes)
      : bytes_per_block((bytes + kLine - 1) / kLine * kLine), memory(blocks * bytes_per_block) {}
  void* operator[](int64_t block) const { return bytes_per_block ? memory.data + block * bytes_per_block : nullptr; }
  float* floats(int64_t block) const { return static_cast<float*>((*this)[block]); }
};

// An array of numbers that lives as long as a call.
template <typename T>
struct Numbers {
  Scratch memory;
  T* data;

  explicit Numbers(int64_t count) : memory(count * sizeof(T)), data(reinterpret_cast<T*>(memory.data)) {}
  Numbers(int64_t count, T value) : Numbers(count) { std::fill_n(data, count, value); }
  T& operator[](int64_t i) const { return data[i]; }
};

}  // namespace fastssl
