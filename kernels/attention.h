// Causal attention of the quick training step, on a CPU, and its gradients (FlashAttention: arXiv 2205.14135).
//
// Scores exist for 32 queries at a time and are computed anew for the gradients, so that they stay in a core's cache,
// and only for the keys that one of the 32 sees. They lie transposed, a row for each key: a vector of them belongs to 16
// queries, whose softmax needs no sum over its numbers.
//
// A product takes A row by row, and B in panels of 16 columns, whose rows are 64 bytes: 16 numbers of fp32, or 16 pairs
// of bf16, each pair two consecutive numbers of a column. VDPBF16PS adds the products of such a row and two numbers of A
// to 16 sums in fp32. On CPUs without it, numbers in bf16 are multiplied in fp32.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include "vectors.h"

namespace {

struct Shape {
    int64_t B, T, H, K, D;  // sequences, positions, query heads, key and value heads, head width (even)
};

#ifdef __AVX512BF16__
template <class E> using Operand = E;
#else
template <class E> using Operand = float;
#endif
template <class C> constexpr int64_t UNIT = 4 / sizeof(C);  // consecutive numbers that lie together
template <class C> constexpr bool IN_TILES = false;
#ifdef __AMX_BF16__
template <> inline constexpr bool IN_TILES<bf16> = true;
#endif

constexpr int64_t QUERIES = 32;  // whose scores exist at once
constexpr int64_t MANY = 2 * QUERIES;  // queries that are summed over at once in the gradients of keys and values
#ifdef __AVX512F__
constexpr int AT_ONCE = 8, PANELS = 2;  // rows and panels of a product at once, so that the sums stay in registers
#else
constexpr int AT_ONCE = 4, PANELS = 1;
#endif
// Rows, columns and depth of a product are multiples of these
template <class C> constexpr int64_t ROWS = IN_TILES<C> ? 32 : AT_ONCE;
template <class C> constexpr int64_t COLUMNS = IN_TILES<C> ? 32 : 16;
template <class C> constexpr int64_t DEPTH = IN_TILES<C> ? 32 : UNIT<C>;

inline int64_t filled_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory of one thread, zeros at first, that begins at a line of the cache
template <class E>
struct Space {
    std::unique_ptr<E, decltype(&std::free)> numbers;

    explicit Space(int64_t n) : numbers((E *)std::aligned_alloc(64, filled_up(n * sizeof(E), 64)), std::free) {
        std::fill(numbers.get(), numbers.get() + n, E{});
    }
    operator E *() const { return numbers.get(); }
};

// ------------------------------------------------------------------------------------------------------- products

// sum + a b in each of 16 columns: a is one number of fp32, or two of bf16
inline floats multiply_add(floats sum, const float *a, floats b) { return sum + *a * b; }
#ifdef __AVX512BF16__
inline floats multiply_add(floats sum, const bf16 *a, floats b) {
    int both;
    std::memcpy(&both, a, 4);
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(both), (__m512bh)b);
}
#endif

// multiply() for R rows and P panels
template <int R, int P, class C>
inline void multiply_part(const C *a, int64_t stride, const C *b, int64_t panel, int64_t depth, float *c,
                          int64_t columns, bool add) {
    floats sums[R][P] = {};
    for (int64_t i = 0; i < depth; i += UNIT<C>) {
        floats row[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) std::memcpy(&row[p], b + p * panel + 16 * i, 64);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) sums[r][p] = multiply_add(sums[r][p], a + r * stride + i, row[p]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            float *to = c + r * columns + 16 * p;
            store(to, add ? load(to) + sums[r][p] : sums[r][p]);
        }
}

#ifdef __AMX_BF16__
// The same with AMX's tiles, which are 16 rows of 64 bytes: sums in 0 to 3, two of A in 4 and 5, two of B in 6 and 7
template <int R, int P>
inline void multiply_part(const bf16 *a, int64_t stride, const bf16 *b, int64_t panel, int64_t depth, float *c,
                          int64_t columns, bool add) {
    static_assert(R == 32 && P == 2);
    float *below = c + 16 * columns;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (add) {
        _tile_loadd(0, c, 4 * columns);
        _tile_loadd(1, c + 16, 4 * columns);
        _tile_loadd(2, below, 4 * columns);
        _tile_loadd(3, below + 16, 4 * columns);
    }
    for (int64_t i = 0; i < depth; i += 32) {
        _tile_loadd(4, a + i, 2 * stride);
        _tile_loadd(5, a + 16 * stride + i, 2 * stride);
        _tile_loadd(6, b + 16 * i, 64);
        _tile_loadd(7, b + panel + 16 * i, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * columns);
    _tile_stored(1, c + 16, 4 * columns);
    _tile_stored(2, below, 4 * columns);
    _tile_stored(3, below + 16, 4 * columns);
}
#endif

// c (rows, columns) = A B, or c + A B. Rows of A are `stride` numbers apart, panels of B `panel`
template <class C>
void multiply(const C *a, int64_t stride, int64_t rows, const C *b, int64_t panel, int64_t depth, float *c,
              int64_t columns, bool add = false) {
    constexpr int WIDE = IN_TILES<C> ? 2 : PANELS;
    int64_t j = 0;
    for (; j + 16 * WIDE <= columns; j += 16 * WIDE)
        for (int64_t i = 0; i < rows; i += ROWS<C>)
            multiply_part<ROWS<C>, WIDE>(a + i * stride, stride, b + j / 16 * panel, panel, depth, c + i * columns + j,
                                         columns, add);
    if constexpr (COLUMNS<C> < 16 * WIDE)
        for (int64_t i = 0; j < columns && i < rows; i += ROWS<C>)
            multiply_part<ROWS<C>, 1>(a + i * stride, stride, b + j / 16 * panel, panel, depth, c + i * columns + j,
                                      columns, add);
}

// ------------------------------------------------------------------------------------------------------- operands

// Two rows of B, 16 columns of them
inline void store_rows(float *to, floats first, floats second) {
    store(to, first);
    store(to + 16, second);
}
#ifdef __AVX512BF16__
inline void store_rows(bf16 *to, floats first, floats second) {
    alignas(64) static constexpr bf16 IN_TURN[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(IN_TURN), both));
}
#endif

// 16 rows of 16 numbers, of which those from `rows` and from `columns` on are missing and read as 0
template <class E>
inline void load_square(const E *from, int64_t stride, int64_t rows, int64_t columns, floats *square) {
    for (int64_t i = 0; i < 16; i++) square[i] = i < rows ? load(from + i * stride, columns) : floats{};
}

// (rows, n) -> A: the same rows, `width` apart
template <class E, class C>
void as_rows(const E *from, int64_t rows, int64_t n, C *to, int64_t width) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i += 16) store(to + r * width + i, load(from + r * n + i, n - i), n - i);
}

// (rows, n) -> A: n rows, `width` apart; width is at least `rows`, filled up to 16
template <class E, class C>
void as_columns(const E *from, int64_t rows, int64_t n, C *to, int64_t width) {
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t i = 0; i < n; i += 16) {
            floats square[16];
            load_square(from + r * n + i, n, rows - r, n - i, square);
            transpose(square);
            for (int64_t k = 0; k < std::min<int64_t>(16, n - i); k++) store(to + (i + k) * width + r, square[k]);
        }
}

// (rows, n), rows `stride` apart -> B of `depth` rows, those that are missing 0
template <class E, class C>
void pack(const E *from, int64_t stride, int64_t rows, int64_t n, C *to, int64_t depth) {
    for (int64_t r = 0; r < depth; r += 2)
        for (int64_t i = 0; i < n; i += 16)
            store_rows(to + i * depth + 16 * r, r < rows ? load(from + r * stride + i, n - i) : floats{},
                       r + 1 < rows ? load(from + (r + 1) * stride + i, n - i) : floats{});
}

// (rows, n), rows `stride` apart -> B of n of `depth` rows and QUERIES columns, those that are missing 0
template <class E, class C>
void pack_transposed(const E *from, int64_t stride, int64_t rows, int64_t n, C *to, int64_t depth) {
    for (int64_t r = 0; r < QUERIES; r += 16)
        for (int64_t i = 0; i < n; i += 16) {
            floats square[16];
            load_square(from + r * stride + i, stride, rows - r, n - i, square);
            transpose(square);
            for (int64_t k = 0; k < std::min<int64_t>(16, n - i); k += 2)
                store_rows(to + r * depth + 16 * (i + k), square[k], square[k + 1]);
        }
}

// (n, QUERIES) in fp32, times `scale` of each column -> (rows, n), rows `stride` apart
template <class E>
void write_transposed(const float *from, const floats *scale, int64_t rows, int64_t n, E *to, int64_t stride) {
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t i = 0; i < n; i += 16) {
            floats square[16];
            for (int64_t k = 0; k < 16; k++) square[k] = load(from + (i + k) * QUERIES + r) * scale[r / 16];
            transpose(square);
            for (int64_t k = 0; k < std::min<int64_t>(16, rows - r); k++)
                store(to + (r + k) * stride + i, square[k], n - i);
        }
}

// ------------------------------------------------------------------------------------------------------- attention

// Which keys QUERIES queries see, from position t0 on: a query those from its entry in `first` to its own position
struct Seen {
    ints from[2] = {}, to[2];
    int64_t begin = 0, all_begin = 0, t0;  // no query sees a key before `begin`; all see those from all_begin to t0

    Seen(const std::int32_t *first, int64_t t0, int64_t T) : t0(t0) {
        for (int64_t i = 0; i < QUERIES; i++) {
            to[i / 16][i % 16] = t0 + i;
            if (first) from[i / 16][i % 16] = all_begin = first[std::min(T - 1, t0 + i)];
        }
        if (first) begin = first[t0] / QUERIES * QUERIES;
    }
    // x where the queries of a half see the key, else `other`
    floats only(floats x, int64_t key, int64_t half, float other) const {
        if (key >= all_begin && key < t0) return x;
        const ints at = ints{} + std::int32_t(key);
        return (at >= from[half]) & (at <= to[half]) ? x : floats{} + other;
    }
};

// q (B, H, T, D), k and v (B, K, T, D) -> out (B, T, H D), softmax(q k^T / sqrt(D)) v, and the logarithms of the sums of
// exponentials, total (B, H, T). A query sees the keys from `first` (B, T), or from 0 if that is null, to its own
// position; `first` does not fall within a sequence
template <class E>
void attention(const E *q, const E *k, const E *v, const std::int32_t *first, Shape s, E *out, float *total,
               int threads) {
    using C = Operand<E>;
    const int64_t T = s.T, D = s.D, keys = filled_up(T, QUERIES), width = keys + 32;
    const int64_t deep = filled_up(D, DEPTH<C>), rows = filled_up(D, std::max<int64_t>(16, ROWS<C>));
    const float scale = 1 / std::sqrt(float(D));
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        Space<C> as_k(keys * deep), as_v(rows * width), queries(rows * QUERIES), weights(keys * QUERIES);
        Space<float> scores(keys * QUERIES), sums(rows * QUERIES);
        int64_t prepared = -1;  // key head, whose keys and values several query heads share
#pragma omp for
        for (int64_t head = 0; head < s.B * s.H; head++) {
            const int64_t b = head / s.H, h = head % s.H, shared = b * s.K + h / (s.H / s.K);
            if (shared != prepared) {
                as_rows(k + shared * T * D, T, D, (C *)as_k, deep);
                as_columns(v + shared * T * D, T, D, (C *)as_v, width);
                prepared = shared;
            }
            for (int64_t t0 = 0; t0 < T; t0 += QUERIES) {
                const int64_t n = std::min(QUERIES, T - t0), end = t0 + QUERIES;
                const Seen seen(first ? first + b * T : nullptr, t0, T);
                const int64_t begin = seen.begin, depth = end - begin;
                pack_transposed(q + (head * T + t0) * D, D, n, D, (C *)queries, deep);
                multiply<C>(as_k + begin * deep, deep, depth, queries, 16 * deep, deep, scores, QUERIES);

                floats most[2] = {floats{} - 1e30f, floats{} - 1e30f}, all[2] = {};
                for (int64_t key = begin; key < end; key++)
                    for (int64_t half = 0; half < 2; half++) {
                        float *at = scores + (key - begin) * QUERIES + 16 * half;
                        const floats x = seen.only(load(at) * scale, key, half, -1e30f);
                        store(at, x);
                        most[half] = x > most[half] ? x : most[half];
                    }
                for (int64_t key = begin; key < end; key += 2)
                    for (int64_t half = 0; half < 2; half++) {
                        floats e[2];
                        for (int64_t i = 0; i < 2; i++) {
                            const floats x = load(scores + (key - begin + i) * QUERIES + 16 * half);
                            e[i] = seen.only(exp_of(x - most[half]), key + i, half, 0);
                            all[half] += e[i];
                        }
                        store_rows(weights + 16 * (half * depth + key - begin), e[0], e[1]);
                    }
                multiply<C>(as_v + begin, width, filled_up(D, ROWS<C>), weights, 16 * depth, depth, sums, QUERIES);
                for (int64_t half = 0; half < 2; half++) {
                    for (int64_t i = 0; i < 16 && 16 * half + i < n; i++)
                        total[head * T + t0 + 16 * half + i] = most[half][i] + std::log(all[half][i]);
                    all[half] = 1.0f / all[half];
                }
                write_transposed(sums, all, n, D, out + ((b * T + t0) * s.H + h) * D, s.H * D);
            }
        }
    }
}

// Gradients of attention() from that of its result, dout: dq (B, H, T, D), and dk and dv of each query head alone, also
// (B, H, T, D)
template <class E>
void attention_backward(const E *q, const E *k, const E *v, const std::int32_t *first, const E *out, const float *total,
                        const E *dout, Shape s, E *dq, float *dk, float *dv, int threads) {
    using C = Operand<E>;
    const int64_t T = s.T, D = s.D, keys = filled_up(T, QUERIES), width = keys + 32;
    const int64_t deep = filled_up(D, DEPTH<C>), rows = filled_up(D, std::max<int64_t>(16, ROWS<C>));
    const float scale = 1 / std::sqrt(float(D));
    const floats once[2] = {floats{} + 1.0f, floats{} + 1.0f};
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        Space<C> k_rows(keys * deep), v_rows(keys * deep), k_columns(rows * width);
        Space<C> queries(rows * QUERIES), ups(rows * QUERIES), many_queries(rows * MANY), many_ups(rows * MANY);
        Space<C> weights(keys * MANY), dweights(keys * MANY), dscores(keys * QUERIES);
        Space<float> scores(keys * QUERIES), up_v(keys * QUERIES), sums(rows * QUERIES);
        Space<float> sum_k(keys * rows), sum_v(keys * rows);
        int64_t prepared = -1;
#pragma omp for
        for (int64_t head = 0; head < s.B * s.H; head++) {
            const int64_t b = head / s.H, h = head % s.H, shared = b * s.K + h / (s.H / s.K);
            if (shared != prepared) {
                as_rows(k + shared * T * D, T, D, (C *)k_rows, deep);
                as_rows(v + shared * T * D, T, D, (C *)v_rows, deep);
                as_columns(k + shared * T * D, T, D, (C *)k_columns, width);
                prepared = shared;
            }
            std::fill(sum_k + 0, sum_k + keys * rows, 0.0f);
            std::fill(sum_v + 0, sum_v + keys * rows, 0.0f);

            for (int64_t many = 0; many < T; many += MANY) {
                const int64_t last = std::min(many + MANY, keys);
                const E *q_many = q + (head * T + many) * D, *up_many = dout + ((b * T + many) * s.H + h) * D;
                pack(q_many, D, T - many, D, (C *)many_queries, MANY);
                pack(up_many, s.H * D, T - many, D, (C *)many_ups, MANY);
                int64_t begin = 0;
                for (int64_t t0 = many; t0 < last; t0 += QUERIES) {
                    const int64_t n = std::min(QUERIES, T - t0), end = t0 + QUERIES, column = t0 - many;
                    const Seen seen(first ? first + b * T : nullptr, t0, T);
                    if (t0 == many) begin = seen.begin;
                    const int64_t depth = end - begin;
                    pack_transposed(q_many + column * D, D, n, D, (C *)queries, deep);
                    pack_transposed(up_many + column * s.H * D, s.H * D, n, D, (C *)ups, deep);
                    multiply<C>(k_rows + begin * deep, deep, depth, queries, 16 * deep, deep, scores, QUERIES);
                    multiply<C>(v_rows + begin * deep, deep, depth, ups, 16 * deep, deep, up_v, QUERIES);

                    floats log_sum[2] = {}, mean[2] = {};
                    for (int64_t i = 0; i < n; i++) {
                        const int64_t place = ((b * T + t0 + i) * s.H + h) * D;
                        floats dot = {};
                        for (int64_t j = 0; j < D; j += 16) dot += load(out + place + j, D - j) * load(dout + place + j, D - j);
                        mean[i / 16][i % 16] = sum_of(dot);
                        log_sum[i / 16][i % 16] = total[head * T + t0 + i];
                    }
                    for (int64_t key = begin; key < end; key += 2)
                        for (int64_t half = 0; half < 2; half++) {
                            floats d[2];
                            for (int64_t i = 0; i < 2; i++) {
                                const int64_t row = key - begin + i, at = row * QUERIES + 16 * half;
                                const floats e = exp_of(load(scores + at) * scale - log_sum[half]);
                                const floats p = seen.only(e, key + i, half, 0);
                                d[i] = p * (load(up_v + at) - mean[half]) * scale;
                                store(weights + row * MANY + column + 16 * half, p);
                                store(dweights + row * MANY + column + 16 * half, d[i]);
                            }
                            store_rows(dscores + 16 * (half * depth + key - begin), d[0], d[1]);
                        }
                    multiply<C>(k_columns + begin, width, filled_up(D, ROWS<C>), dscores, 16 * depth, depth, sums, QUERIES);
                    write_transposed(sums, once, n, D, dq + (head * T + t0) * D, D);
                }
                // keys that all of these queries may see, and then those that only some may
                for (int64_t key = begin; key < last; key += key < many ? many - key : QUERIES) {
                    const int64_t here = key < many ? many - key : QUERIES, column = std::max<int64_t>(0, key - many);
                    const int64_t from = (key - begin) * MANY + column, depth = last - many - column;
                    multiply<C>(weights + from, MANY, here, many_ups + 16 * column, 16 * MANY, depth,
                                sum_v + key * rows, rows, true);
                    multiply<C>(dweights + from, MANY, here, many_queries + 16 * column, 16 * MANY, depth,
                                sum_k + key * rows, rows, true);
                }
            }
            for (int64_t t = 0; t < T; t++) {
                std::copy(sum_k + t * rows, sum_k + t * rows + D, dk + (head * T + t) * D);
                std::copy(sum_v + t * rows, sum_v + t * rows + D, dv + (head * T + t) * D);
            }
        }
    }
}

}  // namespace
