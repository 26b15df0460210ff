// Products of float32 with weights as they are, [out, in]. Few rows go along the weights by vectors.
// More are multiplied by the CPU's matrix tiles, which take bfloat16: a number of float32 is the sum
// of three of these, and the three smallest of the nine products of two such sums are too small for
// float32. (As "BF16x9" in cuBLAS, or Henry, Tang and Heinecke 2019, arXiv 1904.06376.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "tiles.h"

namespace {

template <typename T>
using Buffer = std::unique_ptr<T[], decltype(&std::free)>;

// Room for so many; null if there is none.
template <typename T>
Buffer<T> make_buffer(int64_t count) {
    return {static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)), std::free};
}

#ifdef REFT_TILES

constexpr int64_t PIECES = 3;          // numbers of bfloat16 whose sum is one of float32
constexpr int64_t TILE_NUMBERS = 512;  // numbers of bfloat16 in a tile
constexpr int64_t DEEP = 32;           // of them in a row
constexpr int64_t HELD_BLOCKS = 12;    // blocks of rows whose sums are held at once
constexpr int64_t FEW_ROWS = 12;       // of so many, weights take longer to read than to use

// Tiles along the inner width of weights that are in pieces at the same time: what fits the first
// cache, or what spares more sums than it costs where there are more than FEW_BLOCKS of rows.
constexpr int64_t SHALLOW = 4, DEPTH = 24, FEW_BLOCKS = 4;

using Tile = bfloat16[TILE_NUMBERS];

// Has the cache read the line `numbers` behind `from`, which may be beyond the end. Weights are
// read in strips, which the CPU does not foresee: products of few rows take a third longer without.
inline void fetch(const float* from, int64_t numbers) {
    const auto at = reinterpret_cast<uintptr_t>(from) + numbers * sizeof(float);
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}

// Writes the pieces of 32 numbers, `between` numbers apart: the nearest bfloat16, the nearest to
// what is left, and the rest. In a row of a tile the first of `lower` is beside that of `upper`.
// Tiles take no denormals, so that numbers below 2^-110 lose digits; from 3.39e38 on they are NaN.
inline void split(__m512 lower, __m512 upper, bfloat16* to, int64_t between) {
    const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(~0xffff);
    const auto nearest = [&](__m512 x) {
        return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), high);
    };
    for (int64_t piece = 0; piece < PIECES; ++piece) {
        const bool last = piece == PIECES - 1;
        const __m512i a = last ? _mm512_castps_si512(lower) : nearest(lower);
        const __m512i b = last ? _mm512_castps_si512(upper) : nearest(upper);
        // The upper halves of both: b & high | a >> 16.
        const __m512i both = _mm512_ternarylogic_epi32(b, high, _mm512_srli_epi32(a, 16), 0xea);
        _mm512_store_si512(to + piece * between, both);
        lower = _mm512_sub_ps(lower, _mm512_castsi512_ps(a));
        upper = _mm512_sub_ps(upper, _mm512_castsi512_ps(b));
    }
}

// Splits up to DEEP numbers; zero stands for those from `count` on.
inline void split_some(const float* from, int64_t count, bfloat16* to, int64_t between) {
    if (count >= DEEP) {
        split(_mm512_loadu_ps(from), _mm512_loadu_ps(from + EDGE), to, between);
        return;
    }
    const auto mask = (1u << std::max<int64_t>(count, 0)) - 1;
    split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from),
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> EDGE), from + EDGE), to, between);
}

// The pieces of 16 rows as right sides of products: [PIECES], `between` tiles apart, each with two
// numbers of every row in each of its rows. Zero stands for rows from `count` on.
inline void split_rows(const float* rows, int64_t count, int64_t in, int64_t from, Tile* to,
                       int64_t between) {
    alignas(64) bfloat16 split_up[PIECES][EDGE][DEEP] = {};
    for (int64_t i = 0; i < std::min(count, EDGE); ++i)
        split_some(rows + i * in + from, in - from, split_up[0][i], TILE_NUMBERS);
    for (int64_t piece = 0; piece < PIECES; ++piece) {
        __m512i lines[EDGE];
        for (int64_t i = 0; i < EDGE; ++i) lines[i] = _mm512_load_si512(split_up[piece][i]);
        transpose(lines);
        for (int64_t i = 0; i < EDGE; ++i)
            _mm512_store_si512(to[piece * between] + i * DEEP, lines[i]);
    }
}

inline void load_weights(const Tile* two) {
    _tile_loadd(4, two[0], 64);
    _tile_loadd(5, two[1], 64);
}

inline void load_rows(const Tile* two) {
    _tile_loadd(6, two[0], 64);
    _tile_loadd(7, two[1], 64);
}

// Adds products of `count` times DEEP numbers of SQUARE outputs and SQUARE rows to tiles 0 to 3:
// `weights` and `rows` have [count][PIECES][2] tiles. What is small comes first: it is rounded where
// sums are small. Meanwhile the numbers `ahead` of as many weights are fetched, if there are any.
inline void multiply_block(const Tile* weights, const Tile* rows, int64_t count, const float* ahead,
                           int64_t in) {
    constexpr int64_t NEXT = 2 * PIECES;
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < (ahead ? SQUARE : 0); ++j) {
            fetch(ahead, j * in + i * DEEP);
            fetch(ahead, j * in + i * DEEP + EDGE);
        }
        const Tile *w = weights + i * NEXT, *r = rows + i * NEXT;
        load_weights(w);
        load_rows(r + 4);
        multiply_tiles();
        load_rows(r + 2);
        multiply_tiles();
        load_weights(w + 2);
        multiply_tiles();
        load_rows(r);
        multiply_tiles();
        load_weights(w + 4);
        multiply_tiles();
    }
    for (int64_t i = 0; i < count; ++i) {
        load_weights(weights + i * NEXT);
        load_rows(rows + i * NEXT);
        multiply_tiles();
    }
}

// Writes sums [SQUARE outputs][SQUARE rows] to `out` [count][outs], plus the bias if there is one.
inline void write_block(const float* sums, const float* bias, float* out, int64_t count,
                        int64_t outputs, int64_t outs) {
    for (int64_t n = 0; n < outputs; n += EDGE) {
        const auto mask = static_cast<__mmask16>((1u << std::min(EDGE, outputs - n)) - 1);
        const __m512 more = bias ? _mm512_maskz_loadu_ps(mask, bias + n) : _mm512_setzero_ps();
        for (int64_t t = 0; t < count; t += EDGE) {
            __m512i lines[EDGE];
            for (int64_t i = 0; i < EDGE; ++i)
                lines[i] = _mm512_load_si512(sums + (n + i) * SQUARE + t);
            transpose(lines);
            for (int64_t i = 0; i < std::min(EDGE, count - t); ++i)
                _mm512_mask_storeu_ps(out + (t + i) * outs + n, mask,
                                      _mm512_add_ps(_mm512_castsi512_ps(lines[i]), more));
        }
    }
}

// Rows by vectors, TOGETHER outputs at a time; `lanes` has LANES numbers of each row, then the next.
template <int64_t ROWS>
void multiply_few(const __m512* lanes, const float* weight, const float* bias, float* out,
                  int64_t in, int64_t outs, int threads) {
    constexpr int64_t TOGETHER = ROWS <= 4 ? 4 : ROWS <= 8 ? 3 : 2;
    const int64_t whole = in / LANES;
    const auto rest = static_cast<__mmask16>((1u << in % LANES) - 1);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < outs; n += TOGETHER) {
        const int64_t used = std::min(TOGETHER, outs - n);
        const float* from[TOGETHER];
        for (int64_t j = 0; j < TOGETHER; ++j) from[j] = weight + (n + std::min(j, used - 1)) * in;
        __m512 sums[ROWS][TOGETHER] = {};
        const auto add = [&](int64_t k, const auto& numbers) {
            __m512 w[TOGETHER];
#pragma GCC unroll 4
            for (int64_t j = 0; j < TOGETHER; ++j) {
                w[j] = numbers(from[j] + k * LANES);
                fetch(from[j], k * LANES + TOGETHER * in);
            }
#pragma GCC unroll 12
            for (int64_t m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
                for (int64_t j = 0; j < TOGETHER; ++j)
                    sums[m][j] = _mm512_fmadd_ps(w[j], lanes[k * ROWS + m], sums[m][j]);
        };
        for (int64_t k = 0; k < whole; ++k) add(k, [](const float* w) { return load_lanes(w); });
        if (rest) add(whole, [&](const float* w) { return _mm512_maskz_loadu_ps(rest, w); });
        for (int64_t m = 0; m < ROWS; ++m)
            for (int64_t j = 0; j < used; ++j)
                out[m * outs + n + j] = _mm512_reduce_add_ps(sums[m][j]) + (bias ? bias[n + j] : 0);
    }
}

template <int64_t ROWS = FEW_ROWS>
void multiply_few(int64_t count, const __m512* lanes, const float* weight, const float* bias,
                  float* out, int64_t in, int64_t outs, int threads) {
    if constexpr (ROWS > 0) {
        if (count == ROWS)
            multiply_few<ROWS>(lanes, weight, bias, out, in, outs, threads);
        else
            multiply_few<ROWS - 1>(count, lanes, weight, bias, out, in, outs, threads);
    }
}

// The product of up to FEW_ROWS rows; returns whether there was memory for it.
inline bool multiply_few(const float* rows, int64_t count, const float* weight, const float* bias,
                         float* out, int64_t in, int64_t outs, int threads) {
    const int64_t vectors = (in + LANES - 1) / LANES;
    const auto lanes = make_buffer<__m512>(vectors * count);  // [vectors][count]
    if (!lanes) return false;
    for (int64_t m = 0; m < count; ++m)
        for (int64_t k = 0; k < vectors; ++k) {
            const auto mask = static_cast<__mmask16>((1u << std::min(LANES, in - k * LANES)) - 1);
            lanes[k * count + m] = _mm512_maskz_loadu_ps(mask, rows + m * in + k * LANES);
        }
    multiply_few(count, lanes.get(), weight, bias, out, in, outs, threads);
    return true;
}

// Pieces of SQUARE weights, [count][PIECES][2] tiles: `count` times DEEP numbers from `at` on. Zero
// stands for weights from `used` on.
inline void split_weights(const float* weight, int64_t used, int64_t in, int64_t at, int64_t count,
                          Tile* to) {
    for (int64_t i = 0; i < SQUARE; ++i)
        for (int64_t k = 0; k < count; ++k) {
            const int64_t from = at + k * DEEP;
            split_some(weight + (i < used ? i * in + from : 0), i < used ? in - from : 0,
                       to[k * 2 * PIECES + i / EDGE] + i % EDGE * DEEP, 2 * TILE_NUMBERS);
        }
}

// The product of any number of rows; returns whether there was memory for it.
inline bool multiply_many(const float* rows, int64_t count, const float* weight, const float* bias,
                          float* out, int64_t in, int64_t outs, int threads) {
    constexpr int64_t NEXT = 2 * PIECES;
    const int64_t deep = (in + DEEP - 1) / DEEP, blocks = (count + SQUARE - 1) / SQUARE;
    const int64_t depth = blocks <= FEW_BLOCKS ? SHALLOW : DEPTH;
    const auto room = make_buffer<Tile>(blocks * deep * NEXT);
    if (!room) return false;
    Tile* const in_pieces = room.get();  // [blocks][deep][PIECES][2]
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < blocks * deep * 2; ++i) {
            const int64_t block = i / (2 * deep), at = i / 2 % deep, half = i % 2;
            const int64_t first = block * SQUARE + half * EDGE;
            split_rows(rows + std::min(first, count - 1) * in, count - first, in, at * DEEP,
                       in_pieces + (block * deep + at) * NEXT + half, 2);
        }
        alignas(64) Tile pieces[NEXT * DEPTH];
        alignas(64) float sums[HELD_BLOCKS][SQUARE * SQUARE];
        const Tiles tiles(true);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < outs; n += SQUARE)
            for (int64_t group = 0; group < blocks; group += HELD_BLOCKS) {
                const int64_t used = std::min(SQUARE, outs - n);
                const int64_t last = std::min(blocks, group + HELD_BLOCKS);
                const bool kept = last == group + 1;  // in tiles 0 to 3 until the end
                for (int64_t at = 0; at < deep; at += depth) {
                    const int64_t next = at + depth;
                    const float* ahead = weight + n * in + (next < deep ? next * DEEP : 0);
                    if (next >= deep) ahead = n + SQUARE < outs ? ahead + SQUARE * in : nullptr;
                    split_weights(weight + n * in, used, in, at * DEEP, std::min(depth, deep - at),
                                  pieces);
                    for (int64_t b = group; b < last; ++b) {
                        float* sum = sums[b - group];
                        if (!at)
                            zero_tiles();
                        else if (!kept)
                            load_tiles(sum);
                        multiply_block(pieces, in_pieces + (b * deep + at) * NEXT,
                                       std::min(depth, deep - at), b == group ? ahead : nullptr,
                                       in);
                        if (!kept || next >= deep) store_tiles(sum);
                    }
                }
                for (int64_t b = group; b < last; ++b)
                    write_block(sums[b - group], bias ? bias + n : nullptr,
                                out + b * SQUARE * outs + n, std::min(SQUARE, count - b * SQUARE),
                                used, outs);
            }
    }
    return true;
}

#endif

// `out` [count, outs] = `rows` [count, in] times the weight [outs, in] transposed, plus the bias if
// there is one. Returns whether it could be computed: not without tiles, nor without memory.
inline bool float_product(const float* rows, int64_t count, const float* weight, const float* bias,
                          float* out, int64_t in, int64_t outs, int threads) {
#ifdef REFT_TILES
    if (!have_tiles()) return false;
    if (count <= FEW_ROWS) return multiply_few(rows, count, weight, bias, out, in, outs, threads);
    return multiply_many(rows, count, weight, bias, out, in, outs, threads);
#else
    return false;
#endif
}

}  // namespace
