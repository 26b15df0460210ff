// Token mixing by recurrent states: the gated delta rule.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "scalars.h"

namespace {

constexpr int64_t COLUMNS = 32;    // columns of a state whose sums stay in registers
#ifdef __AVX512F__
constexpr int64_t WIDE = 128;      // columns of one token's state, whose rows are read as they lie
#else
constexpr int64_t WIDE = COLUMNS;
#endif
constexpr int64_t AT_ONCE = 16;    // tokens that go over some columns while these are in the cache
constexpr int64_t MAX_KEY = 256;   // largest width of a key head
constexpr int64_t MAX_VALUE = 256; // largest width of a value head whose norm is fused

// One token's change of some columns of a head's state [key_dim, value_dim]:
//     state *= decay;  change = beta * (value - key . state);  state += key change^T
// and its output, query . state. `both` is query . key. The sums over the old state are all that
// is needed, so the state is read once more only to be written. WIDTH is the number of columns
// where it is known when compiling, 0 where it is not.
template <int WIDTH>
inline void delta_columns(float* state, int64_t stride, const float* query, const float* key,
                          const float* value, float* out, int64_t key_dim, int64_t width,
                          float decay, float beta, float both) {
    if (WIDTH) width = WIDTH;
    float by_key[WIDTH ? WIDTH : COLUMNS] = {}, by_query[WIDTH ? WIDTH : COLUMNS] = {};
    for (int64_t row = 0; row < key_dim; ++row) {
        const float* at = state + row * stride;
        for (int64_t i = 0; i < width; ++i) {
            by_key[i] += key[row] * at[i];
            by_query[i] += query[row] * at[i];
        }
    }
    for (int64_t i = 0; i < width; ++i) {
        const float change = (value[i] - decay * by_key[i]) * beta;
        out[i] = decay * by_query[i] + both * change;
        by_key[i] = change;
    }
    for (int64_t row = 0; row < key_dim; ++row) {
        float* at = state + row * stride;
        for (int64_t i = 0; i < width; ++i) at[i] = decay * at[i] + key[row] * by_key[i];
    }
}

// A head in float32, divided by its length if `normal`, times `scale`.
template <typename T>
inline void widen_head(const T* from, float* to, int64_t dim, bool normal, float scale) {
    float sum = 0;
    for (int64_t i = 0; i < dim; ++i) {
        to[i] = load(from[i]);
        sum += to[i] * to[i];
    }
    if (normal) scale /= std::sqrt(sum + 1e-6f);
    for (int64_t i = 0; i < dim; ++i) to[i] *= scale;
}

// By how much a token shrinks the state, and how much of the change it makes.
struct DeltaGates {
    float decay, beta;
};

// The gated delta rule of one head over a sequence's tokens: query, key, value and `out` point to
// the first token's, and tokens are apart by the strides. `state` [key_dim, value_dim] changes in
// place. `gates(token)` gives decay and beta; `after(first, n)` is called when the outputs of tokens
// [first, first + n) are there.
template <typename T, typename Gates, typename After>
inline void delta_head(const T* query, int64_t query_stride, const T* key, int64_t key_stride,
                       const T* value, int64_t value_stride, float* state, T* out,
                       int64_t out_stride, int64_t tokens, int64_t key_dim, int64_t value_dim,
                       bool normal, Gates gates, After after) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(key_dim));
    float queries[AT_ONCE * MAX_KEY], keys[AT_ONCE * MAX_KEY];
    float both[AT_ONCE];
    DeltaGates gate[AT_ONCE];
    for (int64_t start = 0; start < tokens; start += AT_ONCE) {
        const int64_t n = std::min(AT_ONCE, tokens - start);
        for (int64_t t = 0; t < n; ++t) {
            float *q = queries + t * key_dim, *k = keys + t * key_dim;
            widen_head(query + (start + t) * query_stride, q, key_dim, normal, scale);
            widen_head(key + (start + t) * key_stride, k, key_dim, normal, 1.0f);
            both[t] = 0;
            for (int64_t i = 0; i < key_dim; ++i) both[t] += q[i] * k[i];
            gate[t] = gates(start + t);
        }
        const bool wide = n == 1 && value_dim % WIDE == 0;
        const int64_t columns = wide ? WIDE : COLUMNS;
        for (int64_t column = 0; column < value_dim; column += columns) {
            const int64_t width = std::min(columns, value_dim - column);
            auto* change = wide               ? delta_columns<WIDE>
                           : width == COLUMNS ? delta_columns<COLUMNS>
                                              : delta_columns<0>;
            for (int64_t t = 0; t < n; ++t) {
                float values[WIDE], made[WIDE];
                const T* from = value + (start + t) * value_stride + column;
                for (int64_t i = 0; i < width; ++i) values[i] = load(from[i]);
                change(state + column, value_dim, queries + t * key_dim, keys + t * key_dim, values,
                       made, key_dim, width, gate[t].decay, gate[t].beta, both[t]);
                T* to = out + (start + t) * out_stride + column;
                for (int64_t i = 0; i < width; ++i) store(to[i], made[i]);
            }
        }
        after(start, n);
    }
}

// The gated delta rule over `tokens` tokens of each of `count` sequences. Query and key heads lie
// [count * tokens, key_heads, key_dim], values and `out` [count * tokens, value_heads, value_dim];
// the strides are between tokens. `gate` (the logarithm of the decay) and `beta` are
// [count * tokens, value_heads]. `state` [count, value_heads, key_dim, value_dim] changes in place.
template <typename T>
void delta_rule(const T* query, const T* key, const T* value, const float* gate, const float* beta,
                float* state, T* out, int64_t count, int64_t tokens, int64_t key_heads,
                int64_t value_heads, int64_t key_dim, int64_t value_dim, int64_t query_stride,
                int64_t key_stride, int64_t value_stride, int normal, int threads) {
    const int64_t group = value_heads / key_heads, width = value_heads * value_dim;
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t sequence = 0; sequence < count; ++sequence)
        for (int64_t head = 0; head < value_heads; ++head) {
            const int64_t first = sequence * tokens, from = head / group * key_dim;
            const float* log_decay = gate + first * value_heads + head;
            const float* own_beta = beta + first * value_heads + head;
            delta_head(
                query + first * query_stride + from, query_stride,
                key + first * key_stride + from, key_stride,
                value + first * value_stride + head * value_dim, value_stride,
                state + (sequence * value_heads + head) * key_dim * value_dim,
                out + first * width + head * value_dim, width, tokens, key_dim, value_dim, normal,
                [=](int64_t t) {
                    return DeltaGates{std::exp(log_decay[t * value_heads]),
                                      own_beta[t * value_heads]};
                },
                [](int64_t, int64_t) {});
        }
}

}  // namespace
