// Attention token by token: each query goes over its keys by itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "scalars.h"
#include "wide_attention.h"

namespace {

constexpr int64_t MAX_DIM = 576;  // largest width of a head

// How queries score keys, and which they see. 0 and null stand for what there is not.
struct Scoring {
    int64_t window, chunk;
    float scale, softcap;
    const float* sinks;  // of each query head

    // The first position that a query at `position` sees.
    int64_t first(int64_t position) const {
        const int64_t near = window ? std::max<int64_t>(0, position - window + 1) : 0;
        return chunk ? std::max(near, position - position % chunk) : near;
    }
};

// Widths of the heads. The values of a layer may be the first numbers of its keys: then they lie
// there, `value_row` apart, and are not stored again.
struct Widths {
    int64_t key, value, value_row;
    bool values_in_keys;

    Widths(int64_t key, int64_t value, bool values_in_keys)
        : key(key), value(value), value_row(values_in_keys ? key : value),
          values_in_keys(values_in_keys) {}
};

inline bool attends(int64_t key_dim, int64_t value_dim) {
    return key_dim <= MAX_DIM && value_dim <= MAX_DIM;
}

inline const float* widen(const float* from, float*, int64_t) { return from; }

inline const float* widen(const bfloat16* from, float* scratch, int64_t size) {
    for (int64_t i = 0; i < size; ++i) scratch[i] = load(from[i]);
    return scratch;
}

// Attention of up to TOGETHER query heads of one token that share a key head, over positions
// [first, last]. `sinks` are those of these heads. DIM is the heads' width where it is known when
// compiling, 0 where it is not.
template <typename T, int DIM>
void attend_group(const T* query, const T* keys, const T* values, T* out, int64_t group,
                  Widths widths, int64_t first, int64_t last, float scale, float softcap,
                  const float* sinks) {
    constexpr float NOTHING = -std::numeric_limits<float>::infinity();
    constexpr int64_t WIDEST = DIM ? DIM : MAX_DIM;
    const int64_t dim = DIM ? DIM : widths.key, width = DIM ? DIM : widths.value;
    const int64_t row = DIM ? DIM : widths.value_row;
    float queries[TOGETHER * WIDEST], sums[TOGETHER * WIDEST];
    float largest[TOGETHER], weights[TOGETHER], scores[BLOCK];
    float scratch[BLOCK * WIDEST], key_scratch[BLOCK * WIDEST];
    for (int64_t i = 0; i < group * dim; ++i) queries[i] = load(query[i]) * scale;
    for (int64_t i = 0; i < group * width; ++i) sums[i] = 0;
    for (int64_t g = 0; g < group; ++g) {
        largest[g] = sinks ? sinks[g] : NOTHING;
        weights[g] = sinks ? 1 : 0;
    }
    for (int64_t start = first; start <= last; start += BLOCK) {
        const int64_t count = std::min(BLOCK, last + 1 - start);
        const float* k = widen(keys + start * dim, key_scratch, count * dim);
        const bool inside = !DIM && widths.values_in_keys;
        const float* v = inside ? k : widen(values + start * row, scratch, count * row);
        for (int64_t g = 0; g < group; ++g) {
            const float* q = queries + g * dim;
            float top = softcap ? NOTHING : largest[g];
            for (int64_t j = 0; j < count; ++j) {
                float dot = 0;
                for (int64_t i = 0; i < dim; ++i) dot += q[i] * k[j * dim + i];
                scores[j] = dot;
                top = dot > top || dot != dot ? dot : top;
            }
            if (softcap) {
                for (int64_t j = 0; j < count; ++j) scores[j] = capped(scores[j], softcap);
                top = std::max(largest[g], capped(top, softcap));
            }
            float* sum = sums + g * width;
            const float shrink = exponential(largest[g] - top);
            float weight = weights[g] * shrink;
            for (int64_t j = 0; j < count; ++j) {
                scores[j] = exponential(scores[j] - top);
                weight += scores[j];
            }
            float acc[WIDEST];
            for (int64_t i = 0; i < width; ++i) acc[i] = sum[i] * shrink;
            for (int64_t j = 0; j < count; ++j)
                for (int64_t i = 0; i < width; ++i) acc[i] += scores[j] * v[j * row + i];
            for (int64_t i = 0; i < width; ++i) sum[i] = acc[i];
            largest[g] = top;
            weights[g] = weight;
        }
    }
    for (int64_t g = 0; g < group; ++g) {
        const float scale_out = 1.0f / weights[g];
        for (int64_t i = 0; i < width; ++i)
            store(out[g * width + i], sums[g * width + i] * scale_out);
    }
}

// `attend_group` in the way that is fastest for heads of this width on this CPU. `next` are the keys
// that will be scored after these, null if none will.
template <typename T, int DIM>
void attend_heads(const T* query, const T* keys, const T* values, T* out, int64_t group,
                  Widths widths, int64_t first, int64_t last, float scale, float softcap,
                  const float* sinks, [[maybe_unused]] const T* next) {
#ifdef __AVX512F__
    if constexpr (DIM != 0)
        attend_group_wide<T, DIM>(query, keys, values, out, group, first, last, scale, softcap,
                                  sinks, next);
    else
#endif
        attend_group<T, DIM>(query, keys, values, out, group, widths, first, last, scale, softcap,
                             sinks);
}

// A layer's keys or values in a KV row: [heads, capacity, dim], after `before` numbers per token.
template <typename T>
inline T* part_of(int64_t address, int64_t capacity, int64_t before) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address)) + before * capacity;
}

// In how many parts the query heads of a key head are attended: no part has more than `most`, and
// there are enough for all threads where `others`, parts of other heads and tokens, are few.
inline int64_t parts_of_group(int64_t group, int64_t most, int64_t others, int threads) {
    const int64_t idle = std::max<int64_t>(1, threads / std::max<int64_t>(1, others));
    return std::min(group, std::max((group + most - 1) / most, idle));
}

// Stores keys and values, then attends. `places` holds (address of the KV row, its capacity,
// position) for each token. Returns 0 when done; 1, with nothing written, if a position is beyond
// its row, or if `attends` is false.
template <typename T>
int attend(const T* query, const T* key, const T* value, T* out, const int64_t* places,
           int64_t tokens, int64_t keys_before, int64_t values_before, int64_t key_heads,
           int64_t group, Widths widths, int64_t query_stride, int64_t key_stride,
           int64_t value_stride, Scoring scoring, int threads) {
    const int64_t dim = widths.key, width = widths.value;
    if (!attends(dim, width)) return 1;
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t* place = places + 3 * token;
        if (place[2] < 0 || place[2] >= place[1]) return 1;
    }
    const int64_t parts = parts_of_group(group, TOGETHER, tokens * key_heads, threads);
    const int64_t together = (group + parts - 1) / parts;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t token = 0; token < tokens; ++token) {
            const int64_t* place = places + 3 * token;
            T* keys = part_of<T>(place[0], place[1], keys_before);
            T* values = part_of<T>(place[0], place[1], values_before);
            for (int64_t h = 0; h < key_heads; ++h) {
                const int64_t to = h * place[1] + place[2];
                std::memcpy(keys + to * dim, key + token * key_stride + h * dim, dim * sizeof(T));
                if (!widths.values_in_keys)
                    std::memcpy(values + to * width, value + token * value_stride + h * width,
                                width * sizeof(T));
            }
        }
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t part = 0; part < key_heads * parts; ++part) {
                const int64_t* place = places + 3 * token;
                const int64_t h = part / parts, begin = part % parts * together;
                const int64_t count = std::min(together, group - begin);
                const int64_t last = place[2], first = scoring.first(last);
                const int64_t head = h * group + begin;
                const T* q = query + token * query_stride + head * dim;
                T* to = out + (token * key_heads * group + head) * width;
                const T* k = part_of<T>(place[0], place[1], keys_before) + h * place[1] * dim;
                const T* v = part_of<T>(place[0], place[1], values_before) +
                             h * place[1] * widths.value_row;
                const T* next = h + 1 < key_heads ? k + place[1] * dim : nullptr;
                if (!next && token + 1 < tokens)
                    next = part_of<T>(place[3], place[4], keys_before);
                const int64_t same = dim == width && !widths.values_in_keys ? dim : 0;
                auto* attend_one = same == 64    ? attend_heads<T, 64>
                                   : same == 96  ? attend_heads<T, 96>
                                   : same == 128 ? attend_heads<T, 128>
                                   : same == 256 ? attend_heads<T, 256>
                                                 : attend_heads<T, 0>;
                if (count > 0)
                    attend_one(q, k, v, to, count, widths, first, last, scoring.scale,
                               scoring.softcap, scoring.sinks ? scoring.sinks + head : nullptr,
                               next);
            }
    }
    return 0;
}

}  // namespace
