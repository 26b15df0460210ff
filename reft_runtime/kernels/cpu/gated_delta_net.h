// All that a gated delta net computes between its two products, in one pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "convolution.h"
#include "delta_rule.h"
#include "rows.h"

namespace {

// The sizes of a net's heads. Its rows hold queries and keys [key_heads, key_dim] each, values and
// gates of the output [value_heads, value_dim] each, then for each value head what beta and the
// decay are made of.
struct DeltaHeads {
    int64_t key_heads, key_dim, value_heads, value_dim;
};

// `decay_rate` and `time_bias` [value_heads], and the weight [value_dim] and epsilon of the norm.
template <typename T>
struct DeltaWeights {
    Convolution<T> convolution;
    const float* decay_rate;
    const float* time_bias;
    const T* norm;
    float epsilon;
};

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// `tokens` rows of each of `count` sequences, `stride` apart, to `out` [count * tokens, value_heads
// * value_dim]. Queries, keys and values are convolved with silu, to `mixed` [count * tokens,
// channels]; `inputs` [count, channels, kept] are the convolution's newest inputs. Then come the
// gated delta rule on `state` [count, value_heads, key_dim, value_dim], with queries and keys of
// length 1, decay exp(-decay_rate * softplus(a + time_bias)) and beta sigmoid(b), and the gated
// norm of each value head. Every result that a model's own code rounds to T is rounded here.
template <typename T>
void gated_delta_net(const T* rows, const DeltaHeads& heads, const DeltaWeights<T>& weights,
                     T* inputs, float* state, T* mixed, T* out, int64_t count, int64_t tokens,
                     int64_t stride, int threads) {
    const int64_t key_dim = heads.key_dim, value_heads = heads.value_heads;
    const int64_t value_dim = heads.value_dim, group = value_heads / heads.key_heads;
    const int64_t keys = heads.key_heads * key_dim, values = value_heads * value_dim;
    const int64_t channels = 2 * keys + values;
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t sequence = 0; sequence < count; ++sequence)
        for (int64_t key_head = 0; key_head < heads.key_heads; ++key_head) {
            const T* from = rows + sequence * tokens * stride;
            T* own = mixed + sequence * tokens * channels;
            const auto convolve_from = [&](int64_t first, int64_t size) {
                for (int64_t stop = first + size; first < stop; first += CHANNELS)
                    weights.convolution.from_channel(first).run(
                        from + first, stride,
                        inputs + (sequence * channels + first) * weights.convolution.kept,
                        own + first, channels, tokens, std::min(CHANNELS, stop - first));
            };
            const int64_t query = key_head * key_dim, key = keys + query;
            convolve_from(query, key_dim);
            convolve_from(key, key_dim);
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
                const int64_t at = head * value_dim, value = 2 * keys + at;
                convolve_from(value, value_dim);
                const T* gate = from + channels + at;
                const T* b = from + channels + values + head;
                const T* a = b + value_heads;
                const float rate = weights.decay_rate[head], bias = weights.time_bias[head];
                T* to = out + sequence * tokens * values + at;
                delta_head(
                    own + query, channels, own + key, channels, own + value, channels,
                    state + (sequence * value_heads + head) * key_dim * value_dim, to, values,
                    tokens, key_dim, value_dim, true,
                    [=](int64_t t) {
                        T beta;
                        store(beta, 1.0f / (1.0f + std::exp(-load(b[t * stride]))));
                        const float time = softplus(load(a[t * stride]) + bias);
                        return DeltaGates{std::exp(-rate * time), load(beta)};
                    },
                    [=, &weights](int64_t first, int64_t n) {
                        for (int64_t t = first; t < first + n; ++t) {
                            T made[MAX_VALUE];
                            std::copy_n(to + t * values, value_dim, made);
                            gated_norm_row(made, gate + t * stride, weights.norm, to + t * values,
                                           value_dim, weights.epsilon);
                        }
                    });
            }
        }
}

}  // namespace
