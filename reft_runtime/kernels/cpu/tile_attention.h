// Attention of prompts in bfloat16 by the CPU's matrix tiles (AMX): scores, and sums of values, are
// products of tiles of 16 x 32 and 32 x 16 numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "decode_attention.h"
#include "tiles.h"
#include "vectors.h"

namespace {

constexpr int64_t QUERIES = 32;  // tokens of a head that go over the keys together
constexpr int64_t STEP = 32;     // keys of a product of tiles

// Values of STEP keys from `values` on as the left side of a product, [width][STEP]; those from
// `count` on are zero.
template <typename T>
void pack_values(const T* values, int64_t row, int64_t count, int64_t width, T* to) {
    for (int64_t d = 0; d < width; ++d)
        for (int64_t j = 0; j < STEP; ++j) to[d * STEP + j] = j < count ? values[j * row + d] : T{};
}

#ifdef REFT_TILES

constexpr int64_t SPAN = 256;  // keys that are scored before their values are summed

// Pairs of bfloat16, one of the lower ones and one of the upper ones in each.
inline __m512i pairs(__m512 lower, __m512 upper) {
    const auto wide = [](__m512 x) {
        return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    };
    return _mm512_or_si512(wide(lower), _mm512_slli_epi32(wide(upper), 16));
}

// Attention of up to QUERIES tokens of one head from `position` on. `keys` are those of the head
// from position 0 on; `packed` are the values from position `packed_from` on, a multiple of STEP,
// by `pack_values`. Scores have a row per key and a column per token. Widths are multiples of 32.
inline void attend_by_tiles(const bfloat16* query, const bfloat16* keys, const bfloat16* packed,
                            bfloat16* out, int64_t tokens, const Widths& widths,
                            int64_t query_stride, int64_t out_stride, int64_t position,
                            int64_t packed_from, const Scoring& scoring, const float* sink) {
    constexpr float NOTHING = -std::numeric_limits<float>::infinity();
    constexpr int64_t HALF = QUERIES / 2, CHUNK = 32;
    alignas(64) float scores[SPAN * QUERIES], sums[MAX_DIM * QUERIES];
    alignas(64) bfloat16 queries[MAX_DIM * QUERIES], last_keys[STEP * MAX_DIM];
    alignas(64) bfloat16 weights[SPAN * QUERIES];
    const int64_t dim = widths.key, width = widths.value;
    const int64_t window = scoring.window, chunk = scoring.chunk;
    const int64_t last = position + tokens - 1;
    const __m512i columns = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // The right sides of products: a row of each tile has two numbers of each token.
    const __m512i by_token = _mm512_mullo_epi32(
        columns, _mm512_set1_epi32(static_cast<int32_t>(query_stride * sizeof(bfloat16))));
    for (int64_t half = 0; half < 2; ++half) {
        const int64_t used = std::clamp<int64_t>(tokens - half * HALF, 0, HALF);
        const auto here = static_cast<__mmask16>((1u << used) - 1);
        const bfloat16* from = query + half * HALF * query_stride;
        for (int64_t i = 0; i < dim; i += 2)
            _mm512_store_si512(
                queries + i / CHUNK * CHUNK * QUERIES + (half * HALF + i % CHUNK / 2) * CHUNK,
                _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), here, by_token, from + i, 1));
    }
    std::fill_n(sums, width * QUERIES, 0.0f);
    const __m512 scale = _mm512_set1_ps(scoring.scale * LOG2_E), none = _mm512_set1_ps(NOTHING);
    // Of scores times `scale`: exponentials are powers of two.
    __m512 largest[2], weight[2];
    for (int64_t half = 0; half < 2; ++half) {
        largest[half] = sink ? _mm512_set1_ps(*sink * LOG2_E) : none;
        weight[half] = _mm512_set1_ps(sink ? 1.0f : 0.0f);
    }
    for (int64_t start = scoring.first(position) / STEP * STEP; start <= last; start += SPAN) {
        const int64_t count = std::min(SPAN, last + 1 - start);
        const int64_t rows = (count + STEP - 1) / STEP * STEP;
        for (int64_t j = 0; j < rows; j += STEP) {
            const bfloat16* k = keys + (start + j) * dim;
            if (j + STEP > count) {  // what lies behind the last key is not read
                std::memcpy(last_keys, k, (count - j) * dim * sizeof(bfloat16));
                std::memset(last_keys + (count - j) * dim, 0,
                            (j + STEP - count) * dim * sizeof(bfloat16));
                k = last_keys;
            }
            settle();
            zero_tiles();
            for (int64_t c = 0; c < dim; c += CHUNK) {
                const bfloat16* q = queries + c * QUERIES;
                _tile_loadd(4, k + c, dim * sizeof(bfloat16));
                _tile_loadd(5, k + 16 * dim + c, dim * sizeof(bfloat16));
                _tile_loadd(6, q, 64);
                _tile_loadd(7, q + HALF * CHUNK, 64);
                multiply_tiles();
            }
            store_tiles(scores + j * QUERIES);
        }
        // Key start + j is seen by the tokens from its own position on: `window` of them, and those
        // of its chunk.
        const int64_t beyond = position + QUERIES;
        const bool all_see = start + rows - 1 <= position && (!window || start + window >= beyond) &&
                             (!chunk || start - start % chunk + chunk >= beyond);
        for (int64_t j = 0; j < (all_see ? 0 : rows); ++j) {
            const int64_t at = start + j;
            int64_t stop = window ? at + window : beyond;
            if (chunk) stop = std::min(stop, at - at % chunk + chunk);
            const int64_t from = std::clamp<int64_t>(at - position, 0, QUERIES);
            const int64_t to = std::clamp<int64_t>(stop - position, 0, QUERIES);
            std::fill_n(scores + j * QUERIES, j < count ? from : QUERIES, NOTHING);
            std::fill_n(scores + j * QUERIES + to, QUERIES - to, NOTHING);
        }
        bool shrinks = false;
        __m512 shrink[2];
        __m512 tops[4] = {none, none, none, none};  // of both halves of even rows, then of odd ones
        for (int64_t j = 0; j < rows; j += 2)
            for (int64_t i = 0; i < 4; ++i)
                tops[i] = _mm512_max_ps(_mm512_load_ps(scores + j * QUERIES + i * HALF), tops[i]);
        for (int64_t half = 0; half < 2; ++half) {
            const float* score = scores + half * HALF;
            __m512 top = _mm512_mul_ps(_mm512_max_ps(tops[half], tops[half + 2]), scale);
            top = _mm512_max_ps(top, largest[half]);
            // Where nothing is seen yet, 0: infinities have no difference.
            const __mmask16 blind = _mm512_cmp_ps_mask(top, none, _CMP_EQ_OQ);
            const __m512 safe = _mm512_mask_mov_ps(top, blind, _mm512_setzero_ps());
            shrink[half] = power_of_two(_mm512_sub_ps(largest[half], safe));
            shrinks |= _mm512_cmp_ps_mask(top, largest[half], _CMP_NEQ_UQ) != 0;
            largest[half] = top;
            __m512 sum = _mm512_mul_ps(weight[half], shrink[half]);
            for (int64_t j = 0; j < rows; j += 2) {
                const auto weigh = [&](int64_t row) {
                    const __m512 x = _mm512_load_ps(score + row * QUERIES);
                    return power_of_two(_mm512_fmsub_ps(x, scale, safe));
                };
                const __m512 lower = weigh(j), upper = weigh(j + 1);
                sum = _mm512_add_ps(sum, _mm512_add_ps(lower, upper));
                _mm512_store_si512(weights + j * QUERIES + half * 2 * HALF, pairs(lower, upper));
            }
            weight[half] = sum;
        }
        for (int64_t i = 0; i < (shrinks ? width : 0); ++i)
            for (int64_t half = 0; half < 2; ++half) {
                float* at = sums + i * QUERIES + half * HALF;
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink[half]));
            }
        for (int64_t d = 0; d < width; d += CHUNK) {
            load_tiles(sums + d * QUERIES);
            for (int64_t j = 0; j < rows; j += STEP) {
                const bfloat16* v = packed + (start - packed_from + j) * width + d * STEP;
                const bfloat16* w = weights + j * QUERIES;
                _tile_loadd(4, v, 64);
                _tile_loadd(5, v + 16 * STEP, 64);
                _tile_loadd(6, w, 128);
                _tile_loadd(7, w + 2 * HALF, 128);
                multiply_tiles();
            }
            store_tiles(sums + d * QUERIES);
        }
    }
    alignas(64) float scale_out[QUERIES];
    for (int64_t half = 0; half < 2; ++half)
        _mm512_store_ps(scale_out + half * HALF,
                        _mm512_div_ps(_mm512_set1_ps(1.0f), weight[half]));
    const __m512i by_number = _mm512_slli_epi32(columns, 5);  // QUERIES apart
    for (int64_t n = 0; n < tokens; ++n)
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 sum = _mm512_i32gather_ps(by_number, sums + i * QUERIES + n, sizeof(float));
            store_lanes(out + n * out_stride + i, _mm512_mul_ps(sum, _mm512_set1_ps(scale_out[n])));
        }
}

#else

inline void attend_by_tiles(const bfloat16*, const bfloat16*, const bfloat16*, bfloat16*, int64_t,
                            const Widths&, int64_t, int64_t, int64_t, int64_t, const Scoring&,
                            const float*) {}

#endif

// Whether prompts of these widths may attend by tiles.
template <typename T>
bool takes_tiles(const Widths& widths, const Scoring& scoring) {
    return std::is_same_v<T, bfloat16> && widths.key % 32 == 0 && widths.value % 32 == 0 &&
           !scoring.softcap && scoring.scale > 0 && have_tiles();
}

}  // namespace
