// What stands between the layers' matrix products in a Llama-like model's training step, on a CPU: each function reads
// and writes every number once, where PyTorch's separate operations go through memory several times. For attention see
// attention.h.
//
// E is the type of activations, fp32 or bf16; the residual stream, the vectors' weights and the arithmetic are fp32.
// Rows are tokens, N = B T of them. Results are the same to the bit for any number of threads: a sum over tokens is
// made of partial sums over 64 of them, each in a row of its own. No header of torch; training.py calls by address.
#include <algorithm>
#include <cstdlib>
#include "attention.h"
#include "vectors.h"
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace {

constexpr int64_t GROUP = 64;  // tokens of a partial sum
constexpr int64_t MAX_D = 512;  // widest attention head

// 1 / rms(x)
template <class E>
inline float rms_scale(const E *x, float eps, int64_t n) {
    floats sum = {};
    for (int64_t i = 0; i < n; i += WIDTH) {
        const floats v = load(x + i, n - i);
        sum += v * v;
    }
    return 1 / std::sqrt(sum_of(sum) / n + eps);
}

// The gradient of y = w x / rms(x) for one row: dx, and dw to add to. Returns 1 / rms(x)
template <class X, class E>
inline float rms_backward(const X *x, const float *w, const E *dy, float eps, int64_t n, float *dx, float *dw) {
    const float scale = rms_scale(x, eps, n);
    floats dot = {};
    for (int64_t i = 0; i < n; i += WIDTH) {
        const floats normed = load(x + i, n - i) * scale, d = load(dy + i, n - i);
        dot += normed * (d * load(w + i, n - i));
        store(dw + i, load(dw + i, n - i) + d * normed, n - i);
    }
    const float mean = sum_of(dot) / n;
    for (int64_t i = 0; i < n; i += WIDTH) {
        const floats normed = load(x + i, n - i) * scale;
        store(dx + i, (load(dy + i, n - i) * load(w + i, n - i) - normed * mean) * scale, n - i);
    }
    return scale;
}

// sum = x + add (x alone if there is no add), out = w sum / rms(sum)
template <class E>
void norm(const float *x, const E *add, const float *w, float eps, int64_t N, int64_t d, float *sum, E *out,
          int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * d;
        if (add) {
            for (int64_t i = 0; i < d; i += WIDTH)
                store(sum + n * d + i, load(row + i, d - i) + load(add + n * d + i, d - i), d - i);
            row = sum + n * d;
        }
        const float scale = rms_scale(row, eps, d);
        for (int64_t i = 0; i < d; i += WIDTH)
            store(out + n * d + i, load(row + i, d - i) * scale * load(w + i, d - i), d - i);
    }
}

// dx = g + the norm's gradient from dy (g may be null), also rounded to E in `rounded`; out: the norm's output once
// more; dw (groups of tokens, d)
template <class E>
void norm_backward(const float *x, const float *w, const E *dy, const float *g, float eps, int64_t N, int64_t d,
                   float *dx, E *rounded, E *out, float *dw, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < N; first += GROUP) {
        float *sums = dw + first / GROUP * d;
        std::fill(sums, sums + d, 0.0f);
        for (int64_t n = first; n < std::min(N, first + GROUP); n++) {
            const float *row = x + n * d, scale = rms_backward(row, w, dy + n * d, eps, d, dx + n * d, sums);
            for (int64_t i = 0; i < d; i += WIDTH) {
                floats total = load(dx + n * d + i, d - i);
                if (g) total += load(g + n * d + i, d - i);
                store(dx + n * d + i, total, d - i);
                store(rounded + n * d + i, total, d - i);
                store(out + n * d + i, load(row + i, d - i) * scale * load(w + i, d - i), d - i);
            }
        }
    }
}

// (N, (H + 2K) D) -> queries (B, H, T, D), keys and values (B, K, T, D): queries and keys are normed, if there are
// weights, and rotated, as apply_rope() of the architecture files does it
template <class E>
void heads(const E *qkv, const float *q_norm, const float *k_norm, float eps, const float *cos, const float *sin,
           Shape s, E *q, E *k, E *v, int threads) {
    const int64_t all = s.H + 2 * s.K, D = s.D, half = D / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < s.B * s.T; n++) {
        const int64_t b = n / s.T, t = n % s.T;
        for (int64_t h = 0; h < all; h++) {
            const E *from = qkv + (n * all + h) * D;
            if (h >= s.H + s.K) {
                std::copy(from, from + D, v + ((b * s.K + h - s.H - s.K) * s.T + t) * D);
                continue;
            }
            const bool is_query = h < s.H;
            const float *weight = is_query ? q_norm : k_norm, scale = weight ? rms_scale(from, eps, D) : 1;
            E *to = is_query ? q + ((b * s.H + h) * s.T + t) * D : k + ((b * s.K + h - s.H) * s.T + t) * D;
            for (int64_t i = 0; i < half; i += WIDTH) {
                const int64_t left = half - i;
                const floats c = load(cos + t * half + i, left), z = load(sin + t * half + i, left);
                floats a = load(from + i, left), u = load(from + half + i, left);
                if (weight) {
                    a *= scale * load(weight + i, left);
                    u *= scale * load(weight + half + i, left);
                }
                store(to + i, a * c - u * z, left);
                store(to + half + i, u * c + a * z, left);
            }
        }
    }
}

// The gradient of heads(), with dk and dv of each query head alone, (B, H, T, D); dw (groups of tokens, 2, D) are those
// of q_norm and k_norm
template <class E>
void heads_backward(const E *qkv, const float *q_norm, const float *k_norm, float eps, const float *cos,
                    const float *sin, Shape s, const E *dq, const float *dk, const float *dv, E *dqkv, float *dw,
                    int threads) {
    const int64_t all = s.H + 2 * s.K, D = s.D, half = D / 2, N = s.B * s.T, sharing = s.H / s.K;
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < N; first += GROUP) {
        float *sums = dw + first / GROUP * 2 * D, up[MAX_D], dx[MAX_D];
        std::fill(sums, sums + 2 * D, 0.0f);
        for (int64_t n = first; n < std::min(N, first + GROUP); n++) {
            const int64_t b = n / s.T, t = n % s.T;
            for (int64_t h = 0; h < all; h++) {
                const E *raw = qkv + (n * all + h) * D;
                E *to = dqkv + (n * all + h) * D;
                const bool is_query = h < s.H, is_value = h >= s.H + s.K;
                const int64_t head = is_query ? h : (h - s.H) % s.K * sharing;  // or the first of those that share it
                const int64_t place = ((b * s.H + head) * s.T + t) * D;
                const auto gradient = [&](int64_t i, int64_t left) {
                    if (is_query) return load(dq + place + i, left);
                    floats sum = {};
                    for (int64_t j = 0; j < sharing; j++)
                        sum += load((is_value ? dv : dk) + place + j * s.T * D + i, left);
                    return sum;
                };
                if (is_value) {
                    for (int64_t i = 0; i < D; i += WIDTH) store(to + i, gradient(i, D - i), D - i);
                    continue;
                }
                for (int64_t i = 0; i < half; i += WIDTH) {
                    const int64_t left = half - i;
                    const floats c = load(cos + t * half + i, left), z = load(sin + t * half + i, left);
                    const floats a = gradient(i, left), u = gradient(half + i, left);
                    store(up + i, a * c + u * z, left);
                    store(up + half + i, u * c - a * z, left);
                }
                const float *weight = is_query ? q_norm : k_norm;
                if (weight) rms_backward(raw, weight, up, eps, D, dx, sums + (is_query ? 0 : D));
                for (int64_t i = 0; i < D; i += WIDTH) store(to + i, load((weight ? dx : up) + i, D - i), D - i);
            }
        }
    }
}

// 1 / (1 + e^-x), and with AVX-512 by an approximation of 14 bits and one step of Newton's method
inline floats sigmoid(floats x) {
    const floats e = exp_of(x > 0.0f ? -x : x), y = 1.0f + e;
#ifdef __AVX512F__
    floats inverse = (floats)_mm512_rcp14_ps((__m512)y);
    inverse = inverse * (2.0f - y * inverse);
#else
    const floats inverse = 1.0f / y;
#endif
    return x > 0.0f ? inverse : e * inverse;
}

// (N, 2F), gate before up -> silu(gate) up (N, F)
template <class E>
void swiglu(const E *gate_up, int64_t N, int64_t F, E *out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < F; i += WIDTH) {
            const floats gate = load(gate_up + 2 * n * F + i, F - i), up = load(gate_up + (2 * n + 1) * F + i, F - i);
            store(out + n * F + i, gate * sigmoid(gate) * up, F - i);
        }
}

// The gradient of swiglu(), and its output once more
template <class E>
void swiglu_backward(const E *gate_up, const E *dout, int64_t N, int64_t F, E *dgate_up, E *out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < F; i += WIDTH) {
            const floats gate = load(gate_up + 2 * n * F + i, F - i), up = load(gate_up + (2 * n + 1) * F + i, F - i);
            const floats d = load(dout + n * F + i, F - i), part = sigmoid(gate), silu = gate * part;
            store(out + n * F + i, silu * up, F - i);
            store(dgate_up + 2 * n * F + i, d * up * part * (1.0f + gate - silu), F - i);
            store(dgate_up + (2 * n + 1) * F + i, d * silu, F - i);
        }
}

// Loss of each row of logits (N, V), and the logarithm of its sum of exponentials; a target of -1 costs nothing
template <class E>
void cross_entropy(const E *logits, const int64_t *targets, int64_t N, int64_t V, float *loss, float *total,
                   int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) {
        const E *row = logits + n * V;
        const int64_t whole = V / WIDTH * WIDTH;
        floats most = floats{} + value(row[0]), all = {};
        for (int64_t i = 0; i < whole; i += WIDTH) {
            const floats x = load(row + i);
            most = x > most ? x : most;
        }
        float highest = most[0], rest = 0;
        for (int j = 1; j < WIDTH; j++) highest = std::max(highest, most[j]);
        for (int64_t i = whole; i < V; i++) highest = std::max(highest, value(row[i]));
        for (int64_t i = 0; i < whole; i += WIDTH) all += exp_of(load(row + i) - highest);
        for (int64_t i = whole; i < V; i++) rest += std::exp(value(row[i]) - highest);
        total[n] = highest + std::log(sum_of(all) + rest);
        loss[n] = targets[n] < 0 ? 0 : total[n] - value(row[targets[n]]);
    }
}

// dlogits = (softmax(logits) - 1 at the target) g, with g (N); may be in place
template <class E>
void cross_entropy_backward(const E *logits, const int64_t *targets, const float *total, const float *g, int64_t N,
                            int64_t V, E *dlogits, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) {
        const E *row = logits + n * V;
        E *out = dlogits + n * V;
        if (targets[n] < 0) {
            std::fill(out, out + V, E{});
            continue;
        }
        const float at_target = (std::exp(value(row[targets[n]]) - total[n]) - 1) * g[n];
        for (int64_t i = 0; i < V; i += WIDTH) store(out + i, exp_of(load(row + i, V - i) - total[n]) * g[n], V - i);
        store(out + targets[n], floats{} + at_target, 1);
    }
}

// into[idx[n]] += rows[n]: the threads share the columns, so that the order of the sums is the same for all
void scatter_add(const float *rows, const int64_t *idx, int64_t N, int64_t d, float *into, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < d; first += 4 * WIDTH)
        for (int64_t n = 0; n < N; n++)
            for (int64_t i = first; i < std::min(d, first + 4 * WIDTH); i++) into[idx[n] * d + i] += rows[n * d + i];
}

}  // namespace

// Each function for fp32 and for bf16, in the order of FUNCTIONS in training.py
#define ALL(E) {(void *)norm<E>, (void *)norm_backward<E>, (void *)heads<E>, (void *)heads_backward<E>, \
    (void *)attention<E>, (void *)attention_backward<E>, (void *)swiglu<E>, (void *)swiglu_backward<E>, \
    (void *)cross_entropy<E>, (void *)cross_entropy_backward<E>, (void *)scatter_add}
extern "C" {
// From now on the process keeps memory that was freed: a step asks for the same again, and new memory from the system
// costs as much as the arithmetic in it
void keep_memory() {
#ifdef __GLIBC__
    if (std::getenv("GLIBC_TUNABLES")) return;  // somebody knows better
    if (!std::getenv("MALLOC_MMAP_THRESHOLD_")) mallopt(M_MMAP_THRESHOLD, 32 << 20);
    if (!std::getenv("MALLOC_TRIM_THRESHOLD_")) mallopt(M_TRIM_THRESHOLD, 2000 << 20);
#endif
}

extern void *const for_float32[] = ALL(float);
extern void *const for_bfloat16[] = ALL(bf16);
}
