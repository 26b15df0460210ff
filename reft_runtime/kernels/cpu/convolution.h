// Causal convolutions, a channel each, that go on from the newest inputs of a sequence.
#pragma once

#include <algorithm>
#include <cstdint>

#include "scalars.h"

namespace {

constexpr int64_t CHANNELS = 512;  // channels that a thread takes at a time
constexpr int64_t MAX_TAPS = 8;    // most taps of a convolution

// Stores sums, and instead silu of the rounded sums if they are `activated`.
template <typename T>
inline void store_activated(T* __restrict to, const float* __restrict sums, int64_t count,
                            bool activated) {
    if (!activated) {
        for (int64_t i = 0; i < count; ++i) store(to[i], sums[i]);
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        T rounded;
        store(rounded, sums[i]);
        store(to[i], silu(load(rounded)));
    }
}

// Convolutions of one sequence's tokens over `channels` <= CHANNELS channels. `from` and `to` point
// to the first token's, and tokens are apart by the strides. `weight` is [channels, taps], `bias`
// [channels] or null. `held` [channels, kept] are the newest inputs before the tokens and then
// those up to the last one; taps - 1 <= kept, taps <= MAX_TAPS.
template <typename T>
struct Convolution {
    const T* weight;
    const T* bias;
    int64_t taps, kept;
    bool silu;

    // One token of each channel; TAPS is the number of taps, and of inputs kept, where it is known
    // when compiling, else 0. No two of the arrays overlap.
    template <int TAPS>
    void one(const T* __restrict from, T* __restrict held, T* __restrict to,
             int64_t channels) const {
        const int64_t n = TAPS ? TAPS : taps, k = TAPS ? TAPS : kept;
        const T* __restrict weights = weight;
        float sums[CHANNELS];
        for (int64_t c = 0; c < channels; ++c) {
            T* own = held + c * k;
            T newest[MAX_TAPS];
            for (int64_t i = 0; i + 1 < n; ++i) newest[i] = own[k - n + 1 + i];
            newest[n - 1] = from[c];
            float sum = 0;
            for (int64_t i = 0; i < n; ++i) sum += load(newest[i]) * load(weights[c * n + i]);
            for (int64_t i = 0; i + n < k; ++i) own[i] = own[i + 1];
            for (int64_t i = std::max<int64_t>(0, n - k); i < n; ++i) own[k - n + i] = newest[i];
            sums[c] = sum;
        }
        for (int64_t c = 0; bias && c < channels; ++c) sums[c] += load(bias[c]);
        store_activated(to, sums, channels, silu);
    }

    // Several tokens; TAPS is the number of taps where it is known when compiling, else 0.
    template <int TAPS>
    void several(const T* from, int64_t from_stride, T* held, T* to, int64_t to_stride,
                 int64_t tokens, int64_t channels) const {
        const int64_t n = TAPS ? TAPS : taps;
        // By tap, so that a loop over channels finds numbers side by side. The inputs of the last
        // `n` tokens are a ring: that of token t lies at (t + n) % n.
        float weights[MAX_TAPS][CHANNELS], inputs[MAX_TAPS][CHANNELS], added[CHANNELS];
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t i = 0; i < n; ++i) weights[i][c] = load(weight[c * n + i]);
            for (int64_t i = 0; i + 1 < n; ++i)
                inputs[i + 1][c] = load(held[c * kept + kept - n + 1 + i]);
            added[c] = bias ? load(bias[c]) : 0.0f;
        }
        for (int64_t token = 0; token < tokens; ++token) {
            const T* now = from + token * from_stride;
            T* out = to + token * to_stride;
            const float* seen[MAX_TAPS];
            for (int64_t i = 0; i < n; ++i) seen[i] = inputs[(token + 1 + i) % n];
            float* newest = inputs[token % n];
            float sums[CHANNELS];
            for (int64_t c = 0; c < channels; ++c) newest[c] = load(now[c]);
            for (int64_t c = 0; c < channels; ++c) {
                float sum = added[c];
                for (int64_t i = 0; i < n; ++i) sum += weights[i][c] * seen[i][c];
                sums[c] = sum;
            }
            store_activated(out, sums, channels, silu);
        }
        const int64_t stay = std::max<int64_t>(0, kept - tokens);
        for (int64_t c = 0; c < channels; ++c) {
            T* own = held + c * kept;
            for (int64_t i = 0; i < stay; ++i) own[i] = own[i + kept - stay];
            for (int64_t i = stay; i < kept; ++i)
                own[i] = from[(tokens - kept + i) * from_stride + c];
        }
    }

    void run(const T* from, int64_t from_stride, T* held, T* to, int64_t to_stride,
             int64_t tokens, int64_t channels) const {
        if (tokens > 1 && taps == 4)
            several<4>(from, from_stride, held, to, to_stride, tokens, channels);
        else if (tokens > 1)
            several<0>(from, from_stride, held, to, to_stride, tokens, channels);
        else if (taps == 4 && kept == 4)
            one<4>(from, held, to, channels);
        else
            one<0>(from, held, to, channels);
    }

    // The same convolutions from channel `first` on.
    Convolution from_channel(int64_t first) const {
        return {weight + first * taps, bias ? bias + first : nullptr, taps, kept, silu};
    }
};

// Convolutions of `tokens` tokens of each of `count` sequences: `inputs` [count * tokens, channels],
// rows `stride` apart, to `out` [count * tokens, channels]. `state` is [count, channels, kept].
template <typename T>
void convolve(const T* inputs, const Convolution<T>& convolution, T* state, T* out, int64_t count,
              int64_t tokens, int64_t channels, int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads) collapse(2) if (count * tokens * channels > SERIAL)
    for (int64_t sequence = 0; sequence < count; ++sequence)
        for (int64_t start = 0; start < channels; start += CHANNELS) {
            const int64_t first = sequence * tokens;
            convolution.from_channel(start).run(
                inputs + first * stride + start, stride,
                state + (sequence * channels + start) * convolution.kept,
                out + first * channels + start, channels, tokens,
                std::min(CHANNELS, channels - start));
        }
}

}  // namespace
