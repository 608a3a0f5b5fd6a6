// Just enough of CUDA for g++ to compile a .cu file as C++ and to run its kernels on the CPU, to prove their
// logic without a GPU.
//
// A block's threads are fibers, each with a stack of its own. A fiber runs until it meets a shuffle, __syncwarp
// or __syncthreads, and goes on once its warp or block has arrived. Between two barriers of the block one warp
// runs as far as it can before the next one starts, in an order drawn anew every time, and blocks run in a
// shuffled order: a missing barrier shows as a wrong result. Shared memory is filled with NaN before every
// block, and must be untouched behind the size that the launch asked for. Lanes of a warp that meet different
// barriers, or leave while others wait, end the process with a message.
//
// Not here: what only real hardware does (memory order, occupancy, speed), static __shared__, blocks of more
// than one dimension, warps in which some lanes skip a shuffle.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  cuda_on_cpu::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); })

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cuda_on_cpu {

[[noreturn]] inline void fail(const char *what) {
  fprintf(stderr, "cuda_on_cpu: %s\n", what);
  abort();
}

struct Index { unsigned x = 0; };
inline Index thread, block, threads, blocks;

constexpr size_t SHARED = 99 * 1024;  // what a block can have on the smallest GPUs since sm_80
enum Wait { RUNS, AT_WARP, AT_BLOCK, DONE };
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  std::unique_ptr<char[]> stack{new char[STACK]};
  static constexpr size_t STACK = 128 * 1024;
  Wait wait = DONE;
  bool started = false;
  int phase = 0, operation = 0;  // shuffles so far, modulo 2; what it waits at, equal for all lanes of a warp
  float value[2];
};
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::mt19937 dice(1);

// A fiber's life: one kernel body after another. ucontext only makes the stacks; _setjmp and _longjmp switch
// without a system call
inline void live() {
  for (;;) {
    body();
    Fiber &self = *fibers[thread.x];
    self.wait = DONE;
    if (!_setjmp(self.at)) _longjmp(scheduler, 1);
  }
}
inline void resume(unsigned i) {
  Fiber &f = *fibers[i];
  thread.x = i;
  f.wait = RUNS;
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = Fiber::STACK;
  makecontext(&f.context, live, 0);
  setcontext(&f.context);
}
inline void wait(Wait where, int operation) {
  Fiber &self = *fibers[thread.x];
  self.wait = where, self.operation = operation;
  if (!_setjmp(self.at)) _longjmp(scheduler, 1);
}
inline std::vector<unsigned> shuffled(unsigned n) {
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; i++) order[i] = i;
  for (unsigned i = n; i > 1; i--) std::swap(order[i - 1], order[dice() % i]);
  return order;
}

// Runs the 32 fibers of a warp until all wait for the block or are done
inline Wait run_warp(unsigned warp) {
  for (;;) {
    for (unsigned lane : shuffled(32)) resume(warp * 32 + lane);
    const Fiber &first = *fibers[warp * 32];
    for (unsigned lane = 1; lane < 32; lane++) {
      const Fiber &f = *fibers[warp * 32 + lane];
      if (f.wait != first.wait || (f.wait != DONE && f.operation != first.operation))
        fail("lanes of a warp wait at different places");
    }
    if (first.wait != AT_WARP) return first.wait;
  }
}
inline void run_block() {
  for (;;) {
    Wait all = RUNS;
    for (unsigned warp : shuffled(threads.x / 32)) {
      const Wait now = run_warp(warp);
      if (all != RUNS && now != all) fail("a warp left the block while another waits for it");
      all = now;
    }
    if (all == DONE) return;
  }
}

template <typename Kernel> void launch(unsigned grid, unsigned size, size_t shared, Kernel kernel);

}  // namespace cuda_on_cpu

// the name that a kernel must give its dynamic shared memory
alignas(128) inline float4 shared_memory[cuda_on_cpu::SHARED / 16 + 256];

template <typename Kernel> void cuda_on_cpu::launch(unsigned grid, unsigned size, size_t shared, Kernel kernel) {
  if (grid == 0 || size == 0 || size % 32 || size > 1024 || shared > SHARED) fail("bad launch");
  while (fibers.size() < size) fibers.emplace_back(new Fiber);
  body = kernel, threads.x = size, blocks.x = grid;
  const size_t all = sizeof shared_memory;
  char *const memory = reinterpret_cast<char *>(shared_memory);
  for (unsigned b : shuffled(grid)) {
    block.x = b;
    memset(memory, 0xff, all);  // all bits set is a NaN
    run_block();
    for (size_t i = shared; i < all; i++)
      if (memory[i] != (char)0xff) fail("wrote behind the shared memory of the launch");
  }
}

#define threadIdx cuda_on_cpu::thread
#define blockIdx cuda_on_cpu::block
#define blockDim cuda_on_cpu::threads
#define gridDim cuda_on_cpu::blocks

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::AT_BLOCK, 0); }
inline void __syncwarp() { cuda_on_cpu::wait(cuda_on_cpu::AT_WARP, 0); }
inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
  if (mask != 0xffffffffu || distance < 1 || distance > 31) cuda_on_cpu::fail("bad shuffle");
  cuda_on_cpu::Fiber &self = *cuda_on_cpu::fibers[threadIdx.x];
  // two places for values, because some lanes meet the next shuffle before others have read this one
  const int phase = self.phase ^= 1;
  self.value[phase] = value;
  cuda_on_cpu::wait(cuda_on_cpu::AT_WARP, distance);
  return cuda_on_cpu::fibers[threadIdx.x ^ distance]->value[phase];
}

// bf16 and half round to nearest even
struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
struct __half { uint16_t bits; };
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float size = std::ldexp(1024.0f + fraction, exponent - 25);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  if (exponent == 0) size = std::ldexp((float)fraction, -24);
  return x.bits >> 15 ? -size : size;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.0f) return {(uint16_t)(sign | 0x7c00)};
  // a fraction that rounds up to 2048 carries into the exponent
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  return {(uint16_t)(sign | ((exponent + 14) * 1024 + (int)std::nearbyint(std::ldexp(size, 10 - exponent))))};
}

typedef int cudaError_t;
typedef void *cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "no error"; }
template <typename Kernel> cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }
