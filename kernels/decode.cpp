// One token of each of B sequences through a Llama-like model, on a CPU.
//
// A step reads every weight once, and so little is computed with it that memory sets the pace. Weights are fp32 or
// bf16, everything else is fp32. The whole step is one parallel region: a thread goes from product to product without
// leaving it. No header of torch is needed, which makes the file quick to build; decode.py calls `step` by its address.
#include <vector>
#include "vectors.h"
#ifdef __AVX512F__
constexpr int TILE = 8;  // sequences that a row of weights is multiplied with at once: what the registers can hold
#else
constexpr int TILE = 4;
#endif

struct Layer {
    const float *attn_norm, *q_norm, *k_norm, *ffn_norm;  // (d), (D) or null, (D) or null, (d)
    const void *qkv, *out, *gate_up, *down;  // weights (rows, columns): (H D + 2 K D, d), (d, H D), (2 F, d), (d, F)
    float *k, *v;  // the cache (B, K, max_len, D)
};

struct Model {
    int64_t n_layer, d, H, K, D, F, V;  // sizes: H query heads of width D share K key and value heads
    int64_t is_bf16;  // the type of the weights
    float eps;
    const void *embed;  // (V, d), also the output head
    const float *norm, *cos, *sin;  // (d), (positions, D / 2)
    const Layer *layers;
};

namespace {

// Numbers that begin at a line of the cache: a vector that lies in two lines costs two accesses
struct Numbers {
    std::vector<float> space;
    float *first;
    explicit Numbers(int64_t n) : space(n + 16) {  // a line is 16 numbers
        first = reinterpret_cast<float *>((reinterpret_cast<std::uintptr_t>(space.data()) + 63) / 64 * 64);
    }
    float *data() { return first; }
    float &operator[](int64_t i) { return first[i]; }
};

// sums[i] = the sum of v[i], for n vectors
template <int n>
inline void sums_of(const floats *v, float *sums) {
#ifdef __AVX512F__
    if (n == 16) {  // together: halves are added in other registers, until each has one number of every vector
        __m512 t[8], u[4], w[2];
        for (int i = 0; i < 8; i++) {
            const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
            t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        for (int i = 0; i < 4; i++) {
            const __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
            u[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
        }
        const auto add_lanes = [](__m512 a, __m512 b) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        };
        for (int i = 0; i < 2; i++) w[i] = add_lanes(u[2 * i], u[2 * i + 1]);
        _mm512_storeu_ps(sums, add_lanes(w[0], w[1]));
        return;
    }
#endif
    for (int i = 0; i < n; i++) sums[i] = sum_of(v[i]);
}

// R rows of weights times C activations of length n: sums[r][c]. The rows are `skip` numbers apart
template <int R, int C, class W>
inline void products(const W *w, int64_t skip, const float *x, int64_t n, float (&sums)[R][C]) {
    floats s[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) s[r][c] = floats{};
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        floats weights[R];
        for (int r = 0; r < R; r++) {
            weights[r] = load(w + r * skip + i);
            if (R <= 2) __builtin_prefetch(w + r * skip + i + 2 * n);  // of a row that comes soon
        }
        for (int c = 0; c < C; c++) {
            const floats activations = load(x + c * n + i);
            for (int r = 0; r < R; r++) s[r][c] += weights[r] * activations;
        }
    }
    sums_of<R * C>(&s[0][0], &sums[0][0]);
    for (; i < n; i++)
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) sums[r][c] += value(w[r * skip + i]) * x[c * n + i];
}

// products() of activations b, b + 1, ... of B, C at a time while there are so many, and then fewer. use(b, sums)
template <int R, int C, class W, class Use>
inline void products_of_all(const W *w, int64_t skip, const float *x, int64_t n, int64_t b, int64_t B, Use use) {
    for (; b + C <= B; b += C) {
        float s[R][C];
        products<R, C>(w, skip, x + b * n, n, s);
        for (int c = 0; c < C; c++) {
            float of_one[R];
            for (int r = 0; r < R; r++) of_one[r] = s[r][c];
            use(b + c, of_one);
        }
    }
    if constexpr (C > 1)
        if (b < B) products_of_all<R, C / 2>(w, skip, x, n, b, B, use);
}

// Multiplies R rows of w, `skip` numbers apart, with each of the B activations, and calls use(row, b, sums). It does so
// for all rows of w (rows, n), which the threads share
template <int R, class W, class Use>
inline void linear(const W *w, int64_t rows, int64_t skip, int64_t n, const float *x, int64_t B, Use use) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        products_of_all<R, TILE>(w + row * n, skip, x, n, 0, B,
                                 [&](int64_t b, const float *sums) { use(row, b, sums); });
}

// y = w x, of which use(row, b, y) takes each number: row and row + half together, two streams of memory at once
template <class W, class Use>
inline void linear(const W *w, int64_t rows, int64_t n, const float *x, int64_t B, Use use) {
    const int64_t half = rows / 2;
    linear<2>(w, half, half * n, n, x, B, [&](int64_t row, int64_t b, const float *y) {
        use(row, b, y[0]);
        use(row + half, b, y[1]);
    });
    if (rows % 2)
        linear<1>(w + (rows - 1) * n, 1, 0, n, x, B,
                  [&](int64_t, int64_t b, const float *y) { use(rows - 1, b, *y); });
}

inline void rms_norm(const float *x, const float *weight, float eps, int64_t n, float *out) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    const float scale = 1 / std::sqrt(sum / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

// Rotates the pairs (x_i, x_{i + D/2}), as apply_rope() of the architecture files
inline void rope(float *x, const float *cos, const float *sin, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        const float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + D / 2] = b * cos[i] + a * sin[i];
    }
}

// The sum of rows (S, D), each times its weight, divided by `all`: n vectors of it, which stay in registers
template <int n>
inline void weighted_sum(const float *rows, const float *weights, float all, int64_t S, int64_t D, float *y) {
    floats total[n] = {};
    for (int64_t s = 0; s < S; s++)
        for (int j = 0; j < n; j++) total[j] += load(rows + s * D + j * WIDTH) * weights[s];
    for (int j = 0; j < n; j++) store(y + j * WIDTH, total[j] / all);
}

// softmax(q k^T / sqrt(D)) v over S positions of one head
inline void attend(const float *q, const float *k, const float *v, int64_t S, int64_t D, float *scores, float *y) {
    int64_t s = 0;
    for (; s + 16 <= S; s += 16) products<16, 1>(k + s * D, D, q, D, *(float (*)[16][1])(scores + s));
    for (; s < S; s++) products<1, 1>(k + s * D, 0, q, D, *(float (*)[1][1])(scores + s));
    for (; s % WIDTH; s++) scores[s] = -INFINITY;  // there is room for whole vectors

    const float scale = 1 / std::sqrt(float(D));
    floats highest = load(scores), all = {};
    for (s = WIDTH; s < S; s += WIDTH) {
        const floats some = load(scores + s);
        highest = some > highest ? some : highest;
    }
    float most = highest[0];
    for (int j = 1; j < WIDTH; j++) most = highest[j] > most ? highest[j] : most;
    for (s = 0; s < S; s += WIDTH) {
        const floats e = exp_of((load(scores + s) - most) * scale);
        store(scores + s, e);
        all += e;
    }

    const float sum = sum_of(all);
    int64_t i = 0;
    for (; i + 4 * WIDTH <= D; i += 4 * WIDTH) weighted_sum<4>(v + i, scores, sum, S, D, y + i);
    for (; i + WIDTH <= D; i += WIDTH) weighted_sum<1>(v + i, scores, sum, S, D, y + i);
    for (; i < D; i++) {
        float total = 0;
        for (s = 0; s < S; s++) total += v[s * D + i] * scores[s];
        y[i] = total / sum;
    }
}

template <class W>
void run(const Model &m, const int64_t *tokens, int64_t B, int64_t position, int64_t max_len, int threads,
         float *logits) {
    const int64_t d = m.d, D = m.D, F = m.F, heads = m.H + 2 * m.K, S = position + 1;
    const W *embed = static_cast<const W *>(m.embed);
    const float *cos = m.cos + position * (D / 2), *sin = m.sin + position * (D / 2);
    Numbers x(B * d), qkv(B * heads * D), y(B * m.H * D), hidden(B * F);
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0; i < d; i++) x[b * d + i] = value(embed[tokens[b] * d + i]);

#pragma omp parallel num_threads(threads)
    {
        Numbers normed(B * d), scores(S + WIDTH);
        const auto norm_all = [&](const float *weight) {  // every thread for itself: that is quicker than waiting
            for (int64_t b = 0; b < B; b++) rms_norm(&x[b * d], weight, m.eps, d, &normed[b * d]);
        };
        for (int64_t l = 0; l < m.n_layer; l++) {
            const Layer &layer = m.layers[l];
            norm_all(layer.attn_norm);
            linear(static_cast<const W *>(layer.qkv), heads * D, d, normed.data(), B,
                   [&](int64_t row, int64_t b, float sum) { qkv[b * heads * D + row] = sum; });

            // queries and keys are normed and rotated; keys and values go into the cache
#pragma omp for schedule(static)
            for (int64_t i = 0; i < B * heads; i++) {
                const int64_t b = i / heads, h = i % heads;
                float *head = &qkv[i * D];
                if (h < m.H + m.K) {
                    const float *weight = h < m.H ? layer.q_norm : layer.k_norm;
                    if (weight) rms_norm(head, weight, m.eps, D, head);
                    rope(head, cos, sin, D);
                }
                if (h >= m.H) {
                    float *cache = h < m.H + m.K ? layer.k : layer.v;
                    const int64_t row = (b * m.K + (h - m.H) % m.K) * max_len + position;
                    std::memcpy(cache + row * D, head, D * sizeof(float));
                }
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < B * m.H; i++) {
                const int64_t b = i / m.H, h = i % m.H, head = (b * m.K + h / (m.H / m.K)) * max_len * D;
                attend(&qkv[(b * heads + h) * D], layer.k + head, layer.v + head, S, D, scores.data(), &y[i * D]);
            }
            linear(static_cast<const W *>(layer.out), d, m.H * D, y.data(), B,
                   [&](int64_t row, int64_t b, float sum) { x[b * d + row] += sum; });

            norm_all(layer.ffn_norm);
            linear<2>(static_cast<const W *>(layer.gate_up), F, F * d, d, normed.data(), B,
                      [&](int64_t row, int64_t b, const float *y) {
                          hidden[b * F + row] = y[0] / (1 + std::exp(-y[0])) * y[1];
                      });
            linear(static_cast<const W *>(layer.down), d, F, hidden.data(), B,
                   [&](int64_t row, int64_t b, float sum) { x[b * d + row] += sum; });
        }
        norm_all(m.norm);
        linear(embed, m.V, d, normed.data(), B,
                  [&](int64_t row, int64_t b, float sum) { logits[b * m.V + row] = sum; });
    }
}

}  // namespace

// tokens (B) at `position` -> logits (B, V); their keys and values go into the cache
extern "C" void step(const Model *m, const int64_t *tokens, int64_t B, int64_t position, int64_t max_len, int threads,
                     float *logits) {
    if (m->is_bf16) run<bf16>(*m, tokens, B, position, max_len, threads, logits);
    else run<float>(*m, tokens, B, position, max_len, threads, logits);
}
