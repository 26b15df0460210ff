// Sixteen numbers at once, for CPUs with 512-bit vectors.
#pragma once

#include "scalars.h"

#ifdef __AVX512F__

#include <immintrin.h>

namespace {

constexpr float LOG2_E = 1.44269504f;

inline __m512 load_lanes(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 load_lanes(const bfloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_lanes(float* to, __m512 values) { _mm512_storeu_ps(to, values); }

inline void store_lanes(bfloat16* to, __m512 values) {
#ifdef __AVX512BF16__
    const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
#else
    alignas(64) float each[LANES];
    _mm512_store_ps(each, values);
    for (int64_t i = 0; i < LANES; ++i) store(to[i], each[i]);
#endif
}

// 2^x within 4 units in the last place, 0 where it is less than 2^-126; NaN gives NaN.
inline __m512 power_of_two(__m512 x) {
    const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);
    for (const float factor :
         {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(factor));
    return _mm512_maskz_scalef_ps(counts, y, whole);
}

// exp, by `power_of_two`.
inline __m512 exponential(__m512 x) {
    return power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)));
}

// `silu` of each. A division takes as long as all of the rest.
inline __m512 silu(__m512 x) {
    // min returns its second operand if one is NaN; beyond 2^126 a reciprocal would be 0.
    const __m512 power = _mm512_min_ps(_mm512_set1_ps(126.0f),
                                       _mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
    const __m512 below = _mm512_add_ps(power_of_two(power), _mm512_set1_ps(1.0f));
    const __m512 near = _mm512_rcp14_ps(below);
    const __m512 rest = _mm512_fnmadd_ps(below, near, _mm512_set1_ps(2.0f));
    return _mm512_mul_ps(_mm512_mul_ps(x, near), rest);
}

}  // namespace

#endif

namespace {

// Makes each of the scores exp(score - top), and adds it to the weights; `count` is a multiple of
// LANES.
inline void weigh(float* scores, const float* top, float* weights, int64_t count) {
#ifdef __AVX512F__
    for (int64_t i = 0; i < count; i += LANES) {
        const __m512 weight =
            exponential(_mm512_sub_ps(load_lanes(scores + i), load_lanes(top + i)));
        store_lanes(scores + i, weight);
        store_lanes(weights + i, _mm512_add_ps(load_lanes(weights + i), weight));
    }
#else
    for (int64_t i = 0; i < count; ++i) {
        scores[i] = exponential(scores[i] - top[i]);
        weights[i] += scores[i];
    }
#endif
}

}  // namespace
