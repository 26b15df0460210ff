// The CPU's matrix tiles (AMX): products of 16 x 32 and 32 x 16 numbers of bfloat16.
#pragma once

#include <cstdint>

#include "vectors.h"

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define REFT_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef REFT_TILES

constexpr int64_t EDGE = 16;           // rows of a tile
constexpr int64_t DEEP = 32;           // numbers of bfloat16 in a row of a tile
constexpr int64_t TILE_NUMBERS = 512;  // of them in a tile
constexpr int64_t SQUARE = 2 * EDGE;   // rows, and columns, of the sums in tiles 0 to 3

using Tile = bfloat16[TILE_NUMBERS];

// Whether the system lets this process use tiles. It has to be asked once.
inline bool have_tiles() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool have = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return have;
}

// Has the compiler write to memory what it has not yet. It has to be called before tiles are read
// from where the same function wrote: GCC does not know what its intrinsics for that read.
inline void settle() { asm volatile("" ::: "memory"); }

// While it lives, all tiles of the thread have 16 rows of 64 bytes. Then they are as before: oneDNN
// uses them too.
class Tiles {
  public:
    explicit Tiles(bool used) : used_(used) {
        if (!used_) return;
        _tile_storeconfig(before_);
        alignas(64) uint8_t shape[64] = {1};  // the palette
        for (int64_t tile = 0; tile < 8; ++tile) shape[16 + 2 * tile] = 64, shape[48 + tile] = 16;
        settle();
        _tile_loadconfig(shape);
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    ~Tiles() {
        if (!used_) return;
        if (before_[0])
            _tile_loadconfig(before_);
        else
            _tile_release();
    }

  private:
    bool used_;
    alignas(64) uint8_t before_[64];
};

// Products of the tiles 4, 5 (left sides) and 6, 7 (right sides), added to tiles 0 to 3; or, if not
// BOTH, without tile 7, to tiles 0 and 2.
template <bool BOTH = true>
inline void multiply_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (BOTH) _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (BOTH) _tile_dpbf16ps(3, 5, 7);
}

inline void zero_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Tiles 0 to 3, two by two, are sums [SQUARE][SQUARE].
inline void store_tiles(float* to) {
    constexpr int64_t BYTES = SQUARE * sizeof(float);
    _tile_stored(0, to, BYTES);
    _tile_stored(1, to + 16, BYTES);
    _tile_stored(2, to + 16 * SQUARE, BYTES);
    _tile_stored(3, to + 16 * SQUARE + 16, BYTES);
}

inline void load_tiles(const float* from) {
    constexpr int64_t BYTES = SQUARE * sizeof(float);
    settle();
    _tile_loadd(0, from, BYTES);
    _tile_loadd(1, from + 16, BYTES);
    _tile_loadd(2, from + 16 * SQUARE, BYTES);
    _tile_loadd(3, from + 16 * SQUARE + 16, BYTES);
}

// Transposes 16 x 16 numbers of four bytes.
inline void transpose(__m512i rows[EDGE]) {
    __m512i next[EDGE];
    for (int64_t i = 0; i < EDGE; i += 2) {
        next[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        next[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int64_t i = 0; i < EDGE; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(next[i], next[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(next[i], next[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(next[i + 1], next[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(next[i + 1], next[i + 3]);
    }
    for (int64_t i = 0; i < EDGE; i += 8)
        for (int64_t j = i; j < i + 4; ++j) {
            next[j] = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0x88);
            next[j + 4] = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0xdd);
        }
    for (int64_t j = 0; j < 8; ++j) {
        rows[j] = _mm512_shuffle_i32x4(next[j], next[j + 8], 0x88);
        rows[j + 8] = _mm512_shuffle_i32x4(next[j], next[j + 8], 0xdd);
    }
}

#else

inline bool have_tiles() { return false; }

struct Tiles {
    explicit Tiles(bool) {}
};

#endif

}  // namespace
