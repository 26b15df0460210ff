// Norms, the gated activation, rotary positions, and the largest element of a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "scalars.h"
#include "vectors.h"

namespace {

// 1 / the root mean square of a row.
template <typename T>
float by_length(const T* x, int64_t width, float epsilon) {
    float sum = 0;
    for (int64_t i = 0; i < width; ++i) {
        const float value = load(x[i]);
        sum += value * value;
    }
    return 1.0f / std::sqrt(sum / static_cast<float>(width) + epsilon);
}

template <typename T>
void norm_row(const T* x, const T* weight, T* out, int64_t width, float epsilon) {
    const float scale = by_length(x, width, epsilon);
    for (int64_t i = 0; i < width; ++i) {
        T normal;  // rounded before the weight is applied, as most models do
        store(normal, load(x[i]) * scale);
        store(out[i], load(normal) * load(weight[i]));
    }
}

// `once`: nothing is rounded before the weight is applied. `from_one`: neither, and the weight is
// how far a factor is from one.
template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float epsilon,
              int once, int from_one, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SERIAL)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * width;
        if (!once && !from_one) {
            norm_row(x + at, weight, out + at, width, epsilon);
            continue;
        }
        const float scale = by_length(x + at, width, epsilon), from = from_one ? 1.0f : 0.0f;
        for (int64_t i = 0; i < width; ++i)
            store(out[at + i], load(x[at + i]) * scale * (from + load(weight[i])));
    }
}

// silu(gate) * x of `count` numbers.
template <typename T>
void silu_mul_row(const T* gate, const T* x, T* out, int64_t count) {
    int64_t i = 0;
#ifdef __AVX512F__
    for (; i + LANES <= count; i += LANES)
        store_lanes(out + i, _mm512_mul_ps(silu(load_lanes(gate + i)), load_lanes(x + i)));
#endif
    for (; i < count; ++i) store(out[i], silu(load(gate[i])) * load(x[i]));
}

// The norm of a row times silu of its `gate`.
template <typename T>
void gated_norm_row(const T* x, const T* gate, const T* weight, T* out, int64_t width,
                    float epsilon) {
    norm_row(x, weight, out, width, epsilon);
    silu_mul_row(gate, out, out, width);
}

// `once`: nothing is rounded but the result.
template <typename T>
void gated_rms_norm(const T* x, const T* gate, const T* weight, T* out, int64_t rows,
                    int64_t width, float epsilon, int once, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SERIAL)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * width;
        if (!once) {
            gated_norm_row(x + at, gate + at, weight, out + at, width, epsilon);
            continue;
        }
        const float scale = by_length(x + at, width, epsilon);
        for (int64_t i = 0; i < width; ++i)
            store(out[at + i],
                  load(x[at + i]) * scale * load(weight[i]) * silu(load(gate[at + i])));
    }
}

template <typename T>
void add_rms_norm(const T* x, const T* more, const T* weight, T* total, T* out, int64_t rows,
                  int64_t width, float epsilon, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SERIAL)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * width;
        for (int64_t i = at; i < at + width; ++i) store(total[i], load(x[i]) + load(more[i]));
        norm_row(total + at, weight, out + at, width, epsilon);
    }
}

// Adds numbers in place.
template <typename T>
void add_rows(T* to, const T* more, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) if (count > SERIAL)
    for (int64_t i = 0; i < count; ++i) store(to[i], load(to[i]) + load(more[i]));
}

// silu(gate) * up of each row [gate | up], both of `width`.
template <typename T>
void silu_mul(const T* both, T* out, int64_t rows, int64_t width, int threads) {
    constexpr int64_t PART = 1024;
#pragma omp parallel for num_threads(threads) collapse(2) if (rows * width > SERIAL)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t start = 0; start < width; start += PART) {
            const T* gate = both + row * 2 * width + start;
            silu_mul_row(gate, gate + width, out + row * width + start,
                         std::min(PART, width - start));
        }
}

// Rotary positions: the halves of the first `width` numbers of each head against each other; heads
// are `between` apart.
template <typename T>
void rotate_heads(T* heads, const T* cos, const T* sin, int64_t count, int64_t between,
                  int64_t width) {
    const int64_t half = width / 2;
    for (int64_t head = 0; head < count; ++head) {
        T* at = heads + head * between;
        for (int64_t i = 0; i < half; ++i) {
            const float a = load(at[i]), b = load(at[i + half]);
            store(at[i], a * load(cos[i]) - b * load(sin[i]));
            store(at[i + half], b * load(cos[i + half]) + a * load(sin[i + half]));
        }
    }
}

// The strides are between tokens; `cos` and `sin` are [tokens, width].
template <typename T>
void rotate(T* query, T* key, const T* cos, const T* sin, int64_t tokens, int64_t query_heads,
            int64_t key_heads, int64_t width, int64_t query_stride, int64_t query_between,
            int64_t key_stride, int64_t key_between, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * query_heads * width > SERIAL)
    for (int64_t token = 0; token < tokens; ++token) {
        const T* c = cos + token * width;
        const T* s = sin + token * width;
        rotate_heads(query + token * query_stride, c, s, query_heads, query_between, width);
        rotate_heads(key + token * key_stride, c, s, key_heads, key_between, width);
    }
}

// Makes the elements of a row -inf that have no bit in `allowed`, the lowest bit of a word first.
template <typename T>
void refuse(T* row, const uint32_t* allowed, int64_t width) {
    T lowest;
    store(lowest, -std::numeric_limits<float>::infinity());
    for (int64_t first = 0; first < width; first += 32) {
        const uint32_t word = allowed[first / 32];
        if (word == 0xffffffffu) continue;
        T* x = row + first;
        const int64_t count = std::min<int64_t>(32, width - first);
        for (int64_t i = 0; i < count; ++i) x[i] = (word >> i) & 1u ? x[i] : lowest;
    }
}

// A number that orders like the float whose bits these are; NaN is beyond the infinities.
template <typename I>
inline I ordered(I bits) {
    return bits ^ ((bits >> (8 * sizeof(I) - 1)) & std::numeric_limits<I>::max());
}

// The index of the first of a row's largest elements, or -1 if the row holds NaN or +inf, or is all
// -inf.
template <typename T>
int64_t first_best(const T* row, int64_t width) {
    constexpr int64_t PART = 1024;
    using I = std::conditional_t<sizeof(T) == 2, int16_t, int32_t>;
    constexpr I LARGEST = std::numeric_limits<I>::max();
    T infinity;
    store(infinity, std::numeric_limits<float>::infinity());
    I infinite;
    std::memcpy(&infinite, &infinity, sizeof infinite);
    I top = std::numeric_limits<I>::min(), magnitude = 0;
    int64_t at = 0;  // where the part begins that has the best
    for (int64_t start = 0; start < width; start += PART) {
        const int64_t stop = std::min(width, start + PART);
        I best = std::numeric_limits<I>::min();
        for (int64_t i = start; i < stop; ++i) {
            I bits;
            std::memcpy(&bits, row + i, sizeof bits);
            const I order = ordered(bits), size = bits & LARGEST;
            best = order > best ? order : best;
            magnitude = size > magnitude ? size : magnitude;
        }
        // Zeros are equal, whatever their sign.
        if (best > top && !(best == 0 && top == -1)) at = start;
        top = best > top ? best : top;
    }
    const I bits = ordered(top);  // `ordered` is its own inverse
    // A magnitude beyond infinity's is NaN; infinity itself may be a banned token's -inf.
    if (magnitude > infinite || (bits & LARGEST) == infinite) return -1;
    T value;
    std::memcpy(&value, &bits, sizeof value);
    while (load(row[at]) != load(value)) ++at;
    return at;
}

}  // namespace
