// Products by the CPU's matrix tiles with weights as they are, [out, in]. Weights are left sides,
// and rows right sides: sums have a row per output.
#pragma once

#include <algorithm>
#include <cstdint>

#include "buffers.h"
#include "tiles.h"

namespace {

#ifdef REFT_TILES

constexpr int64_t HELD_BLOCKS = 12;  // blocks of rows whose sums are held at once

// Has the cache read the line `numbers` behind `from`, which may be beyond the end. Weights are
// read in strips, which the CPU does not foresee: products of few rows take a third longer without.
template <typename T>
inline void fetch(const T* from, int64_t numbers) {
    const auto at = reinterpret_cast<uintptr_t>(from) + numbers * sizeof(T);
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}

// Weights that are fetched while others are multiplied.
template <typename T>
struct Ahead {
    const T* from;  // null if there are none
    int64_t first, last, in;

    // Fetches DEEP numbers, the i-th so many, of the weights `first` to `last`.
    void operator()(int64_t i) const {
        constexpr int64_t LINE = 64 / sizeof(T);
        for (int64_t j = first; j < (from ? last : 0); ++j)
            for (int64_t k = 0; k < DEEP; k += LINE) fetch(from, j * in + i * DEEP + k);
    }
};

// The product of any number of rows; returns whether there was memory for it. `Side` makes tiles of
// numbers, EACH of those of DEEP numbers of SQUARE rows:
//   `pack` writes those of EDGE rows, every second;
//   `take` takes so many of the tiles of up to SQUARE weights, and `multiply` adds products with
//   them to tiles 0 to 3, or to 0 and 2 alone if there are EDGE rows at most; `depth` is how many
//   are taken at once;
//   `write` writes sums [SQUARE outputs][SQUARE rows] to an output, plus the bias if there is one.
// Zero stands for what is behind the end of rows and weights.
template <typename Side, typename T = typename Side::Number>
bool multiply_many(const T* rows, int64_t count, const T* weight, const T* bias, T* out, int64_t in,
                   int64_t outs, int threads) {
    constexpr int64_t EACH = Side::EACH;
    const int64_t deep = (in + DEEP - 1) / DEEP, blocks = (count + SQUARE - 1) / SQUARE;
    const int64_t most = Side::depth(blocks), parts = (deep + most - 1) / most;
    const int64_t depth = (deep + parts - 1) / parts;
    const auto room = make_buffer<Tile>(blocks * deep * EACH);
    if (!room) return false;
    Tile* const packed = room.get();  // [blocks][deep][EACH]
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < blocks * deep * 2; ++i) {
            const int64_t first = i / (2 * deep) * SQUARE + i % 2 * EDGE;
            Side::pack(rows + std::min(first, count - 1) * in, count - first, in,
                       i / 2 % deep * DEEP, packed + i / 2 * EACH + i % 2);
        }
        Side side;
        alignas(64) float sums[HELD_BLOCKS][SQUARE * SQUARE];
        const Tiles tiles(true);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < outs; n += SQUARE)
            for (int64_t group = 0; group < blocks; group += HELD_BLOCKS) {
                const int64_t used = std::min(SQUARE, outs - n);
                const int64_t held = std::min(HELD_BLOCKS, blocks - group);
                const T* strip = weight + n * in;
                for (int64_t at = 0; at < deep; at += depth) {
                    const int64_t next = at + depth;
                    const T* ahead = strip + (next < deep ? next * DEEP : SQUARE * in);
                    if (next >= deep && n + SQUARE >= outs) ahead = nullptr;
                    side.take(strip, used, in, at * DEEP, std::min(depth, deep - at));
                    for (int64_t b = 0; b < held; ++b) {
                        if (!at)
                            zero_tiles();
                        else if (held > 1)  // sums of a single block stay where they are
                            load_tiles(sums[b]);
                        const Tile* block = packed + ((group + b) * deep + at) * EACH;
                        const Ahead<T> more{ahead, b * SQUARE / held, (b + 1) * SQUARE / held, in};
                        if (count - (group + b) * SQUARE > EDGE)
                            side.template multiply<true>(block, more);
                        else
                            side.template multiply<false>(block, more);
                        if (held > 1 || next >= deep) store_tiles(sums[b]);
                    }
                }
                for (int64_t b = 0; b < held; ++b) {
                    const int64_t first = (group + b) * SQUARE;
                    Side::write(sums[b], bias ? bias + n : nullptr, out + first * outs + n,
                                std::min(SQUARE, count - first), used, outs);
                }
            }
    }
    return true;
}

#endif

}  // namespace
