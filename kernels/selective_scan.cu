// The selective scan (Mamba, arXiv 2312.00752) on CUDA GPUs, forward and backward; selective_scan.h says what
// goes in and out.
//
//     h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = sum_n C_t[n] h_t[n] + D u_t
//
// How it works. Time is serial, channels are parallel. The N states of a channel are spread over LANES lanes of
// a warp, STATES to a lane. A lane serves PER_LANE channels at once, which halves the loads of B and C and the
// work of summing over channels. h stays in registers from the first step to the last. A block takes one
// sequence and a tile of channels. It stages some steps of delta, u, B and C in shared memory (fp32, coalesced,
// zeros where the tensor ends: with delta = u = 0 a step changes nothing), runs over them, and sends y back the
// same way. Nearly all the work is exp(delta A). A is scaled by log2(e) once, so that this is one multiply-add
// and the hardware's 2^x. A reset adds -infinity to that exponent. Sums over the lanes of a channel are taken
// for four steps at once with a transposing butterfly: eight values cost 7 shuffles on 8 lanes, not 24.
//
// What is kept for the backward pass is h before each chunk of 64 steps: (batch, ceil(T / 64), N, channels) in
// fp32. The backward pass goes over the chunks from the last to the first. In each it computes h again: once to
// find it before every 16 steps, once more before every 4 (both kept in shared memory), and a third time to
// have h and exp(delta A) of 4 steps in registers. From there it runs against time. So it computes 2.5
// exponentials per step and state, and stores none.
//
// The gradients of B and C are sums over channels: over the channels of a lane, of a warp (butterfly), of a
// block (shared memory), and then over blocks, whose sums go through `workspace` and are added by a second
// kernel. To keep that small, a long sequence is gone through in several segments, three launches each. A and D
// have sums over the batch, likewise. There are no atomics: every sum has a fixed order, and a result does not
// depend on how the GPU schedules blocks.
//
// N is padded to 16, 32, 64, 128 or 256. Nothing here has been timed on a GPU yet; the layouts follow from counting
// instructions, registers and bytes.

#ifdef CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif

#include <algorithm>
#include <cmath>

#include "selective_scan.h"

extern __shared__ float4 shared_memory[];  // every kernel lays its own struct over it

namespace {

constexpr int GROUP = 4;   // steps whose sums over lanes are taken together; backward has h of all of them in registers
constexpr int STEPS = 16;  // steps that backward stages in shared memory at once
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// How a block of THREADS threads is laid out over (channels, states), at compile time
template <int LANES_, int STATES_, int PER_LANE_, int THREADS_> struct Tile {
  static constexpr int LANES = LANES_, STATES = STATES_, PER_LANE = PER_LANE_, THREADS = THREADS_, WARPS = THREADS / 32;
  static constexpr int N = LANES * STATES;  // padded
  static constexpr int CHANNELS = THREADS / LANES * PER_LANE;  // of a block
  static constexpr int VEC = STATES < 4 ? STATES : 4;  // states that lie side by side: one load from shared memory
  static constexpr int STAGED = N <= 64 ? 32 : 16;  // steps that forward stages at once
  // the s-th state of a lane, and back
  static __device__ __forceinline__ int state(int lane, int s) {
    return s / VEC * (LANES * VEC) + lane * VEC + s % VEC;
  }
  static __device__ __forceinline__ int lane_of(int n) { return n / VEC % LANES; }
  static __device__ __forceinline__ int slot_of(int n) { return n / (LANES * VEC) * VEC + n % VEC; }
};

// ---------------------------------------------------------------------------------------------------- small pieces

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void store(float *p, float x) { *p = x; }
__device__ __forceinline__ void store(__nv_bfloat16 *p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(__half *p, float x) { *p = __float2half_rn(x); }

// 2^x, 0 below 2^-126; without that exp2f would spend three more instructions on denormal results
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// V floats of shared memory in one instruction
template <int V> __device__ __forceinline__ void load(const float *p, float *v) {
  if constexpr (V == 4) {
    const float4 x = *reinterpret_cast<const float4 *>(p);
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
  } else if constexpr (V == 2) {
    const float2 x = *reinterpret_cast<const float2 *>(p);
    v[0] = x.x, v[1] = x.y;
  } else {
    v[0] = *p;
  }
}
// This lane's states of a row (N) of shared memory
template <class X> __device__ __forceinline__ void load_states(const float *row, int lane, float (&v)[X::STATES]) {
#pragma unroll
  for (int s = 0; s < X::STATES; s += X::VEC) load<X::VEC>(row + X::state(lane, s), v + s);
}

// v[0..V) summed over LANES lanes that are STRIDE apart; `lane` counts them. While more than KEEP values are
// left, a lane gives away half of its values and keeps the other half. It ends with the sums of
// v[lane % R + i R] in v[i], where R is V divided by the number of values that are left
template <int V, int KEEP, int LANES, int STRIDE> __device__ __forceinline__ void sum_over_lanes(float *v, int lane) {
  if constexpr (LANES > 1 && V > KEEP) {
    const bool odd = lane & 1;
#pragma unroll
    for (int i = 0; i < V / 2; i++) {
      const float give = odd ? v[2 * i] : v[2 * i + 1], keep = odd ? v[2 * i + 1] : v[2 * i];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, give, STRIDE);
    }
    sum_over_lanes<V / 2, KEEP, LANES / 2, STRIDE * 2>(v, lane >> 1);
  } else if constexpr (LANES > 1) {
#pragma unroll
    for (int i = 0; i < V; i++) v[i] += __shfl_xor_sync(0xffffffffu, v[i], STRIDE);
    sum_over_lanes<V, KEEP, LANES / 2, STRIDE * 2>(v, lane >> 1);
  }
}

// Four values of an activation or of fp32, moved by one instruction where they are aligned
template <typename T> struct alignas(4 * sizeof(T)) Four { T v[4]; };
template <typename T> __device__ __forceinline__ bool fours(const T *p, int64_t stride, int width) {
  return stride % 4 == 0 && width % 4 == 0 && reinterpret_cast<uintptr_t>(p) % sizeof(Four<T>) == 0;
}

// Copies `rows` rows of `width` values into (ROWS, COLUMNS) in shared memory, padded with zeros. The matrix
// they come from has its rows `stride` apart
template <int ROWS, int COLUMNS, int THREADS, typename T>
__device__ __forceinline__ void stage(const T *from, int64_t stride, int rows, int width, float *to) {
  const bool wide = fours(from, stride, width);
#pragma unroll 1  // mostly one turn or two; unrolled, the compiler keeps so many loads in flight that registers run out
  for (int i = threadIdx.x * 4; i < ROWS * COLUMNS; i += THREADS * 4) {
    const int r = i / COLUMNS, c = i % COLUMNS;
    const T *p = from + r * stride + c;
    float v[4] = {};
    if (r < rows && c < width) {
      if (wide) {
        const Four<T> four = *reinterpret_cast<const Four<T> *>(p);
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = to_float(four.v[j]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++)
          if (c + j < width) v[j] = to_float(p[j]);
      }
    }
    *reinterpret_cast<float4 *>(to + i) = make_float4(v[0], v[1], v[2], v[3]);
  }
}
// And back. The same thread has the same elements in both, so no barrier is needed between this and the next stage()
template <int ROWS, int COLUMNS, int THREADS, typename T>
__device__ __forceinline__ void unstage(const float *from, T *to, int64_t stride, int rows, int width) {
  const bool wide = fours(to, stride, width);
#pragma unroll 1
  for (int i = threadIdx.x * 4; i < ROWS * COLUMNS; i += THREADS * 4) {
    const int r = i / COLUMNS, c = i % COLUMNS;
    if (r >= rows || c >= width) continue;
    T *p = to + r * stride + c;
    float v[4];
    load<4>(from + i, v);
    if (wide) {
      Four<T> four;
#pragma unroll
      for (int j = 0; j < 4; j++) store(four.v + j, v[j]);
      *reinterpret_cast<Four<T> *>(p) = four;
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (c + j < width) store(p + j, v[j]);
    }
  }
}
// What a step adds to its exponent: -infinity where h_{t-1} counts as zero
template <int ROWS> __device__ __forceinline__ void stage_resets(const uint8_t *reset, int rows, float *to) {
  if (threadIdx.x < ROWS) to[threadIdx.x] = reset && (int)threadIdx.x < rows && reset[threadIdx.x] ? -INFINITY : 0.0f;
}

// Which part of the problem this block and this thread have. There is a block for every sequence and tile of channels
template <class X> struct Place {
  int b, c0, width;  // the block's sequence, its first channel, and the channels it really has
  int lane, c;       // the thread's lane of LANES; its first channel, counted from c0
  __device__ __forceinline__ explicit Place(const ScanArgs &p) {
    const int tiles = ((int)p.channels + X::CHANNELS - 1) / X::CHANNELS;
    b = (int)blockIdx.x / tiles, c0 = (int)blockIdx.x % tiles * X::CHANNELS;
    width = (int)p.channels - c0 < X::CHANNELS ? (int)p.channels - c0 : X::CHANNELS;
    lane = threadIdx.x % X::LANES, c = threadIdx.x / X::LANES * X::PER_LANE;
  }
};
// A thread's values of a matrix (channels, N) whose first row is channel c0; null and what is not there read as zero
template <class X>
__device__ __forceinline__ void read_matrix(const float *from, int64_t N, const Place<X> &at, float scale,
                                            float (&v)[X::PER_LANE][X::STATES]) {
#pragma unroll
  for (int k = 0; k < X::PER_LANE; k++)
#pragma unroll
    for (int s = 0; s < X::STATES; s++) {
      const int n = X::state(at.lane, s);
      v[k][s] = from && at.c + k < at.width && n < N ? from[(at.c + k) * N + n] * scale : 0.0f;
    }
}
template <class X>
__device__ __forceinline__ void write_matrix(float *to, int64_t N, const Place<X> &at, bool add,
                                             const float (&v)[X::PER_LANE][X::STATES]) {
#pragma unroll
  for (int k = 0; k < X::PER_LANE; k++)
#pragma unroll
    for (int s = 0; s < X::STATES; s++) {
      const int n = X::state(at.lane, s);
      if (at.c + k < at.width && n < N) {
        float *p = to + (at.c + k) * N + n;
        *p = add ? *p + v[k][s] : v[k][s];
      }
    }
}

// One step from h to next; a is what h was multiplied with. A is scaled by log2(e); x = delta u
template <class X>
__device__ __forceinline__ void step(const float (&A)[X::PER_LANE][X::STATES], const float *delta, const float *x,
                                     float bias, const float (&B)[X::STATES],
                                     const float (&h)[X::PER_LANE][X::STATES], float (&a)[X::PER_LANE][X::STATES],
                                     float (&next)[X::PER_LANE][X::STATES]) {
#pragma unroll
  for (int k = 0; k < X::PER_LANE; k++)
#pragma unroll
    for (int s = 0; s < X::STATES; s++) {
      a[k][s] = power_of_two(fmaf(delta[k], A[k][s], bias));
      next[k][s] = fmaf(a[k][s], h[k][s], x[k] * B[s]);
    }
}

// ---------------------------------------------------------------------------------------------------- forward

template <class X> struct ForwardShared {
  alignas(16) float delta[X::STAGED][X::CHANNELS], u[X::STAGED][X::CHANNELS];  // y replaces u
  alignas(16) float B[X::STAGED][X::N], C[X::STAGED][X::N], bias[X::STAGED], D[X::CHANNELS];
  alignas(16) float h[X::N][X::CHANNELS];  // on its way to checkpoints
};

template <typename Type, class X>
__global__ __launch_bounds__(X::THREADS, (X::N > 128 ? 768 : 1024) / X::THREADS)
void forward_kernel(const ScanArgs p) {
  constexpr int K = X::PER_LANE, S = X::STATES, CH = X::CHANNELS, ROWS = X::STAGED;
  ForwardShared<X> &sh = *reinterpret_cast<ForwardShared<X> *>(shared_memory);
  const Place<X> at(p);
  const int T = (int)p.T, chunks = (T + CHUNK - 1) / CHUNK;
  float A[K][S], h[K][S];
  read_matrix<X>(p.A + at.c0 * p.N, p.N, at, LOG2E, A);
  read_matrix<X>(p.h0 ? p.h0 + (at.b * p.channels + at.c0) * p.N : nullptr, p.N, at, 1.0f, h);
  // after a sum over lanes, lane i < GROUP * K has step i % GROUP of channel i / GROUP
  const int owned = at.c + at.lane / GROUP % K;
  stage<1, CH, X::THREADS>(p.D ? p.D + at.c0 : nullptr, 0, p.D ? 1 : 0, at.width, sh.D);

  for (int t0 = 0; t0 < T; t0 += ROWS) {
    const int rows = T - t0 < ROWS ? T - t0 : ROWS;
    const int64_t row = at.b * p.T + t0, first = row * p.channels + at.c0;
    const bool keep = p.checkpoints && t0 % CHUNK == 0;
    stage<ROWS, CH, X::THREADS>((const Type *)p.delta + first, p.channels, rows, at.width, sh.delta[0]);
    stage<ROWS, CH, X::THREADS>((const Type *)p.u + first, p.channels, rows, at.width, sh.u[0]);
    stage<ROWS, X::N, X::THREADS>((const Type *)p.B + row * p.N, p.N, rows, (int)p.N, sh.B[0]);
    stage<ROWS, X::N, X::THREADS>((const Type *)p.C + row * p.N, p.N, rows, (int)p.N, sh.C[0]);
    stage_resets<ROWS>(p.reset ? p.reset + row : nullptr, rows, sh.bias);
    if (keep) {
#pragma unroll
      for (int k = 0; k < K; k++)
#pragma unroll
        for (int s = 0; s < S; s++) sh.h[X::state(at.lane, s)][at.c + k] = h[k][s];
    }
    __syncthreads();
    if (keep)
      unstage<X::N, CH, X::THREADS>(
          sh.h[0], p.checkpoints + ((int64_t)at.b * chunks + t0 / CHUNK) * p.N * p.channels + at.c0,
          p.channels, (int)p.N, at.width);
#pragma unroll 1
    for (int t = 0; t < rows; t += GROUP) {
      float y[K * GROUP], bias[GROUP];
      load<GROUP>(sh.bias + t, bias);
#pragma unroll
      for (int j = 0; j < GROUP; j++) {
        float delta[K], x[K], B[S], C[S], a[K][S];
        load<K>(&sh.delta[t + j][at.c], delta);
        load<K>(&sh.u[t + j][at.c], x);
        load_states<X>(sh.B[t + j], at.lane, B);
        load_states<X>(sh.C[t + j], at.lane, C);
#pragma unroll
        for (int k = 0; k < K; k++) x[k] *= delta[k];
        step<X>(A, delta, x, bias[j], B, h, a, h);
#pragma unroll
        for (int k = 0; k < K; k++) {
          y[k * GROUP + j] = h[k][0] * C[0];
#pragma unroll
          for (int s = 1; s < S; s++) y[k * GROUP + j] = fmaf(h[k][s], C[s], y[k * GROUP + j]);
        }
      }
      sum_over_lanes<K * GROUP, 1, X::LANES, 1>(y, at.lane);
      __syncwarp();  // the channel's lanes have read u, which y replaces
      if (at.lane < K * GROUP) {
        float &u = sh.u[t + at.lane % GROUP][owned];
        u = fmaf(sh.D[owned], u, y[0]);
      }
    }
    __syncthreads();
    unstage<ROWS, CH, X::THREADS>(sh.u[0], (Type *)p.y + first, p.channels, rows, at.width);
  }
  write_matrix<X>(p.last + (at.b * p.channels + at.c0) * p.N, p.N, at, false, h);
}

// ---------------------------------------------------------------------------------------------------- backward

// the last start of each level need not be saved
constexpr int SAVED = CHUNK / STEPS - 1, SAVED_GROUPS = STEPS / GROUP - 1;

template <class X> struct BackwardShared {
  // du replaces u, ddelta replaces dy
  alignas(16) float delta[STEPS][X::CHANNELS], u[STEPS][X::CHANNELS], dy[STEPS][X::CHANNELS];
  alignas(16) float B[STEPS][X::N], C[STEPS][X::N], bias[STEPS], D[X::CHANNELS];
  alignas(16) float sums[X::WARPS][GROUP][2 * X::N];  // of dB and dC over the channels of a warp
  float saved[SAVED + SAVED_GROUPS][X::PER_LANE * X::STATES][X::THREADS];  // h before steps; a thread has its own
};

// Some chunks of every sequence: what one launch does
struct Segment {
  int first, end;        // chunks
  const float *dh_from;  // (batch, channels, N): a_t dh_t of the step behind it, or null for zeros
  float *dh_to;          // the same before its first step, or null
  float *dBC;            // (2, batch, tiles, steps of a segment, N): dB and dC summed over the channels of a tile
  float *dA, *dD;        // (batch, channels, N), (batch, channels)
  int64_t steps;         // of a segment
  bool add;              // to dA and dD, which hold what later segments gave
};

template <class X>
__device__ __forceinline__ void save(float (*slot)[X::THREADS], const float (&h)[X::PER_LANE][X::STATES]) {
#pragma unroll
  for (int i = 0; i < X::PER_LANE * X::STATES; i++) slot[i][threadIdx.x] = h[i / X::STATES][i % X::STATES];
}
template <class X>
__device__ __forceinline__ void restore(float (*slot)[X::THREADS], float (&h)[X::PER_LANE][X::STATES]) {
#pragma unroll
  for (int i = 0; i < X::PER_LANE * X::STATES; i++) h[i / X::STATES][i % X::STATES] = slot[i][threadIdx.x];
}

// delta, delta u, B and the exponent's bias of staged step t
template <class X>
__device__ __forceinline__ void load_step(const BackwardShared<X> &sh, int t, const Place<X> &at, float *delta,
                                          float *x, float (&B)[X::STATES], float &bias) {
  load<X::PER_LANE>(&sh.delta[t][at.c], delta);
  load<X::PER_LANE>(&sh.u[t][at.c], x);
  load_states<X>(sh.B[t], at.lane, B);
  bias = sh.bias[t];
#pragma unroll
  for (int k = 0; k < X::PER_LANE; k++) x[k] *= delta[k];
}
// h over GROUP staged steps from t on
template <class X>
__device__ __forceinline__ void advance(const BackwardShared<X> &sh, int t, const Place<X> &at,
                                        const float (&A)[X::PER_LANE][X::STATES],
                                        float (&h)[X::PER_LANE][X::STATES]) {
#pragma unroll
  for (int j = 0; j < GROUP; j++) {
    float delta[X::PER_LANE], x[X::PER_LANE], B[X::STATES], bias, a[X::PER_LANE][X::STATES];
    load_step<X>(sh, t + j, at, delta, x, B, bias);
    step<X>(A, delta, x, bias, B, h, a, h);
  }
}

template <typename Type, class X>
__global__ __launch_bounds__(X::THREADS, 512 / X::THREADS)
void backward_kernel(const ScanArgs p, const Segment seg) {
  constexpr int K = X::PER_LANE, S = X::STATES, CH = X::CHANNELS;
  BackwardShared<X> &sh = *reinterpret_cast<BackwardShared<X> *>(shared_memory);
  const Place<X> at(p);
  const int T = (int)p.T, chunks = (T + CHUNK - 1) / CHUNK;
  const int64_t states = (at.b * p.channels + at.c0) * p.N;
  float A[K][S], dh[K][S], dA[K][S] = {}, dD = 0.0f;  // between steps dh is a_t dh_t of the step behind
  read_matrix<X>(p.A + at.c0 * p.N, p.N, at, LOG2E, A);
  read_matrix<X>(seg.dh_from ? seg.dh_from + states : nullptr, p.N, at, 1.0f, dh);
  const int owned = at.c + at.lane / GROUP % K;  // as in forward
  stage<1, CH, X::THREADS>(p.D ? p.D + at.c0 : nullptr, 0, p.D ? 1 : 0, at.width, sh.D);

#pragma unroll 1
  for (int chunk = seg.end - 1; chunk >= seg.first; chunk--) {
    const int t0 = chunk * CHUNK, steps = T - t0 < CHUNK ? T - t0 : CHUNK, parts = (steps + STEPS - 1) / STEPS;
    float h[K][S];

    // the checkpoint, turned from (N, channels) by way of shared memory that is free now
    float *tile = sh.saved[SAVED][0];
    stage<X::N, CH, X::THREADS>(p.checkpoints + ((int64_t)at.b * chunks + chunk) * p.N * p.channels + at.c0,
                                p.channels, (int)p.N, at.width, tile);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
      for (int s = 0; s < S; s++) h[k][s] = tile[X::state(at.lane, s) * CH + at.c + k];

    // first up to the last part of STEPS steps, then back from there
#pragma unroll 1
    for (int i = 0; i < 2 * parts - 1; i++) {
      const bool back = i >= parts - 1;
      const int part = back ? 2 * parts - 2 - i : i, rows = steps - part * STEPS < STEPS ? steps - part * STEPS : STEPS;
      const int64_t row = at.b * p.T + t0 + part * STEPS, first = row * p.channels + at.c0;
      if (!back) save<X>(sh.saved[part], h);
      if (back && part < parts - 1) restore<X>(sh.saved[part], h);
      __syncthreads();  // nobody needs what was staged before
      stage<STEPS, CH, X::THREADS>((const Type *)p.delta + first, p.channels, rows, at.width, sh.delta[0]);
      stage<STEPS, CH, X::THREADS>((const Type *)p.u + first, p.channels, rows, at.width, sh.u[0]);
      stage<STEPS, X::N, X::THREADS>((const Type *)p.B + row * p.N, p.N, rows, (int)p.N, sh.B[0]);
      stage_resets<STEPS>(p.reset ? p.reset + row : nullptr, rows, sh.bias);
      if (back) {
        stage<STEPS, CH, X::THREADS>((const Type *)p.dy + first, p.channels, rows, at.width, sh.dy[0]);
        stage<STEPS, X::N, X::THREADS>((const Type *)p.C + row * p.N, p.N, rows, (int)p.N, sh.C[0]);
      }
      __syncthreads();

      // the same once more with groups: the way back begins with the last one, the way up needs all of them
      const int groups = (rows + GROUP - 1) / GROUP, up = back ? groups - 1 : groups;
#pragma unroll 1
      for (int g = 0; g < up; g++) {
        if (back) save<X>(sh.saved[SAVED + g], h);
        advance<X>(sh, g * GROUP, at, A, h);
      }
      if (!back) continue;

#pragma unroll 1
      for (int g = groups - 1; g >= 0; g--) {
        if (g < groups - 1) restore<X>(sh.saved[SAVED + g], h);
        float before[GROUP][K][S], a[GROUP][K][S], sums[2 * K * GROUP];  // h before each step; sum_n dh B and sum_n q A
#pragma unroll
        for (int j = 0; j < GROUP; j++) {
          float delta[K], x[K], B[S], bias;
          load_step<X>(sh, g * GROUP + j, at, delta, x, B, bias);
#pragma unroll
          for (int i = 0; i < K * S; i++) before[j][i / S][i % S] = h[i / S][i % S];
          step<X>(A, delta, x, bias, B, before[j], a[j], h);
        }
#pragma unroll
        for (int j = GROUP - 1; j >= 0; j--) {
          const int t = g * GROUP + j;
          float delta[K], x[K], dy[K], B[S], C[S], bias, dBC[2 * S] = {};
          load_step<X>(sh, t, at, delta, x, B, bias);
          load<K>(&sh.dy[t][at.c], dy);
          load_states<X>(sh.C[t], at.lane, C);
#pragma unroll
          for (int k = 0; k < K; k++) {
            float sum_B = 0.0f, sum_A = 0.0f;
#pragma unroll
            for (int s = 0; s < S; s++) {
              const float d = fmaf(dy[k], C[s], dh[k][s]);
              dBC[s] = fmaf(d, x[k], dBC[s]);
              dBC[S + s] = fmaf(dy[k], j == GROUP - 1 ? h[k][s] : before[(j + 1) % GROUP][k][s], dBC[S + s]);
              sum_B = fmaf(d, B[s], sum_B);
              dh[k][s] = a[j][k][s] * d;
              const float q = dh[k][s] * before[j][k][s];
              sum_A = fmaf(q, A[k][s], sum_A);
              dA[k][s] = fmaf(q, delta[k], dA[k][s]);
            }
            sums[k * GROUP + j] = sum_B;
            sums[(K + k) * GROUP + j] = sum_A;
          }
          // over the channels of the warp: dBC[i] now holds value i G + lane / LANES of 2 S, one row of 32 in `sums`
          constexpr int G = 32 / X::LANES;
          sum_over_lanes<2 * S, 1, G, X::LANES>(dBC, threadIdx.x % 32 / X::LANES);
#pragma unroll
          for (int i = 0; i < 2 * S / G; i++) sh.sums[threadIdx.x / 32][j][i * 32 + threadIdx.x % 32] = dBC[i];
        }
        sum_over_lanes<2 * K * GROUP, 2, X::LANES, 1>(sums, at.lane);
        __syncwarp();  // the channel's lanes have read u and dy, which du and ddelta replace
        if (at.lane < K * GROUP) {
          const int t = g * GROUP + at.lane % GROUP;
          const float u = sh.u[t][owned], dy = sh.dy[t][owned];
          sh.u[t][owned] = fmaf(sh.delta[t][owned], sums[0], sh.D[owned] * dy);
          sh.dy[t][owned] = fmaf(LN2, sums[1], u * sums[0]);
          dD = fmaf(dy, u, dD);
        }
        __syncthreads();
        // over the warps of the block
#pragma unroll 1
        for (int i = threadIdx.x; i < GROUP * 2 * X::N; i += X::THREADS) {
          const int j = i / (2 * X::N), which = i / X::N % 2, n = i % X::N, t = part * STEPS + g * GROUP + j;
          if (n >= p.N || t >= steps) continue;
          const int from = (which * S + X::slot_of(n)) * X::LANES + X::lane_of(n);
          float sum = 0.0f;
#pragma unroll
          for (int w = 0; w < X::WARPS; w++) sum += sh.sums[w][j][from];
          seg.dBC[(((int64_t)which * gridDim.x + blockIdx.x) * seg.steps + t0 - seg.first * CHUNK + t) * p.N + n] = sum;
        }
        __syncthreads();
      }
      unstage<STEPS, CH, X::THREADS>(sh.u[0], (Type *)p.du + first, p.channels, rows, at.width);
      unstage<STEPS, CH, X::THREADS>(sh.dy[0], (Type *)p.ddelta + first, p.channels, rows, at.width);
    }
  }
  if (seg.dh_to) write_matrix<X>(seg.dh_to + states, p.N, at, false, dh);
  write_matrix<X>(seg.dA + states, p.N, at, seg.add, dA);
  sum_over_lanes<1, 1, GROUP, 1>(&dD, at.lane);
  if (at.lane < K * GROUP && at.lane % GROUP == 0 && owned < at.width) {
    float *to = seg.dD + at.b * p.channels + at.c0 + owned;
    *to = seg.add ? *to + dD : dD;
  }
}

// to[r, i] = sum_j from[j, r, i] for rows r of `columns`; distances in elements. In the order of j
__global__ __launch_bounds__(256)
void add_partials(const float *from, int64_t count, int64_t distance, int64_t rows, int64_t columns, int64_t from_row,
                  float *to, int64_t to_row) {
  for (int64_t k = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; k < rows * columns;
       k += (int64_t)gridDim.x * blockDim.x) {
    const int64_t r = k / columns, i = k % columns;
    float sum = 0.0f;
    for (int64_t j = 0; j < count; j++) sum += from[j * distance + r * from_row + i];
    to[r * to_row + i] = sum;
  }
}

// ---------------------------------------------------------------------------------------------------- launches

// For the largest N a block has fewer channels, so that its shared memory stays below the 99 KB of the smaller GPUs
template <typename F> auto with_tile(int64_t N, F f) {
  if (N <= 16) return f(Tile<8, 2, 2, 256>());
  if (N <= 32) return f(Tile<8, 4, 2, 256>());
  if (N <= 64) return f(Tile<16, 4, 2, 256>());
  if (N <= 128) return f(Tile<32, 4, 2, 128>());
  return f(Tile<32, 8, 1, 128>());
}
template <typename F> auto with_type(ScanType type, F f) {
  if (type == ScanType::bf16) return f(__nv_bfloat16());
  if (type == ScanType::f16) return f(__half());
  return f(float());
}

// What backward keeps in its workspace, in floats from its start
struct Plan {
  int64_t tiles, chunks, segments, segment_chunks, dA, dD, dh, dBC, total;
  Plan(int64_t batch, int64_t T, int64_t channels, int64_t N) {
    const int64_t width = with_tile(N, [](auto x) { return (int64_t)decltype(x)::CHANNELS; });
    tiles = (channels + width - 1) / width, chunks = (T + CHUNK - 1) / CHUNK;
    // dBC may take a quarter of what u, delta, dy, du and ddelta take in fp32, or what one chunk needs
    const int64_t fit = 5 * T * channels / 4 / std::max<int64_t>(1, 2 * tiles * N * CHUNK);
    segments = std::max<int64_t>(1, (chunks + std::max<int64_t>(1, fit) - 1) / std::max<int64_t>(1, fit));
    segment_chunks = (chunks + segments - 1) / segments;
    segments = segment_chunks ? (chunks + segment_chunks - 1) / segment_chunks : 1;
    dA = 0, dD = dA + batch * channels * N, dh = dD + batch * channels;
    dBC = dh + (segments > 1 ? batch * channels * N : 0);
    total = dBC + 2 * tiles * batch * segment_chunks * CHUNK * N;
  }
};

const char *check(const ScanArgs &p, int64_t blocks) {
  if (p.N < 1 || p.N > 256) return "selective_scan takes 1 to 256 states";
  if (std::max({blocks, p.T + CHUNK, p.channels + 256}) > INT32_MAX)
    return "selective_scan: too many blocks, steps or channels for one launch";
  return nullptr;
}
const char *message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// A kernel with more than 48 KB of shared memory must be told so
template <typename Shared, typename Kernel, typename... Args>
const char *launch(Kernel kernel, int64_t blocks, int threads, void *stream, const Args &...args) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(Shared));
  if (error != cudaSuccess) return message(error);
  LAUNCH(kernel, (unsigned)blocks, threads, sizeof(Shared), (cudaStream_t)stream, args...);
  return message(cudaGetLastError());
}
const char *add_up(const float *from, int64_t count, int64_t distance, int64_t rows, int64_t columns,
                   int64_t from_row, float *to, int64_t to_row, void *stream) {
  if (rows * columns == 0) return nullptr;
  const int64_t blocks = std::min<int64_t>((rows * columns + 255) / 256, 65536);
  LAUNCH(add_partials, (unsigned)blocks, 256, 0, (cudaStream_t)stream, from, count, distance, rows, columns,
         from_row, to, to_row);
  return message(cudaGetLastError());
}

}  // namespace

const char *scan_forward_cuda(const ScanArgs &p) {
  const int64_t blocks = Plan(p.batch, p.T, p.channels, p.N).tiles * p.batch;
  if (const char *error = check(p, blocks)) return error;
  if (blocks == 0) return nullptr;
  return with_tile(p.N, [&](auto x) {
    return with_type(p.type, [&](auto zero) {
      using X = decltype(x);
      return launch<ForwardShared<X>>(forward_kernel<decltype(zero), X>, blocks, X::THREADS, p.stream, p);
    });
  });
}

int64_t scan_backward_workspace(int64_t batch, int64_t T, int64_t channels, int64_t N) {
  return Plan(batch, T, channels, N).total * (int64_t)sizeof(float);
}

const char *scan_backward_cuda(const ScanArgs &p) {
  const Plan plan(p.batch, p.T, p.channels, p.N);
  const int64_t blocks = plan.tiles * p.batch, matrix = p.channels * p.N;
  if (const char *error = check(p, blocks)) return error;
  float *work = (float *)p.workspace;
  for (int64_t i = plan.segments - 1; i >= 0; i--) {
    const bool last = i == plan.segments - 1;
    const int64_t end = std::min(plan.chunks, (i + 1) * plan.segment_chunks), begin = i * plan.segment_chunks;
    const int64_t room = plan.segment_chunks * CHUNK;
    const Segment seg{(int)begin, (int)end, last ? p.dlast : work + plan.dh, i == 0 ? p.dh0 : work + plan.dh,
                      work + plan.dBC, work + plan.dA, work + plan.dD, room, !last};
    const char *error = blocks == 0 ? nullptr : with_tile(p.N, [&](auto x) {
      return with_type(p.type, [&](auto zero) {
        using X = decltype(x);
        return launch<BackwardShared<X>>(backward_kernel<decltype(zero), X>, blocks, X::THREADS, p.stream, p, seg);
      });
    });
    const int64_t steps = std::min(p.T - begin * CHUNK, room), one = room * p.N;  // one: a block's part of dB
    for (int which = 0; which < 2 && !error; which++)
      error = add_up(seg.dBC + which * blocks * one, plan.tiles, one, p.batch, steps * p.N, plan.tiles * one,
                     (which ? p.dC : p.dB) + begin * CHUNK * p.N, p.T * p.N, p.stream);
    if (error) return error;
  }
  if (const char *error = add_up(work + plan.dA, p.batch, matrix, 1, matrix, 0, p.dA, 0, p.stream)) return error;
  return p.dD ? add_up(work + plan.dD, p.batch, p.channels, 1, p.channels, 0, p.dD, 0, p.stream) : nullptr;
}
