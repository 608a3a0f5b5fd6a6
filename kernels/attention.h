// Causal attention of the quick training step, on a CPU, and its gradients (FlashAttention: arXiv 2205.14135).
//
// Scores exist for 32 queries at a time, are computed anew for the gradients, and stay in a core's cache. Keys that no
// such query sees get no scores. Scores lie transposed, a row for each key: the numbers of a vector belong to
// different queries, so that a softmax adds up vectors and not numbers of one.
//
// A product takes A row by row, and B in panels, a row of which fills one register: WIDTH numbers of fp32 or, with
// AVX-512, 16 pairs of bf16, each pair two consecutive numbers of a column. VDPBF16PS adds the products of such a row
// and two numbers of A to 16 sums in fp32. On CPUs without it, numbers in bf16 are multiplied in fp32.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
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
template <class C> constexpr int64_t UNIT = 4 / sizeof(C);  // numbers of a column of B that lie side by side
template <class C> constexpr bool IN_TILES = false;
#ifdef __AMX_BF16__
template <> inline constexpr bool IN_TILES<bf16> = true;
#endif

constexpr int64_t QUERIES = 32, VECTORS = QUERIES / WIDTH;  // whose scores exist at once
constexpr int64_t MANY = 2 * QUERIES;  // queries that are summed over at once in the gradients of keys and values
// Panels and rows of a product at once, so that the sums stay in registers
constexpr int PANELS = 2;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int AT_ONCE = 8;
#else
constexpr int AT_ONCE = 4;
#endif
// Rows, columns and depth of a product are multiples of these
template <class C> constexpr int64_t ROWS = IN_TILES<C> ? 32 : AT_ONCE;
template <class C> constexpr int64_t COLUMNS = IN_TILES<C> ? 32 : WIDTH;
template <class C> constexpr int64_t DEPTH = IN_TILES<C> ? 32 : UNIT<C>;

// Memory of one thread, zeros at first, that begins at a line of the cache
template <class E>
struct Space {
    std::unique_ptr<E, decltype(&std::free)> numbers;

    explicit Space(int64_t n) : numbers((E *)std::aligned_alloc(64, filled_up(n * sizeof(E), 64)), std::free) {
        if (!numbers) throw std::bad_alloc();
        std::fill(numbers.get(), numbers.get() + n, E{});
    }
    operator E *() const { return numbers.get(); }
    E *data() const { return numbers.get(); }
};

// ------------------------------------------------------------------------------------------------------- products

// sum + a b in each column: a is one number of fp32, or two of bf16
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
        for (int p = 0; p < P; p++) std::memcpy(&row[p], b + p * panel + WIDTH * i, sizeof row[p]);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) sums[r][p] = multiply_add(sums[r][p], a + r * stride + i, row[p]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            float *to = c + r * columns + WIDTH * p;
            store(to, add ? load(to) + sums[r][p] : sums[r][p]);
        }
}

#ifdef __AMX_BF16__
// The same with AMX's tiles, which are 16 rows of 64 bytes: sums in 0 to 3, two of A in 4 and 5, two of B in 6 and 7
template <int R, int P>
inline void multiply_part(const bf16 *a, int64_t stride, const bf16 *b, int64_t panel, int64_t depth, float *c,
                          int64_t columns, bool add) {
    static_assert(R == 32 && P == 2);
    asm volatile("" ::: "memory");  // what loads a tile does not tell the compiler that it reads memory
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
    int64_t j = 0;
    for (; j + PANELS * WIDTH <= columns; j += PANELS * WIDTH)
        for (int64_t i = 0; i < rows; i += ROWS<C>)
            multiply_part<ROWS<C>, PANELS>(a + i * stride, stride, b + j / WIDTH * panel, panel, depth,
                                           c + i * columns + j, columns, add);
    if constexpr (COLUMNS<C> < PANELS * WIDTH)
        for (int64_t i = 0; j < columns && i < rows; i += ROWS<C>)
            multiply_part<ROWS<C>, 1>(a + i * stride, stride, b + j / WIDTH * panel, panel, depth,
                                      c + i * columns + j, columns, add);
}

// ------------------------------------------------------------------------------------------------------- operands

// Two rows of a panel
inline void store_rows(float *to, floats first, floats second) {
    store(to, first);
    store(to + WIDTH, second);
}
#ifdef __AVX512BF16__
inline void store_rows(bf16 *to, floats first, floats second) {
    alignas(64) static constexpr bf16 IN_TURN[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(IN_TURN), both));
}
#endif

// WIDTH rows of as many numbers, of which those from `rows` and from `columns` on are missing and read as 0
template <class E>
inline void load_square(const E *from, int64_t stride, int64_t rows, int64_t columns, floats *square) {
    for (int64_t i = 0; i < WIDTH; i++) square[i] = i < rows ? load(from + i * stride, columns) : floats{};
}

// (rows, n) -> A: the same rows, `width` apart
template <class E, class C>
void as_rows(const E *from, int64_t rows, int64_t n, C *to, int64_t width) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i += WIDTH) store(to + r * width + i, load(from + r * n + i, n - i), n - i);
}

// (rows, n) -> A: n rows, `width` apart; width is at least `rows`, filled up to WIDTH
template <class E, class C>
void as_columns(const E *from, int64_t rows, int64_t n, C *to, int64_t width) {
    for (int64_t r = 0; r < rows; r += WIDTH)
        for (int64_t i = 0; i < n; i += WIDTH) {
            floats square[WIDTH];
            load_square(from + r * n + i, n, rows - r, n - i, square);
            transpose(square);
            for (int64_t k = 0; k < std::min<int64_t>(WIDTH, n - i); k++) store(to + (i + k) * width + r, square[k]);
        }
}

// (rows, n), rows `stride` apart -> B of `depth` rows; those from `rows` on are 0
template <class E, class C>
void pack(const E *from, int64_t stride, int64_t rows, int64_t n, C *to, int64_t depth) {
    for (int64_t r = 0; r < depth; r += 2)
        for (int64_t i = 0; i < n; i += WIDTH)
            store_rows(to + i * depth + WIDTH * r, r < rows ? load(from + r * stride + i, n - i) : floats{},
                       r + 1 < rows ? load(from + (r + 1) * stride + i, n - i) : floats{});
}

// (rows, n), rows `stride` apart -> B of QUERIES columns, those from `rows` on 0, and `depth` rows, n of them written
template <class E, class C>
void pack_transposed(const E *from, int64_t stride, int64_t rows, int64_t n, C *to, int64_t depth) {
    for (int64_t r = 0; r < QUERIES; r += WIDTH)
        for (int64_t i = 0; i < n; i += WIDTH) {
            floats square[WIDTH];
            load_square(from + r * stride + i, stride, rows - r, n - i, square);
            transpose(square);
            for (int64_t k = 0; k < std::min<int64_t>(WIDTH, n - i); k += 2)
                store_rows(to + r * depth + WIDTH * (i + k), square[k], square[k + 1]);
        }
}

// (n, QUERIES) in fp32, times `scale` of each column -> (rows, n), rows `stride` apart
template <class E>
void write_transposed(const float *from, const floats *scale, int64_t rows, int64_t n, E *to, int64_t stride) {
    for (int64_t r = 0; r < rows; r += WIDTH)
        for (int64_t i = 0; i < n; i += WIDTH) {
            floats square[WIDTH];
            for (int64_t k = 0; k < WIDTH; k++) square[k] = load(from + (i + k) * QUERIES + r) * scale[r / WIDTH];
            transpose(square);
            for (int64_t k = 0; k < std::min<int64_t>(WIDTH, rows - r); k++)
                store(to + (r + k) * stride + i, square[k], n - i);
        }
}

// ------------------------------------------------------------------------------------------------------- attention

// Which keys the queries from position t0 on see, QUERIES of them: each from its entry in `first` to its own position
struct Seen {
    ints from[VECTORS] = {}, to[VECTORS];
    int64_t begin = 0, all_begin = 0, t0;  // no query sees a key before `begin`; all see those from all_begin to t0

    Seen(const std::int32_t *first, int64_t t0, int64_t T) : t0(t0) {
        for (int64_t i = 0; i < QUERIES; i++) {
            to[i / WIDTH][i % WIDTH] = t0 + i;
            if (first) from[i / WIDTH][i % WIDTH] = all_begin = first[std::min(T - 1, t0 + i)];
        }
        if (first) begin = first[t0] / QUERIES * QUERIES;
    }
    // x where the queries of vector i see the key, else `other`
    floats only(floats x, int64_t key, int64_t i, float other) const {
        if (key >= all_begin && key < t0) return x;
        const ints at = ints{} + std::int32_t(key);
        return (at >= from[i]) & (at <= to[i]) ? x : floats{} + other;
    }
};

struct Sizes {
    int64_t keys;  // T filled up
    int64_t width;  // from one row to the next where keys are columns; some more, so that it is no power of two
    int64_t deep, rows;  // D filled up, as the depth of a product and as its rows

    template <class C>
    static Sizes of(Shape s) {
        const int64_t keys = filled_up(s.T, QUERIES);
        return {keys, keys + 32, filled_up(s.D, DEPTH<C>), filled_up(s.D, std::max<int64_t>(WIDTH, ROWS<C>))};
    }
};

// exp(scores - most) for `depth` keys from seen.begin on, as B, with `most` the largest of each query, and their sums.
// The scores are first multiplied by `scale`, in place
template <class C>
inline void exponentials(float *scores, const Seen &seen, int64_t depth, float scale, C *weights, floats *most,
                         floats *sum) {
    std::fill(most, most + VECTORS, floats{} - 1e30f);
    std::fill(sum, sum + VECTORS, floats{});
    for (int64_t row = 0; row < depth; row++)
        for (int64_t i = 0; i < VECTORS; i++) {
            float *at = scores + row * QUERIES + i * WIDTH;
            const floats x = seen.only(load(at) * scale, seen.begin + row, i, -1e30f);
            store(at, x);
            most[i] = x > most[i] ? x : most[i];
        }
    for (int64_t row = 0; row < depth; row += 2)
        for (int64_t i = 0; i < VECTORS; i++) {
            floats e[2];
            for (int64_t k = 0; k < 2; k++) {
                const floats x = load(scores + (row + k) * QUERIES + i * WIDTH);
                e[k] = seen.only(exp_of(x - most[i]), seen.begin + row + k, i, 0);
                sum[i] += e[k];
            }
            store_rows(weights + WIDTH * (i * depth + row), e[0], e[1]);
        }
}

// q (B, H, T, D), k and v (B, K, T, D) -> out (B, T, H D), softmax(q k^T / sqrt(D)) v, and total (B, H, T), logarithms
// of the sums of exponentials. A query sees the keys from `first` (B, T), or from 0 if that is null, to its own
// position; `first` never decreases along a sequence
template <class E>
void attention(const E *q, const E *k, const E *v, const std::int32_t *first, Shape s, E *out, float *total,
               int threads) {
    using C = Operand<E>;
    const int64_t T = s.T, D = s.D;
    const Sizes size = Sizes::of<C>(s);
    const int64_t deep = size.deep;
#pragma omp parallel num_threads(std::min<int64_t>(threads, s.B * s.H))
    {
        const Tiles tiles;
        Space<C> k_rows(size.keys * deep), v_columns(size.rows * size.width);
        Space<C> queries(size.rows * QUERIES), weights(size.keys * QUERIES);
        Space<float> scores(size.keys * QUERIES), sums(size.rows * QUERIES);
        int64_t prepared = -1;  // key head, which several query heads may share
#pragma omp for
        for (int64_t head = 0; head < s.B * s.H; head++) {
            const int64_t b = head / s.H, h = head % s.H, shared = b * s.K + h / (s.H / s.K);
            if (shared != prepared) {
                as_rows(k + shared * T * D, T, D, k_rows.data(), deep);
                as_columns(v + shared * T * D, T, D, v_columns.data(), size.width);
                prepared = shared;
            }
            for (int64_t t0 = 0; t0 < T; t0 += QUERIES) {
                const int64_t n = std::min(QUERIES, T - t0);
                const Seen seen(first ? first + b * T : nullptr, t0, T);
                const int64_t begin = seen.begin, depth = t0 + QUERIES - begin;
                pack_transposed(q + (head * T + t0) * D, D, n, D, queries.data(), deep);
                multiply(k_rows + begin * deep, deep, depth, queries.data(), WIDTH * deep, deep, scores, QUERIES);
                floats most[VECTORS], sum[VECTORS];
                exponentials(scores, seen, depth, 1 / std::sqrt(float(D)), weights.data(), most, sum);
                multiply(v_columns + begin, size.width, filled_up(D, ROWS<C>), weights.data(), WIDTH * depth, depth,
                         sums, QUERIES);
                for (int64_t i = 0; i < n; i++)
                    total[head * T + t0 + i] = most[i / WIDTH][i % WIDTH] + std::log(sum[i / WIDTH][i % WIDTH]);
                for (floats &x : sum) x = 1.0f / x;
                write_transposed(sums, sum, n, D, out + ((b * T + t0) * s.H + h) * D, s.H * D);
            }
        }
    }
}

// A thread's part in attention_backward(): one query head after the other
template <class E>
struct Gradients {
    using C = Operand<E>;
    const E *q, *k, *v, *out, *dout;
    const std::int32_t *first;
    const float *total;
    Shape s;
    Sizes size = Sizes::of<C>(s);
    int64_t T = s.T, D = s.D, prepared = -1;
    Space<C> k_rows{size.keys * size.deep}, v_rows{size.keys * size.deep}, k_columns{size.rows * size.width};
    Space<C> queries{size.rows * QUERIES}, ups{size.rows * QUERIES};  // up: gradient of the result
    Space<C> many_queries{size.rows * MANY}, many_ups{size.rows * MANY};
    Space<C> weights{size.keys * MANY}, dscores{size.keys * MANY}, packed{size.keys * QUERIES};
    Space<float> scores{size.keys * QUERIES}, dweights{size.keys * QUERIES}, sums{size.rows * QUERIES};
    Space<float> dk{size.keys * size.rows}, dv{size.keys * size.rows};

    // QUERIES queries from t0 on: their rows of `weights` and `dscores`, from `column` on and for keys from `begin` on,
    // and dq (T, D)
    void add_queries(int64_t head, int64_t t0, int64_t column, int64_t begin, E *dq) {
        const int64_t b = head / s.H, h = head % s.H, n = std::min(QUERIES, T - t0), depth = t0 + QUERIES - begin;
        const int64_t place = ((b * T + t0) * s.H + h) * D, deep = size.deep;
        const float scale = 1 / std::sqrt(float(D));
        const Seen seen(first ? first + b * T : nullptr, t0, T);
        pack_transposed(q + (head * T + t0) * D, D, n, D, queries.data(), deep);
        pack_transposed(dout + place, s.H * D, n, D, ups.data(), deep);
        multiply(k_rows + begin * deep, deep, depth, queries.data(), WIDTH * deep, deep, scores, QUERIES);
        multiply(v_rows + begin * deep, deep, depth, ups.data(), WIDTH * deep, deep, dweights, QUERIES);

        floats log_sum[VECTORS] = {}, mean[VECTORS] = {};
        for (int64_t i = 0; i < n; i++) {
            const E *result = out + place + i * s.H * D, *up = dout + place + i * s.H * D;
            floats dot = {};
            for (int64_t j = 0; j < D; j += WIDTH) dot += load(result + j, D - j) * load(up + j, D - j);
            mean[i / WIDTH][i % WIDTH] = sum_of(dot);
            log_sum[i / WIDTH][i % WIDTH] = total[head * T + t0 + i];
        }
        for (int64_t row = 0; row < depth; row += 2)
            for (int64_t i = 0; i < VECTORS; i++) {
                floats d[2];
                for (int64_t j = 0; j < 2; j++) {
                    const int64_t from = (row + j) * QUERIES + i * WIDTH, to = (row + j) * MANY + column + i * WIDTH;
                    const floats e = exp_of(load(scores + from) * scale - log_sum[i]);  // anything for unseen keys
                    const floats p = seen.only(e, begin + row + j, i, 0);
                    d[j] = p * (load(dweights + from) - mean[i]) * scale;
                    store(weights + to, p);
                    store(dscores + to, d[j]);
                }
                store_rows(packed + WIDTH * (i * depth + row), d[0], d[1]);
            }
        multiply(k_columns + begin, size.width, filled_up(D, ROWS<C>), packed.data(), WIDTH * depth, depth, sums,
                 QUERIES);
        floats once[VECTORS];
        std::fill(once, once + VECTORS, floats{} + 1.0f);
        write_transposed(sums, once, n, D, dq + t0 * D, D);
    }

    // What the queries from t0 to `last` add to dk and dv. All of them may see the keys before t0; then come those that
    // only the later ones may see
    void add_to_keys(int64_t t0, int64_t last, int64_t begin) {
        for (int64_t key = begin; key < last; key = std::max(key + QUERIES, t0)) {
            const int64_t here = key < t0 ? t0 - key : QUERIES, column = std::max<int64_t>(0, key - t0);
            const int64_t from = (key - begin) * MANY + column, depth = last - t0 - column, panel = WIDTH * MANY;
            multiply(weights + from, MANY, here, many_ups + WIDTH * column, panel, depth, dv + key * size.rows,
                     size.rows, true);
            multiply(dscores + from, MANY, here, many_queries + WIDTH * column, panel, depth, dk + key * size.rows,
                     size.rows, true);
        }
    }

    // The gradients of one head: dq, dk and dv (T, D)
    void run(int64_t head, E *dq, float *dk_out, float *dv_out) {
        const int64_t b = head / s.H, h = head % s.H, shared = b * s.K + h / (s.H / s.K);
        if (shared != prepared) {
            as_rows(k + shared * T * D, T, D, k_rows.data(), size.deep);
            as_rows(v + shared * T * D, T, D, v_rows.data(), size.deep);
            as_columns(k + shared * T * D, T, D, k_columns.data(), size.width);
            prepared = shared;
        }
        std::fill(dk.data(), dk + size.keys * size.rows, 0.0f);
        std::fill(dv.data(), dv + size.keys * size.rows, 0.0f);
        for (int64_t t0 = 0; t0 < T; t0 += MANY) {
            const int64_t last = std::min(t0 + MANY, size.keys);
            const int64_t begin = Seen(first ? first + b * T : nullptr, t0, T).begin;
            pack(q + (head * T + t0) * D, D, T - t0, D, many_queries.data(), MANY);
            pack(dout + ((b * T + t0) * s.H + h) * D, s.H * D, T - t0, D, many_ups.data(), MANY);
            for (int64_t t = t0; t < last; t += QUERIES) add_queries(head, t, t - t0, begin, dq);
            add_to_keys(t0, last, begin);
        }
        for (int64_t t = 0; t < T; t++) {
            std::copy(dk + t * size.rows, dk + t * size.rows + D, dk_out + t * D);
            std::copy(dv + t * size.rows, dv + t * size.rows + D, dv_out + t * D);
        }
    }
};

// Gradients of attention() from that of its result, dout: dq (B, H, T, D), and dk and dv of each query head alone, also
// (B, H, T, D)
template <class E>
void attention_backward(const E *q, const E *k, const E *v, const std::int32_t *first, const E *out, const float *total,
                        const E *dout, Shape s, E *dq, float *dk, float *dv, int threads) {
#pragma omp parallel num_threads(std::min<int64_t>(threads, s.B * s.H))
    {
        const Tiles tiles;
        Gradients<E> gradients{q, k, v, out, dout, first, total, s};
#pragma omp for
        for (int64_t head = 0; head < s.B * s.H; head++) {
            const int64_t place = head * s.T * s.D;
            gradients.run(head, dq + place, dk + place, dv + place);
        }
    }
}

}  // namespace
