// `attend_group` for CPUs with 512-bit vectors, and heads of whole vectors: the keys' products are
// summed sixteen keys at once, and each value is read once for several query heads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "scalars.h"
#include "vectors.h"

namespace {

// Of both ways to attend token by token.
constexpr int64_t BLOCK = 64;     // positions whose scores are held at once
constexpr int64_t TOGETHER = 16;  // most query heads that go over a key head's keys together

}  // namespace

#ifdef __AVX512F__

namespace {

constexpr int64_t FETCHED = 2048;   // bytes
constexpr int64_t WIDE_SUMS = 16;   // most vectors of sums that are held in registers

// Begins to load what will be read next: after this the CPU's own guesses go on.
inline void fetch_first(const void* from) {
    for (int64_t at = 0; from && at < FETCHED; at += 64)
        __builtin_prefetch(static_cast<const char*>(from) + at);
}

// The sums of each of sixteen vectors, in their order.
inline __m512 sums_of(const __m512* v) {
    __m512 pairs[8], fours[4];
    for (int i = 0; i < 8; ++i)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                                 _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
}

// The scaled products of a query with up to sixteen keys; those beyond `count` are -inf.
template <typename T, int DIM>
inline __m512 scores_of(const T* query, const T* keys, int64_t count, float scale) {
    __m512 products[LANES];
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2 && DIM % 32 == 0) {
        const auto pairs = [](const T* from) { return (__m512bh)_mm512_loadu_si512(from); };
        for (int64_t j = 0; j < LANES; ++j) {
            const T* key = keys + std::min(j, count - 1) * DIM;
            __m512 product = _mm512_setzero_ps();
            for (int64_t i = 0; i < DIM; i += 32)
                product = _mm512_dpbf16_ps(product, pairs(query + i), pairs(key + i));
            products[j] = product;
        }
    } else
#endif
    {
        __m512 q[DIM / LANES];
        for (int64_t i = 0; i < DIM / LANES; ++i) q[i] = load_lanes(query + i * LANES);
        for (int64_t j = 0; j < LANES; ++j) {
            const T* key = keys + std::min(j, count - 1) * DIM;
            __m512 product = _mm512_mul_ps(q[0], load_lanes(key));
            for (int64_t i = 1; i < DIM / LANES; ++i)
                product = _mm512_fmadd_ps(q[i], load_lanes(key + i * LANES), product);
            products[j] = product;
        }
    }
    const __mmask16 seen = static_cast<__mmask16>((1u << count) - 1);
    return _mm512_mask_blend_ps(seen, _mm512_set1_ps(-std::numeric_limits<float>::infinity()),
                                _mm512_mul_ps(sums_of(products), _mm512_set1_ps(scale)));
}

// Adds values [count, DIM], times the weights [HEADS, BLOCK], to sums [HEADS, DIM] that are
// first made smaller by `shrink`.
template <typename T, int DIM, int HEADS>
inline void add_values(const T* values, const float* weights, const float* shrink, float* sums,
                       int64_t count) {
    constexpr int64_t VECTORS = DIM / LANES;
    __m512 sum[HEADS][VECTORS];
    for (int64_t h = 0; h < HEADS; ++h)
        for (int64_t i = 0; i < VECTORS; ++i)
            sum[h][i] = _mm512_mul_ps(_mm512_loadu_ps(sums + h * DIM + i * LANES),
                                      _mm512_set1_ps(shrink[h]));
    for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; i < VECTORS; ++i) {
            const __m512 value = load_lanes(values + j * DIM + i * LANES);
            for (int64_t h = 0; h < HEADS; ++h)
                sum[h][i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[h * BLOCK + j]), value,
                                            sum[h][i]);
        }
    for (int64_t h = 0; h < HEADS; ++h)
        for (int64_t i = 0; i < VECTORS; ++i)
            _mm512_storeu_ps(sums + h * DIM + i * LANES, sum[h][i]);
}

template <typename T, int DIM>
inline void add_all_values(const T* values, const float* weights, const float* shrink, float* sums,
                           int64_t group, int64_t count) {
    constexpr int64_t MOST = std::max<int64_t>(1, WIDE_SUMS * LANES / DIM);
    for (int64_t h = 0; h < group;) {
        const auto add = [&](auto heads) {
            constexpr int HEADS = decltype(heads)::value;
            add_values<T, DIM, HEADS>(values, weights + h * BLOCK, shrink + h, sums + h * DIM,
                                      count);
            h += HEADS;
        };
        const int64_t left = group - h;
        if (MOST >= 4 && left >= 4) add(std::integral_constant<int, MOST >= 4 ? 4 : 1>());
        else if (MOST >= 3 && left == 3) add(std::integral_constant<int, MOST >= 3 ? 3 : 1>());
        else if (MOST >= 2 && left >= 2) add(std::integral_constant<int, MOST >= 2 ? 2 : 1>());
        else add(std::integral_constant<int, 1>());
    }
}

// See `attend_group`; keys and values are DIM wide. `next` are the keys that will be scored after
// these, null if none will.
template <typename T, int DIM>
void attend_group_wide(const T* query, const T* keys, const T* values, T* out, int64_t group,
                       int64_t first, int64_t last, float scale, float softcap,
                       const float* sinks, const T* next) {
    float sums[TOGETHER * DIM], scores[TOGETHER * BLOCK];
    float largest[TOGETHER], weights[TOGETHER], shrink[TOGETHER];
    std::fill_n(sums, group * DIM, 0.0f);
    for (int64_t g = 0; g < group; ++g) {
        largest[g] = sinks ? sinks[g] : -std::numeric_limits<float>::infinity();
        weights[g] = sinks ? 1 : 0;
    }
    for (int64_t start = first; start <= last; start += BLOCK) {
        const int64_t count = std::min(BLOCK, last + 1 - start);
        fetch_first(values + start * DIM);
        for (int64_t g = 0; g < group; ++g) {
            float* row = scores + g * BLOCK;
            __m512 top = _mm512_set1_ps(largest[g]);
            for (int64_t j = 0; j < count; j += LANES) {
                __m512 score = scores_of<T, DIM>(query + g * DIM, keys + (start + j) * DIM,
                                                 std::min(LANES, count - j), scale);
                _mm512_storeu_ps(row + j, score);
                if (softcap) {
                    for (int64_t i = j; i < std::min(count, j + LANES); ++i)
                        row[i] = capped(row[i], softcap);
                    score = _mm512_loadu_ps(row + j);
                }
                top = _mm512_max_ps(top, score);  // a NaN is seen in the weights
            }
            const float most = _mm512_reduce_max_ps(top);
            const int64_t padded = (count + LANES - 1) / LANES * LANES;
            shrink[g] = exponential(largest[g] - most);
            __m512 weight = _mm512_setzero_ps();
            for (int64_t j = 0; j < padded; j += LANES) {
                const __m512 weighed =
                    exponential(_mm512_sub_ps(load_lanes(row + j), _mm512_set1_ps(most)));
                store_lanes(row + j, weighed);
                weight = _mm512_add_ps(weight, weighed);
            }
            largest[g] = most;
            weights[g] = weights[g] * shrink[g] + _mm512_reduce_add_ps(weight);
        }
        fetch_first(start + BLOCK <= last ? keys + (start + BLOCK) * DIM : next);
        add_all_values<T, DIM>(values + start * DIM, scores, shrink, sums, group, count);
    }
    for (int64_t g = 0; g < group; ++g) {
        const float scale_out = 1.0f / weights[g];
        for (int64_t i = 0; i < DIM; ++i) store(out[g * DIM + i], sums[g * DIM + i] * scale_out);
    }
}

}  // namespace

#endif
