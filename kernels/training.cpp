// What stands between the matrix products of a Llama-like model's training step, on a CPU: each function reads and
// writes every number once, where PyTorch's separate operations go through memory several times.
//
// E is the type of activations, fp32 or bf16; the residual stream, the vectors' weights and all arithmetic are fp32.
// Rows are tokens, N = B T of them. Results are the same to the bit for any number of threads: a sum over tokens is
// made of partial sums over 64 of them, each in a row of its own. No header of torch; training.py calls by address.
#include <algorithm>
#include <cstdlib>
#include <vector>
#include "vectors.h"
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace {

constexpr int64_t GROUP = 64;  // tokens of a partial sum
constexpr int64_t MAX_D = 512;  // widest attention head

struct Shape {
    int64_t B, T, H, K, D;  // sequences, positions, query heads, key and value heads, head width
    int64_t block;  // queries whose scores are computed at once; the last block may have fewer

    // Queries lie block after block, in each (B, H, positions of the block, D), so that a block is one matrix for each
    // key head: the place of a query's first number
    int64_t place(int64_t b, int64_t h, int64_t t) const {
        const int64_t first = t / block * block, size = std::min(block, T - first);
        return (B * H * first + (b * H + h) * size + t - first) * D;
    }
};

inline float mean_square_scale(const float *x, float eps, int64_t n) {
    floats sum = {};
    for (int64_t i = 0; i < n; i += WIDTH) {
        const floats v = load(x + i, n - i);
        sum += v * v;
    }
    return 1 / std::sqrt(sum_of(sum) / n + eps);
}

// The gradient of y = w x / rms(x) for one row: dx, and dw to add to. Returns 1 / rms(x)
template <class E>
inline float rms_backward(const float *x, const float *w, const E *dy, float eps, int64_t n, float *dx, float *dw) {
    const float scale = mean_square_scale(x, eps, n);
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
        const float scale = mean_square_scale(row, eps, d);
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
                if (rounded) store(rounded + n * d + i, total, d - i);
                store(out + n * d + i, load(row + i, d - i) * scale * load(w + i, d - i), d - i);
            }
        }
    }
}

// (N, (H + 2K) D) -> queries in blocks, keys and values (B, K, T, D): queries and keys are normed, if there are
// weights, and rotated, as apply_rope() of the architecture files does it
template <class E>
void heads(const E *qkv, const float *q_norm, const float *k_norm, float eps, const float *cos, const float *sin,
           Shape s, E *q, E *k, E *v, int threads) {
    const int64_t all = s.H + 2 * s.K, D = s.D, half = D / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < s.B * s.T; n++) {
        const int64_t b = n / s.T, t = n % s.T;
        float x[MAX_D];
        for (int64_t h = 0; h < all; h++) {
            const E *from = qkv + (n * all + h) * D;
            if (h >= s.H + s.K) {
                std::copy(from, from + D, v + ((b * s.K + h - s.H - s.K) * s.T + t) * D);
                continue;
            }
            const bool is_query = h < s.H;
            const float *weight = is_query ? q_norm : k_norm;
            E *to = is_query ? q + s.place(b, h, t) : k + ((b * s.K + h - s.H) * s.T + t) * D;
            for (int64_t i = 0; i < D; i += WIDTH) store(x + i, load(from + i, D - i), D - i);
            if (weight) {
                const float scale = mean_square_scale(x, eps, D);
                for (int64_t i = 0; i < D; i += WIDTH)
                    store(x + i, load(x + i, D - i) * scale * load(weight + i, D - i), D - i);
            }
            for (int64_t i = 0; i < half; i += WIDTH) {
                const int64_t left = half - i;
                const floats c = load(cos + t * half + i, left), z = load(sin + t * half + i, left);
                const floats a = load(x + i, left), u = load(x + half + i, left);
                store(to + i, a * c - u * z, left);
                store(to + half + i, u * c + a * z, left);
            }
        }
    }
}

// The gradient of heads(); dw (groups of tokens, 2, D) are those of q_norm and k_norm
template <class E>
void heads_backward(const E *qkv, const float *q_norm, const float *k_norm, float eps, const float *cos,
                    const float *sin, Shape s, const E *dq, const E *dk, const E *dv, E *dqkv, float *dw, int threads) {
    const int64_t all = s.H + 2 * s.K, D = s.D, half = D / 2, N = s.B * s.T;
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < N; first += GROUP) {
        float *sums = dw + first / GROUP * 2 * D, x[MAX_D], up[MAX_D], dx[MAX_D];
        std::fill(sums, sums + 2 * D, 0.0f);
        for (int64_t n = first; n < std::min(N, first + GROUP); n++) {
            const int64_t b = n / s.T, t = n % s.T;
            for (int64_t h = 0; h < all; h++) {
                E *to = dqkv + (n * all + h) * D;
                if (h >= s.H + s.K) {
                    const E *from = dv + ((b * s.K + h - s.H - s.K) * s.T + t) * D;
                    std::copy(from, from + D, to);
                    continue;
                }
                const bool is_query = h < s.H;
                const float *weight = is_query ? q_norm : k_norm;
                const E *from = is_query ? dq + s.place(b, h, t) : dk + ((b * s.K + h - s.H) * s.T + t) * D;
                for (int64_t i = 0; i < half; i += WIDTH) {
                    const int64_t left = half - i;
                    const floats c = load(cos + t * half + i, left), z = load(sin + t * half + i, left);
                    const floats a = load(from + i, left), u = load(from + half + i, left);
                    store(up + i, a * c + u * z, left);
                    store(up + half + i, u * c - a * z, left);
                }
                const float *result = up;
                if (weight) {
                    const E *raw = qkv + (n * all + h) * D;
                    for (int64_t i = 0; i < D; i += WIDTH) store(x + i, load(raw + i, D - i), D - i);
                    rms_backward(x, weight, up, eps, D, dx, sums + (is_query ? 0 : D));
                    result = dx;
                }
                for (int64_t i = 0; i < D; i += WIDTH) store(to + i, load(result + i, D - i), D - i);
            }
        }
    }
}

// Queries in blocks <-> (N, H D)
template <class E>
void merge(const E *blocks, Shape s, E *rows, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < s.B * s.T; n++)
        for (int64_t h = 0; h < s.H; h++) {
            const E *from = blocks + s.place(n / s.T, h, n % s.T);
            std::copy(from, from + s.D, rows + (n * s.H + h) * s.D);
        }
}
template <class E>
void split(const E *rows, Shape s, E *blocks, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < s.B * s.T; n++)
        for (int64_t h = 0; h < s.H; h++) {
            const E *from = rows + (n * s.H + h) * s.D;
            std::copy(from, from + s.D, blocks + s.place(n / s.T, h, n % s.T));
        }
}

inline ints places(int64_t from) {
    ints i;
    for (int j = 0; j < WIDTH; j++) i[j] = std::int32_t(from) + j;
    return i;
}

// Scores (B, H, size, S) of the queries at positions t0, t0 + 1, ... become probabilities, in place. A query sees the
// keys from `first` (B, T), or from 0 if that is null, to its own position
template <class E>
void softmax(E *scores, const std::int32_t *first, Shape s, int64_t t0, int64_t size, int threads) {
    const int64_t S = t0 + size;
    const float scale = 1 / std::sqrt(float(s.D));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> weights(S + WIDTH);  // of one row, before they are divided by their sum
#pragma omp for
        for (int64_t row = 0; row < s.B * s.H * size; row++) {
            const int64_t t = t0 + row % size, b = row / (s.H * size), begin = first ? first[b * s.T + t] : 0;
            const int64_t from = begin / WIDTH * WIDTH, end = t + 1;
            E *r = scores + row * S;
            floats most = floats{} - 1e30f, all = {};
            for (int64_t i = from; i < end; i += WIDTH) {
                floats x = load(r + i, S - i) * scale;
                if (i < begin || i + WIDTH > end) {  // what a query does not see is as good as infinitely small
                    const ints at = places(i);
                    x = (at >= std::int32_t(begin)) & (at < std::int32_t(end)) ? x : floats{} - 1e30f;
                }
                store(&weights[i], x);
                most = x > most ? x : most;
            }
            float highest = most[0];
            for (int j = 1; j < WIDTH; j++) highest = std::max(highest, most[j]);
            for (int64_t i = from; i < end; i += WIDTH) {
                const floats x = load(&weights[i]), e = x > -1e29f ? exp_of(x - highest) : floats{};
                store(&weights[i], e);
                all += e;
            }
            const float share = 1 / sum_of(all);
            for (int64_t i = from; i < end; i += WIDTH) store(r + i, load(&weights[i]) * share, S - i);
            std::fill(r, r + from, E{});
            std::fill(r + std::min(S, (end + WIDTH - 1) / WIDTH * WIDTH), r + S, E{});
        }
    }
}

// Gradient of softmax(), in place of the gradient of the probabilities p, of which unseen ones are 0
template <class E>
void softmax_backward(const E *p, E *dp, const std::int32_t *first, Shape s, int64_t t0, int64_t size, int threads) {
    const int64_t S = t0 + size;
    const float scale = 1 / std::sqrt(float(s.D));
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < s.B * s.H * size; row++) {
        const int64_t t = t0 + row % size, b = row / (s.H * size), begin = first ? first[b * s.T + t] : 0;
        const int64_t from = begin / WIDTH * WIDTH, end = std::min(S, (t + WIDTH) / WIDTH * WIDTH);
        const E *r = p + row * S;
        E *d = dp + row * S;
        floats dot = {};
        for (int64_t i = from; i < end; i += WIDTH) dot += load(r + i, S - i) * load(d + i, S - i);
        const float mean = sum_of(dot);
        for (int64_t i = from; i < end; i += WIDTH)
            store(d + i, load(r + i, S - i) * (load(d + i, S - i) - mean) * scale, S - i);
        std::fill(d, d + from, E{});
        std::fill(d + end, d + S, E{});
    }
}

inline floats sigmoid(floats x) {
    const floats e = exp_of(x > 0.0f ? -x : x);
    return (x > 0.0f ? floats{} + 1.0f : e) / (1.0f + e);
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
    (void *)merge<E>, (void *)split<E>, (void *)softmax<E>, (void *)softmax_backward<E>, (void *)swiglu<E>, \
    (void *)swiglu_backward<E>, (void *)cross_entropy<E>, (void *)cross_entropy_backward<E>, (void *)scatter_add}
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
