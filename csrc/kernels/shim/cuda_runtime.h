// CUDA source on the CPU, to be tested where there is no GPU: the part of the language and runtime our kernels use.
//
// With this folder on the include path the .cu files compile as C++ (g++ -x c++ -fsanitize=address,undefined), and
// every CUDA thread is a fiber (ucontext) of one CPU thread. A fiber runs until it waits for others, in a barrier or a
// shuffle, or ends. Threads of a block and blocks of a grid run forward, in reverse or at random (shim_set_order): a
// value read before its writer ran, or a sum that depends on who comes first, differs in one of them. The sanitizers
// see every access, alignment of vectors included. Threads that do not meet where CUDA wants them to (a barrier that
// some skip, a shuffle whose mask names an absent lane) end the process with a message.
//
// Not shown: speed, the memory model between two barriers, what hardware runs out of.

#pragma once

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another, so one copy serves all; it starts as the last block left it

struct dim3 {
  unsigned x = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

namespace shim {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kWarp = 32;

// Where threads wait for each other: a barrier, or one shuffle of the lanes in `mask`. A new generation frees them.
struct Meeting {
  unsigned mask = 0, arrived = 0, generation = 0;
  uint64_t given[kWarp], taken[kWarp];
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  void* fake_stack = nullptr;  // the address sanitizer's
  const Meeting* waits = nullptr;
  unsigned generation = 0;
  bool ended = false;
};

struct Machine {
  std::vector<Fiber> fibers;
  Meeting barrier;
  std::vector<Meeting> shuffles;  // [warp * 32 + lowest lane of the mask]
  std::function<void()> body;
  ucontext_t scheduler;
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  int order = 0;  // 0 forward, 1 reverse, more: a random order with this seed
  std::mt19937 random;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA shim: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = machine.order == 1 ? count - 1 - i : i;
  if (machine.order > 1) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

inline void to_scheduler(Fiber& fiber) {
  __sanitizer_start_switch_fiber(fiber.ended ? nullptr : &fiber.fake_stack, machine.stack, machine.stack_bytes);
  swapcontext(&fiber.context, &machine.scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

inline void start_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack, &machine.stack_bytes);
  machine.body();
  Fiber& fiber = machine.fibers[threadIdx.x];
  fiber.ended = true;
  to_scheduler(fiber);
}

inline void to_fiber(unsigned thread) {
  Fiber& fiber = machine.fibers[thread];
  threadIdx.x = thread;
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack.data(), kStackBytes);
  swapcontext(&machine.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
}

// Counts the caller in, and returns when everybody has come.
inline void meet(Meeting& meeting, unsigned arriving, unsigned everybody) {
  Fiber& fiber = machine.fibers[threadIdx.x];
  fiber.waits = &meeting;
  fiber.generation = meeting.generation;
  meeting.arrived += arriving;
  if (meeting.arrived == everybody) {
    std::copy_n(meeting.given, kWarp, meeting.taken);
    meeting.arrived = 0;
    ++meeting.generation;
  }
  to_scheduler(fiber);
}

inline void run_block() {
  machine.barrier = Meeting{};
  machine.shuffles.assign((blockDim.x + kWarp - 1) / kWarp * kWarp, Meeting{});
  if (machine.fibers.size() < blockDim.x) machine.fibers.resize(blockDim.x);
  for (unsigned thread = 0; thread < blockDim.x; ++thread) {
    Fiber& fiber = machine.fibers[thread];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.waits = nullptr;
    fiber.ended = false;
    makecontext(&fiber.context, start_fiber, 0);
  }
  for (unsigned running = blockDim.x; running > 0;) {
    bool moved = false;
    for (const unsigned thread : in_order(blockDim.x)) {
      Fiber& fiber = machine.fibers[thread];
      if (fiber.ended || (fiber.waits && fiber.waits->generation == fiber.generation)) continue;
      to_fiber(thread);
      running -= fiber.ended;
      moved = true;
    }
    if (!moved) fail("threads wait for others that never come: a barrier or shuffle that not all of them reach");
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, unsigned grid, unsigned block, Arguments... arguments) {
  if (grid == 0 || block == 0 || block > 1024) fail("a launch of an impossible size");
  machine.body = [=] { kernel(arguments...); };
  machine.random.seed(static_cast<unsigned>(machine.order));
  gridDim.x = grid;
  blockDim.x = block;
  for (const unsigned index : in_order(grid)) {
    blockIdx.x = index;
    run_block();
  }
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  const unsigned lane = threadIdx.x % kWarp;
  if (!(mask >> lane & 1)) fail("a lane calls a shuffle whose mask leaves it out");
  Meeting& meeting = machine.shuffles[threadIdx.x - lane + static_cast<unsigned>(__builtin_ctz(mask))];
  if (meeting.arrived && meeting.mask != mask) fail("lanes meet in one shuffle with different masks");
  meeting.mask = mask;
  std::memcpy(&meeting.given[lane], &value, sizeof(T));
  meet(meeting, 1u << lane, mask);
  if (!(mask >> source & 1)) fail("a shuffle reads from a lane outside its mask");
  std::memcpy(&value, &meeting.taken[source], sizeof(T));
  return value;
}

}  // namespace shim

extern "C" __attribute__((used)) inline void shim_set_order(int order) { shim::machine.order = order; }

inline void __syncthreads() { shim::meet(shim::machine.barrier, 1, blockDim.x); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return shim::shuffle(mask, value, static_cast<unsigned>(source) % shim::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return shim::shuffle(mask, value, threadIdx.x % shim::kWarp ^ static_cast<unsigned>(lanes));
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

// -ffp-contract=off keeps each of these rounded by itself.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

using std::isfinite;

// A machine so small that grids of the tests' shapes have to stride.
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  return std::memset(at, value, bytes), cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }
