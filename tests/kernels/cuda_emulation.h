// Runs CUDA kernels on the host: every thread of a block is a fiber, switched where threads of CUDA meet.
//
// The generated CUDA C++ is compiled after this header by the host's compiler. A fiber runs until a barrier or a
// shuffle and waits there until all threads of its block or all lanes of its warp have come to the same one, so a
// missing barrier shows as a value not yet written: shared memory is poisoned before each block, and every other block
// runs its threads in reverse order.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __restrict__ __restrict
#define __launch_bounds__(threads)
#define __align__(bytes) alignas(bytes)
#define __shared__ static __attribute__((section("emulated_shared")))
// Generated code has it between `static` and the type, where only the attribute may be.
#define alignas(bytes) __attribute__((aligned(bytes)))
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

using __half = _Float16;
using half = _Float16;
using __half2 = struct { half x, y; };
using std::max;
using std::min;

struct dim3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

namespace emulated {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 << 10;
enum State { ready, at_shuffle, at_barrier, done };

struct Thread {
  ucontext_t context;
  dim3 index;
  State state;
  uint32_t given, taken;
  unsigned source;
  std::vector<char> stack = std::vector<char>(kStack);
};

inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline Thread* current;
inline dim3 block_index;
inline const std::function<void()>* body;

inline void meet(State where) {
  current->state = where;
  swapcontext(&current->context, &scheduler);
}

inline void start() {
  (*body)();
  meet(done);
}

inline void fail(const char* what) {
  std::fprintf(stderr, "emulated block (%u, %u): %s\n", block_index.x, block_index.y, what);
  std::abort();
}

// Lets the lanes of a warp go on that have all come to a shuffle, each with the value that its source lane gave.
inline bool release_warp(Thread* warp) {
  for (unsigned lane = 0; lane < kWarp; lane++)
    if (warp[lane].state != at_shuffle) return false;
  for (unsigned lane = 0; lane < kWarp; lane++) warp[lane].taken = warp[warp[lane].source % kWarp].given;
  for (unsigned lane = 0; lane < kWarp; lane++) warp[lane].state = ready;
  return true;
}

inline bool all_at(State state) {
  return std::all_of(threads.begin(), threads.end(), [&](const Thread& thread) { return thread.state == state; });
}

extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

inline void run_block(dim3 shape, bool reversed) {
  if (__start_emulated_shared) std::memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
  unsigned count = shape.x * shape.y;
  if (threads.size() != count) threads = std::vector<Thread>(count);
  for (unsigned i = 0; i < count; i++) {
    Thread& thread = threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    thread.index = {i % shape.x, i / shape.x, 0};
    thread.state = ready;
    makecontext(&thread.context, start, 0);
  }
  while (!all_at(done)) {
    bool moved = false;
    for (unsigned i = 0; i < count; i++) {
      Thread& thread = threads[reversed ? count - 1 - i : i];
      if (thread.state != ready) continue;
      current = &thread;
      swapcontext(&scheduler, &thread.context);
      moved = true;
    }
    for (unsigned warp = 0; warp < count; warp += kWarp) moved |= release_warp(&threads[warp]);
    if (all_at(at_barrier)) {
      for (Thread& thread : threads) thread.state = ready;
      moved = true;
    }
    if (!moved) fail("threads wait for each other at different places");
  }
}

inline void run_grid(dim3 grid, dim3 shape, const std::function<void()>& function) {
  body = &function;
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x++) {
      block_index = {x, y, 0};
      run_block(shape, (x + y) % 2);
    }
}

}  // namespace emulated

#define threadIdx (emulated::current->index)
#define blockIdx (emulated::block_index)

inline void __syncthreads() { emulated::meet(emulated::at_barrier); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width) {
  static_assert(sizeof(T) == 4);
  if (mask != 0xffffffffu || width != 32) emulated::fail("only shuffles of whole warps are emulated");
  std::memcpy(&emulated::current->given, &value, 4);
  emulated::current->source = threadIdx.x ^ lanes;
  emulated::meet(emulated::at_shuffle);
  std::memcpy(&value, &emulated::current->taken, 4);
  return value;
}

inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; i++) sum += int8_t(a >> (8 * i)) * int8_t(b >> (8 * i));
  return sum;
}

inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((uint64_t(x) * y) >> 32); }

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= unsigned(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}

inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float __half2float(half value) { return value; }
inline half __float2half_rn(float value) { return half(value); }
inline bool __hgt(half a, half b) { return a > b; }
inline bool __hlt(half a, half b) { return a < b; }
