// Products of bfloat16 by the CPU's matrix tiles, with weights as they are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "product.h"
#include "tiles.h"

namespace {

#ifdef REFT_TILES

// Up to DEEP numbers, or zero.
inline __m512i load_line(const bfloat16* from, int64_t count) {
    const auto mask = count >= DEEP ? ~0u : (1u << std::max<int64_t>(count, 0)) - 1;
    return _mm512_maskz_loadu_epi16(mask, from);
}

// How `multiply_many` makes tiles of bfloat16. Those of weights are where the weights are.
class BFloat16Tiles {
  public:
    using Number = bfloat16;
    static constexpr int64_t EACH = 2;

    // A single block of rows waits for memory; the weights of more stay in the first cache.
    static int64_t depth(int64_t blocks) { return blocks == 1 ? SHALLOW : DEPTH; }

    // Two numbers of every row are in each of a tile's rows.
    static void pack(const bfloat16* rows, int64_t count, int64_t in, int64_t at, Tile* to) {
        __m512i lines[EDGE];
        for (int64_t i = 0; i < EDGE; ++i)
            lines[i] = i < count ? load_line(rows + i * in + at, in - at) : _mm512_setzero_si512();
        transpose(lines);
        for (int64_t i = 0; i < EDGE; ++i) _mm512_store_si512(*to + i * DEEP, lines[i]);
    }

    void take(const bfloat16* weight, int64_t used, int64_t in, int64_t at, int64_t count) {
        count_ = count;
        if (used == SQUARE && at + count * DEEP <= in) {
            upper_ = weight + at, lower_ = upper_ + EDGE * in;
            between_ = DEEP, stride_ = in * sizeof(bfloat16);
            return;
        }
        for (int64_t i = 0; i < SQUARE; ++i)
            for (int64_t k = 0; k < count; ++k) {
                const int64_t from = at + k * DEEP;
                _mm512_store_si512(edge_[2 * k + i / EDGE] + i % EDGE * DEEP,
                                   i < used ? load_line(weight + i * in + from, in - from)
                                            : _mm512_setzero_si512());
            }
        upper_ = edge_[0], lower_ = edge_[1];
        between_ = 2 * TILE_NUMBERS, stride_ = DEEP * sizeof(bfloat16);
    }

    template <bool BOTH>
    void multiply(const Tile* rows, const Ahead<bfloat16>& ahead) const {
        settle();
        for (int64_t i = 0; i < count_; ++i) {
            ahead(i);
            _tile_loadd(4, upper_ + i * between_, stride_);
            _tile_loadd(5, lower_ + i * between_, stride_);
            _tile_stream_loadd(6, rows[2 * i], 64);
            if constexpr (BOTH) _tile_stream_loadd(7, rows[2 * i + 1], 64);
            multiply_tiles<BOTH>();
        }
    }

    static void write(const float* sums, const bfloat16* bias, bfloat16* out, int64_t count,
                      int64_t used, int64_t outs) {
        alignas(64) static constexpr uint16_t IN_TURN[] = {
            0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i in_turn = _mm512_load_si512(IN_TURN);
        const auto mask = used == SQUARE ? ~0u : (1u << used) - 1;
        for (int64_t t = 0; t < count; t += EDGE) {
            __m512i lines[EDGE];  // each with two outputs of every row, and then a row each
            for (int64_t i = 0; i < EDGE; ++i) {
                __m512 both[2];
                for (int64_t j = 0; j < 2; ++j) {
                    const int64_t n = 2 * i + j;
                    both[j] = _mm512_load_ps(sums + n * SQUARE + t);
                    if (bias && n < used)
                        both[j] = _mm512_add_ps(both[j], _mm512_set1_ps(load(bias[n])));
                }
                const __m512bh rounded = _mm512_cvtne2ps_pbh(both[1], both[0]);
                lines[i] = _mm512_permutexvar_epi16(in_turn, reinterpret_cast<__m512i>(rounded));
            }
            transpose(lines);
            for (int64_t i = 0; i < std::min(EDGE, count - t); ++i)
                _mm512_mask_storeu_epi16(out + (t + i) * outs, mask, lines[i]);
        }
    }

  private:
    static constexpr int64_t SHALLOW = 6, DEPTH = 9;

    alignas(64) Tile edge_[2 * DEPTH];
    const bfloat16 *upper_ = nullptr, *lower_ = nullptr;
    int64_t count_ = 0, between_ = 0, stride_ = 0;
};

#endif

// As `multiply` of float32.
inline bool multiply(const bfloat16* rows, int64_t count, const bfloat16* weight,
                     const bfloat16* bias, bfloat16* out, int64_t in, int64_t outs, int threads) {
#ifdef REFT_TILES
    return have_tiles() &&
           multiply_many<BFloat16Tiles>(rows, count, weight, bias, out, in, outs, threads);
#else
    return false;
#endif
}

}  // namespace
