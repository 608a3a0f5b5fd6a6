// What the CPU's kernels share: vectors of numbers in fp32, made of fp32 or bf16 in memory, and AMX's tiles. No header
// of torch.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

using std::int64_t;
using bf16 = std::uint16_t;

namespace {

// Vectors of the compiler (GCC, Clang), as wide as the CPU's registers: of wider ones GCC makes slow code
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef std::int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef std::uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef bf16 halves __attribute__((vector_size(2 * WIDTH)));

inline int64_t filled_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline float value(float w) { return w; }
inline float value(bf16 w) {
    const std::uint32_t bits = std::uint32_t(w) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline floats load(const float *w) {
    floats x;
    std::memcpy(&x, w, sizeof x);
    return x;
}
inline floats load(const bf16 *w) {
#ifdef __AVX512F__  // GCC 12 makes seven instructions of what stands below
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)w)), 16);
#else
    halves h;
    std::memcpy(&h, w, sizeof h);
    return (floats)(__builtin_convertvector(h, words) << 16);
#endif
}

// e^x for x <= 0: 2^n times 2^f, with a polynomial that interpolates (2^f - 1) / f at Chebyshev's points of [0, 1].
// Its relative error is 1.2e-7 down to x = -1, 1e-6 down to -16, 4e-6 down to -87; for less, e^x is at most 1.2e-38
inline floats exp_of(floats x) {
    floats t = x * 1.44269504f;
#ifdef __AVX512F__
    const floats n = (floats)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const floats f = t - n;
#else
    t = t < -126.0f ? floats{} - 126.0f : t;  // and NaN stays NaN
    ints n = __builtin_convertvector(t, ints);  // towards zero
    n += __builtin_convertvector(n, floats) > t;  // a comparison gives 0 or -1
    const floats f = t - __builtin_convertvector(n, floats);
#endif
    floats p = f * 2.08179146e-4f + 1.26921665e-3f;
    p = p * f + 9.65219550e-3f;
    p = p * f + 5.54960221e-2f;
    p = p * f + 2.40227208e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
#ifdef __AVX512F__
    return (floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (floats)((n + 127) << 23);
#endif
}

inline float sum_of(floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float a[WIDTH];
    std::memcpy(a, &x, sizeof x);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int j = 0; j < half; j++) a[j] += a[j + half];
    return a[0];
#endif
}

// Rounds to the nearest, a tie to the even one; VCVTNEPS2BF16 takes numbers below 1e-38 for 0
inline halves rounded(floats x) {
#ifdef __AVX512BF16__
    return (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    words bits = (words)x;
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    bits = x == x ? bits : words{} + 0x7fc0;  // the rounding may carry a NaN over into a zero
#ifdef __AVX512F__
    return (halves)_mm512_cvtepi32_epi16((__m512i)bits);
#else
    return __builtin_convertvector(bits, halves);
#endif
#endif
}
inline void store(float *to, floats x) { std::memcpy(to, &x, sizeof x); }
inline void store(bf16 *to, floats x) {
    const halves h = rounded(x);
    std::memcpy(to, &h, sizeof h);
}

// Rows become columns, of WIDTH x WIDTH numbers
inline void transpose(floats *r) {
#ifdef __AVX512F__
    __m512i t[16], u[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = (floats)_mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = (floats)_mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
#else
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < i; j++) {
            const float x = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = x;
        }
#endif
}

// load() and store() where only n numbers are left, which may be fewer than a vector. What is missing reads as 0
template <class E>
inline floats load(const E *from, int64_t n) {
    if (n >= WIDTH) return load(from);
#ifdef __AVX512F__
    const __mmask16 some = (1u << n) - 1;
    if constexpr (sizeof(E) == 4) return (floats)_mm512_maskz_loadu_ps(some, from);
    else return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)), 16);
#endif
    E numbers[WIDTH] = {};
    std::memcpy(numbers, from, n * sizeof(E));
    return load(numbers);
}
template <class E>
inline void store(E *to, floats x, int64_t n) {
    if (n >= WIDTH) return store(to, x);
#ifdef __AVX512F__
    const __mmask16 some = (1u << n) - 1;
    if constexpr (sizeof(E) == 4) _mm512_mask_storeu_ps(to, some, (__m512)x);
    else _mm256_mask_storeu_epi16(to, some, (__m256i)rounded(x));
#else
    E numbers[WIDTH];
    store(numbers, x);
    std::memcpy(to, numbers, n * sizeof(E));
#endif
}

// While one exists, the thread's tiles are 16 rows of 64 bytes each (AMX)
#ifdef __AMX_BF16__
struct TileSizes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// A constant, because GCC leaves out stores that only LDTILECFG reads (its bug 114098)
alignas(64) constexpr TileSizes TILE_SIZES;

struct Tiles {
    Tiles() { _tile_loadconfig(&TILE_SIZES); }
    ~Tiles() { _tile_release(); }
};
#else
struct Tiles {
    ~Tiles() {}  // there are none; that it does something keeps compilers from calling it unused
};
#endif

}  // namespace
