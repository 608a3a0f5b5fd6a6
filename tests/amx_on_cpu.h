// AMX's tiles in plain C++, to prove the logic of what is written for them on a CPU that has none. Tiles hold NaN until
// they are loaded, and a thread that uses one without having configured it ends the process.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_on_cpu {

struct Tiles {
    bool configured = false;
    float numbers[8][16][16];
};
inline thread_local Tiles tiles;

inline float (*tile(int i))[16] {
    if (!tiles.configured) {
        std::fprintf(stderr, "tile %d is used without a configuration\n", i);
        std::abort();
    }
    return tiles.numbers[i];
}
inline void configure(const void *config) {
    const auto *bytes = static_cast<const std::uint8_t *>(config);
    for (int i = 0; i < 8; i++)  // palette 1; bytes of a row from 16 on, rows from 48 on
        if (bytes[0] != 1 || bytes[16 + 2 * i] != 64 || bytes[17 + 2 * i] != 0 || bytes[48 + i] != 16) std::abort();
    tiles.configured = true;
    for (auto &one : tiles.numbers)
        for (auto &row : one)
            for (float &x : row) x = NAN;
}
inline float half(const float *row, int i) {  // number i of 32 in bf16
    std::uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const char *>(row) + 2 * i, 2);
    const std::uint32_t wide = std::uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}
inline void multiply(int to, int a, int b) {
    auto *sums = tile(to), *left = tile(a), *right = tile(b);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++)
            for (int k = 0; k < 32; k++) sums[i][j] += half(left[i], k) * half(right[k / 2], 2 * j + k % 2);
}
inline void load(int to, const void *from, long stride) {
    for (int i = 0; i < 16; i++) std::memcpy(tile(to)[i], static_cast<const char *>(from) + i * stride, 64);
}
inline void store(int from, void *to, long stride) {
    for (int i = 0; i < 16; i++) std::memcpy(static_cast<char *>(to) + i * stride, tile(from)[i], 64);
}

}  // namespace amx_on_cpu

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_on_cpu::configure
#define _tile_release() (void)(amx_on_cpu::tiles.configured = false)
#define _tile_zero(to) std::memset(amx_on_cpu::tile(to), 0, 1024)
#define _tile_loadd amx_on_cpu::load
#define _tile_stored amx_on_cpu::store
#define _tile_dpbf16ps amx_on_cpu::multiply
