// A CPU in place of the GPU: what this project's kernels use of CUDA, so that the tests can run them with sanitizers.
//
// It stands where the toolkit has its header of this name. The blocks of a launch run one after another. The threads of
// a block are fibers (ucontext): one runs until it waits for others, at a barrier or a collective of its warp, then the
// next one does, in the order that cuda_host_order names: 0 forwards, 1 backwards, any other number: shuffled anew each
// time, from that seed. What depends on the order, for want of a barrier, comes out wrong in one of them.
//
// Stricter than a GPU: a barrier that a thread of the block never reaches, and a collective that names another lane than
// those that take part, end the process. Shared memory is as it was left by the block before.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

inline unsigned order = 0, launches = 0;
inline std::mt19937 random_order;

constexpr size_t kStack = 64 << 10;

// Where threads wait until as many as are expected are there.
struct Gate {
  unsigned arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  void* stack;
  void* shadow = nullptr;  // AddressSanitizer's
};

struct Thread {
  dim3 index;
  unsigned number;
  bool done = false;
  Fiber* fiber = nullptr;  // once it has begun
  const Gate* gate = nullptr;
  unsigned generation = 0;

  bool waits() const { return gate && gate->generation == generation; }
};

// Of a warp, those of one mask. What they exchange lies in two places by turns: none comes to the next exchange but one
// before all have left this one.
struct Lanes {
  Gate gate;
  uint64_t values[2][32];
};

inline const std::function<void()>* body;
inline std::vector<Thread> threads;
inline std::vector<std::map<unsigned, Lanes>> warps;
inline Gate block_gate;
inline std::vector<Thread*> turns;
inline size_t turn;
inline bool any_ran;
inline Thread *current, *following;  // the one that runs, and the one to run when its fiber is left
inline std::vector<Fiber*> idle;
inline ucontext_t scheduler;
inline void* scheduler_shadow;
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "cuda_host: %s (block %u, %u, %u, thread %u, %u, %u)\n", why, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z);
  std::abort();
}

// The thread whose turn it is. nullptr: all are done.
inline Thread* next() {
  for (;;) {
    for (; turn < turns.size(); ++turn) {
      if (turns[turn]->done || turns[turn]->waits()) continue;
      any_ran = true;
      return turns[turn++];
    }
    if (std::all_of(turns.begin(), turns.end(), [](const Thread* thread) { return thread->done; })) return nullptr;
    if (!any_ran) fail("threads wait for some that never come");
    turn = 0;
    any_ran = false;
    if (order > 1) std::shuffle(turns.begin(), turns.end(), random_order);
  }
}

inline void become(Thread* thread, Fiber* fiber) {
  current = thread;
  thread->fiber = fiber;
  threadIdx = thread->index;
}

inline void entered([[maybe_unused]] Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber->shadow, &scheduler_stack, &scheduler_stack_size);
#endif
}

inline void leave(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber->shadow, scheduler_stack, scheduler_stack_size);
#endif
  swapcontext(&fiber->context, &scheduler);
  entered(fiber);
}

inline void enter(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_shadow, fiber->stack, kStack);
#endif
  swapcontext(&scheduler, &fiber->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_shadow, nullptr, nullptr);
#endif
}

// A fiber runs threads from beginning to end, one after another, for as long as none of them waits.
inline void run_threads() {
  Fiber* const fiber = current->fiber;
  entered(fiber);
  for (;;) {
    (*body)();
    current->done = true;
    following = next();
    if (following && !following->fiber) {
      become(following, fiber);
    } else {
      idle.push_back(fiber);
      leave(fiber);
    }
  }
}

inline Fiber* new_fiber() {
  Fiber* const fiber = new Fiber;
  fiber->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, run_threads, 0);
  return fiber;
}

inline void run_block() {
  warps.assign((threads.size() + 31) / 32, {});
  block_gate = {};
  turns.clear();
  for (Thread& thread : threads) {
    thread.done = false;
    thread.fiber = nullptr;
    thread.gate = nullptr;
    turns.push_back(&thread);
  }
  if (order == 1) std::reverse(turns.begin(), turns.end());
  if (order > 1) std::shuffle(turns.begin(), turns.end(), random_order);
  turn = 0;
  any_ran = true;
  for (following = next(); following;) {
    Fiber* fiber = following->fiber;
    if (!fiber) {
      if (idle.empty()) idle.push_back(new_fiber());
      fiber = idle.back();
      idle.pop_back();
    }
    become(following, fiber);
    enter(fiber);
  }
}

inline void wait(Gate& gate, unsigned expected) {
  current->gate = &gate;
  current->generation = gate.generation;
  if (++gate.arrived == expected) {
    gate.arrived = 0;
    ++gate.generation;
  }
  Fiber* const fiber = current->fiber;
  following = next();
  leave(fiber);
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  const unsigned count = block.x * block.y * block.z;
  if (count == 0 || count > 1024) fail("a block has 1 to 1024 threads");
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) fail("the grid is too large");
  threads.assign(count, {});
  for (unsigned i = 0; i < count; ++i) {
    threads[i].number = i;
    threads[i].index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
  }
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
}

inline unsigned lane() { return current->number % 32; }

inline Lanes& lanes_of(unsigned mask) {
  if (!(mask >> lane() & 1)) fail("a lane takes part in a collective that does not name it");
  return warps[current->number / 32][mask];
}

// Every lane gives a value, then takes what `take` makes of all of them.
template <typename T, typename Take>
auto exchange(unsigned mask, T value, const Take& take) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Lanes& lanes = lanes_of(mask);
  uint64_t* const values = lanes.values[lanes.gate.generation % 2];
  std::memcpy(&values[lane()], &value, sizeof(T));
  wait(lanes.gate, __builtin_popcount(mask));
  return take([&](unsigned from) {
    if (from >= 32 || !(mask >> from & 1)) fail("a lane asks for the value of one that takes no part");
    T result;
    std::memcpy(&result, &values[from], sizeof(T));
    return result;
  });
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::wait(cuda_host::block_gate, blockDim.x * blockDim.y * blockDim.z); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_host::exchange(mask, value, [&](const auto& value_of) { return value_of(cuda_host::lane() ^ lanes); });
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return cuda_host::exchange(mask, vote, [&](const auto& value_of) {
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i) votes |= (mask >> i & 1 && value_of(i)) << i;
    return votes;
  });
}

inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }

template <typename T>
T atomicMin(T* at, T value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}

template <typename T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}

using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  ++cuda_host::launches;
  cuda_host::launch(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
