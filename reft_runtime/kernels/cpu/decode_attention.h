// Attention token by token: each query goes over its keys by itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "scalars.h"

namespace {

constexpr int64_t BLOCK = 64;      // positions whose scores are held at once
constexpr int64_t MAX_DIM = 256;   // largest width of a head
constexpr int64_t MAX_GROUP = 64;  // most query heads that share a key head

inline bool attends(int64_t dim, int64_t group) { return dim <= MAX_DIM && group <= MAX_GROUP; }

inline const float* widen(const float* from, float*, int64_t) { return from; }

inline const float* widen(const bfloat16* from, float* scratch, int64_t size) {
    for (int64_t i = 0; i < size; ++i) scratch[i] = load(from[i]);
    return scratch;
}

// Attention of the query heads of one token that share a key head, over positions [first, last].
// DIM is the heads' width where it is known when compiling, 0 where it is not.
template <typename T, int DIM>
void attend_group(const T* query, const T* keys, const T* values, T* out, int64_t group,
                  int64_t dim, int64_t first, int64_t last, float scale) {
    if (DIM) dim = DIM;
    float queries[MAX_GROUP * (DIM ? DIM : MAX_DIM)], sums[MAX_GROUP * (DIM ? DIM : MAX_DIM)];
    float largest[MAX_GROUP], weights[MAX_GROUP], scores[BLOCK];
    float scratch[BLOCK * (DIM ? DIM : MAX_DIM)];
    float key_scratch[BLOCK * (DIM ? DIM : MAX_DIM)];
    for (int64_t i = 0; i < group * dim; ++i) queries[i] = load(query[i]) * scale, sums[i] = 0;
    for (int64_t g = 0; g < group; ++g) {
        largest[g] = -std::numeric_limits<float>::infinity();
        weights[g] = 0;
    }
    for (int64_t start = first; start <= last; start += BLOCK) {
        const int64_t count = std::min(BLOCK, last + 1 - start);
        const float* k = widen(keys + start * dim, key_scratch, count * dim);
        const float* v = widen(values + start * dim, scratch, count * dim);
        for (int64_t g = 0; g < group; ++g) {
            const float* q = queries + g * dim;
            float top = largest[g];
            for (int64_t j = 0; j < count; ++j) {
                float dot = 0;
                for (int64_t i = 0; i < dim; ++i) dot += q[i] * k[j * dim + i];
                scores[j] = dot;
                top = dot > top || dot != dot ? dot : top;
            }
            float* sum = sums + g * dim;
            const float shrink = exponential(largest[g] - top);
            float weight = weights[g] * shrink;
            for (int64_t j = 0; j < count; ++j) {
                scores[j] = exponential(scores[j] - top);
                weight += scores[j];
            }
            float acc[DIM ? DIM : MAX_DIM];
            for (int64_t i = 0; i < dim; ++i) acc[i] = sum[i] * shrink;
            for (int64_t j = 0; j < count; ++j)
                for (int64_t i = 0; i < dim; ++i) acc[i] += scores[j] * v[j * dim + i];
            for (int64_t i = 0; i < dim; ++i) sum[i] = acc[i];
            largest[g] = top;
            weights[g] = weight;
        }
    }
    for (int64_t g = 0; g < group; ++g) {
        const float scale_out = 1.0f / weights[g];
        for (int64_t i = 0; i < dim; ++i) store(out[g * dim + i], sums[g * dim + i] * scale_out);
    }
}

// A layer's keys or values in a KV row: [heads, capacity, dim], after `before` numbers per token.
template <typename T>
inline T* part_of(int64_t address, int64_t capacity, int64_t before) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address)) + before * capacity;
}

// Stores keys and values, then attends. `places` holds (address of the KV row, its capacity,
// position) for each token. Returns 0 when done; 1, with nothing written, if a position is beyond
// its row, or if `attends` is false.
template <typename T>
int attend(const T* query, const T* key, const T* value, T* out, const int64_t* places,
           int64_t tokens, int64_t keys_before, int64_t values_before, int64_t key_heads,
           int64_t group, int64_t dim, int64_t query_stride, int64_t key_stride,
           int64_t value_stride, int64_t window, float scale, int threads) {
    if (!attends(dim, group)) return 1;
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t* place = places + 3 * token;
        if (place[2] < 0 || place[2] >= place[1]) return 1;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t token = 0; token < tokens; ++token) {
            const int64_t* place = places + 3 * token;
            T* keys = part_of<T>(place[0], place[1], keys_before);
            T* values = part_of<T>(place[0], place[1], values_before);
            for (int64_t h = 0; h < key_heads; ++h) {
                const int64_t to = (h * place[1] + place[2]) * dim;
                std::memcpy(keys + to, key + token * key_stride + h * dim, dim * sizeof(T));
                std::memcpy(values + to, value + token * value_stride + h * dim, dim * sizeof(T));
            }
        }
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t h = 0; h < key_heads; ++h) {
                const int64_t* place = places + 3 * token;
                const int64_t last = place[2], head = h * place[1] * dim;
                const int64_t first = window ? std::max<int64_t>(0, last - window + 1) : 0;
                const T* q = query + token * query_stride + h * group * dim;
                T* to = out + (token * key_heads + h) * group * dim;
                const T* k = part_of<T>(place[0], place[1], keys_before) + head;
                const T* v = part_of<T>(place[0], place[1], values_before) + head;
                auto* attend_one = dim == 64    ? attend_group<T, 64>
                                   : dim == 128 ? attend_group<T, 128>
                                                : attend_group<T, 0>;
                attend_one(q, k, v, to, group, dim, first, last, scale);
            }
    }
    return 0;
}

}  // namespace
