// Muon's orthogonalization in bf16, for CPUs that multiply bf16: those with AMX, whose instruction TDPBF16PS multiplies
// tiles, and those with AVX512-BF16, where VDPBF16PS does so pair by pair. A matrix is the work of one thread from its
// fp32 numbers to the result, and stays in that core's cache.
//
// A matrix X of m <= k is held as tiles of 16 rows x 32 columns, each 1 KB in one piece, filled up with zeros, which
// stay zeros. TDPBF16PS adds to a 16 x 16 tile of fp32 the product of such a tile and a second operand, which has
// consecutive rows beside each other in pairs: 16 pairs x 16 columns. For X X^T that operand is a tile transposed in
// units of pairs; for B X it is two tiles' rows interleaved. X X^T and its square are symmetric: half is computed.
// No header of torch; orthogonalize.py calls by address.
#include <algorithm>
#include <vector>
#include <immintrin.h>
#include "vectors.h"

namespace {

constexpr int64_t ROWS = 16, COLUMNS = 32, TILE = ROWS * COLUMNS;

struct alignas(64) Tile {  // so that a row is one line of the cache: 1.2 times as fast
    std::uint16_t numbers[TILE];
};

struct Matrix {
    int64_t m, k;  // multiples of 32
    std::vector<Tile> tiles;

    Matrix(int64_t m, int64_t k) : m(m), k(k), tiles(m * k / TILE) {}
    std::uint16_t *tile(int64_t row, int64_t column) { return tiles[row * (k / COLUMNS) + column].numbers; }
};

// 16 numbers of bf16 in fp32; the lower and the upper half of 32; and back
inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 low(__m512i x) { return widened(_mm512_castsi512_si256(x)); }
inline __m512 high(__m512i x) { return widened(_mm512_extracti64x4_epi64(x, 1)); }
inline __m512i rounded_both(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline void load16(floats *r, const void *from, int64_t stride) {  // in bytes
    for (int i = 0; i < 16; i++) std::memcpy(&r[i], (const char *)from + i * stride, 64);
}
inline void store16(void *to, const floats *r) { std::memcpy(to, r, 16 * 64); }

// The second operand of a product with X^T: each tile transposed in pairs, to[row of tiles][column of tiles]
void pack_transposed(const Matrix &x, std::vector<Tile> &to) {
    for (size_t i = 0; i < x.tiles.size(); i++) {
        floats r[16];
        load16(r, x.tiles[i].numbers, 64);
        transpose(r);
        store16(to[i].numbers, r);
    }
}

// The second operand of B X: rows in pairs. to[16 columns][32 rows]
void pack_pairs(Matrix &x, std::vector<Tile> &to) {
    const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i right = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const int64_t deep = x.m / COLUMNS;
    for (int64_t i = 0; i < deep; i++)
        for (int64_t j = 0; j < x.k / COLUMNS; j++) {
            std::uint16_t *first = to[2 * j * deep + i].numbers, *second = to[(2 * j + 1) * deep + i].numbers;
            for (int64_t p = 0; p < 16; p++) {
                const std::uint16_t *rows = x.tile(2 * i + p / 8, j) + p % 8 * 2 * COLUMNS;
                const __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + COLUMNS);
                const __m512i lo = _mm512_unpacklo_epi16(a, b), hi = _mm512_unpackhi_epi16(a, b);
                _mm512_storeu_si512(first + p * COLUMNS, _mm512_permutex2var_epi64(lo, left, hi));
                _mm512_storeu_si512(second + p * COLUMNS, _mm512_permutex2var_epi64(lo, right, hi));
            }
        }
}

// c (2 x 2 tiles of fp32) = 32 rows of a, `deep` tiles long, times 32 columns of packed
#ifdef __AMX_BF16__
inline void product(const std::uint16_t *a, const std::uint16_t *packed, int64_t deep, float c[4][256]) {
    asm volatile("" ::: "memory");  // what loads a tile does not tell the compiler that it reads memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < deep; i++) {
        _tile_loadd(4, a + i * TILE, 64);
        _tile_loadd(5, a + (deep + i) * TILE, 64);
        _tile_loadd(6, packed + i * TILE, 64);
        _tile_loadd(7, packed + (deep + i) * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[1], 64);
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
}
#else
inline void product(const std::uint16_t *a, const std::uint16_t *packed, int64_t deep, float c[4][256]) {
    constexpr int64_t AT_ONCE = 8;  // rows, whose 16 vectors of sums stay in registers
    for (int64_t first = 0; first < 2 * ROWS; first += AT_ONCE) {
        const std::uint16_t *rows = a + first / ROWS * deep * TILE + first % ROWS * COLUMNS;
        __m512 left[AT_ONCE] = {}, right[AT_ONCE] = {};
        for (int64_t i = 0; i < deep * TILE; i += TILE)
            for (int64_t pair = 0; pair < 16; pair++) {
                const __m512bh l = (__m512bh)_mm512_load_si512(packed + i + pair * 32);
                const __m512bh r = (__m512bh)_mm512_load_si512(packed + deep * TILE + i + pair * 32);
#pragma GCC unroll 8
                for (int64_t row = 0; row < AT_ONCE; row++) {
                    int both;
                    std::memcpy(&both, rows + i + row * COLUMNS + 2 * pair, 4);
                    const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
                    left[row] = _mm512_dpbf16_ps(left[row], x, l);
                    right[row] = _mm512_dpbf16_ps(right[row], x, r);
                }
            }
        float(*to)[256] = c + first / ROWS * 2;
#pragma GCC unroll 8
        for (int64_t row = 0; row < AT_ONCE; row++) {
            _mm512_storeu_ps(to[0] + (first % ROWS + row) * 16, left[row]);
            _mm512_storeu_ps(to[1] + (first % ROWS + row) * 16, right[row]);
        }
    }
}
#endif

// c = scale c + add's share of the old numbers, whose two tiles lie at `old`
inline void combine(float c[4][256], float scale, const std::uint16_t *old, int64_t stride, float add) {
    const __m512 s = _mm512_set1_ps(scale), b = _mm512_set1_ps(add);
    for (int64_t half = 0; half < 2; half++)
        for (int64_t row = 0; row < 16; row++) {
            const __m512i numbers = _mm512_loadu_si512(old + half * stride + row * COLUMNS);
            float *left = c[2 * half] + 16 * row, *right = c[2 * half + 1] + 16 * row;
            _mm512_storeu_ps(left, _mm512_fmadd_ps(s, _mm512_loadu_ps(left), _mm512_mul_ps(b, low(numbers))));
            _mm512_storeu_ps(right, _mm512_fmadd_ps(s, _mm512_loadu_ps(right), _mm512_mul_ps(b, high(numbers))));
        }
}

inline void round_to(std::uint16_t *tile, const float *left, const float *right) {
    for (int64_t row = 0; row < 16; row++)
        _mm512_storeu_si512(tile + row * COLUMNS,
                            rounded_both(_mm512_loadu_ps(left + 16 * row), _mm512_loadu_ps(right + 16 * row)));
}

// out = scale x y^T + add old, of which half is computed; old may be null. packed is pack_transposed(y). The result has
// to be symmetric: it is if x and y are the same, or two polynomials of one symmetric matrix
void symmetric(Matrix &x, const std::vector<Tile> &packed, float scale, Matrix *old, float add, Matrix &out) {
    const int64_t deep = x.k / COLUMNS, blocks = x.m / COLUMNS;
    alignas(64) float c[4][256];
    for (int64_t i = 0; i < blocks; i++)
        for (int64_t j = 0; j <= i; j++) {
            product(x.tile(2 * i, 0), packed[2 * j * deep].numbers, deep, c);
            if (old) combine(c, scale, old->tile(2 * i, j), blocks * TILE, add);
            round_to(out.tile(2 * i, j), c[0], c[1]);
            round_to(out.tile(2 * i + 1, j), c[2], c[3]);
            if (i == j) continue;
            for (auto &part : c) {
                floats r[16];
                load16(r, part, 64);
                transpose(r);
                store16(part, r);
            }
            round_to(out.tile(2 * j, i), c[0], c[2]);
            round_to(out.tile(2 * j + 1, i), c[1], c[3]);
        }
}

void add_to_diagonal(Matrix &x, float a) {
    for (int64_t i = 0; i < x.m; i++) {
        bf16 *number = x.tile(i / ROWS, i / COLUMNS) + i % ROWS * COLUMNS + i % COLUMNS;
        store(number, floats{} + (value(*number) + a), 1);
    }
}

// x = a x + b x. packed is pack_pairs(x)
void polynomial(Matrix &x, const std::vector<Tile> &packed, Matrix &b, float a) {
    const int64_t deep = x.m / COLUMNS, wide = x.k / COLUMNS;
    alignas(64) float c[4][256];
    for (int64_t i = 0; i < deep; i++)
        for (int64_t j = 0; j < wide; j++) {
            product(b.tile(2 * i, 0), packed[2 * j * deep].numbers, deep, c);
            combine(c, 1.0f, x.tile(2 * i, j), wide * TILE, a);
            round_to(x.tile(2 * i, j), c[0], c[1]);
            round_to(x.tile(2 * i + 1, j), c[2], c[3]);
        }
}

// 16 x 16 numbers of a matrix in fp32 with `rows` rows and `columns` columns, from (row, column) on, which may lie over
// its edge; transposed if it is tall. What is missing reads as 0
struct Window {
    float *numbers;
    int64_t rows, columns;
    bool tall;

    __mmask16 mask(int64_t column) const {
        const int64_t n = std::clamp<int64_t>(columns - column, 0, 16);
        return (1u << n) - 1;
    }
    void read(int64_t row, int64_t column, float scale, float *to) const {
        if (tall) std::swap(row, column);
        floats r[16];
        for (int64_t i = 0; i < 16; i++) {
            __m512 x = _mm512_setzero_ps();
            if (row + i < rows) x = _mm512_maskz_loadu_ps(mask(column), numbers + (row + i) * columns + column);
            r[i] = (floats)x * scale;
        }
        if (tall) transpose(r);
        store16(to, r);
    }
    void write(int64_t row, int64_t column, const float *from) const {
        if (tall) std::swap(row, column);
        floats r[16];
        load16(r, from, 64);
        if (tall) transpose(r);
        for (int64_t i = 0; i < std::min<int64_t>(16, rows - row); i++)
            _mm512_mask_storeu_ps(numbers + (row + i) * columns + column, mask(column), (__m512)r[i]);
    }
};

// One matrix (rows, columns), in place
void orthogonalize(float *numbers, int64_t rows, int64_t columns, const float *quintics, int64_t n) {
    const bool tall = rows > columns;
    const int64_t m = std::min(rows, columns), k = std::max(rows, columns);
    Matrix x(filled_up(m, 32), filled_up(k, 32)), a(x.m, x.m), b(x.m, x.m);
    std::vector<Tile> packed(x.m * x.k / TILE);

    // singular values at most 1, where the iteration converges
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < rows * columns; i += 16) {
        const __mmask16 some = (1u << std::min<int64_t>(16, rows * columns - i)) - 1;
        const __m512 v = _mm512_maskz_loadu_ps(some, numbers + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float scale = 1 / std::max(std::sqrt(_mm512_reduce_add_ps(squares)), 1e-7f);
    const Window window{numbers, rows, columns, tall};
    alignas(64) float left[256], right[256];
    for (int64_t i = 0; i < x.m / ROWS; i++)
        for (int64_t j = 0; j < x.k / COLUMNS; j++) {
            window.read(i * ROWS, j * COLUMNS, scale, left);
            window.read(i * ROWS, j * COLUMNS + 16, scale, right);
            round_to(x.tile(i, j), left, right);
        }

    // A step is x <- y x, with y = q0 + q1 a + q2 a^2 and a = x x^T. In the next one a is y a y, because all of these
    // commute, so that two steps need only one pass over x: a fifth less work if x is wide. As a first step this would
    // lose small singular values, after it the result is as exact
    const bool wide = x.k >= 2 * x.m;
    Matrix y(wide ? x.m : 0, x.m);
    for (int64_t step = 0; step < n; step++) {
        const float *q = quintics + 3 * step;
        pack_transposed(x, packed);
        symmetric(x, packed, 1, nullptr, 0, a);
        pack_transposed(a, packed);
        symmetric(a, packed, q[2], &a, q[1], b);
        const bool two = wide && step > 0 && step + 1 < n;
        if (two) {
            add_to_diagonal(b, q[0]);
            symmetric(b, packed, 1, nullptr, 0, y);
            pack_transposed(y, packed);
            symmetric(b, packed, 1, nullptr, 0, a);
            pack_transposed(a, packed);
            symmetric(a, packed, q[5], &a, q[4], y);
            pack_transposed(b, packed);
            symmetric(y, packed, 1, &b, q[3], a);
            std::swap(a, b);
            step++;
        }
        pack_pairs(x, packed);
        polynomial(x, packed, b, two ? 0 : q[0]);
    }

    for (int64_t i = 0; i < x.m / ROWS; i++)
        for (int64_t j = 0; j < x.k / COLUMNS; j++) {
            for (int64_t row = 0; row < 16; row++) {
                const __m512i both = _mm512_loadu_si512(x.tile(i, j) + row * COLUMNS);
                _mm512_storeu_ps(left + 16 * row, low(both));
                _mm512_storeu_ps(right + 16 * row, high(both));
            }
            window.write(i * ROWS, j * COLUMNS, left);
            window.write(i * ROWS, j * COLUMNS + 16, right);
        }
}

}  // namespace

// Each matrix of a stack (count, rows, columns), in place; quintics: (n, 3)
extern "C" void orthogonalize_stack(float *stack, int64_t count, int64_t rows, int64_t columns, const float *quintics,
                                    int64_t n, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) orthogonalize(stack + i * rows * columns, rows, columns, quintics, n);
    }
}
