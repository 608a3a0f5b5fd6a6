// The selective scan (Mamba, arXiv 2312.00752) on the CPU, forward and backward, and the bindings of both
// compiled libraries:
//
//     h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = sum_n C_t[n] h_t[n] + D u_t
//
// Built twice from this file: as it is, and with -DWITH_CUDA to bind selective_scan.cu. Nothing here knows of
// autograd; the operator, its gradient and its shapes are registered in __init__.py.
//
// How it works. SIMD lanes run over channels, for which u, delta and y are contiguous; a tile of VECS vectors
// of channels is the unit of work, and the threads share batch x tiles. Time is cut into chunks of 64 steps.
// For each chunk, a tile's delta, delta u and y are staged into local fp32 arrays (from any type and strides;
// 4 KB each with AVX2 and AVX-512). Then the loop goes over the states, a few at a time, with time innermost and
// h in registers. Nearly all the time goes into exp(delta A). A is scaled by log2(e) once, so that this is 2^x:
// eleven vector operations, nine with AVX-512. The recurrence and y are three more.
//
// The backward pass keeps the state before each chunk, (B, ceil(T / 64), N, channels) in fp32, and goes over
// the chunks from the last to the first. In each it computes h again, keeps h and exp(delta A) of a few states
// for the 64 steps, and adds up C's gradient. Then it runs against time, with A's gradient in registers. The
// gradients of B and C are sums over channels, that is over lanes, tiles and threads. Lanes are added with a
// transposing reduction, 4 states at once. Tiles write into a buffer of their own (64 steps long, so it is
// small), and a second parallel loop adds them in the order of the tiles. So the result does not depend on
// which thread does what.
//
// What was tried and did not help, and how fast it is beside other implementations: see MEASUREMENTS.md.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "selective_scan.h"

using at::Tensor;
using std::optional;

#ifndef WITH_CUDA

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// ---------------------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;  // SSE2, NEON: every 64-bit machine has them
#endif

// GCC's and clang's vector types: + and * work on all lanes, a scalar operand is broadcast
template <typename T> struct Vector;
template <> struct Vector<float> { typedef float type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct Vector<double> { typedef double type __attribute__((vector_size(VECTOR_BYTES))); };
typedef int32_t IntVector __attribute__((vector_size(VECTOR_BYTES)));
template <typename T> using Vec = typename Vector<T>::type;
template <typename T> constexpr int LANES = VECTOR_BYTES / sizeof(T);

constexpr int VECS = VECTOR_BYTES == 64 ? 1 : 2;  // vectors of channels in a tile: with AVX2 and AVX-512 one cache line
constexpr int STATES = 8;       // states of one vector that are in registers going forward; N is padded to a multiple
constexpr int BACK = 8 / VECS;  // states of all vectors of a tile that are in registers going backward
template <typename T> constexpr int TILE = VECS * LANES<T>;

template <typename T> inline Vec<T> load(const T *p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename T> inline void store(T *p, Vec<T> v) { std::memcpy(p, &v, sizeof v); }

// While it lives, this thread takes numbers below 1e-38 for 0. A state that fades away passes through them, and each
// operation on one takes a processor a hundred cycles
struct TinyIsZero {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  TinyIsZero() { _mm_setcsr(before | 0x8040); }  // operands and results
  ~TinyIsZero() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  TinyIsZero() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" ::"r"(before | 1 << 24));
  }
  ~TinyIsZero() { __asm__ volatile("msr fpcr, %0" ::"r"(before)); }
#else
  TinyIsZero() {}
#endif
};

#if !defined(__AVX512F__)
// Every lane within [low, high]. The order of the operands matters: NaN in x stays NaN, and the loss shows it
inline Vec<float> clamp(Vec<float> x, float low_bound, float high_bound) {
  const Vec<float> low = Vec<float>{} + low_bound, high = Vec<float>{} + high_bound;
#if defined(__AVX2__)
  return _mm256_min_ps(high, _mm256_max_ps(low, x));
#else
  x = x < low ? low : x;
  return x > high ? high : x;
#endif
}
#endif

// 2^x = 2^round(x) p(x - round(x)). p is the minimax polynomial under the condition p(0) = 1: with any other
// constant a decay close to one would drift over a long sequence. |p(f) / 2^f - 1| < 3.1e-7 |f|. x may be
// anything; at the ends the result is exactly 0 or infinity. With IN_RANGE the caller guarantees that x is in
// [-126, 126].
// AVX-512 has one operation each for rounding and scaling. Its vreduceps gives the remainder, which is 0 for
// infinities; in range a subtraction gives it in half the time. Without AVX-512, adding 1.5 * 2^23 rounds to an
// integer and leaves it in the low bits, from where a shift moves it into the exponent. In range this needs no
// clamp, which saves a sixth.
template <bool IN_RANGE> inline Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512F__)
  // Hides that x is a product. Else the compiler fuses the product with the subtraction, which then runs on the
  // busiest units
  __asm__("" : "+v"(x));
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const Vec<float> rounded = _mm512_roundscale_ps(x, NEAREST),
                   f = IN_RANGE ? x - rounded : (Vec<float>)_mm512_reduce_ps(x, NEAREST);
#else
  if (!IN_RANGE) x = clamp(x, -127.0f, 128.0f);
  const float shift = 12582912.0f;
  const Vec<float> rounded = x + shift, f = x - (rounded - shift);
#endif
  Vec<float> p = f * 0.0013400436560f + 0.0096663729535f;
  p = p * f + 0.0555033318098f;
  p = p * f + 0.2402234895482f;
  p = p * f + 0.6931471955056f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, rounded);
#else
  // If x is NaN then so is f, but the sum of the bits may be any number
  return f * 0.0f + (Vec<float>)((IntVector)p + ((IntVector)rounded << 23));
#endif
}
template <bool> inline Vec<double> exp2(Vec<double> x) {  // gradient checks only
  for (int i = 0; i < LANES<double>; i++) x[i] = std::exp2(x[i]);
  return x;
}

// sums[s] += the lanes of v[s] added up, for four vectors at once
template <typename T> inline void add_lane_sums(const Vec<T> *v, T *sums) {
  for (int s = 0; s < 4; s++)
    for (int i = 0; i < LANES<T>; i++) sums[s] += v[s][i];
}
#if defined(__AVX2__)
template <> inline void add_lane_sums<float>(const Vec<float> *v, float *sums) {
  // 4 x 4 blocks are transposed while they are added: every 128-bit part then holds partial sums of the four
#if defined(__AVX512F__)
  const __m512 a = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]),
               b = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
  const __m512 parts = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xEE);
  const __m256 half =
      _mm512_castps512_ps256(parts) + _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(parts), 1));
#else
  const __m256 a = _mm256_unpacklo_ps(v[0], v[1]) + _mm256_unpackhi_ps(v[0], v[1]),
               b = _mm256_unpacklo_ps(v[2], v[3]) + _mm256_unpackhi_ps(v[2], v[3]);
  const __m256 half = _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xEE);
#endif
  _mm_storeu_ps(sums, _mm_loadu_ps(sums) + (_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1)));
}
#endif

// Least and most of n values, n a multiple of the lanes, and of zero
template <typename T> inline std::pair<T, T> range(const T *p, int64_t n) {
  Vec<T> low = {}, high = {};
  for (int64_t i = 0; i < n; i += LANES<T>) {
    const Vec<T> x = load(p + i);
    low = x < low ? x : low, high = x > high ? x : high;
  }
  T least = 0, most = 0;
  for (int i = 0; i < LANES<T>; i++) least = std::min(least, low[i]), most = std::max(most, high[i]);
  return {least, most};
}

// What a tile's chunk needs: nothing special (every delta A is known to be in exp2's range), any range, or also resets
enum Kind { PLAIN, WIDE, RESETS };

// ---------------------------------------------------------------------------------------------------- staging

// An activation (batch, T, channels) of any type and strides
struct View {
  char *data;
  at::ScalarType type;
  int64_t batch, time, channel;  // strides in elements
  explicit View(const Tensor &x)
      : data((char *)x.data_ptr()), type(x.scalar_type()),
        batch(x.stride(0)), time(x.stride(1)), channel(x.stride(2)) {}
};

template <typename From, typename To>
void copy_rows(const From *from, int64_t row, int64_t step, To *to, int64_t to_row, int64_t to_step, int rows,
               int columns) {
  for (int t = 0; t < rows; t++)
    if (step == 1 && to_step == 1)  // the usual case, which the compiler turns into vector code
      for (int c = 0; c < columns; c++) to[t * to_row + c] = (To)from[t * row + c];
    else
      for (int c = 0; c < columns; c++) to[t * to_row + c * to_step] = (To)from[t * row + c * step];
}

#define WITH_TYPE(type, T, ...)                                                     \
  switch (type) {                                                                   \
    case at::kFloat: { using T = float; __VA_ARGS__; break; }                       \
    case at::kDouble: { using T = double; __VA_ARGS__; break; }                     \
    case at::kBFloat16: { using T = at::BFloat16; __VA_ARGS__; break; }             \
    case at::kHalf: { using T = at::Half; __VA_ARGS__; break; }                     \
    default: TORCH_CHECK(false, "selective_scan takes float32, bfloat16, float16 or float64, not ", type); \
  }

// `steps` rows of a tile of `width` channels into (CHUNK, TILE); channels that are not there count as zero
template <typename T> void read_tile(const View &v, int64_t b, int64_t t0, int64_t c0, int steps, int width, T *to) {
  if (width < TILE<T>) std::fill(to, to + steps * TILE<T>, T(0));
  WITH_TYPE(v.type, S, {
    const S *from = (const S *)v.data + b * v.batch + t0 * v.time + c0 * v.channel;
    copy_rows(from, v.time, v.channel, to, TILE<T>, 1, steps, width);
    for (int t = 0; t < steps; t++)  // the next tile's rows, which lie too far apart for the hardware to foresee them
      for (int c = 0; c < TILE<T>; c += 64 / sizeof(S)) __builtin_prefetch(from + t * v.time + TILE<T> + c);
  })
}
template <typename T>
void write_tile(const View &v, int64_t b, int64_t t0, int64_t c0, int steps, int width, const T *from) {
  WITH_TYPE(v.type, S, {
    S *to = (S *)v.data + b * v.batch + t0 * v.time + c0 * v.channel;
    copy_rows(from, TILE<T>, 1, to, v.time, v.channel, steps, width);
  })
}

// Rows (N, width) of a wider matrix of row length `channels` <-> (padded N, TILE); what is not there counts as zero
template <typename T> void read_state(const T *from, int64_t channels, int64_t N, int64_t padded, int width, T *to) {
  std::fill(to, to + padded * TILE<T>, T(0));
  for (int64_t n = 0; n < N; n++) std::copy(from + n * channels, from + n * channels + width, to + n * TILE<T>);
}
template <typename T> void write_state(T *to, int64_t channels, int64_t N, int width, const T *from) {
  for (int64_t n = 0; n < N; n++) std::copy(from + n * TILE<T>, from + n * TILE<T> + width, to + n * channels);
}

// What both passes prepare once: sizes; A log2(e) and D tile by tile, padded with zeros; B and C in the compute type
template <typename T> struct Problem {
  int64_t batch, time, channels, N, padded, tiles, chunks;
  View u, delta;
  Tensor A_tiles, D_tiles, B_rows, C_rows, reset_bytes;
  const T *A, *B, *C, *D;
  const uint8_t *reset;
  std::vector<std::pair<T, T>> A_range;  // of a tile: least and most

  Problem(const Tensor &u_, const Tensor &delta_, const Tensor &A_, const Tensor &B_, const Tensor &C_,
          const optional<Tensor> &D_, const optional<Tensor> &reset_)
      : batch(u_.size(0)), time(u_.size(1)), channels(u_.size(2)), N(A_.size(1)),
        padded((N + STATES - 1) / STATES * STATES), tiles((channels + TILE<T> - 1) / TILE<T>),
        chunks((time + CHUNK - 1) / CHUNK), u(u_), delta(delta_) {
    const auto type = c10::CppTypeToScalarType<T>::value;
    A_tiles = at::zeros({tiles, padded, TILE<T>}, A_.options().dtype(type));
    const Tensor a = A_.to(type).contiguous();
    const T *from = a.data_ptr<T>();
    T *to = A_tiles.data_ptr<T>();
    for (int64_t c = 0; c < channels; c++)
      for (int64_t n = 0; n < N; n++)
        to[(c / TILE<T> * padded + n) * TILE<T> + c % TILE<T>] = from[c * N + n] * T(1.4426950408889634);
    D_tiles = at::zeros({tiles * TILE<T>}, A_tiles.options());
    if (D_) D_tiles.narrow(0, 0, channels).copy_(*D_);
    auto rows = [&](const Tensor &x) {
      return (padded == N ? x.to(type) : at::constant_pad_nd(x.to(type), {0, padded - N})).contiguous();
    };
    B_rows = rows(B_), C_rows = rows(C_);
    if (reset_) reset_bytes = reset_->contiguous();
    A = A_tiles.data_ptr<T>(), D = D_tiles.data_ptr<T>(), B = B_rows.data_ptr<T>(), C = C_rows.data_ptr<T>();
    reset = reset_ ? (const uint8_t *)reset_bytes.data_ptr() : nullptr;
    for (int64_t tile = 0; tile < tiles; tile++) A_range.push_back(range(A_of(tile), padded * TILE<T>));
  }
  const T *A_of(int64_t tile) const { return A + tile * padded * TILE<T>; }
  Kind kind(int64_t tile, const T *dl, int steps) const {
    if (reset) return RESETS;
    const auto [least, most] = range(dl, steps * TILE<T>);
    return least >= 0 && A_range[tile].second <= 0 && most * A_range[tile].first >= T(-126) ? PLAIN : WIDE;
  }
  int width(int64_t tile) const { return (int)std::min<int64_t>(TILE<T>, channels - tile * TILE<T>); }
  int steps(int64_t chunk) const { return (int)std::min<int64_t>(CHUNK, time - chunk * CHUNK); }
  const uint8_t *reset_at(int64_t b, int64_t t) const { return reset ? reset + b * time + t : nullptr; }
};

// ---------------------------------------------------------------------------------------------------- forward

// y += C h over `steps` steps of a tile; h (padded N, TILE) goes from the state before them to the state behind them
template <typename T, Kind KIND>
void forward_chunk(int steps, int64_t padded, const T *A, const T *B, const T *C, const uint8_t *reset, const T *dl,
                   const T *x, T *y, T *h) {
  constexpr int W = TILE<T>, S = STATES;
  for (int64_t n = 0; n < padded; n += S)
    for (int v = 0; v < W; v += LANES<T>) {
      Vec<T> state[S];
      for (int s = 0; s < S; s++) state[s] = load(h + (n + s) * W + v);
      for (int t = 0; t < steps; t++) {
        const T keep = KIND == RESETS && reset[t] ? T(0) : T(1);
        const Vec<T> d = load(dl + t * W + v), in = load(x + t * W + v);
        Vec<T> out = load(y + t * W + v);
#pragma GCC unroll 8
        for (int s = 0; s < S; s++) {
          Vec<T> decay = exp2<KIND == PLAIN>(d * load(A + (n + s) * W + v));
          if (KIND == RESETS) decay *= keep;
          state[s] = decay * state[s] + in * B[t * padded + n + s];
          out += state[s] * C[t * padded + n + s];
        }
        store(y + t * W + v, out);
      }
      for (int s = 0; s < S; s++) store(h + (n + s) * W + v, state[s]);
    }
}

template <typename T>
void forward(const Problem<T> &p, const T *h0, const View &out, T *last, T *checkpoints) {
  // Units of work: neighbouring tiles of one batch entry, so that rows are read in long pieces. Each thread
  // gets four units
  const int64_t groups =
      std::min(p.tiles, std::max<int64_t>(1, 4 * at::get_num_threads() / std::max<int64_t>(1, p.batch)));
  at::parallel_for(0, p.batch * groups, 1, [&](int64_t begin, int64_t end) {
    const TinyIsZero mode;
    alignas(64) T dl[CHUNK * TILE<T>], x[CHUNK * TILE<T>], acc[CHUNK * TILE<T>];
    const int64_t size = p.padded * TILE<T>;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / groups, group = unit % groups;
      const int64_t first = group * p.tiles / groups, behind = (group + 1) * p.tiles / groups;
      std::vector<T> states((behind - first) * size, T(0));
      for (int64_t tile = first; h0 && tile < behind; tile++)
        copy_rows(h0 + (b * p.channels + tile * TILE<T>) * p.N, p.N, 1, &states[(tile - first) * size], 1, TILE<T>,
                  p.width(tile), p.N);
      for (int64_t k = 0; k < p.chunks; k++) {
        const int64_t t0 = k * CHUNK;
        const int steps = p.steps(k);
        const T *B = p.B + (b * p.time + t0) * p.padded, *C = p.C + (b * p.time + t0) * p.padded;
        for (int64_t tile = first; tile < behind; tile++) {
          const int64_t c0 = tile * TILE<T>;
          const int width = p.width(tile);
          T *h = &states[(tile - first) * size];
          if (checkpoints)
            write_state(checkpoints + (b * p.chunks + k) * p.N * p.channels + c0, p.channels, p.N, width, h);
          read_tile(p.delta, b, t0, c0, steps, width, dl);
          read_tile(p.u, b, t0, c0, steps, width, x);
          for (int t = 0; t < steps; t++)
            for (int c = 0; c < TILE<T>; c++) {
              acc[t * TILE<T> + c] = p.D[c0 + c] * x[t * TILE<T> + c];
              x[t * TILE<T> + c] *= dl[t * TILE<T> + c];
            }
          const Kind kind = p.kind(tile, dl, steps);
          auto run = kind == PLAIN  ? forward_chunk<T, PLAIN>
                     : kind == WIDE ? forward_chunk<T, WIDE>
                                    : forward_chunk<T, RESETS>;
          run(steps, p.padded, p.A_of(tile), B, C, p.reset_at(b, t0), dl, x, acc, h);
          write_tile(out, b, t0, c0, steps, width, acc);
        }
      }
      for (int64_t tile = first; tile < behind; tile++)
        copy_rows(&states[(tile - first) * size], 1, TILE<T>, last + (b * p.channels + tile * TILE<T>) * p.N, p.N, 1,
                  p.width(tile), p.N);
    }
  });
}

// ---------------------------------------------------------------------------------------------------- backward

// BACK states of a tile over `steps` steps; all pointers are at their first element. Computes
// da += sum_n (dh_t h_{t-1} a_t) A log2(e) and dx += sum_n dh_t B, adds to dA, dB and dC, and takes dh from the
// end of the chunk to its beginning. `hs` and `as` are room for h before every step and exp(delta A) of every step.
template <typename T, Kind KIND>
void backward_states(int steps, int64_t padded, const T *A, const T *B, const T *C, const uint8_t *reset, const T *dl,
                     const T *x, const T *dy, const T *h0, T *da, T *dx, T *dh, T *dA, T *dB, T *dC, T *hs, T *as) {
  constexpr int S = BACK, L = LANES<T>, W = TILE<T>;
  Vec<T> state[S][VECS];
#pragma GCC unroll 8
  for (int s = 0; s < S; s++)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; v++) state[s][v] = load(h0 + s * W + v * L);
  for (int t = 0; t < steps; t++) {
    const T keep = KIND == RESETS && reset[t] ? T(0) : T(1);
    Vec<T> for_C[S] = {};
#pragma GCC unroll 2
    for (int v = 0; v < VECS; v++) {
      const Vec<T> d = load(dl + t * W + v * L), in = load(x + t * W + v * L), g = load(dy + t * W + v * L);
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) {
        Vec<T> decay = exp2<KIND == PLAIN>(d * load(A + s * W + v * L));
        if (KIND == RESETS) decay *= keep;
        const int j = (t * S + s) * W + v * L;
        store(as + j, decay);
        store(hs + j, state[s][v]);
        state[s][v] = decay * state[s][v] + in * B[t * padded + s];
        for_C[s] += g * state[s][v];
      }
    }
    for (int s = 0; s < S; s += 4) add_lane_sums<T>(for_C + s, dC + t * padded + s);
  }
  Vec<T> grad[S][VECS], sum_A[S][VECS];
#pragma GCC unroll 8
  for (int s = 0; s < S; s++)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; v++) grad[s][v] = load(dh + s * W + v * L), sum_A[s][v] = load(dA + s * W + v * L);
  for (int t = steps - 1; t >= 0; t--) {
    Vec<T> for_B[S] = {};
#pragma GCC unroll 2
    for (int v = 0; v < VECS; v++) {
      const int i = t * W + v * L;
      const Vec<T> d = load(dl + i), in = load(x + i), g = load(dy + i);
      Vec<T> by_a = load(da + i), by_x = load(dx + i);
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) {
        const int j = (t * S + s) * W + v * L;
        grad[s][v] += g * C[t * padded + s];
        for_B[s] += grad[s][v] * in;
        by_x += grad[s][v] * B[t * padded + s];
        grad[s][v] *= load(as + j);  // from here on it is the gradient of h_{t-1}
        const Vec<T> q = grad[s][v] * load(hs + j);
        by_a += q * load(A + s * W + v * L);
        sum_A[s][v] += q * d;
      }
      store(da + i, by_a);
      store(dx + i, by_x);
    }
    for (int s = 0; s < S; s += 4) add_lane_sums<T>(for_B + s, dB + t * padded + s);
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; s++)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; v++) store(dh + s * W + v * L, grad[s][v]), store(dA + s * W + v * L, sum_A[s][v]);
}

template <typename T> struct Gradients {
  View dy, du, ddelta, dB, dC;
  T *dh, *dA, *dD;  // (batch, tiles, padded N, TILE) twice, (batch, tiles, TILE): sums over time, in the compute type
};

template <typename T>
void backward(const Problem<T> &p, const T *checkpoints, const Gradients<T> &g) {
  // Units of work: groups of tiles of one batch entry. They are enough for many threads, and their number
  // depends on the shape alone
  const int64_t groups = std::min(p.tiles, std::max<int64_t>(1, (32 + p.batch - 1) / std::max<int64_t>(1, p.batch)));
  const int64_t room = CHUNK * p.padded;
  const Tensor buffer = at::empty({p.batch, groups, 2, room}, p.A_tiles.options());
  T *parts = buffer.data_ptr<T>();
  for (int64_t k = p.chunks - 1; k >= 0; k--) {
    const int64_t t0 = k * CHUNK;
    const int steps = p.steps(k);
    at::parallel_for(0, p.batch * groups, 1, [&](int64_t begin, int64_t end) {
      const TinyIsZero mode;
      alignas(64) T dl[CHUNK * TILE<T>], u[CHUNK * TILE<T>], x[CHUNK * TILE<T>];
      alignas(64) T dy[CHUNK * TILE<T>], da[CHUNK * TILE<T>], dx[CHUNK * TILE<T>];
      alignas(64) T hs[CHUNK * BACK * TILE<T>], as[CHUNK * BACK * TILE<T>];
      std::vector<T> h(p.padded * TILE<T>);
      for (int64_t unit = begin; unit < end; unit++) {
        const int64_t b = unit / groups, group = unit % groups;
        T *dB = parts + unit * 2 * room, *dC = dB + room;
        std::fill(dB, dB + 2 * room, T(0));
        const T *B = p.B + (b * p.time + t0) * p.padded, *C = p.C + (b * p.time + t0) * p.padded;
        for (int64_t tile = group * p.tiles / groups; tile < (group + 1) * p.tiles / groups; tile++) {
          const int64_t c0 = tile * TILE<T>, at = (b * p.tiles + tile) * TILE<T>;
          const int width = p.width(tile);
          read_tile(p.delta, b, t0, c0, steps, width, dl);
          read_tile(p.u, b, t0, c0, steps, width, u);
          read_tile(g.dy, b, t0, c0, steps, width, dy);
          read_state(checkpoints + (b * p.chunks + k) * p.N * p.channels + c0, p.channels, p.N, p.padded, width,
                     h.data());
          for (int i = 0; i < steps * TILE<T>; i++) x[i] = dl[i] * u[i], da[i] = dx[i] = 0;
          const Kind kind = p.kind(tile, dl, steps);
          auto run = kind == PLAIN  ? backward_states<T, PLAIN>
                     : kind == WIDE ? backward_states<T, WIDE>
                                    : backward_states<T, RESETS>;
          for (int64_t n = 0; n < p.padded; n += BACK) {
            const int64_t i = n * TILE<T>;
            run(steps, p.padded, p.A_of(tile) + i, B + n, C + n, p.reset_at(b, t0), dl, x, dy, h.data() + i, da, dx,
                g.dh + at * p.padded + i, g.dA + at * p.padded + i, dB + n, dC + n, hs, as);
          }
          for (int t = 0; t < steps; t++)
            for (int c = 0; c < TILE<T>; c++) {
              const int i = t * TILE<T> + c;
              da[i] = da[i] * T(0.6931471805599453) + dx[i] * u[i];
              dx[i] = dx[i] * dl[i] + p.D[c0 + c] * dy[i];
              g.dD[at + c] += dy[i] * u[i];
            }
          write_tile(g.ddelta, b, t0, c0, steps, width, da);
          write_tile(g.du, b, t0, c0, steps, width, dx);
        }
      }
    });
    at::parallel_for(0, p.batch * steps, 16, [&](int64_t begin, int64_t end) {
      std::vector<T> sum(p.padded);
      for (int64_t row = begin; row < end; row++)
        for (int which = 0; which < 2; which++) {
          const int64_t b = row / steps, t = row % steps;
          const T *part = parts + (b * groups * 2 + which) * room + t * p.padded;
          std::copy(part, part + p.padded, sum.begin());
          for (int64_t group = 1; group < groups; group++)
            for (int64_t n = 0; n < p.padded; n++) sum[n] += part[group * 2 * room + n];
          const View &to = which ? g.dC : g.dB;
          WITH_TYPE(to.type, S, {
            S *there = (S *)to.data + b * to.batch + (t0 + t) * to.time;
            copy_rows(sum.data(), 0, 1, there, 0, to.channel, 1, p.N);
          })
        }
    });
  }
}

// ---------------------------------------------------------------------------------------------------- one token

// h <- exp(delta A) h + delta B u in place, y = C h + D u, for one time step. Lanes run over states, as h lies
// in memory
template <typename T>
void step(int64_t channels, int64_t N, T *h, const T *u, const T *delta, const T *A, const T *B, const T *C, const T *D,
          T *y) {
  constexpr int L = LANES<T>;
  for (int64_t c = 0; c < channels; c++, h += N, A += N) {
    const T d = delta[c] * T(1.4426950408889634), x = delta[c] * u[c];
    Vec<T> sum = {};
    int64_t n = 0;
    for (; n + L <= N; n += L) {
      const Vec<T> state = exp2<false>(load(A + n) * d) * load(h + n) + load(B + n) * x;
      store(h + n, state);
      sum += state * load(C + n);
    }
    T out = D ? D[c] * u[c] : T(0);
    for (int i = 0; i < L; i++) out += sum[i];
    for (; n < N; n++) {
      h[n] = std::exp2(d * A[n]) * h[n] + x * B[n];
      out += C[n] * h[n];
    }
    y[c] = out;
  }
}

// ---------------------------------------------------------------------------------------------------- bindings

std::tuple<Tensor, Tensor, Tensor> scan_forward(
    const Tensor &u, const Tensor &delta, const Tensor &A, const Tensor &B, const Tensor &C,
    const optional<Tensor> &D, const optional<Tensor> &h0, const optional<Tensor> &reset, bool save) {
  const auto type = u.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto options = A.options().dtype(type);
  Tensor y = at::empty(u.sizes(), u.options().memory_format(at::MemoryFormat::Contiguous));
  Tensor last = at::empty({u.size(0), A.size(0), A.size(1)}, options);
  Tensor checkpoints =
      at::empty({u.size(0), save ? (u.size(1) + CHUNK - 1) / CHUNK : 0, A.size(1), A.size(0)}, options);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const optional<Tensor> start = h0 ? optional<Tensor>(h0->to(type).contiguous()) : std::nullopt;
    forward<T>(Problem<T>(u, delta, A, B, C, D, reset), start ? start->data_ptr<T>() : nullptr, View(y),
               last.data_ptr<T>(), save ? checkpoints.data_ptr<T>() : nullptr);
  };
  type == at::kDouble ? run(0.0) : run(0.0f);
  return {y, last, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor &dy, const optional<Tensor> &dlast, const Tensor &u, const Tensor &delta, const Tensor &A,
    const Tensor &B, const Tensor &C, const optional<Tensor> &D, const optional<Tensor> &reset,
    const Tensor &checkpoints) {
  const auto type = u.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto contiguous = [](const Tensor &x) {
    return at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  };
  Tensor du = contiguous(u), ddelta = contiguous(delta), dB = contiguous(B), dC = contiguous(C), dA, dD, dh0;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p(u, delta, A, B, C, D, reset);
    const std::vector<int64_t> tiled = {p.batch, p.tiles, p.padded, TILE<T>};
    Tensor dh = at::zeros(tiled, p.A_tiles.options()), sum_A = at::zeros(tiled, p.A_tiles.options());
    Tensor sum_D = at::zeros({p.batch, p.tiles, TILE<T>}, p.A_tiles.options());
    auto plain = [&](const Tensor &x) {  // (..., tiles, padded N, TILE) -> (..., channels, N)
      return x.movedim(-1, -2).flatten(-3, -2).narrow(-2, 0, p.channels).narrow(-1, 0, p.N);
    };
    if (dlast) {
      Tensor wide = at::constant_pad_nd(dlast->to(type), {0, p.padded - p.N, 0, p.tiles * TILE<T> - p.channels});
      dh.copy_(wide.view({p.batch, p.tiles, TILE<T>, p.padded}).transpose(2, 3));
    }
    TORCH_CHECK(checkpoints.size(1) == p.chunks, "selective_scan: the forward pass kept no states");
    if (p.channels == 0) dB.zero_(), dC.zero_();
    if (p.tiles)
      backward<T>(p, checkpoints.data_ptr<T>(),
                  {View(dy), View(du), View(ddelta), View(dB), View(dC), dh.data_ptr<T>(), sum_A.data_ptr<T>(),
                   sum_D.data_ptr<T>()});
    dh0 = plain(dh).contiguous();
    dA = plain(sum_A.sum(0)).to(A.scalar_type()).contiguous();
    dD = sum_D.sum(0).flatten().narrow(0, 0, p.channels).contiguous();
  };
  type == at::kDouble ? run(0.0) : run(0.0f);
  return {du, ddelta, dA, dB, dC, dD, dh0};
}

// h (batch, channels, N) is changed in place. u, delta (batch, channels), A (channels, N), B, C (batch, N). All are
// contiguous and of one type
Tensor scan_step(Tensor h, const Tensor &u, const Tensor &delta, const Tensor &A, const Tensor &B, const Tensor &C,
                 const optional<Tensor> &D) {
  const int64_t channels = A.size(0), N = A.size(1), part = std::max<int64_t>(1, 16384 / N);
  Tensor y = at::empty_like(u);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const int64_t parts = (channels + part - 1) / part;
    at::parallel_for(0, u.size(0) * parts, 1, [&](int64_t begin, int64_t end) {
      const TinyIsZero mode;
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / parts, c = i % parts * part, row = b * channels + c;
        step<T>(std::min(part, channels - c), N, h.data_ptr<T>() + row * N, u.data_ptr<T>() + row,
                delta.data_ptr<T>() + row, A.data_ptr<T>() + c * N, B.data_ptr<T>() + b * N,
                C.data_ptr<T>() + b * N, D ? D->data_ptr<T>() + c : nullptr, y.data_ptr<T>() + row);
      }
    });
  };
  h.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
  return y;
}

// For the benchmark: every thread computes exp2 of 16 KB of fp32 in the L1 cache `rounds` times. Returns the number of
// exponentials
int64_t exp_only(int64_t rounds) {
  const int64_t threads = at::get_num_threads(), n = 4096;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> x(n, -1.0f);
    for (int64_t r = 0; r < rounds * (end - begin); r++) {
      for (int64_t i = 0; i < n; i += LANES<float>) store(&x[i], exp2<false>(load(&x[i]) * -0.9f));
      __asm__ volatile("" ::"r"(x.data()) : "memory");  // the compiler must not see that a round could be skipped
    }
  });
  return threads * rounds * n;
}

TORCH_LIBRARY(selective_scan_cpu, m) {
  m.def("forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? h0, Tensor? reset, "
        "bool save) -> (Tensor, Tensor, Tensor)", scan_forward);
  m.def("backward(Tensor dy, Tensor? dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
        "Tensor? reset, Tensor checkpoints) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        scan_backward);
  m.def("step(Tensor(a!) h, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D) -> Tensor", scan_step);
  m.def("exp_only(int rounds) -> int", exp_only);
}

#else  // WITH_CUDA: the kernels are in selective_scan.cu; here tensors become pointers

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

// The inputs as the kernels want them: contiguous, the activations of one type, states and parameters fp32
struct Inputs {
  Tensor u, delta, A, B, C, D, h0, reset;
  ScanArgs args{};

  Inputs(const Tensor &u_, const Tensor &delta_, const Tensor &A_, const Tensor &B_, const Tensor &C_,
         const optional<Tensor> &D_, const optional<Tensor> &h0_, const optional<Tensor> &reset_) {
    at::ScalarType type = u_.scalar_type();
    for (const Tensor &x : {delta_, B_, C_}) type = at::promoteTypes(type, x.scalar_type());
    TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                "selective_scan takes float32, bfloat16 or float16, not ", type);
    auto as = [](const Tensor &x, at::ScalarType t) { return x.to(t).contiguous(); };
    u = as(u_, type), delta = as(delta_, type), B = as(B_, type), C = as(C_, type), A = as(A_, at::kFloat);
    if (D_) D = as(*D_, at::kFloat);
    if (h0_) h0 = as(*h0_, at::kFloat);
    if (reset_) reset = reset_->contiguous();
    args.type = type == at::kFloat ? ScanType::f32 : type == at::kBFloat16 ? ScanType::bf16 : ScanType::f16;
    args.batch = u.size(0), args.T = u.size(1), args.channels = u.size(2), args.N = A.size(1);
    args.u = u.const_data_ptr(), args.delta = delta.const_data_ptr();
    args.B = B.const_data_ptr(), args.C = C.const_data_ptr();
    args.A = A.const_data_ptr<float>();
    args.D = D_ ? D.const_data_ptr<float>() : nullptr;
    args.h0 = h0_ ? h0.const_data_ptr<float>() : nullptr;
    args.reset = reset_ ? (const uint8_t *)reset.const_data_ptr() : nullptr;
    args.stream = c10::cuda::getCurrentCUDAStream(u.device().index()).stream();
  }
  Tensor fp32(at::IntArrayRef shape) const { return at::empty(shape, A.options()); }
};

static void succeed(const char *error) { TORCH_CHECK(!error, "selective_scan: ", error); }

std::tuple<Tensor, Tensor, Tensor> scan_forward(
    const Tensor &u, const Tensor &delta, const Tensor &A, const Tensor &B, const Tensor &C,
    const optional<Tensor> &D, const optional<Tensor> &h0, const optional<Tensor> &reset, bool save) {
  const c10::cuda::CUDAGuard guard(u.device());
  Inputs in(u, delta, A, B, C, D, h0, reset);
  ScanArgs &a = in.args;
  Tensor y = at::empty_like(in.u), last = in.fp32({a.batch, a.channels, a.N});
  Tensor checkpoints = in.fp32({a.batch, save ? (a.T + CHUNK - 1) / CHUNK : 0, a.N, a.channels});
  a.y = y.data_ptr(), a.last = last.data_ptr<float>(), a.checkpoints = save ? checkpoints.data_ptr<float>() : nullptr;
  succeed(scan_forward_cuda(a));
  return {y.to(u.scalar_type()), last, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor &dy_, const optional<Tensor> &dlast_, const Tensor &u, const Tensor &delta, const Tensor &A,
    const Tensor &B, const Tensor &C, const optional<Tensor> &D, const optional<Tensor> &reset,
    const Tensor &checkpoints) {
  const c10::cuda::CUDAGuard guard(u.device());
  Inputs in(u, delta, A, B, C, D, std::nullopt, reset);
  ScanArgs &a = in.args;
  const Tensor dy = dy_.to(in.u.scalar_type()).contiguous();
  const optional<Tensor> dlast = dlast_ ? optional<Tensor>(dlast_->to(at::kFloat).contiguous()) : std::nullopt;
  Tensor du = at::empty_like(in.u), ddelta = at::empty_like(in.u);
  Tensor dA = in.fp32({a.channels, a.N}), dB = in.fp32(B.sizes()), dC = in.fp32(C.sizes());
  Tensor dD = in.fp32({a.channels}), dh0 = in.fp32({a.batch, a.channels, a.N});
  Tensor workspace = at::empty({scan_backward_workspace(a.batch, a.T, a.channels, a.N)}, A.options().dtype(at::kByte));
  a.dy = dy.const_data_ptr(), a.dlast = dlast ? dlast->const_data_ptr<float>() : nullptr;
  TORCH_CHECK(checkpoints.size(1) == (a.T + CHUNK - 1) / CHUNK, "selective_scan: the forward pass kept no states");
  a.checkpoints = (float *)checkpoints.const_data_ptr<float>();
  a.du = du.data_ptr(), a.ddelta = ddelta.data_ptr();
  a.dA = dA.data_ptr<float>(), a.dB = dB.data_ptr<float>(), a.dC = dC.data_ptr<float>();
  a.dD = dD.data_ptr<float>(), a.dh0 = dh0.data_ptr<float>(), a.workspace = workspace.data_ptr();
  succeed(scan_backward_cuda(a));
  return {du.to(u.scalar_type()), ddelta.to(delta.scalar_type()), dA, dB.to(B.scalar_type()), dC.to(C.scalar_type()),
          dD, dh0};
}

TORCH_LIBRARY(selective_scan_cuda, m) {
  m.def("forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? h0, Tensor? reset, "
        "bool save) -> (Tensor, Tensor, Tensor)", scan_forward);
  m.def("backward(Tensor dy, Tensor? dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
        "Tensor? reset, Tensor checkpoints) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        scan_backward);
}

#endif
