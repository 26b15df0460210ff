// Products of float32 with weights as they are, [out, in]. Few rows go along the weights by vectors.
// More are multiplied by the CPU's matrix tiles, which take bfloat16: a number of float32 is the sum
// of three of these, and the three smallest of the nine products of two such sums are too small for
// float32. (As "BF16x9" in cuBLAS, or Henry, Tang and Heinecke 2019, arXiv 1904.06376.)
#pragma once

#include <algorithm>
#include <cstdint>

#include "buffers.h"
#include "product.h"
#include "tiles.h"

namespace {

#ifdef REFT_TILES

constexpr int64_t PIECES = 3;     // numbers of bfloat16 whose sum is one of float32
constexpr int64_t FEW_ROWS = 12;  // of so many, weights take longer to read than to use

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

inline void load_weights(const Tile* two) {
    _tile_loadd(4, two[0], 64);
    _tile_loadd(5, two[1], 64);
}

template <bool BOTH>
inline void load_rows(const Tile* two) {
    _tile_loadd(6, two[0], 64);
    if constexpr (BOTH) _tile_loadd(7, two[1], 64);
}

// How `multiply_many` makes tiles of float32: [PIECES][2] of DEEP numbers of SQUARE rows or weights.
class FloatTiles {
  public:
    using Number = float;
    static constexpr int64_t EACH = 2 * PIECES;

    // What fits the first cache, or what spares more sums than it costs.
    static int64_t depth(int64_t blocks) { return blocks <= FEW_BLOCKS ? SHALLOW : DEPTH; }

    static void pack(const float* rows, int64_t count, int64_t in, int64_t at, Tile* to) {
        split_rows(rows, count, in, at, to, 2);
    }

    void take(const float* weight, int64_t used, int64_t in, int64_t at, int64_t count) {
        count_ = count;
        for (int64_t i = 0; i < SQUARE; ++i)
            for (int64_t k = 0; k < count; ++k) {
                const int64_t from = at + k * DEEP;
                split_some(weight + (i < used ? i * in + from : 0), i < used ? in - from : 0,
                           pieces_[k * EACH + i / EDGE] + i % EDGE * DEEP, 2 * TILE_NUMBERS);
            }
    }

    // What is small comes first: it is rounded where sums are small.
    template <bool BOTH>
    void multiply(const Tile* rows, const Ahead<float>& ahead) const {
        settle();
        for (int64_t i = 0; i < count_; ++i) {
            const Tile *w = pieces_ + i * EACH, *r = rows + i * EACH;
            ahead(i);
            load_weights(w);
            load_rows<BOTH>(r + 4);
            multiply_tiles<BOTH>();
            load_rows<BOTH>(r + 2);
            multiply_tiles<BOTH>();
            load_weights(w + 2);
            multiply_tiles<BOTH>();
            load_rows<BOTH>(r);
            multiply_tiles<BOTH>();
            load_weights(w + 4);
            multiply_tiles<BOTH>();
        }
        for (int64_t i = 0; i < count_; ++i) {
            load_weights(pieces_ + i * EACH);
            load_rows<BOTH>(rows + i * EACH);
            multiply_tiles<BOTH>();
        }
    }

    static void write(const float* sums, const float* bias, float* out, int64_t count,
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

  private:
    static constexpr int64_t SHALLOW = 4, DEPTH = 24, FEW_BLOCKS = 4;

    alignas(64) Tile pieces_[EACH * DEPTH];
    int64_t count_ = 0;
};

#endif

// `out` [count, outs] = `rows` [count, in] times the weight [outs, in] transposed, plus the bias if
// there is one. Returns whether it could be computed: not without tiles, nor without memory.
inline bool multiply(const float* rows, int64_t count, const float* weight, const float* bias,
                     float* out, int64_t in, int64_t outs, int threads) {
#ifdef REFT_TILES
    if (!have_tiles()) return false;
    if (count <= FEW_ROWS) return multiply_few(rows, count, weight, bias, out, in, outs, threads);
    return multiply_many<FloatTiles>(rows, count, weight, bias, out, in, outs, threads);
#else
    return false;
#endif
}

}  // namespace
